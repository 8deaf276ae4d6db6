"""Methods that families register: their cards come from their classes, docstrings and decorators.

A family says once what all its methods have in common; a new method is a new file of the family,
and nothing here changes.
"""

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from pluribus.catalogue._card import At, Card, Data, Where
from pluribus.core.registry import Registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A registry, and what holds for every method in it."""

    folder: str  # of its files, below the package
    registry: str  # module:name
    kind: str
    needs: str
    data: Data
    trains: str
    at: tuple[At, ...]
    where: tuple[Where, ...]
    memory: str
    inference: str
    command: str

    def methods(self) -> Registry:
        """Return the registry."""
        module, _, name = self.registry.partition(":")
        return getattr(importlib.import_module(module), name)


FAMILIES = (
    Family(
        folder="merge",
        registry="pluribus.core.registry:MERGERS",
        kind="merge method",
        needs="Models of one shape.",
        data="none",
        trains="nothing",
        at=("merge",),
        where=("weights",),
        memory="the --memory budget; it does not grow with the model",
        inference="one model",
        command="pluribus merge RECIPE merged/",
    ),
    Family(
        folder="tune",
        registry="pluribus.tune:TUNERS",
        kind="tuning method",
        needs="Fine-tunes of one base, and a little data.",
        data="unlabelled",
        trains="coefficients or masks",
        at=("tune",),
        where=("weights",),
        memory="about one model and its gradient",
        inference="one model",
        command="pluribus tune RECIPE tuned/",
    ),
    Family(
        folder="compress",
        registry="pluribus.compress:COMPRESSORS",
        kind="compressor",
        needs="Fine-tunes of one base model.",
        data="none",
        trains="nothing",
        at=("merge",),
        where=("weights",),
        memory="one shared part, and a small one for each task",
        inference="one model for each task, expanded when it is needed",
        command="pluribus compress RECIPE store/",
    ),
    Family(
        folder="decode/fusers",
        registry="pluribus.decode.fusers:FUSERS",
        kind="fuser",
        needs="Language models with one vocabulary, or vocabularies that can be aligned.",
        data="none",
        trains="nothing",
        at=("inference",),
        where=("logits",),
        memory="all models at once",
        inference="one pass of every model for each token",
        command="pluribus generate stack.yml TEXT",
    ),
    Family(
        folder="decode/scaling/strategies",
        registry="pluribus.decode.scaling.strategies:STRATEGIES",
        kind="test-time strategy",
        needs="A language model.",
        data="none",
        trains="nothing",
        at=("inference",),
        where=("program",),
        memory="one model, and one verifier where it is a model",
        inference="as many samples as the budget allows",
        command="pluribus scale MODEL --task TASK --strategies NAME",
    ),
)
EXTERNAL = {
    "gram": "the inputs' second moments (pluribus calibrate)",
    "fisher": "the Fisher information",
}


class Method(typing.NamedTuple):
    """A registered method and what its own code says."""

    family: Family
    name: str
    facts: Any
    parameters: Mapping[str, str]
    doc: str

    @property
    def file(self) -> str:
        """Its file, below the package."""
        return f"{self.family.folder}/{self.name}.py"

    def card(self) -> Card:
        """Return a card of the family's facts and its own."""
        first = self.doc.split("\n", 1)[0]
        title, _, said = first.partition(": ")
        summary = f"{said[:1].upper()}{said[1:]}" if said else first
        asked: tuple[str, ...] = getattr(self.facts, "needs", ())
        needs = self.family.needs
        if asked:
            needs += f" For each expert: {', '.join(EXTERNAL.get(one) or one for one in asked)}."
        if (verifier := getattr(self.facts, "verifier", "none")) != "none":
            needs += f" A verifier is {verifier}."
        return Card(
            name=self.name,
            title=title.rstrip("."),
            summary=summary,
            needs=needs,
            data="unlabelled" if asked else self.family.data,
            trains=self.family.trains,
            at=self.family.at,
            where=self.family.where,
            memory=self.family.memory,
            inference=self.family.inference,
            package=self.family.folder.replace("/", "."),
            paper=self.facts.paper,
            command=self.family.command.replace("NAME", self.name),
            facts=self.facts,
            parameters=self.parameters,
            doc=self.doc,
        )


def method(family: Family, name: str) -> Method:
    """Return one method of a family. Raises RecipeError for a name that it has not."""
    registry = family.methods()
    cls = registry[name]
    hints = typing.get_type_hints(cls)
    told = {}
    for item in dataclasses.fields(cls):
        kind = _kind(hints[item.name])
        required = item.default is item.default_factory is dataclasses.MISSING
        default = "required" if required else f"= {_default(item)!r}"
        renamed = item.name == "scale" and family.folder == "merge" and name != "passthrough"
        told["lambda" if renamed else item.name] = f"{kind} {default}"
    module = inspect.getmodule(cls)
    doc = (module.__doc__ if module else "") or cls.__doc__ or ""
    return Method(family, name, getattr(cls, registry.attribute), told, inspect.cleandoc(doc))


def methods() -> list[Method]:
    """Return all methods of all families."""
    return [method(family, name) for family in FAMILIES for name in family.methods()]


def _default(item: Any) -> Any:
    return item.default_factory() if item.default is dataclasses.MISSING else item.default


def _kind(hint: Any) -> str:
    """Return a type for people: `float | one per expert`, `'mean' | 'sum'`."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(repr, parts))
    if origin in (typing.Union, types.UnionType):
        return " | ".join("none" if one is type(None) else _kind(one) for one in parts)
    if origin is tuple and parts[1:] == (...,):
        return "one per expert" if parts[0] is float else f"several {_kind(parts[0])}"
    text = hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
    return text.replace("typing.", "")
