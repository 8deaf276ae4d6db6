"""The recipe: mergekit's YAML schema, strict, with a few fields of our own.

    merge_method  models | slices | modules  base_model  parameters  dtype  out_dtype
    tokenizer_source | tokenizer  chat_template                             (as in mergekit 0.1.5)
    name  seed  gradient_tail  round_inputs  allow_crimes  extras (of a model)           (ours)

An unknown key anywhere is an error that names the nearest one; `lenient` turns it into a warning
and reads on without the key, as mergekit does. Model references are texts or mappings, see
`pluribus.core.refs`; a path is looked for beside the recipe first, then in the working directory.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pluribus.core.dtypes import dtype as dtype_of
from pluribus.core.errors import PluribusError, RecipeError, nearest
from pluribus.core.refs import ModelRef
from pluribus.recipe import settings, text
from pluribus.tokenizer.config import ModelToken, TokenConfig, TokenizerConfig

# What people write beside `model:` although it belongs under `parameters:`.
COMMON = {
    *("weight", "density", "t", "lambda", "scale", "normalize", "epsilon", "gamma", "rescale"),
    *("int8_mask", "select_topk", "filter_wise", "nuslerp_flatten", "nuslerp_row_wise"),
}


class Strict(BaseModel):
    """Holds the rule that an unknown key is an error with a suggestion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        known = list(cls.model_fields)
        for key in value:
            if key in known:
                continue
            hint = nearest(str(key), known)
            if key in COMMON and "parameters" in known:
                hint = f" {key} is a parameter: write it under 'parameters:'."
            said = f"unknown key {key!r}; there are: {', '.join(known)}.{hint}"
            raise PydanticCustomError("unknown_key", "{said}", {"key": key, "said": said})
        return value


def _reference(value: Any, info: Any) -> Any:
    """Read text as a path beside the recipe if there is one, before `@` and `+` mean anything."""
    folder = (info.context or {}).get("folder")
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ValueError("an empty model name")
    if folder is None:
        return value
    if (folder / value).exists():
        return {"model": {"path": value}}
    for cut in (i for i, c in enumerate(value) if c == "+"):
        if (folder / value[:cut]).exists():
            return {"model": {"path": value[:cut]}, "lora": value[cut + 1 :]}
    return value


def _settings(value: Any) -> dict[str, settings.Setting]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError("parameters are names with their values, as in {weight: 0.5}")
    out = {}
    for name, setting in value.items():
        try:
            out[str(name)] = settings.parse(setting)
        except ValueError as error:
            said = f"{name}: {error}"
            raise PydanticCustomError("setting", "{said}", {"key": name, "said": said}) from None
    return out


def _float_type(value: str | None) -> str | None:
    if value is None:
        return None
    try:
        kind = dtype_of(value)
    except PluribusError as error:
        raise ValueError(str(error)) from None
    if not kind.is_float:
        raise ValueError(f"{value} is not a floating-point type")
    return kind.torch


Reference = Annotated[ModelRef, BeforeValidator(_reference)]
Settings = Annotated[dict[str, Any], BeforeValidator(_settings)]
FloatType = Annotated[str | None, AfterValidator(_float_type)]


def _no_layers(value: tuple[int, int] | None) -> tuple[int, int] | None:
    if value is not None and not 0 <= value[0] < value[1]:
        raise ValueError(f"layer_range {list(value)} is [first, one past the last] layer, from 0")
    return value


class Entry(Strict):
    """One model of the merge."""

    model: Reference
    parameters: Settings = {}
    extras: dict[str, Reference] = {}  # further inputs a method needs, e.g. {fisher: path}


class SliceSource(Strict):
    """Layers of one model."""

    model: Reference
    layer_range: Annotated[tuple[int, int] | None, AfterValidator(_no_layers)] = None  # None: all
    parameters: Settings = {}
    extras: dict[str, Reference] = {}


class Slice(Strict):
    """Layers of the output and where they come from."""

    sources: Annotated[list[SliceSource], Field(min_length=1)]
    base_model: Reference | None = None
    residual_weight: float | None = None  # mergekit's; nothing reads it there either
    parameters: Settings = {}


class Module(Strict):
    """One part of a model of several, such as a vision tower."""

    models: Annotated[list[Entry], Field(min_length=1)] | None = None
    slices: Annotated[list[Slice], Field(min_length=1)] | None = None
    parameters: Settings = {}

    @model_validator(mode="after")
    def _one_of(self) -> "Module":
        if (self.models is None) == (self.slices is None):
            raise ValueError("a module has either models or slices")
        return self


