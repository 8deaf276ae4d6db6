"""A language model on this machine: plain, fused or routed, as transformers runs it.

Samples of one prompt are drawn as one batch, behind one reading of the prompt: all but its last
token is run once, and what the cache holds is repeated for every row. (Composites route a prompt as
a whole, and read it for each row.) `sample_many` puts rows of several prompts into one batch, each
with a stream of chance of its own. A prefix goes on in the same turn: the chat template is written
out up to where the assistant speaks, the prefix is put there as it stands, and the whole is
tokenised at once. (The templates' own `continue_final_message` gives the same text, but loses the
blank line that a step ends with where a template trims messages.)
"""

from collections.abc import Sequence
from itertools import groupby
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
        room = self._room
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

    def sample_many(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        temperature: float = 0.8,
        top_p: float = 1.0,
        max_tokens: int = 2048,
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """Return one continuation of each prompt, `batch` rows at a time.

        What a row is depends on its prompt and its seed, up to rounding, not on the others. A
        prompt that several rows have is read once. Raises InputError as `sample` does, or if there
        are not as many seeds as prompts.
        """
        if len(prompts) != len(seeds):
            raise InputError(f"{len(prompts)} prompts and {len(seeds)} seeds; give a seed for each")
        settings: dict[str, Any] = {
            "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "stop": stop
        }  # fmt: skip
        asked = [
            Asked.of(prompt, 1, **settings, seed=seed, prefix="")
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        if getattr(self.model, "prompts", None):  # members read prompts of their own
            return [self.sample(one.prompt, **one.settings())[0] for one in asked]
        room = self._room
        rows = [self._ids(one) for one in asked]
        longest = max(map(len, rows), default=0)
        if longest >= room:
            raise InputError(f"a prompt is {longest} tokens, but the model takes {room}; give less")
        places = sorted(range(len(rows)), key=lambda i: (len(rows[i]), rows[i]))
        found: dict[int, Completion] = {}
        while places:
            most = min(max_tokens, room - len(rows[places[0]]))
            some = [i for i in places[: self.batch] if len(rows[i]) + most <= room]
            made = self._together([asked[i] for i in some], [rows[i] for i in some], most)
            found |= dict(zip(some, made, strict=True))
            places = places[len(some) :]
        return [found[i] for i in range(len(rows))]

    def _together(
        self, asked: Sequence[Asked], rows: Sequence[Sequence[int]], most: int
    ) -> list[Completion]:
        """Write behind rows of tokens, sorted so that equal ones follow each other."""
        import torch

        device = next(self.model.parameters()).device
        different = [list(key) for key, _ in groupby(rows)]
        counts = torch.tensor([len(list(own)) for _, own in groupby(rows)], device=device)
        with torch.inference_mode():
            opening = beginning.Opening.of(self.model, different, device)
            ids, seen, cache = opening.before(different, device, whole=True)
            done = len(opening.tokens)
            if ids.shape[1] - done > 1:
                cache = beginning.read(self.model, ids[:, done:-1], seen[:, :-1], cache)
            if cache is not None:
                places = torch.arange(len(counts), device=device)
                cache.batch_select_indices(places.repeat_interleave(counts))
            inputs = {
                "input_ids": ids.repeat_interleave(counts, 0),
                "attention_mask": seen.repeat_interleave(counts, 0),
            }
            drawn = asked[0].temperature > 0
            chances = [_Chances(asked)] if drawn else None
            return self._written(asked, inputs, cache, most, list(map(len, rows)), chances)

    @property
    def _room(self) -> int:
        """How many tokens the model takes."""
        config = getattr(self.model, "config", None)
        return getattr(config, "max_position_embeddings", None) or 1 << 30

    def _read(self, inputs: dict[str, Any]) -> Any:
        """Return the cache of all but a prompt's last token; None where none can be repeated."""
        ids = inputs["input_ids"]
        if ids.shape[1] < 2 or "member_inputs" in inputs:
            return None
        return beginning.read(self.model, ids[:, :-1])

    def _batch(
        self, asked: Asked, inputs: dict[str, Any], cache: Any, most: int, rows: int
    ) -> list[Completion]:
        length = inputs["input_ids"].shape[1]
        given = _repeated(inputs, rows)
        return self._written([asked] * rows, given, cache, most, [length] * rows)

    def _written(
        self,
        asked: Sequence[Asked],
        inputs: dict[str, Any],
        cache: Any,
        most: int,
        lengths: Sequence[int],
        chances: Any = None,
    ) -> list[Completion]:
        """Run `generate` on rows that were asked alike; `chances` draws in its place."""
        hf = optional("transformers", "hf", "writing with a language model")
        from pluribus.decode.write import ends_of

        ends = ends_of(self.model, self.tokenizer)
        first = asked[0]
        drawn = first.temperature > 0 and chances is None
        settings = hf.GenerationConfig(
            max_new_tokens=most,
            do_sample=drawn,
            temperature=first.temperature if drawn else None,
            top_p=first.top_p if drawn else None,
            top_k=0 if drawn else None,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            return_dict_in_generate=True,
            output_logits=self.log_probs,
        )
        start = inputs["input_ids"].shape[1]
        given: dict[str, Any] = {"logits_processor": chances} if chances else {}
        if first.stop:
            given["stopping_criteria"] = [_Stopped(self.tokenizer, start, first.stop)]
        if cache is not None:
            given[cache_name(self.model.forward)] = cache
        out = self.model.generate(**inputs, generation_config=settings, **given)
        logits = out.logits if self.log_probs else ()
        return [
            self._completion(asked[i], row.tolist(), ends, lengths[i], [at[i] for at in logits])
            for i, row in enumerate(out.sequences[:, start:])
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
        rows = torch.tensor([self._ids(asked)], device=next(self.model.parameters()).device)
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}

    def _ids(self, asked: Asked) -> list[int]:
        """Return the tokens that are read. Raises InputError if there are none."""
        text = self.text(asked.prompt, asked.prefix)
        ids = self.tokenizer([text], add_special_tokens=not self.chat)["input_ids"][0]
        if not ids:
            raise InputError(f"the tokenizer makes no tokens of the prompt {text[:60]!r}")
        return list(ids)

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


class _Chances:
    """Leaves `generate` one token of each row, drawn by the row's own stream of chance."""

    def __init__(self, asked: Sequence[Asked]) -> None:
        import torch

        self.temperature, self.top_p = asked[0].temperature, asked[0].top_p
        self.streams = [torch.Generator().manual_seed(one.seed) for one in asked]

    def __call__(self, ids: "Tensor", scores: "Tensor") -> "Tensor":
        import torch

        from pluribus.core.chance import drawn

        u = [torch.rand(1, generator=stream, dtype=torch.float64) for stream in self.streams]
        tokens = drawn(scores, torch.cat(u), self.temperature, self.top_p).to(scores.device)
        left = torch.full_like(scores, -torch.inf)
        return left.scatter(1, tokens[:, None], 0.0)


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
