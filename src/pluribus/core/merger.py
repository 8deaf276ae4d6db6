"""What a merge method is: a frozen dataclass of hyper-parameters, called on blocks of tensors.

    (base: Float["n"], experts: Float["t n"], *, at, **folded) -> Float["n"]

The decorator records facts that tests, docs and the command line read. A merger knows nothing of
paths, devices, element types or progress. What it needs to know about a whole tensor or model
before it can treat a block it asks for through `folds()` and receives by name.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
from annotated_types import Ge, Gt, Interval, Lt

from pluribus.core.arrays import Array
from pluribus.core.errors import InputError, listing, nearest

Grain = Literal["element", "row", "filter", "tensor"]
Scope = Literal["tensor", "model"]

Fraction = Annotated[float, Interval(gt=0, le=1)]
Share = Annotated[float, Interval(ge=0, le=1)]
Positive = Annotated[float, Gt(0), Lt(float("inf"))]
NonNegative = Annotated[float, Ge(0)]
PositiveInt = Annotated[int, Gt(0)]
BESIDE = "a path; relative ones are looked for beside the recipe"
Beside = Annotated[str, BESIDE]
# One value for all experts, or one for each in their order.
PerExpert = float | tuple[float, ...]
FractionPerExpert = Fraction | tuple[Fraction, ...]
SharePerExpert = Share | tuple[Share, ...]


class At(NamedTuple):
    """Where in the model a block lies."""

    name: str = "tensor"
    shape: tuple[int, ...] = ()
    start: int = 0  # first flattened element of the block
    stop: int = 0  # one past its last
    block: int = 0  # number of the block in its tensor
    job: int = 0  # number of the tensor in the model
    layer: int | None = None  # residual block the tensor belongs to
    layers: int = 0  # how many there are
    seed: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Position of the block in the model: partial sums are joined in this order."""
        return (self.job, self.block)

    @property
    def size(self) -> int:
        """Elements of the whole tensor."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Facts:
    """What is known about a method without running it."""

    name: str
    paper: str
    summary: str
    # "element": any run of elements; "row": whole rows of the last axis, as (r, c) and (t, r, c);
    # "filter": the same with all axes but the first in one row (conv kernels, one output channel a
    # row); "tensor": one whole tensor in its own shape. An attribute `grain` of an instance wins.
    grain: Grain
    base: Literal["required", "optional", "ignored"]
    experts: tuple[int, int | None]  # fewest and most
    ordered: bool  # whether the order of experts matters
    random: bool  # whether it draws random numbers
    needs: tuple[str, ...]  # further inputs per expert, e.g. "fisher"
    idempotent: bool  # whether experts that all equal the base give the base
    positional: tuple[str, ...] = field(default=())


FACTS = "__pluribus_facts__"
M = TypeVar("M", bound=type)


def merger(
    name: str,
    *,
    paper: str = "",
    grain: Grain = "element",
    base: Literal["required", "optional", "ignored"] = "required",
    experts: tuple[int, int | None] = (1, None),
    ordered: bool = False,
    random: bool = False,
    needs: tuple[str, ...] = (),
    idempotent: bool = True,
) -> Callable[[M], M]:
    """Register a merge method's facts and make its construction check its parameters.

    Goes above `@dataclass(frozen=True, kw_only=True)`. Every field needs a default or must be
    meant as required. Construction raises InputError naming the field, the value and the range.
    """

    def decorate(cls: M) -> M:
        doc = inspect.getmodule(cls)
        summary = (doc.__doc__ or cls.__doc__ or "").strip().split("\n")[0] if doc else ""
        facts = Facts(
            name, paper, summary, grain, base, experts, ordered, random, needs, idempotent
        )
        setattr(cls, FACTS, facts)
        _checked(cls, name)
        _composable(cls)
        return cls

    return decorate


def facts(method: Any) -> Facts:
    """Return the facts of a merger or its class; an instance's own `grain` goes first."""
    known = getattr(method, FACTS)
    own = None if isinstance(method, type) else getattr(method, "grain", None)
    return known if own is None or own == known.grain else _in_grain(known, own)


@cache
def _in_grain(known: Facts, grain: Grain) -> Facts:
    return replace(known, grain=grain)