class Recipe(Strict):
    """A merge as a user writes it. `Recipe.of` reads one; nothing is opened yet."""

    merge_method: str
    models: Annotated[list[Entry], Field(min_length=1)] | None = None
    slices: Annotated[list[Slice], Field(min_length=1)] | None = None
    modules: Annotated[dict[str, Module], Field(min_length=1)] | None = None
    base_model: Reference | None = None
    parameters: Settings = {}
    dtype: FloatType = None  # element type of the output, unless out_dtype is given
    out_dtype: FloatType = None
    tokenizer_source: Literal["union", "base"] | Reference | None = Field(
        None, union_mode="left_to_right"
    )
    tokenizer: TokenizerConfig | None = None
    chat_template: str | None = None
    name: str | None = None  # for other documents of the same file
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None  # None: a hash of the recipe
    gradient_tail: Literal["first", "last"] = "first"  # t of the tensors after the layers
    round_inputs: bool = False  # round the inputs to dtype on load, as mergekit does
    allow_crimes: bool = False  # merge models of different architectures
    _folder: Path | None = PrivateAttr(None)
    _where: str = PrivateAttr("recipe")
    _notes: tuple[str, ...] = PrivateAttr(())
    _lines: Mapping[tuple[Any, ...], int] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        given = [key for key in ("models", "slices", "modules") if getattr(self, key) is not None]
        if len(given) != 1:
            said = "none of them is" if not given else f"{' and '.join(given)} are"
            raise ValueError(f"exactly one of models, slices and modules is needed; {said} given")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError(
                "tokenizer_source and tokenizer are both given; keep tokenizer and write source "
                "inside it"
            )
        if self.name is not None and (
            not self.name.strip() or self.name in (".", "..") or set(self.name) & set('/\\:+@"\0')
        ):
            raise ValueError(f"name {self.name!r} is not usable as a folder's name")
        if self.round_inputs and self.dtype is None:
            raise ValueError("round_inputs needs dtype, the type to round to")
        return self

    @classmethod
    def of(
        cls,
        value: Mapping[str, Any] | text.Document,
        *,
        folder: Path | None = None,
        where: str = "recipe",
        lenient: bool = False,
    ) -> "Recipe":
        """Read a recipe from plain values.

        Raises RecipeError that names file, line and key. With `lenient`, keys that are unknown are
        left out and stand in `notes`.
        """
        document = value if isinstance(value, text.Document) else text.Document(value)
        data = document.value
        if not isinstance(data, Mapping):
            raise RecipeError(f"{where}: a recipe is keys with values, not {type(data).__name__}")
        notes: list[str] = []
        data = copy.deepcopy(dict(data)) if lenient else data
        while True:
            try:
                recipe = cls.model_validate(data, context={"folder": folder})
                break
            except ValidationError as error:
                unknown = [fault for fault in map(_fault, error.errors()) if fault.unknown]
                if not (lenient and unknown):
                    raise RecipeError(_first(error, document, where)) from None
                for fault in unknown:
                    _remove(data, fault.path)
                    notes.append(f"{_at(document, fault.path, where)}: {fault.message} (ignored)")
        recipe._folder, recipe._where, recipe._notes = folder, where, tuple(notes)
        recipe._lines = document.lines
        return recipe

    @property
    def folder(self) -> Path | None:
        """Where relative paths are looked for first."""
        return self._folder

    @property
    def where(self) -> str:
        """File and document, for messages."""
        return self._where

    def lined(self, where: str, parameter: str) -> str:
        """Return a place in the recipe with the line on which a parameter is first set."""
        keys = ("parameters", parameter)
        lines = [line for path, line in self._lines.items() if path[-2:] == keys]
        return where.replace(self._where, f"{self._where}:{min(lines)}", 1) if lines else where

    @property
    def notes(self) -> tuple[str, ...]:
        """Keys that were ignored."""
        return self._notes

    @property
    def references(self) -> tuple[ModelRef, ...]:
        """All models named, in order, without repeats; the tokenizer's donor is not among them."""
        out = {entry.model: None for entry in self._entries()}
        for slice_ in self._slices():
            if slice_.base_model is not None:
                out[slice_.base_model] = None
        if self.base_model is not None:
            out[self.base_model] = None
        return tuple(out)

    @property
    def places(self) -> tuple[str, ...]:
        """Paths of everything a run opens, the tokenizer's donor and extras among them."""
        refs = [*self.references]
        refs += [ref for entry in self._entries() for ref in entry.extras.values()]
        donor = self.tokenizer.source if self.tokenizer is not None else self.tokenizer_source
        if isinstance(donor, ModelRef):
            refs.append(donor)
        opened = [place.path for ref in refs for place in (ref.model, ref.lora) if place]
        return tuple(dict.fromkeys(opened))

    def plain(self) -> dict[str, Any]:
        """Return the recipe as YAML writes it, without what is default."""
        return {
            key: _plain(getattr(self, key)) for key in type(self).model_fields if self._told(key)
        }

    def to_yaml(self) -> str:
        """Write the recipe; reading it back gives the same values."""
        return text.dump(self.plain())

    @property
    def drawn_seed(self) -> int:
        """The seed given, or one made from the rest of the recipe."""
        if self.seed is not None:
            return self.seed
        from pluribus.engine.provenance import recipe_seed

        told = {key: value for key, value in self.plain().items() if key != "name"}
        return recipe_seed(json.dumps(told, sort_keys=True))

    def _told(self, key: str) -> bool:
        return getattr(self, key) != type(self).model_fields[key].get_default()

    def _slices(self) -> Iterator[Slice]:
        yield from self.slices or ()
        for module in (self.modules or {}).values():
            yield from module.slices or ()

    def _entries(self) -> Iterator[Entry | SliceSource]:
        yield from self.models or ()
        for slice_ in self.slices or ():
            yield from slice_.sources
        for module in (self.modules or {}).values():
            yield from module.models or ()
            for slice_ in module.slices or ():
                yield from slice_.sources


