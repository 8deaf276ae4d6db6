"""What one mode gains over another on the same problems, and at what cost.

Liu et al., ICML 2025, https://arxiv.org/abs/2410.21333, compare accuracies; here, paired, with
d_i, c_i in {0, 1} whether the first and the second mode are right on problem i:

    delta = mean(c - d)                        b = #(c = 1, d = 0)   e = #(c = 0, d = 1)
    p     = min(1, 2 P(X <= min(b, e))),  X ~ Binomial(b + e, 1/2)         exact McNemar
    ci    = paired bootstrap, 2,000 draws, percentiles; for n < 100 Newcombe's paired interval
    U     = value * delta - price * (mean tokens of c - mean tokens of d)

An answer that could not be read is wrong, and counted; `delta_parsed` is over the problems where
both could be read, so that failures of format are told apart from wrong answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pluribus.agents.thinking.intervals import bootstrap, mcnemar, newcombe
from pluribus.agents.thinking.modes import Attempt
from pluribus.core.errors import FormatError, InputError, MismatchError

FEW = 100  # below this many problems the interval is Newcombe's
UNREAD = 0.2  # a larger share of texts without an answer is warned of
UNDECIDED = "undecided"


@dataclass(frozen=True)
class Arm:
    """One mode on a task."""

    mode: str
    n: int
    accuracy: float  # unread answers are wrong
    tokens: float  # mean of a problem
    unparsed: int
    accuracy_parsed: float | None  # among answers that could be read; None without any


@dataclass(frozen=True)
class Pair:
    """What `mode` gains over `over` on the n problems that both were asked."""

    mode: str
    over: str
    n: int
    delta: float
    ci: tuple[float, float]  # 95 %, at this n: not for looking again and again
    p: float
    gains: int
    losses: int
    extra_tokens: float
    net: float  # U, in units of value
    net_ci: tuple[float, float] | None = None  # holds at all times; None if not drawn in sequence
    delta_parsed: float | None = None
    n_parsed: int = 0


@dataclass(frozen=True)
class Effect:
    """What was measured on a task, and the decision. `pairs[0]` is the second mode over the first.

    `decision` is the mode that is proven best, or "undecided"; `chosen` the one to use.
    """

    task: str
    n: int
    value: float
    price: float
    alpha: float
    arms: tuple[Arm, ...]
    pairs: tuple[Pair, ...]
    decision: str
    chosen: str
    notes: tuple[str, ...] = ()
    traits: Mapping[str, bool] = field(default_factory=dict)
    questions: tuple[str, ...] = ()  # some, for finding the task again

    @property
    def delta(self) -> float:
        """Accuracy gained by the second mode over the first."""
        return self.pairs[0].delta

    @property
    def ci(self) -> tuple[float, float]:
        """The 95 % interval of delta."""
        return self.pairs[0].ci

    @property
    def p(self) -> float:
        """Exact McNemar's p of delta."""
        return self.pairs[0].p

    @property
    def cost(self) -> float:
        """Tokens that the second mode writes more than the first, a problem."""
        return self.pairs[0].extra_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        told = asdict(self)
        return {**told, "traits": dict(self.traits)}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "Effect":
        """Return the effect that `to_dict` wrote. Raises FormatError for anything else."""
        try:
            values = dict(told)
            values["arms"] = tuple(Arm(**arm) for arm in values["arms"])
            values["pairs"] = tuple(
                Pair(**{**pair, "ci": tuple(pair["ci"]), "net_ci": _tuple(pair["net_ci"])})
                for pair in values["pairs"]
            )
            values["notes"] = tuple(values["notes"])
            values["questions"] = tuple(values["questions"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"this is no effect as pluribus writes it ({type(error).__name__}: {error}); "
                "measure the task again"
            ) from None


def _tuple(pair: Any) -> Any:
    return None if pair is None else tuple(pair)


def check_prices(value: float, price: float) -> None:
    """Raise InputError for a value or price that is negative, or no number."""
    for name, one in (("value", value), ("price", price)):
        if not 0 <= one < float("inf"):
            raise InputError(
                f"the {name} is {one}; give 0 or more: value is what one right answer is worth, "
                "price what one token costs, in the same unit"
            )
    if value == 0 and price == 0:
        raise InputError("value and price are both 0, so nothing is at stake; give one above 0")


def arm(mode: str, attempts: Sequence[Attempt], answers: Sequence[str | None]) -> Arm:
    """Return a mode's accuracy, tokens and unread answers."""
    right = [a.parsed and a.answer == want for a, want in zip(attempts, answers, strict=True)]
    read = sum(a.parsed for a in attempts)
    n = len(attempts)
    return Arm(
        mode=mode,
        n=n,
        accuracy=sum(right) / n,
        tokens=sum(a.tokens for a in attempts) / n,
        unparsed=n - read,
        accuracy_parsed=sum(right) / read if read else None,
    )


def compare(
    over: Sequence[Attempt],
    attempts: Sequence[Attempt],
    answers: Sequence[str | None],
    *,
    value: float = 1.0,
    price: float = 0.0,
    names: tuple[str, str] = ("direct", "cot"),
    seed: int = 0,
) -> Pair:
    """Return what attempts gain over others at the same problems, such as those of logs.

    Raises MismatchError if they are not paired, InputError without any or for a bad price.
    """
    check_prices(value, price)
    if not len(over) == len(attempts) == len(answers):
        raise MismatchError(
            f"{names[0]} has {len(over)} attempts, {names[1]} {len(attempts)}, and there are "
            f"{len(answers)} answers: they must be of the same problems in the same order"
        )
    if not answers:
        raise InputError("there are no attempts to compare; give at least one of each mode")
    first = [a.parsed and a.answer == want for a, want in zip(over, answers, strict=True)]
    second = [a.parsed and a.answer == want for a, want in zip(attempts, answers, strict=True)]
    told = list(zip(first, second, strict=True))
    n = len(told)
    gains, losses = told.count((False, True)), told.count((True, False))
    differences = [float(c) - float(d) for d, c in told]
    if n < FEW:
        ci = newcombe(told.count((True, True)), gains, losses, told.count((False, False)))
    else:
        ci = bootstrap(differences, seed=seed)
    both = [
        step
        for step, a, b in zip(differences, over, attempts, strict=True)
        if a.parsed and b.parsed
    ]
    extra = sum(b.tokens - a.tokens for a, b in zip(over, attempts, strict=True)) / n
    return Pair(
        mode=names[1],
        over=names[0],
        n=n,
        delta=sum(differences) / n,
        ci=ci,
        p=mcnemar(gains, losses),
        gains=gains,
        losses=losses,
        extra_tokens=extra,
        net=value * sum(differences) / n - price * extra,
        delta_parsed=sum(both) / len(both) if both else None,
        n_parsed=len(both),
    )