def columns(grain: Grain, shape: tuple[int, ...]) -> int:
    """Return how many elements a row of a tensor has in the grain "row" or "filter"."""
    if grain == "filter" and len(shape) > 1:
        return int(np.prod(shape[1:], dtype=np.int64))
    return shape[-1] if shape else 1


def _checked(cls: type, name: str) -> None:
    """Wrap `__init__` so that fields are checked against their annotated ranges."""
    own_init = cls.__init__
    own_check = getattr(cls, "check", None)

    def __init__(self: Any, **values: Any) -> None:
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise InputError(
                    f"{name} has no parameter {key!r}; it has: "
                    f"{listing(sorted(known), 99) or 'none'}." + nearest(key, known)
                )
        own_init(self, **{key: _coerce(cls, name, key, value) for key, value in values.items()})
        if own_check is not None:
            own_check(self)

    __init__.__doc__ = own_init.__doc__
    __init__.__signature__ = inspect.signature(own_init)  # type: ignore[attr-defined]
    setattr(cls, "__init__", __init__)  # noqa: B010 - a type checker sees `type.__init__` in cls


_adapters: dict[tuple[type, str], Any] = {}


def _coerce(cls: type, method: str, key: str, value: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    adapter = _adapters.get((cls, key))
    if adapter is None:
        from typing import get_type_hints

        hint = get_type_hints(cls, include_extras=True)[key]
        try:
            adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        except Exception:  # dataclasses and callables carry their own configuration
            adapter = TypeAdapter(hint)
        _adapters[cls, key] = adapter
    if isinstance(value, list):
        value = tuple(value)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = max(error.errors(), key=lambda fault: len(fault["loc"]))
        raise InputError(f"{method}: {key} = {value!r}: {first['msg']}") from None


def _composable(cls: type) -> None:
    """Give a merger `>>`, so that steps can follow it."""

    def __rshift__(self: Any, other: Any) -> Any:
        from pluribus.core.chain import Chain

        return Chain.of(self) >> other

    cls.__rshift__ = __rshift__  # type: ignore[attr-defined]


# -- calling ---------------------------------------------------------------------------------------

Stage = Mapping[str, Any]  # name -> Fold
_signatures: dict[Any, tuple[set[str], bool]] = {}


def accepted(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `values` that `function` takes by name."""
    key = getattr(function, "__func__", function)
    found = _signatures.get(key)
    if found is None:
        parameters = inspect.signature(function).parameters.values()
        found = _signatures[key] = (
            {p.name for p in parameters},
            any(p.kind is p.VAR_KEYWORD for p in parameters),
        )
    return dict(values) if found[1] else {k: v for k, v in values.items() if k in found[0]}


def stages(method: Any) -> Sequence[Stage]:
    """Return the folds a merger needs: groups that can share a pass, in order."""
    folds = getattr(method, "folds", None)
    return () if folds is None else tuple(stage for stage in folds() if stage)


def call(
    method: Any,
    base: Array | None,
    experts: Array,
    at: At,
    folded: Mapping[str, Any],
    out: np.ndarray | None = None,
) -> Array:
    """Apply a merger to one block, by its fused kernel where there is one for such blocks.

    A kernel takes packed blocks too, and fills `out` if it is given. Returns what was merged: a
    new array, or `out`.
    """
    if isinstance(experts, np.ndarray) and experts.dtype != np.float64:
        kernel = fused(method)
        if kernel is not None:
            return kernel(method, base, experts, at=at, out=out, **folded)
    run = type(method).__call__
    return cast(Array, method(base, experts, **accepted(run, {"at": at, **folded})))


def fused(method: Any) -> Callable[..., Array] | None:
    """Return the CPU kernel that merges blocks for `method`, if any; it takes packed ones too."""
    if not getattr(method, "fusible", True):  # a variant that the kernel doesn't know
        return None
    from pluribus.kernels import find

    return find(facts(method).name, "fused")


def fused_values(method: Any, name: str) -> Callable[..., Any] | None:
    """Return the CPU kernel that finds the values of a method's fold called `name`, if any."""
    if not getattr(method, "fusible", True):
        return None
    from pluribus.kernels import find

    return (find(facts(method).name, "values") or {}).get(name)
