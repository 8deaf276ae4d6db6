"""What makes one distribution of several: a frozen dataclass called on the members' logits.

    fuser({role: logits (b, v)}) -> Fusion(log_probs (b, v), weights {role: (b,)}, info)

A fuser is one file here, named after it. Members are told apart by the names of their roles, never
by their order. Every row has its own weights. Arithmetic is in float32, or in float64 if the logits
are; a token that is -inf in a member is excluded from all sums and from the output, unless a fuser
says otherwise. Sampling filters, penalties and temperature come after fusion, once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pluribus.core.errors import InputError, RecipeError, listing, nearest
from pluribus.core.merger import _checked
from pluribus.core.registry import Registry
from pluribus.core.shapes import Float

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any

FACTS = "__pluribus_fuser__"
F = TypeVar("F", bound=type)


@dataclass(frozen=True)
class Fusion:
    """What a fuser gives: the fused distribution, and how it came about."""

    log_probs: Float[Tensor, "b v"]
    weights: Mapping[str, Float[Tensor, " b"]]  # by role, for each row
    info: Mapping[str, Any] = field(default_factory=dict)  # (b,) tensors, and words


class Fuser(Protocol):
    """Combines the members' logits at one position into one distribution."""

    def check_roles(self, roles: Sequence[str]) -> None:
        """Raise InputError unless these are roles that the fuser can combine."""
        ...

    def __call__(self, logits: Mapping[str, Float[Tensor, "b v"]]) -> Fusion:
        """Return the fused distribution. Raises NonFiniteError for logits that are NaN or +inf."""
        ...


@dataclass(frozen=True)
class FuserFacts:
    """What is known about a fuser without running it."""

    name: str
    paper: str


def fuser(name: str, *, paper: str = "") -> Callable[[F], F]:
    """Register a fuser's facts and make its construction check its parameters.

    Goes above `@dataclass(frozen=True, kw_only=True)`.
    """

    def decorate(cls: F) -> F:
        setattr(cls, FACTS, FuserFacts(name, paper))
        _checked(cls, name)
        return cls

    return decorate


FUSERS = Registry(__name__, FACTS, "fuser")


def build(settings: Mapping[str, Any]) -> Any:
    """Return the fuser that a mapping such as {"kind": "static", "alpha": 1.0} describes.

    Raises RecipeError without a known `kind`, InputError for a bad parameter.
    """
    given = dict(settings)
    kind = given.pop("kind", None)
    if not isinstance(kind, str):
        raise RecipeError(f"a fuser needs a kind: one of {', '.join(FUSERS)}")
    return FUSERS[kind](**given)


def settings_of(fuser: Any) -> dict[str, Any]:
    """Return what `build` makes the same fuser of. Raises InputError for one of another kind."""
    from dataclasses import fields, is_dataclass

    facts = getattr(type(fuser), FACTS, None)
    if facts is None or not is_dataclass(fuser):
        raise InputError(
            f"a {type(fuser).__name__} cannot be written down: only registered fusers can "
            f"({', '.join(FUSERS)})"
        )
    return {"kind": facts.name} | {one.name: getattr(fuser, one.name) for one in fields(fuser)}


def has_roles(kind: str, wanted: Sequence[str], given: Sequence[str]) -> None:
    """Raise InputError unless all wanted roles are among those given."""
    for role in wanted:
        if role not in given:
            raise InputError(
                f"{kind} needs a model in the role {role!r}; there are: {listing(given, 9)}."
                f"{nearest(role, given)}"
            )


def per_role(
    kind: str, what: str, value: "float | Mapping[str, float]", roles: Sequence[str]
) -> dict[str, float]:
    """Return one number for each of the roles, of one for all or a mapping with each.

    Raises InputError for a role that has none, and for one that is not there.
    """
    if not isinstance(value, Mapping):
        return dict.fromkeys(roles, float(value))
    for role in value:
        if role not in roles:
            raise InputError(
                f"{kind}: {what} names {role!r}, but the roles it weighs are "
                f"{listing(roles, 9)}.{nearest(role, roles)}"
            )
    if lacking := [role for role in roles if role not in value]:
        raise InputError(
            f"{kind}: {what} has {len(value)} numbers for {len(roles)} models: give one for "
            f"{listing(lacking)} too"
        )
    return {role: float(value[role]) for role in roles}


def check_finite(kind: str, what: str, value: "float | Mapping[str, float]") -> None:
    """Raise InputError for a number that is NaN or infinite."""
    from math import isfinite

    numbers = value if isinstance(value, Mapping) else {"": value}
    for role, number in numbers.items():
        if not isfinite(number):
            raise InputError(
                f"{kind}: {what}{f' of {role}' if role else ''} is {number}; give a finite number"
            )
