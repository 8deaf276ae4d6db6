"""What takes part in test-time scaling: problems, generators, completions, verifiers, results.

Zhang et al., survey, https://arxiv.org/abs/2503.24235: *what* is scaled (parallel, sequential,
hybrid), *how* (stimulate, verify, search, aggregate), *where* (tasks), *how well* (measures).

A text of a completion never holds the stop text it ended at, nor the prefix it went on from.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from pluribus.core.errors import InputError
from pluribus.core.merger import Fraction, NonNegative, PositiveInt, _checked
from pluribus.decode.scaling.answers import Extract, final

Message = Mapping[str, str]  # {"role": "user", "content": "..."}
Prompt = str | Sequence[Message]
Finish = Literal["stop", "end", "length"]  # a stop text, the model's own end, or max_tokens
Aggregate = Literal["last", "min", "prod"]


@dataclass(frozen=True)
class Completion:
    """One continuation that a generator wrote."""

    text: str
    tokens: int  # new ones: what was written, without prompt and prefix
    finish: Finish = "end"
    log_probs: tuple[float, ...] | None = None  # natural, one a token
    prompt_tokens: int = 0
    stopped_at: str | None = None  # the stop text, where it is known

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; what is absent is left out."""
        told: dict[str, Any] = {"text": self.text, "tokens": self.tokens, "finish": self.finish}
        if self.stopped_at is not None:
            told["stopped_at"] = self.stopped_at
        if self.log_probs is not None:
            told["log_probs"] = list(self.log_probs)
        if self.prompt_tokens:
            told["prompt_tokens"] = self.prompt_tokens
        return told

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "Completion":
        """Return the completion that `to_dict` wrote. Raises InputError for anything else."""
        text, tokens, finish = told.get("text"), told.get("tokens"), told.get("finish")
        if (
            not isinstance(text, str)
            or not isinstance(tokens, int)
            or finish not in ("stop", "end", "length")
        ):
            raise InputError(
                f"expected a completion with text, tokens and finish (stop, end or length), "
                f"not {dict(told)!r}"
            )
        kept = told.get("log_probs")
        return cls(
            text,
            tokens,
            finish,
            None if kept is None else tuple(kept),
            int(told.get("prompt_tokens", 0)),
            told.get("stopped_at"),
        )


@runtime_checkable
class Generator(Protocol):
    """A model that writes: local, behind an endpoint, scripted or replayed.

    A generator that cannot go on from a prefix has an attribute `continues` that is False. One with
    a method `count(text)` tells how many tokens a text has.
    """

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
        """Return n continuations of prompt and prefix.

        `prefix` is what the answer has said already: the model goes on from there, in the same
        turn. Temperature 0 is greedy.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn."""

    temperature: NonNegative = 0.8
    top_p: Fraction = 1.0
    max_tokens: PositiveInt = 2048  # of one completion
    stop: tuple[str, ...] = ()
    seed: int = 42


_checked(Sampling, "sampling")
DRAWN = Sampling()


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question, and what is known of its answer."""

    question: str  # the whole prompt
    answer: str | None = None  # what is right, as `extract` would tell it
    tests: str | None = None  # a program that fails if the code before it is wrong
    id: str = ""
    extract: Extract = field(default=final, repr=False)  # text -> canonical answer or None

    @classmethod
    def of(cls, problem: "str | Problem") -> "Problem":
        """Return a problem; a text is a question."""
        return cls(question=problem) if isinstance(problem, str) else problem

    @property
    def name(self) -> str:
        """What tells it from others: its id, else its question."""
        return self.id or self.question

    def seed(self, given: int) -> int:
        """Return the seed of its samples, so that no two problems are drawn by the same chance.

        Error bars take problems as independent, which one seed for all would not make them.
        """
        return given + zlib.crc32(self.name.encode()) % (1 << 30)

    def find(self, text: str) -> str | None:
        """Return the answer in a text; None if there is none, or `extract` raises.

        Strategies tell of an extractor that raises in their trace.
        """
        try:
            return self.extract(text)
        except Exception:  # whatever a user's function raises
            return None


@runtime_checkable
class Verifier(Protocol):
    """Judges a candidate: one score a step, or one for the whole.

    A verifier that calls a model has attributes `tokens` and `calls`: what it has used so far.
    """

    def score(self, problem: Problem, candidate: list[str]) -> list[float]:
        """Return scores in [0, 1], one a step, or one in all for a verifier of outcomes."""
        ...


@dataclass(frozen=True)
class Candidate:
    """An answer that was considered."""

    text: str
    answer: str | None
    tokens: int  # written for it, appended texts not counted
    finished: bool = True  # whether it ended by itself or at a stop text
    scores: tuple[float, ...] = ()  # by step; empty if nobody judged it
    score: float | None = None  # the aggregate

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "text": self.text,
            "answer": self.answer,
            "tokens": self.tokens,
            "finished": self.finished,
            "scores": list(self.scores),
            "score": self.score,
        }


@dataclass(frozen=True)
class Cost:
    """What a run used. A call is one completion: four samples in one request are four."""

    tokens: int = 0  # written by the generator
    calls: int = 0
    seconds: float = 0.0
    verifier_tokens: int = 0
    verifier_calls: int = 0  # candidates judged
    appended: int = (
        0  # tokens put in by a strategy, as budget forcing does; no generator wrote them
    )

    @property
    def all_tokens(self) -> int:
        """Tokens written by generator and verifier."""
        return self.tokens + self.verifier_tokens

    def flops(self, parameters: int) -> float:
        """Return about how many operations a model of so many parameters needed: 2 a token each."""
        return 2.0 * parameters * self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        from dataclasses import asdict

        return asdict(self)


@dataclass(frozen=True)
class Event:
    """One line of a trace: what happened, and its values."""

    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"kind": self.kind, **self.values}


@dataclass(frozen=True)
class Scaled:
    """The answer of a strategy, what it was chosen from, and what it cost.

    `answer` is None if nothing was written or no candidate has an answer.
    """

    answer: str | None
    chosen: Candidate | None
    candidates: tuple[Candidate, ...]
    cost: Cost
    trace: tuple[Event, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "answer": self.answer,
            "chosen": None if self.chosen is None else self.chosen.to_dict(),
            "candidates": [one.to_dict() for one in self.candidates],
            "cost": self.cost.to_dict(),
            "trace": [event.to_dict() for event in self.trace],
        }


Clock = Callable[[], float]
