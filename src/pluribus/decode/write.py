"""Write a continuation as it comes: text by piece, tokens and their weights at the end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pluribus.core.errors import InputError
from pluribus.core.optional import optional
from pluribus.decode.stack import Opened


@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt."""

    prompt: str
    text: str
    ids: list[int]
    tokens: list[str]
    weights: Mapping[str, list[float]]  # by role, one a token; empty for a plain model
    ended: bool  # whether it said so itself

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "ended": self.ended,
            "tokens": [
                {
                    "id": number,
                    "token": token,
                    "weights": {role: row[i] for role, row in self.weights.items()},
                }
                for i, (number, token) in enumerate(zip(self.ids, self.tokens, strict=True))
            ],
        }


def write(
    opened: Opened,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Written:
    """Write after a prompt: greedily at temperature 0, else drawn with the seed.

    Raises InputError for a prompt without tokens or too long, a temperature below 0, or a model
    that cannot generate.
    """
    if not temperature >= 0 or temperature == float("inf"):
        raise InputError(f"temperature is {temperature}; give 0 (greedy) or more")
    hf = optional("transformers", "hf", "writing with a language model")
    model, tokenizer = opened
    inputs = _inputs(model, tokenizer, prompt)
    length = inputs["input_ids"].shape[1]
    _check_room(model, length, max_new_tokens)
    streamer = _Streamer(tokenizer, on_text) if on_text is not None else None
    ends = ends_of(model, tokenizer)
    settings = hf.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0 if temperature > 0 else None,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        return_dict_in_generate=True,
    )
    with torch.inference_mode(), torch.random.fork_rng(devices=cuda_devices(model)):
        torch.manual_seed(seed)
        out = model.generate(**inputs, generation_config=settings, streamer=streamer)
    new = out.sequences[0, length:].tolist()
    ended = bool(new) and new[-1] in ends
    ids = new[:-1] if ended else new
    weights = {
        role: [float(value) for value in row[0, : len(ids)]]
        for role, row in getattr(out, "fusion_weights", {}).items()
    }
    text = tokenizer.decode(ids, skip_special_tokens=True)
    tokens = [tokenizer.decode([number]) for number in ids]
    return Written(prompt, text, ids, tokens, weights, ended)


def _inputs(model: Any, tokenizer: Any, prompt: str) -> dict[str, Any]:
    from pluribus.decode.fused import Fused

    if isinstance(model, Fused):
        return model.encode(prompt)
    ids = tokenizer([prompt], return_tensors="pt")["input_ids"].long()
    if not ids.shape[1]:
        raise InputError(f"the tokenizer makes no tokens of the prompt {prompt[:60]!r}")
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


def _check_room(model: Any, length: int, more: int) -> None:
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if room is not None and length + more > room:
        raise InputError(
            f"{length} tokens of a prompt and {more} new ones are more than the {room} that the "
            "model takes; give fewer"
        )


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: the model's, or else the tokenizer's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = tokenizer.eos_token_id if own is None else own
    return list(own) if isinstance(own, list) else [] if own is None else [own]


def cuda_devices(model: Any) -> list[torch.device]:
    """Return the CUDA devices that a model lies on, for forking their chance."""
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


class _Streamer:
    """Hands on the text of new tokens as soon as it cannot change any more."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.told = 0
        self.begun = False

    def put(self, value: torch.Tensor) -> None:
        """Take tokens; the first are the prompt's."""
        if not self.begun:
            self.begun = True
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character whose bytes are still to come
            self._tell(text)

    def end(self) -> None:
        """Tell what is left."""
        self._tell(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _tell(self, text: str) -> None:
        if len(text) > self.told:
            self.on_text(text[self.told :])
            self.told = len(text)
