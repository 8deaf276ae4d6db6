"""A language model on this machine: plain, fused or routed, as transformers runs it.

Samples of one prompt are drawn as one batch, behind one reading of the prompt: all but its last
token is run once, and what the cache holds is repeated for every row. (Composites route a prompt as
a whole, and read it for each row.) A prefix goes on in the same turn: the chat template is written
out up to where the assistant speaks, the prefix is put there as it stands, and the whole is
tokenised at once. (The templates' own `continue_final_message` gives the same text, but loses the
blank line that a step ends with where a template trims messages.)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pluribus.agents._messages import Asked, cut, messages, plain
from pluribus.core import beginning
from pluribus.core.errors import InputError, MissingError
from pluribus.core.optional import optional
from pluribus.core.renamed import cache_name
from pluribus.decode.scaling.interface import Completion, Finish, Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from pluribus.decode.stack import Opened

Chat = Literal["auto", "yes", "no"]


class LocalModel:
    """Draws from a causal language model.

    `chat` puts prompts into the tokenizer's chat template: "auto" does if there is one. Without,
    messages are joined by blank lines. With `log_probs` completions tell the log-probability of
    each token under the model itself, before temperature and top_p.
    """

    continues = True

    def __init__(
        self,
        opened: "Opened",
        *,
        chat: Chat = "auto",
        log_probs: bool = False,
        batch: int = 32,
    ) -> None:
        """Raise MissingError for chat = "yes" without a template, InputError for batch < 1."""
        self.model, self.tokenizer = opened
        template = getattr(self.tokenizer, "chat_template", None)
        if chat == "yes" and not template:
            raise MissingError("the tokenizer has no chat template; use chat='no'")
        if batch < 1:
            raise InputError(f"batch is {batch}; give at least 1 row")
        own = getattr(self.model, "prompts", None)  # a stack's, by role
        self.chat = bool(template) and not own if chat == "auto" else chat == "yes"
        self.log_probs, self.batch = log_probs, batch

    @classmethod
    def open(
        cls, reference: str | Path, device: str = "cpu", dtype: str = "float32", **settings: Any
    ) -> "LocalModel":
        """Open a model folder, stack, composite, BASE+ADAPTER or hub name.

        Raises what `pluribus.decode.stack.open_reference` raises.
        """
        from pluribus.decode.stack import open_reference

        return cls(open_reference(reference, device, dtype), **settings)

    def count(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, prompt: Prompt, prefix: str = "") -> str:
        """Return the text that the model reads. Raises InputError for bad messages."""
        if not self.chat:
            return plain(prompt) + prefix
        said = self.tokenizer.apply_chat_template(
            messages(prompt), add_generation_prompt=True, tokenize=False
        )
        return said + prefix

    def sample(
        self,
        prompt: Prompt,
        n: int = 1,
        *,
        temperature: float = 0.8,
        top_p: float = 1.0,
        max_tokens: int = 2048,
        stop: Sequence[str] = (),
        seed: int = 0,
        prefix: str = "",
    ) -> list[Completion]:
        """Return n continuations; the same seed gives the same ones.

        Where a prefix has filled the context, nothing is written, as at any other limit. Raises
        InputError for a prompt without tokens, or one that leaves no room.
        """
        asked = Asked.of(
            prompt,
            n,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            stop=stop,
            seed=seed,
            prefix=prefix,
        )
        import torch

        from pluribus.decode.write import cuda_devices

        inputs = self._inputs(asked)
        ids = inputs["input_ids"]
        length = ids.shape[1]
        config = getattr(self.model, "config", None)
        room = getattr(config, "max_position_embeddings", None) or 1 << 30
        if length >= room and prefix:
            return [Completion("", 0, "length", prompt_tokens=length) for _ in range(n)]
        if length >= room:
            raise InputError(
                f"prompt and prefix are {length} tokens, but the model takes {room}; give fewer"
            )
        most = min(asked.max_tokens, room - length)
        found: list[Completion] = []
        with torch.inference_mode(), torch.random.fork_rng(devices=cuda_devices(self.model)):
            read = self._read(inputs) if n > 1 else None
            torch.manual_seed(asked.seed)
            while len(found) < n:
                rows = min(self.batch, n - len(found))
                cache = None if read is None else beginning.repeated(read, rows)
                found += self._batch(asked, inputs, cache, most, rows)
        return found

    def _read(self, inputs: dict[str, Any]) -> Any:
        """Return the cache of all but a prompt's last token; None where none can be repeated."""
        ids = inputs["input_ids"]
        if ids.shape[1] < 2 or "member_inputs" in inputs:
            return None
        return beginning.read(self.model, ids[:, :-1])

    def _batch(
        self, asked: Asked, inputs: dict[str, Any], cache: Any, most: int, rows: int
    ) -> list[Completion]:
        hf = optional("transformers", "hf", "writing with a language model")
        from pluribus.decode.write import ends_of

        ends = ends_of(self.model, self.tokenizer)
        drawn = asked.temperature > 0
        settings = hf.GenerationConfig(
            max_new_tokens=most,
            do_sample=drawn,
            temperature=asked.temperature if drawn else None,
            top_p=asked.top_p if drawn else None,
            top_k=0 if drawn else None,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            return_dict_in_generate=True,
            output_logits=self.log_probs,
        )
        length = inputs["input_ids"].shape[1]
        halt = [_Stopped(self.tokenizer, length, asked.stop)] if asked.stop else None
        given = _repeated(inputs, rows)
        if cache is not None:
            given[cache_name(self.model.forward)] = cache
        out = self.model.generate(**given, generation_config=settings, stopping_criteria=halt)
        new = out.sequences[:, length:]
        logits = out.logits if self.log_probs else ()
        return [
            self._completion(asked, row.tolist(), ends, length, [at[i] for at in logits])
            for i, row in enumerate(new)
        ]

    def _completion(
        self,
        asked: Asked,
        ids: list[int],
        ends: Sequence[int],
        read: int,
        logits: Sequence["Tensor"],
    ) -> Completion:
        """Cut a row where it ended: at an end token, or with the token that made a stop text."""
        end = next((at for at, token in enumerate(ids) if token in ends), None)
        kept = ids if end is None else ids[:end]
        text, stopped = cut(self._said(kept), asked.stop)
        finish: Finish = "length" if end is None else "end"
        if stopped is not None:
            finish = "stop"
            kept = kept[: self._first_with(kept, asked.stop)]
        told = None
        count = len(kept) + (finish == "end")  # the end token was written too
        if logits:
            told = tuple(
                float(row.float().log_softmax(-1)[token])
                for row, token in zip(logits[:count], ids[:count], strict=True)
            )
        return Completion(text, count, finish, told, read, stopped)

    def _said(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _first_with(self, ids: Sequence[int], stop: Sequence[str]) -> int:
        """Return the least number of tokens whose text holds a stop text."""
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if cut(self._said(ids[:middle]), stop)[1] is None:
                low = middle + 1
            else:
                high = middle
        return low

    def _inputs(self, asked: Asked) -> dict[str, Any]:
        """Return the inputs of one row; a fused model's members may read prompts of their own."""
        import torch

        from pluribus.decode.fused import Fused

        if isinstance(self.model, Fused) and self.model.prompts:
            inputs = dict(self.model.encode(plain(asked.prompt)))
            return self._with_prefix(inputs, asked.prefix) if asked.prefix else inputs
        text = self.text(asked.prompt, asked.prefix)
        ids = self.tokenizer([text], add_special_tokens=not self.chat, return_tensors="pt")
        rows = ids["input_ids"].long()
        if not rows.shape[1]:
            raise InputError(f"the tokenizer makes no tokens of the prompt {text[:60]!r}")
        rows = rows.to(next(self.model.parameters()).device)
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}

    def _with_prefix(self, inputs: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Put the tokens of a prefix after the prompts of all members."""
        import torch

        more = self.tokenizer([prefix], add_special_tokens=False, return_tensors="pt")
        ids = more["input_ids"].long().to(inputs["input_ids"].device)

        def longer(given: Any) -> dict[str, Any]:
            both = torch.cat((given["input_ids"], ids.to(given["input_ids"].device)), 1)
            return {"input_ids": both, "attention_mask": torch.ones_like(both)}

        told = longer(inputs)
        if own := inputs.get("member_inputs"):
            told["member_inputs"] = {role: longer(given) for role, given in own.items()}
        return told


class _Stopped:
    """Tells `generate` which rows have written a stop text."""

    def __init__(self, tokenizer: Any, start: int, stop: Sequence[str]) -> None:
        self.tokenizer, self.start, self.stop = tokenizer, start, stop

    def __call__(self, ids: "Tensor", scores: Any, **_: Any) -> "Tensor":
        import torch

        written = self.tokenizer.batch_decode(ids[:, self.start :], skip_special_tokens=True)
        done = [cut(text, self.stop)[1] is not None for text in written]
        return torch.tensor(done, device=ids.device)


def _repeated(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return inputs of one row as so many; members' prompts are repeated too."""
    told: dict[str, Any] = {}
    for name, value in inputs.items():
        if name == "member_inputs":
            told[name] = {
                role: {
                    "input_ids": own["input_ids"].repeat(rows, 1),
                    "attention_mask": own["attention_mask"].repeat(rows, 1),
                }
                for role, own in value.items()
            }
        else:
            told[name] = value.repeat(rows, 1)
    return told
