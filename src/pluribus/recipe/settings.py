"""Parameter settings: a value, a gradient over the layers, or values by tensor name.

    0.5                                   the same everywhere
    [0, 0.5, 1]                           piecewise linear in t = layer / (layers - 1)
    [{filter: mlp, value: [0, 1]}, 0.5]   (as {filter, value} items) first filter within the name

With g values and s = t (g - 1), a gradient of numbers is (1 - frac(s)) v[int(s)] + frac(s)
v[int(s) + 1]; of text or booleans it is v[int(s)]. One layer alone has t = 1, and tensors outside
the layers have t = 0. A list of filters none of which is in the name leaves the parameter to the
next place where it is set. These are the rules of mergekit 0.1.5.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pluribus.core.errors import RecipeError, nearest
from pluribus.core.merger import BESIDE

Scalar = bool | int | float | str


class Condition(NamedTuple):
    """A value for the tensors whose name contains `filter`; None or "*" is every tensor."""

    filter: str | None
    value: Any  # Scalar or a tuple of them


Setting = Any  # Scalar | tuple[Scalar, ...] | tuple[Condition, ...]


def parse(value: Any) -> Setting:
    """Read one setting as YAML gives it. Raises ValueError saying what is wrong."""
    if isinstance(value, Mapping):
        return (_condition(value),)
    if isinstance(value, list | tuple):
        if any(isinstance(item, Mapping | Condition) for item in value):
            return tuple(_condition(item) for item in value)
        if not value:
            raise ValueError("an empty list sets nothing; leave the parameter out")
        return tuple(_scalar(item) for item in value)
    return _scalar(value)


def _scalar(value: Any) -> Scalar:
    if not isinstance(value, bool | int | float | str):
        shown = "nothing" if value is None else type(value).__name__
        raise ValueError(
            f"expected a number, text, true or false, a list of them, or a list of "
            f"{{filter, value}}, not {shown}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return value


def _condition(item: Any) -> Condition:
    if isinstance(item, Condition):
        return item
    if not isinstance(item, Mapping):
        raise ValueError(
            f"{item!r} stands among filters; write {{value: {item!r}}} for the rest of the tensors"
        )
    for key in item:
        if key not in ("filter", "value"):
            raise ValueError(
                f"unknown key {key!r}; a filter is filter and value."
                + nearest(str(key), ("filter", "value"))
            )
    if "value" not in item:
        raise ValueError("a filter without a value")
    where, value = item.get("filter"), item["value"]
    if where is not None and not isinstance(where, str):
        raise ValueError(f"filter {where!r} is not text")
    if isinstance(value, Mapping):
        raise ValueError("a filter's value is a number, text, or a list of them, not filters")
    parsed = parse(value)
    if isinstance(parsed, tuple) and isinstance(parsed[0], Condition):
        raise ValueError("a filter's value is a number, text, or a list of them, not filters")
    return Condition(where, parsed)


def plain(setting: Setting) -> Any:
    """Return a setting as YAML writes it."""
    if isinstance(setting, Condition):
        head = {} if setting.filter is None else {"filter": setting.filter}
        return {**head, "value": plain(setting.value)}
    return [plain(item) for item in setting] if isinstance(setting, tuple) else setting


def evaluate(
    setting: Setting, tensor: str, t: float, read: Callable[[Scalar], Scalar] = lambda value: value
) -> Scalar | None:
    """Return a setting's value for one tensor, or None if no filter holds for it.

    `read` turns each written value into the parameter's own type before any interpolation.
    """
    if not isinstance(setting, tuple):
        return read(setting)
    if isinstance(setting[0], Condition):
        for condition in setting:
            if condition.filter in (None, "*") or condition.filter in tensor:
                return evaluate(condition.value, tensor, t, read)
        return None
    values: list[Any] = [read(value) for value in setting]
    place = t * (len(values) - 1)
    first = int(place)
    if any(isinstance(value, bool | str) for value in values):
        return values[first]
    second, share = min(first + 1, len(values) - 1), place - first
    return (1 - share) * values[first] + share * values[second]


# -- which parameters a method has -----------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """What a recipe must know of one field of a merge method."""

    name: str
    per_expert: bool  # may differ between the models
    numeric: bool  # text such as 1e-5 is read as a number
    default: Any  # MISSING: must be set
    beside: bool = False  # a path that may be relative to the recipe's folder

    @property
    def names(self) -> tuple[str, ...]:
        """The names a recipe may use for it."""
        return ("lambda", "scale") if self.name == "scale" else (self.name,)

    def read(self, value: Scalar) -> Scalar:
        """Return a written value in the field's kind."""
        if self.numeric and isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                raise RecipeError(f"{self.name}: {value!r} is not a number") from None
        return value


def parameters_of(cls: type) -> dict[str, Parameter]:
    """Return a merge method's parameters by field name."""
    hints = get_type_hints(cls, include_extras=True)
    out = {}
    for item in fields(cls):
        kinds = list(_alternatives(hints[item.name]))
        default = item.default
        if default is MISSING and item.default_factory is not MISSING:
            default = item.default_factory()
        out[item.name] = Parameter(
            item.name,
            per_expert=any(get_origin(kind) is tuple for kind in kinds),
            numeric=any(kind in (float, int) for kind in kinds) and str not in kinds,
            default=default,
            beside=BESIDE in getattr(hints[item.name], "__metadata__", ()),
        )
    return out


def _alternatives(hint: Any) -> Sequence[Any]:
    """Return the plain types that a field's annotation admits."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _alternatives(get_args(hint)[0])
    if origin in (Union, UnionType):
        return [kind for part in get_args(hint) for kind in _alternatives(part)]
    if origin is Literal:
        return [type(value) for value in get_args(hint)]
    return [hint]
