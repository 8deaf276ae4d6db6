"""From messages or texts to what a model reads.

Messages go through the chat template of the tokenizer. Without one they are written as

    System: ...\n\nUser: ...\nAssistant: ...\nUser: ...\nAssistant:

and the answer also ends before "\nUser:". Members of a fused model that have a prompt of their own
(`prompts` of a stack) read the conversation by it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pluribus.decode._prompts import CHAT, SLOT
from pluribus.serve.errors import wrong

PLAIN_STOP = "\nUser:"
Messages = Sequence[Mapping[str, str]]


class Read(NamedTuple):
    """A prompt as a model reads it."""

    ids: list[int]
    inputs: dict[str, Any]  # of models that read more than ids
    stop: tuple[str, ...]  # texts that end the answer beside those asked for


def plain(messages: Messages) -> str:
    """Return a conversation as plain text, up to where the assistant speaks."""
    names = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
    text = ""
    for message in messages:
        name = names[message["role"]]
        text += f"{name}: {message['content']}" + ("\n\n" if name == "System" else "\n")
    return text + "Assistant:"


def templated(tokenizer: Any, messages: Messages) -> str:
    """Return a conversation by the tokenizer's template. Raises ApiError if it refuses it."""
    told = [
        {"role": "system" if m["role"] == "developer" else m["role"], "content": m["content"]}
        for m in messages
    ]
    try:
        return tokenizer.apply_chat_template(told, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise whatever their authors wrote
        raise wrong(
            f"the chat template of this model refuses these messages: {error}", "messages"
        ) from None


def of_messages(model: Any, tokenizer: Any, messages: Messages, prefix: str = "") -> Read:
    """Return what a model reads of a conversation, and of an answer that begins with `prefix`."""
    stop: tuple[str, ...] = ()
    if getattr(tokenizer, "chat_template", None):
        text = templated(tokenizer, messages) + prefix
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        text, stop = plain(messages) + prefix, (PLAIN_STOP,)
        ids = tokenizer(text)["input_ids"]
    inputs = {}
    if templates := getattr(model, "prompts", None):
        alone = len(messages) == 1 and messages[0]["role"] == "user"
        said = messages[0]["content"] if alone else plain(messages)
        inputs = _own(model, tokenizer, list(ids), templates, messages, said, prefix)
    return Read(list(ids), inputs, stop)


def of_text(model: Any, tokenizer: Any, prompt: str | Sequence[int], prefix: str = "") -> Read:
    """Return what a model reads of a text that goes on with `prefix`, or of ids as they are."""
    templates = getattr(model, "prompts", None)
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt + prefix)["input_ids"])
        inputs = {}
        if templates and prompt:
            said = [{"role": "user", "content": prompt}]
            inputs = _own(model, tokenizer, ids, templates, said, prompt, prefix)
        return Read(ids, inputs, ())
    if templates:
        raise wrong(
            "members of this model read prompts of their own, made of the text; give text, not ids",
            "prompt",
        )
    return Read(list(prompt), {}, ())


def _own(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    templates: Mapping[str, str],
    messages: Messages,
    said: str,
    prefix: str,
) -> dict[str, Any]:
    import torch

    own = {}
    for role, template in templates.items():
        words = model.tokenizers.get(role, tokenizer)
        if template == CHAT:
            text = templated(words, messages) + prefix
            found = words(text, add_special_tokens=False)["input_ids"]
        else:
            found = words(template.replace(SLOT, said) + prefix)["input_ids"]
        if not found:
            raise wrong(f"the tokenizer of {role!r} makes no tokens of its prompt", "prompt")
        row = torch.tensor([list(found)])
        own[role] = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    row = torch.tensor([ids], device=model.device)
    return {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        "member_inputs": own,
    }
