"""A causal language model as a system: it chooses between words, or writes an answer.

    choice(x) = argmax_c  1/|c| sum_j log p(c_j | x, c_<j)       |c|: tokens of choice c

Question and choice are tokenised together, as they would be in a text; what all choices of a
question share is run once, and the rest is appended to its key-value cache. Questions of a batch
are padded on the left, choices on the right. Answers are written greedily.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pluribus.core.beginning import Opening, padded
from pluribus.core.errors import InputError
from pluribus.core.optional import optional
from pluribus.core.renamed import cache_name
from pluribus.core.shapes import Float, Int
from pluribus.core.weights import Weights
from pluribus.tasks.open_model import load
from pluribus.tasks.openers import opener
from pluribus.tasks.systems import Asked, OnStep, Predictions, check_scores, digest_of
from pluribus.tasks.task import sample

BATCH_TOKENS = 4096  # of one forward pass, padding included
LOGITS = 1 << 25  # of one forward pass over choices


class Question(NamedTuple):
    """Tokens that all choices share, and the rest of each."""

    shared: list[int]
    rests: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """A causal language model and its tokenizer; `shots` worked examples precede a question."""

    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    label: str = "model"
    shots: int = 0
    batch_tokens: int = BATCH_TOKENS

    def __post_init__(self) -> None:
        """Raise InputError for a number of shots or tokens that is out of range."""
        if self.shots < 0 or self.batch_tokens < 1:
            raise InputError(
                f"shots is {self.shots} and batch_tokens {self.batch_tokens}; give at least 0 and 1"
            )

    @classmethod
    def open(
        cls,
        what: Any,
        *,
        label: str | None = None,
        shots: int = 0,
        device: str = "cpu",
        dtype: str = "float32",
        batch_tokens: int = BATCH_TOKENS,
    ) -> "CausalLM":
        """Load a model folder, hub reference, base+adapter, composite's folder, or `Weights`.

        Raises MissingError without configuration or tokenizer, MismatchError if the tensors are not
        the architecture's, ExtraError without transformers.
        """
        if (found := opener(what)) is not None:
            model, tokenizer = found.language(what, device)
            name = Path(what).name
        else:
            weights = Weights.open(what)
            model, tokenizer = load(weights, device, dtype)
            name = weights.label
        return cls(
            model=model,
            tokenizer=tokenizer,
            label=label or name,
            shots=shots,
            batch_tokens=batch_tokens,
        )

    @property
    def settings(self) -> Mapping[str, Any]:
        """Shots and element type."""
        return {"shots": self.shots, "dtype": str(next(self.model.parameters()).dtype)[6:]}

    @cached_property
    def _digest(self) -> str:
        return digest_of(self.model.state_dict())

    def digest(self) -> str:
        """Return the digest of the model's weights as they are in memory."""
        return self._digest

    def predict(self, asked: Asked, on_step: OnStep | None) -> Predictions:
        """Choose a class or write an answer for every row.

        Raises NonFiniteError for a model whose scores are NaN, InputError for one that is too
        short for the answers.
        """
        prompt, classes = asked.task.prompt, asked.examples.classes
        if prompt is None:
            raise InputError(
                f"{asked.task.name} has no prompt, so a language model cannot be asked; it is a "
                f"task of family '{asked.task.family}'"
            )
        shots = sample(asked.examples.train, self.shots, asked.seed, "shots")
        if len(shots) < self.shots:
            raise InputError(
                f"{asked.task.name} has {len(shots)} examples to draw {self.shots} shots from"
            )
        before = prompt.before(shots, classes)
        questions = [before + prompt.ask(row) for row in asked.rows]

        def told(done: int) -> None:
            if on_step is not None:
                on_step(asked.task.name, done, len(questions))

        if classes:
            scores, cut = self.choice_scores(questions, prompt.choices(classes), told)
            check_scores(scores, self.label, asked.task.name)
            values: list[Any] = scores.argmax(1).tolist()
        else:
            values, cut = self.write(questions, prompt.max_tokens, prompt.stop, told)
        if not cut:
            return Predictions(values)
        return Predictions(values, (f"{cut} questions were too long and lost their beginning",))

    # -- choosing ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def choice_scores(
        self,
        questions: Sequence[str],
        choices: Sequence[str],
        told: Callable[[int], None] | None = None,
    ) -> tuple[Float[Tensor, "b v"], int]:
        """Return the mean log-likelihood of a token of each choice, and how many were cut."""
        asked = [self._tokens(question, choices) for question in questions]
        room = self._room()
        cut = 0
        for i, (shared, rests) in enumerate(asked):
            if (over := len(shared) + max(map(len, rests)) - room) > 0:
                asked[i] = Question(shared[over:] or shared[-1:], rests)
                cut += 1
        scores = torch.empty(len(asked), len(choices))
        opening = Opening.of(self.model, [q.shared for q in asked], self._device)
        done = 0
        for rows in _batches([len(q.shared) for q in asked], self.batch_tokens):
            scores[rows] = self._score([asked[i] for i in rows], opening)
            done += len(rows)
            if told is not None:
                told(done)
        return scores, cut

    def _tokens(self, question: str, choices: Sequence[str]) -> Question:
        """Tokenise question and choices together and find what all of them share."""
        encoded = self.tokenizer([question, *(question + choice for choice in choices)])
        start, *whole = encoded["input_ids"]
        if not start:
            raise InputError(f"the tokenizer makes no tokens of the question {question[:60]!r}")
        columns = zip(start, *whole, strict=False)
        shared = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))
        if shared == min(map(len, whole)):  # a choice that adds no token, or is another's start
            shared -= 1
        if shared < 1:
            raise InputError(
                f"the choices of {question[-60:]!r} share no token with the question; the "
                "tokenizer must begin them alike"
            )
        return Question(whole[0][:shared], [tokens[shared:] for tokens in whole])

    def _score(self, asked: list[Question], opening: Opening) -> Float[Tensor, "b v"]:
        device = self._device
        ids, seen, cache = opening.before([q.shared for q in asked], device)
        longest = max(len(rest) for q in asked for rest in q.rests)
        out = self._run(ids, seen, use_cache=longest > 1, last=True, cache=cache)
        heads = torch.tensor([[rest[0] for rest in q.rests] for q in asked], device=device)
        totals = _likely(out.logits[:, -1], heads)  # (b, v)
        if longest > 1:
            cache = getattr(out, self._cache, None)
            totals += self._rest(asked, seen, cache, out.logits.shape[-1])
        counts = torch.tensor([[len(rest) for rest in q.rests] for q in asked], device=device)
        return (totals / counts).cpu()

    def _rest(
        self, asked: list[Question], seen: Int[Tensor, "b s"], cache: Any, vocabulary: int
    ) -> Float[Tensor, "b v"]:
        """Return the log-likelihood of every choice's tokens after its first."""
        b, length = seen.shape
        totals = torch.zeros(b, len(asked[0].rests), device=seen.device)
        longest = [max(map(len, rests)) for rests in zip(*(q.rests for q in asked), strict=True)]
        further = [i for i, count in enumerate(longest) if count > 1]
        wide = -(-2 * self.batch_tokens * vocabulary // LOGITS)  # how many tokens' room a row takes
        sizes = [max(length + longest[i] - 1, wide * (longest[i] - 1)) for i in further]
        for batch in _batches(sizes, 2 * self.batch_tokens // b):  # of choices of like length
            chosen = [further[i] for i in batch]
            rests, width = [[q.rests[i] for i in chosen] for q in asked], len(chosen)
            flat = [rest for row in rests for rest in row]  # (b * width) token lists
            ids, own = padded([rest[:-1] for rest in flat], left=False, device=seen.device)
            wanted, _ = padded([rest[1:] for rest in flat], left=False, device=seen.device)
            before = seen.repeat_interleave(width, 0)
            places = before.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)
            if hasattr(cache, "batch_repeat_interleave"):
                copied = copy.deepcopy(cache)
                copied.batch_repeat_interleave(width)
                out = self._run(ids, torch.cat((before, own), 1), places=places, cache=copied)
                logits = out.logits
            else:  # a model that keeps no such cache reads the question once a choice
                shared = [asked[i].shared for i in range(b) for _ in range(width)]
                start, _ = padded(shared, left=True, device=seen.device)
                out = self._run(torch.cat((start, ids), 1), torch.cat((before, own), 1))
                logits = out.logits[:, length:]
            likely = _likely(logits, wanted[..., None])[..., 0]
            totals[:, chosen] = (likely * own).sum(1).view(b, width)
        return totals

    # -- writing -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def write(
        self,
        questions: Sequence[str],
        most: int,
        stop: Sequence[str],
        told: Callable[[int], None] | None = None,
    ) -> tuple[list[str], int]:
        """Return the likeliest continuations, each before its first stop text; and the cuts."""
        hf = optional("transformers", "hf", "writing with a language model")
        room = self._room() - most
        if room < 1:
            raise InputError(
                f"{self.label} has no room for {most} tokens of an answer beside its question: it "
                f"takes {self._room()} (max_position_embeddings); leave such tasks out"
            )
        encoded = self.tokenizer(list(questions))["input_ids"]
        cut = sum(len(tokens) > room for tokens in encoded)
        encoded = [tokens[-room:] for tokens in encoded]
        own: Any = getattr(self.model, "generation_config", None)
        ends = getattr(own, "eos_token_id", None)
        ends = self.tokenizer.eos_token_id if ends is None else ends
        first = ends[0] if isinstance(ends, list) else ends
        settings = hf.GenerationConfig(
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0 if first is None else first,
        )
        answers = [""] * len(encoded)
        opening = Opening.of(self.model, encoded, self._device)
        done = 0
        model: Any = self.model
        for rows in _batches([len(tokens) + most for tokens in encoded], self.batch_tokens):
            ids, seen, cache = opening.before([encoded[i] for i in rows], self._device, whole=True)
            halt = [_Stopped(self.tokenizer, ids.shape[1], stop)] if stop else None
            made = model.generate(
                input_ids=ids,
                attention_mask=seen,
                generation_config=settings,
                stopping_criteria=halt,
                **({} if cache is None else {self._cache: cache}),
            )
            texts = self.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                answers[i] = _before(text, stop)
            done += len(rows)
            if told is not None:
                told(done)
        return answers, cut

    # -- the model ---------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _room(self) -> int:
        """Return how many tokens the model takes."""
        config: Any = getattr(self.model, "config", None)
        return getattr(config, "max_position_embeddings", None) or 1 << 30

    @property
    def _cache(self) -> str:
        return cache_name(self._accepts)

    @cached_property
    def _accepts(self) -> frozenset[str]:
        runs: Any = getattr(self.model, "base", self.model)  # a composite takes what its base does
        return frozenset(inspect.signature(runs.forward).parameters)

    def _run(
        self,
        ids: Int[Tensor, "b s"],
        seen: Int[Tensor, "b a"],
        *,
        places: Int[Tensor, "b s"] | None = None,
        cache: Any = None,
        use_cache: bool = False,
        last: bool = False,
    ) -> Any:
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": seen}
        if "position_ids" in self._accepts:
            own = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            given["position_ids"] = own if places is None else places
        if cache is not None:
            given[self._cache] = cache
        if last and "logits_to_keep" in self._accepts:
            given["logits_to_keep"] = 1
        return self.model(**given, use_cache=use_cache or cache is not None)


class _Stopped:
    """Tells `generate` which rows have written a stop text."""

    def __init__(self, tokenizer: Any, start: int, stop: Sequence[str]) -> None:
        self.tokenizer, self.start, self.stop = tokenizer, start, stop

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        written = self.tokenizer.batch_decode(ids[:, self.start :], skip_special_tokens=True)
        done = [_before(text, self.stop) != text.lstrip("\n ") for text in written]
        return torch.tensor(done, device=ids.device)


def _likely(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return log-likelihoods of some tokens, without an array of those of all."""
    logits = logits.float()
    return logits.gather(-1, wanted) - logits.logsumexp(-1, keepdim=True)


def _before(text: str, stop: Sequence[str]) -> str:
    """Return what precedes the first stop text; space and line breaks at the start don't stop."""
    text = text.lstrip("\n ")
    return text[: min((at for end in stop if (at := text.find(end)) >= 0), default=len(text))]


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield indices in batches of like lengths whose padded size stays within a budget."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        count = max(1, budget // max(lengths[order[0]], 1))
        yield order[:count]
        order = order[count:]
