"""How a recipe's slices become tensors: numbered families, modules, and what lies outside layers.

There is no table of architectures. The first whole number between dots in a tensor's name is its
layer, what stands before it the family: `model.layers.7.mlp.up_proj.weight` is layer 7 of
`model.layers`. A tensor without such a number lies outside; with several slices it comes from the
first one, or from the last if its name says that it follows the layers (final norm, head).
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pluribus.core.depth import is_tail
from pluribus.core.errors import MismatchError, RecipeError, listing, nearest
from pluribus.core.weights import Weights

_LAYER = re.compile(r"\.(\d+)\.")
# Buffers that a model computes by itself; files of the same model may or may not hold them.
DERIVED = re.compile(
    r"(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|attn\.masked_bias|attention\.masked_bias"
    r"|attn\.bias|attention\.bias|embeddings\.position_ids)$"
)
# mergekit's names for the parts of its multi-module architectures, and what files call them.
PARTS = {
    "text_decoder": ("language_model", "text_model", "model"),
    "vision_tower": ("vision_tower", "vision_model", "visual"),
    "vision_model": ("vision_model", "vision_tower", "visual"),
    "multi_modal_projector": ("multi_modal_projector", "merger"),
}


class Named(NamedTuple):
    """A tensor's place by its name."""

    family: str | None  # None: outside the layers
    layer: int
    rest: str


def place_of(name: str) -> Named:
    """Return family, layer and the rest of a tensor's name."""
    found = _LAYER.search(name)
    if found is None:
        return Named(None, -1, name)
    return Named(name[: found.start()], int(found[1]), name[found.end() :])


@dataclass(frozen=True)
class Layers:
    """The tensors of one model by family and layer."""

    families: Mapping[str, Mapping[int, Mapping[str, str]]]  # family: {layer: {rest: name}}
    outside: tuple[str, ...]

    @classmethod
    def of(cls, names: Iterable[str]) -> "Layers":
        """Sort a model's tensor names."""
        families: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
        outside = []
        for name in names:
            place = place_of(name)
            if place.family is None:
                outside.append(name)
            else:
                families[place.family][place.layer][place.rest] = name
        return cls({family: dict(layers) for family, layers in families.items()}, tuple(outside))

    def count(self, family: str) -> int:
        """Return one more than the family's highest layer number."""
        return 1 + max(self.families.get(family, {}), default=-1)


@dataclass(frozen=True)
class Part:
    """One model's layers within an output slice. `where` is the position in the user's words."""

    model: str  # label
    weights: Weights
    layers: Layers
    layer_range: tuple[int, int] | None  # None: all
    parameters: Mapping[str, Any]
    extras: Mapping[str, Weights] = field(default_factory=dict)


@dataclass(frozen=True)
class OutSlice:
    """Layers of the output: its inputs in order, the base (one of them, or none), its settings."""

    parts: tuple[Part, ...]
    base: int | None
    parameters: Mapping[str, Any]
    module: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Section:
    """A module of the output: which tensors are its own, and its slices in order."""

    name: str
    slices: tuple[OutSlice, ...]


@dataclass(frozen=True)
class Item:
    """One tensor of the output and the names of its inputs, one for each part of its slice."""

    name: str
    inputs: tuple[str, ...]
    slice_: OutSlice
    t: float  # position for gradients
    tail: bool = False  # outside the layers, after them
    source_layer: tuple[str, int] | None = None  # family and layer of the first part


@dataclass(frozen=True)
class Stack:
    """How a sliced family was put together: for each output layer, a model and its layer."""

    section: str
    family: str
    before: int  # layers of the reference
    layers: tuple[tuple[Part, int], ...]


@dataclass(frozen=True)
class Layout:
    """The output's tensors, and what had to be done to the layers."""

    items: tuple[Item, ...]
    stacks: tuple[Stack, ...]
    notes: tuple[str, ...]


Lookup = Callable[[Weights, str], str | None]  # the name a model has for a tensor, or None


