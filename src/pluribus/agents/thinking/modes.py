"""Ways to be asked: at once, after thinking, or by a strategy of test-time scaling.

    mode.run(problem, model, budget) -> Attempt(answer, text, tokens)

All modes put the same question, with their own instruction below it. The answer is what follows the
last mark (`Answer:`, `answer is`, `####`, `\\boxed{`). A text without a mark has no answer, but for
the direct mode, where the text is the answer. What stands up to `</think>` is not searched.
Tokens are what the model wrote in truth, so a model that thinks unasked is seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from pluribus.core.errors import InputError
from pluribus.core.merger import NonNegative, PositiveInt, _checked
from pluribus.decode.scaling._prompts import check_fields, fill
from pluribus.decode.scaling.answers import MARK, Extract, boxed
from pluribus.decode.scaling.budget import Budget, Meter
from pluribus.decode.scaling.interface import Generator, Problem, Verifier

DIRECT = "{question}\n\nGive the answer alone, without reasoning, as: Answer: ..."
COT = "{question}\n\nThink step by step first. Then end with one line: Answer: ..."


@dataclass(frozen=True)
class Attempt:
    """What one mode made of one problem."""

    answer: str | None  # None: no answer could be read
    text: str
    tokens: int  # written, a verifier's included

    @property
    def parsed(self) -> bool:
        """Whether there is an answer, right or wrong."""
        return self.answer is not None


@runtime_checkable
class Mode(Protocol):
    """A way to be asked. `most_tokens` bounds what it writes; None is no bound."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of one attempt."""
        ...

    def run(self, problem: Problem, model: Generator, budget: Budget | None = None) -> Attempt:
        """Return an attempt. Raises what the model raises."""
        ...


def marked(text: str) -> str | None:
    """Return what follows the last mark of an answer, on its line; None without a mark."""
    said = text.rpartition("</think>")[2]
    if (found := boxed(said)) is not None:
        return found
    ends = [found.end() for found in MARK.finditer(said)]
    if (at := said.rfind("####")) >= 0:
        ends.append(at + 4)
    if not ends:
        return None
    line = said[max(ends) :].strip().partition("\n")[0]
    return line.strip("*` ") or None  # marks of bold type and code


def choice(choices: Sequence[str]) -> Extract:
    """Return what reads one of some choices, whatever its case: alone, or as the first word.

    `(b) because ...` is the choice B. Raises InputError for fewer than two, or two alike.
    """
    known = {one.strip().lower(): one for one in choices}
    if len(known) < max(2, len(choices)):
        raise InputError(
            f"the choices are {', '.join(choices) or 'none'}; give two or more that differ by "
            "more than case"
        )

    def find(text: str) -> str | None:
        said = text.strip().strip("*_`\"'()[].:$ ").lower()
        if said in known:
            return known[said]
        first = said.split(maxsplit=1)[0].strip("*_`\"'()[].:,;$") if said else ""
        return known.get(first)

    return find


@dataclass(frozen=True, kw_only=True)
class Direct:
    """Asks for the answer alone."""

    template: str = DIRECT
    max_tokens: PositiveInt = 10
    temperature: NonNegative = 0.0
    seed: int = 0
    name: str = "direct"

    def __post_init__(self) -> None:
        """Raise InputError for a template without {question}."""
        check_fields("the template", self.template, ("question",))

    @property
    def most_tokens(self) -> int:
        """The most tokens of one attempt."""
        return self.max_tokens

    def run(self, problem: Problem, model: Generator, budget: Budget | None = None) -> Attempt:
        """See `Mode`."""
        return _asked(self, problem, model, budget, whole=True)


@dataclass(frozen=True, kw_only=True)
class CoT:
    """Asks to think step by step, and to mark the answer."""

    template: str = COT
    max_tokens: PositiveInt = 1024
    temperature: NonNegative = 0.0
    seed: int = 0
    name: str = "cot"

    def __post_init__(self) -> None:
        """Raise InputError for a template without {question}."""
        check_fields("the template", self.template, ("question",))

    @property
    def most_tokens(self) -> int:
        """The most tokens of one attempt."""
        return self.max_tokens

    def run(self, problem: Problem, model: Generator, budget: Budget | None = None) -> Attempt:
        """See `Mode`."""
        return _asked(self, problem, model, budget, whole=False)


_checked(Direct, "direct")
_checked(CoT, "cot")


def try_all(
    mode: Mode, problems: Sequence[Problem], model: Generator, budget: Budget | None = None
) -> list[Attempt]:
    """Return an attempt at each problem.

    `Direct` and `CoT` ask a model that has `sample_many` for all at once, if there is no budget.
    """
    many = getattr(model, "sample_many", None)
    if many is None or budget is not None or not isinstance(mode, Direct | CoT):
        return [mode.run(one, model, budget) for one in problems]
    made = many(
        [fill(mode.template, question=one.question) for one in problems],
        [problem.seed(mode.seed) for problem in problems],
        temperature=mode.temperature,
        max_tokens=mode.max_tokens,
    )
    whole = isinstance(mode, Direct)
    return [
        Attempt(read(problem, one.text, whole=whole), one.text, one.tokens)
        for problem, one in zip(problems, made, strict=True)
    ]


def _asked(
    mode: Direct | CoT, problem: Problem, model: Generator, budget: Budget | None, whole: bool
) -> Attempt:
    made = Meter(model, budget, seed=problem.seed(mode.seed)).sample(
        fill(mode.template, question=problem.question),
        1,
        temperature=mode.temperature,
        max_tokens=mode.max_tokens,
    )
    if not made:
        return Attempt(None, "", 0)
    text = made[0].text
    return Attempt(read(problem, text, whole=whole), text, made[0].tokens)


def read(problem: Problem, text: str, *, whole: bool = False) -> str | None:
    """Return the marked answer as the problem would tell it; `whole`: else what the text says."""
    found = marked(text)
    if found is None and whole:
        found = text.rpartition("</think>")[2]
    return None if found is None else problem.find(found)


@dataclass(frozen=True, kw_only=True)
class ByStrategy:
    """A strategy of test-time scaling over thoughts: votes, searches, revisions."""

    strategy: Any  # see pluribus.decode.scaling
    template: str = COT
    verifier: Verifier | None = None
    most_tokens: int | None = None  # without one, n times max_tokens where it has an n
    name: str = ""

    def __post_init__(self) -> None:
        """Raise InputError for a template without {question}, or what is no strategy."""
        from pluribus.decode.scaling.strategies import FACTS, facts

        check_fields("the template", self.template, ("question",))
        if not hasattr(type(self.strategy), FACTS):
            raise InputError(
                f"{self.strategy!r} is no strategy of test-time scaling; give one such as "
                "SelfConsistency(n=8)"
            )
        known = facts(self.strategy)
        if not self.name:
            object.__setattr__(self, "name", known.name)
        if self.most_tokens is None and known.pooled and known.verifier == "none":
            most = self.strategy.n * self.strategy.sampling.max_tokens
            object.__setattr__(self, "most_tokens", most)

    def run(self, problem: Problem, model: Generator, budget: Budget | None = None) -> Attempt:
        """See `Mode`."""
        asked = replace(
            problem,
            question=fill(self.template, question=problem.question),
            extract=lambda text: read(problem, text),
        )
        done = self.strategy.run(asked, model, self.verifier, budget)
        text = "" if done.chosen is None else done.chosen.text
        return Attempt(done.answer, text, done.cost.all_tokens)
