"""Our dataclasses as pyglove's symbolic objects and back, generated from their fields.

A merge method, a chain or a recipe's part checks its values when it is made, so it cannot hold a
placeholder; its symbolic twin can. `lift` turns a tree of ordinary values into symbolic ones, and
`lower` makes the ordinary objects of a point, which are then checked as always:

    lift(Ties(density=0.2))                         ~ Ties(density=0.2, scale=1.0, ...) of pg.Object
    symbolic(Ties)(density=floatv(0.1, 1.0))        the same with a placeholder
    lower(template.decode(dna))                     Ties(density=0.37)

Tensors and modules are refused: a point is copied, compared and stored, and modules would be shared
between trials and carry weights from one into the next. A path, a key or a function that makes one
takes their place. Lists in a frozen dataclass come back as tuples.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from pluribus.core.errors import InputError, nearest
from pluribus.core.merger import FACTS, _coerce
from pluribus.search._pyglove import pg


class Glue(pg.Object):
    """Base of the symbolic twins; `_original` is the dataclass that a point becomes."""

    _original = object  # without an annotation, which pyglove would make a field of


@cache
def twin(cls: type) -> type:
    """Return the symbolic class with the fields of a dataclass."""
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise InputError(f"{cls!r} is not a dataclass, and only those have a symbolic twin")
    members = [(field.name, pg.typing.Any()) for field in dataclasses.fields(cls) if field.init]
    body = {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}Symbol"}
    made = pg.members(members)(type(f"{cls.__name__}Symbol", (Glue,), body))
    made._original = cls
    return made


def symbolic(cls: type) -> Callable[..., Any]:
    """Return a constructor like the dataclass's own whose arguments may hold placeholders.

    Fields that are not given take their defaults. Raises InputError for a field that is not there
    or has no default and is not given.
    """
    made = twin(cls)

    def construct(**values: Any) -> Any:
        known = {field.name: field for field in dataclasses.fields(cls) if field.init}
        for name in values:
            if name not in known:
                raise InputError(
                    f"{cls.__name__} has no field {name!r}; it has: {', '.join(known)}."
                    + nearest(name, known)
                )
        filled = {}
        for name, field in known.items():
            if name in values:
                filled[name] = lift(values[name], name)
            elif field.default is not dataclasses.MISSING:
                filled[name] = lift(field.default, name)
            elif field.default_factory is not dataclasses.MISSING:
                filled[name] = lift(field.default_factory(), name)
            else:
                raise InputError(f"{cls.__name__} needs a value for {name!r}")
        return made(**filled)

    return construct


def lift(value: Any, path: str = "") -> Any:
    """Return a tree of dataclasses, mappings and lists as symbolic values.

    Raises InputError for a tensor, array or module, naming its path.
    """
    if isinstance(value, Glue):
        return value
    if isinstance(value, pg.hyper.Choices):
        # Not `clone`: a candidate may be an object that can't be copied, such as a function.
        candidates = [
            lift(candidate, f"{path}[={i}]") for i, candidate in enumerate(value.candidates)
        ]
        return value.clone(override={"candidates": candidates})
    if isinstance(value, pg.hyper.HyperValue | pg.Object):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        inner = {name: lift(getattr(value, name), f"{path}.{name}".lstrip(".")) for name in fields}
        return twin(type(value))(**inner)
    if isinstance(value, Mapping):
        odd = next((key for key in value if not isinstance(key, str)), None)
        if odd is not None:
            raise InputError(f"{path or 'the space'}: keys are text, not {odd!r}")
        return pg.Dict({k: lift(v, f"{path}.{k}".lstrip(".")) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return pg.List([lift(inner, f"{path}[{i}]") for i, inner in enumerate(value)])
    if _heavy(value):
        raise InputError(
            f"{path or 'the space'} holds a {type(value).__name__}: a space holds no tensors or "
            "modules; put a path, a key or a function that makes it there"
        )
    return value


def lower(value: Any) -> Any:
    """Return the ordinary objects that a symbolic value stands for.

    Placeholders that are left (in nested searches) stay, and so do the twins that hold them.
    Raises what the dataclasses raise for values that they refuse.
    """
    if isinstance(value, Glue):
        if not pg.is_deterministic(value):
            return value
        cls = value._original
        frozen = cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
        inner = {key: lower(value.sym_getattr(key)) for key in value.sym_keys()}
        return cls(**{key: _hashable(v) if frozen else v for key, v in inner.items()})
    if isinstance(value, pg.hyper.HyperValue):
        return value
    if isinstance(value, pg.Dict):
        made = {key: lower(inner) for key, inner in value.sym_items()}
        return made if pg.is_deterministic(value) else pg.Dict(made)
    if isinstance(value, pg.List):
        items = [lower(inner) for inner in value.sym_values()]
        return items if pg.is_deterministic(value) else pg.List(items)
    return value


def check(value: Any) -> None:
    """Raise InputError, naming the path, for a placeholder with a value that its field refuses.

    Looks at the placeholders that stand directly in a field of a merger, step or algorithm: each
    plain candidate of a choice, and both ends of a range.
    """

    def visit(path: Any, node: Any, parent: Any) -> Any:
        cls = getattr(parent, "_original", None) if isinstance(parent, Glue) else None
        if cls is not None and isinstance(node, pg.hyper.HyperPrimitive) and _ranged(cls):
            for candidate in _candidates(node):
                try:
                    _coerce(cls, cls.__name__, str(path.key), lower(candidate))
                except InputError as error:
                    raise InputError(f"{path}: {error}; take it out of the space") from None
        return pg.TraverseAction.ENTER

    pg.traverse(value, visit)


def _ranged(cls: type) -> bool:
    """Whether a class checks its fields against their annotations."""
    marks = (FACTS, "__pluribus_step__", "__pluribus_algorithm__")
    return any(hasattr(cls, mark) for mark in marks)


def _candidates(node: Any) -> list[Any]:
    if isinstance(node, pg.hyper.Float):
        return [node.min_value, node.max_value]
    if isinstance(node, pg.hyper.OneOf):
        return [c for c in node.candidates if pg.is_deterministic(c)]
    return []


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _heavy(value: Any) -> bool:
    """Whether a value is a tensor, an array or a module; imports nothing to find out."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor | torch.nn.Module):
        return True
    return numpy is not None and isinstance(value, numpy.ndarray)