def lay_out(sections: Sequence[Section], reference: Weights, lookup: Lookup) -> Layout:
    """Return every tensor of the output.

    Raises RecipeError for slices that don't fit and for modules that leave tensors out,
    MismatchError with all names that some model lacks.
    """
    owner = _owners(sections, reference)
    items: list[Item] = []
    stacks: list[Stack] = []
    notes: list[str] = []
    lacks: dict[str, list[str]] = defaultdict(list)
    for section in sections:
        families, outside = _own(section, owner)
        first = section.slices[0]
        sliced = len(section.slices) > 1 or any(
            part.layer_range is not None for s in section.slices for part in s.parts
        )
        if sliced and len(families) > 1:
            raise RecipeError(
                f"{first.where}: this model has {len(families)} families of layers "
                f"({listing(families)}), so a layer_range is ambiguous; name each in modules:"
            )
        if sliced and not families:
            raise RecipeError(
                f"{first.where}: no numbered layers were found in {first.parts[0].model}, so "
                "there is nothing to slice"
            )
        found = [*_outside(section, outside, tail=False, lookup=lookup, lacks=lacks, notes=notes)]
        for family in families:
            inner, stack = _layers(section, family, sliced, lookup, lacks, notes)
            found += inner
            if sliced:
                before = Layers.of(reference).count(family)
                stacks.append(Stack(section.name, family, before, tuple(stack)))
        found += _outside(section, outside, tail=True, lookup=lookup, lacks=lacks, notes=notes)
        items += found
    if lacks:
        raise MismatchError(_missing(lacks))
    order = {name: i for i, name in enumerate(reference)}
    if not stacks:
        items.sort(key=lambda item: order.get(item.name, len(order)))
    twice = [name for name, count in _counts(item.name for item in items).items() if count > 1]
    if twice:
        raise RecipeError(f"several modules make the same tensors: {listing(twice)}")
    return Layout(tuple(items), tuple(stacks), tuple(dict.fromkeys(notes)))


# -- modules ---------------------------------------------------------------------------------------


def _roots(section: str, names: Sequence[str]) -> list[str]:
    """Return the dotted prefixes that a module's name stands for."""
    for word in (section, *PARTS.get(section, ())):
        roots = {}
        for name in names:
            if name == word or name.startswith(f"{word}."):
                roots[word] = None
            parts = name.split(".")
            if "." not in word and word in parts[:-1]:
                roots[".".join(parts[: parts.index(word) + 1])] = None
        if roots:
            shortest = min(root.count(".") for root in roots)
            return [root for root in roots if root.count(".") == shortest]
    return []


def _owners(sections: Sequence[Section], reference: Weights) -> dict[str, str]:
    """Return the module of every tensor of the inputs, by name."""
    names = list(
        dict.fromkeys(
            name
            for weights in [
                reference,
                *(p.weights for s in sections for o in s.slices for p in o.parts),
            ]
            for name in weights
        )
    )
    if len(sections) == 1 and sections[0].name == "default":
        return dict.fromkeys(names, "default")
    roots: dict[str, str] = {}
    for section in sections:
        if section.name == "default":
            continue
        found = _roots(section.name, names)
        if not found:
            stems = {name.rpartition(".")[0].split(".", 1)[0] for name in names}
            families = {f for name in names if (f := place_of(name).family) is not None}
            raise RecipeError(
                f"modules: no tensor lies in a module called {section.name!r}; there are: "
                f"{listing(sorted(stems | families), 12)}, and 'default' for the rest."
                + nearest(section.name, stems | families)
            )
        roots |= dict.fromkeys(found, section.name)
    owner = {}
    left = []
    for name in names:
        inside = [r for r in roots if name == r or name.startswith(f"{r}.")]
        if inside:
            owner[name] = roots[max(inside, key=len)]
        elif any(section.name == "default" for section in sections):
            owner[name] = "default"
        else:
            left.append(name)
    loose = [name for name in left if place_of(name).family is None]
    if len(loose) < len(left):
        lost = {place_of(name).family or "" for name in left} - {""}
        raise RecipeError(
            f"modules: {listing(sorted(lost))} belong to no module, and would be lost; add a "
            "module called 'default' for the rest"
        )
    if loose:  # a head beside a decoder: it goes with the largest module
        sizes: dict[str, int] = defaultdict(int)
        for name, module in owner.items():
            if name in reference:
                sizes[module] += reference.source(name).spec.size
        owner |= dict.fromkeys(loose, max(sizes, key=lambda module: sizes[module]))
    return owner