def _plain(value: Any) -> Any:
    if isinstance(value, ModelRef):
        return _plain_reference(value)
    if isinstance(value, BaseModel):
        out = {}
        for key, field in type(value).model_fields.items():
            inner = getattr(value, key)
            if inner != field.get_default(call_default_factory=True):
                out[key] = _plain(inner)
        kind = getattr(value, "kind", None)
        return {"kind": kind, **out} if kind is not None else out
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | settings.Condition):
        return settings.plain(value)
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value


def _plain_reference(ref: ModelRef) -> Any:
    """Return the short text where it reads back as the same reference."""
    try:
        if ModelRef.model_validate(str(ref)) == ref:
            return str(ref)
    except ValidationError:
        pass
    places = {key: getattr(ref, key) for key in ("model", "lora")}
    out: dict[str, Any] = {
        key: {k: v for k, v in (("path", p.path), ("revision", p.revision)) if v is not None}
        for key, p in places.items()
        if p is not None
    }
    if ref.override_architecture is not None:
        out["override_architecture"] = ref.override_architecture
    return out


# -- faults ----------------------------------------------------------------------------------------


class _Fault:
    """One of pydantic's errors in our words."""

    def __init__(self, path: Sequence[Any], message: str, unknown: bool) -> None:
        self.path, self.message, self.unknown = tuple(path), message, unknown


def _fault(error: Any) -> _Fault:
    path, kind = list(error["loc"]), error["type"]
    context = error.get("ctx") or {}
    if kind in ("unknown_key", "setting"):
        return _Fault([*path, context["key"]], error["msg"], kind == "unknown_key")
    if kind == "extra_forbidden":
        fields = [
            *TokenizerConfig.model_fields,
            *TokenConfig.model_fields,
            *ModelToken.model_fields,
        ]
        fields += [*ModelRef.model_fields, "path", "revision"]
        hint = nearest(str(path[-1]), fields)
        if path[-1] in ("path", "revision"):
            hint = " A model is {model: {path: ..., revision: ...}, lora: {path: ...}}."
        return _Fault(path, f"unknown key {path[-1]!r}." + hint, True)
    if kind == "missing":
        return _Fault(path[:-1], f"{path[-1]} is missing", False)
    if kind == "too_short":
        return _Fault(path, "at least one is needed", False)
    message = error["msg"].removeprefix("Value error, ")
    if kind == "model_type" and context.get("class_name") == "ModelRef":
        message = "a model is a path, an address, org/name, or {model: ..., lora: ...}"
    given = error.get("input")
    if kind not in ("value_error", "assertion_error") and isinstance(given, str | int | float):
        message += f", not {given!r}"
    return _Fault(path, message, False)


def _first(error: ValidationError, document: text.Document, where: str) -> str:
    """Return the most telling fault: an unknown key first, else the one deepest in the recipe."""
    faults = [_fault(entry) for entry in error.errors()]
    fault = max(faults, key=lambda f: (f.unknown, len(f.path)))
    return f"{_at(document, fault.path, where)}: {fault.message}"


def _at(document: text.Document, path: Sequence[Any], where: str) -> str:
    known = [part for part in path if _is_in(document.value, path, part)]
    line = document.line(known)
    shown = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in known).lstrip(".")
    return where + (f":{line}" if line else "") + (f": {shown}" if shown else "")


def _is_in(value: Any, path: Sequence[Any], part: Any) -> bool:
    """Return whether `part` of `path` is a key of the document, not a name of pydantic's own."""
    for step in path:
        inside = _has(value, step)
        if step is part:
            return inside
        if inside:
            value = value[step]
    return False


def _has(value: Any, step: Any) -> bool:
    if isinstance(value, Mapping):
        return step in value
    return isinstance(value, list) and isinstance(step, int) and step < len(value)


def _remove(data: Any, path: Sequence[Any]) -> None:
    for step in path[:-1]:
        if _has(data, step):
            data = data[step]
    del data[path[-1]]