def _own(section: Section, owner: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the families and outside tensors of a module, in the order of its first model."""
    families: dict[str, None] = {}
    outside: dict[str, None] = {}
    for out in section.slices:
        for part in out.parts:
            for name in part.weights:
                if owner[name] != section.name:
                    continue
                family = place_of(name).family
                if family is None:
                    outside[name] = None
                else:
                    families[family] = None
    return list(families), list(outside)


# -- tensors ---------------------------------------------------------------------------------------


def _outside(
    section: Section,
    names: Sequence[str],
    *,
    tail: bool,
    lookup: Lookup,
    lacks: dict[str, list[str]],
    notes: list[str],
) -> list[Item]:
    """Return the tensors before (or after) the layers: from the first (or last) slice."""
    out = section.slices[-1 if tail else 0]
    items = []
    for name in names:
        if is_tail(name) != tail:
            continue
        inputs = _inputs(out, [name] * len(out.parts), lookup, lacks, notes)
        if inputs is not None:
            items.append(Item(name, inputs, out, 0.0, tail))
    return items


def _layers(
    section: Section,
    family: str,
    sliced: bool,
    lookup: Lookup,
    lacks: dict[str, list[str]],
    notes: list[str],
) -> tuple[list[Item], list[tuple[Part, int]]]:
    items: list[Item] = []
    stack: list[tuple[Part, int]] = []
    for out in section.slices:
        ranges = [_range(part, family, out.where) for part in out.parts]
        lengths = {stop - start for start, stop in ranges}
        if len(lengths) > 1:
            told = ", ".join(
                f"{part.model} {list(r)}" for part, r in zip(out.parts, ranges, strict=True)
            )
            raise RecipeError(
                f"{out.where}: the models have different numbers of layers in {family} ({told}); "
                "give each a layer_range of the same length"
            )
        length = lengths.pop()
        for offset in range(length):
            t = offset / (length - 1) if length > 1 else 1.0
            number = len(stack) if sliced else ranges[0][0] + offset
            numbers = [start + offset for start, _ in ranges]
            rests: dict[str, None] = {}
            for part, k in zip(out.parts, numbers, strict=True):
                rests |= dict.fromkeys(part.layers.families.get(family, {}).get(k, {}))
            for rest in rests:
                wanted = [f"{family}.{k}.{rest}" for k in numbers]
                inputs = _inputs(out, wanted, lookup, lacks, notes)
                if inputs is not None:
                    name = f"{family}.{number}.{rest}"
                    items.append(Item(name, inputs, out, t, False, (family, numbers[0])))
            stack.append((out.parts[0], numbers[0]))
    return items, stack


def _range(part: Part, family: str, where: str) -> tuple[int, int]:
    count = part.layers.count(family)
    if part.layer_range is None:
        return 0, count
    start, stop = part.layer_range
    if stop > count:
        raise RecipeError(
            f"{where}: layer_range [{start}, {stop}] of {part.model}, which has {count} layers in "
            f"{family}" + (f"; the last possible end is {count}" if count else "")
        )
    return start, stop


def _inputs(
    out: OutSlice,
    wanted: Sequence[str],
    lookup: Lookup,
    lacks: dict[str, list[str]],
    notes: list[str],
) -> tuple[str, ...] | None:
    """Return the input names of one output tensor; None if some model lacks it."""
    found = [lookup(part.weights, name) for part, name in zip(out.parts, wanted, strict=True)]
    if all(name is not None for name in found):
        return tuple(name for name in found if name is not None)
    if any(DERIVED.search(name) for name in wanted):
        kind = DERIVED.search(wanted[0])
        assert kind is not None
        notes.append(
            f"buffers *.{kind[0]} are left out: some models lack them, and a model computes them"
        )
        return None
    for part, name, got in zip(out.parts, wanted, found, strict=True):
        if got is None:
            lacks[part.model].append(name)
    return None


def _missing(lacks: Mapping[str, list[str]]) -> str:
    told = "; ".join(f"{model} lacks {listing(names)}" for model, names in lacks.items())
    return f"{told}. Only models with the same tensors can be merged"


def _counts(names: Iterable[str]) -> dict[str, int]:
    out: dict[str, int] = defaultdict(int)
    for name in names:
        out[name] += 1
    return out
