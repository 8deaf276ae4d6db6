"""How deep in a network a tensor lies, read from its name: `depth_map(weights)`.

Models keep their residual blocks in numbered lists, so a name holds its block's number somewhere:
`model.layers.7.mlp.up_proj.weight`, `blocks.3.mlp.0.weight`, `layer2.0.conv1.weight`. Which of a
name's numbers counts is decided for the whole model: the family `prefix.<number>.` whose members
look alike and that holds most parameters. A decoder beside an encoder goes on counting after it.
"""

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pluribus.core.errors import InputError, listing, nearest

Rule = Literal["auto"] | Sequence[str] | Callable[[str], int | None]

_NUMBERED = re.compile(r"(.*?)(\d+)")  # a component such as `layer2` or plain `2`
_STAGES = {"layer", "stage", "block", "layers", "stages", "blocks", "group", "res"}
_TAIL = re.compile(
    r"(^|\.)(lm_head|embed_out|output_projection|head|heads|classifier|fc|score|qa_outputs|pooler"
    r"|final_norm|final_layer_norm|final_layernorm|norm_f|ln_f|ln_final|ln_post|post_layernorm|norm"
    r"|visual_projection|text_projection|proj_out|output)(\.[a-z_]*)?$"
)


def is_tail(name: str) -> bool:
    """Return whether a tensor outside the blocks follows them, by its name: final norm or head."""
    return _TAIL.search(name) is not None and "embed." not in name and "embeddings." not in name


@dataclass(frozen=True)
class DepthMap:
    """Block numbers by tensor name; None for tensors outside the blocks."""

    layers: Mapping[str, int | None]
    count: int
    labels: tuple[str, ...]  # where each block lives, e.g. "model.layers.0"
    sizes: Mapping[str, int]  # elements of each tensor

    @property
    def outside(self) -> list[str]:
        """Names of the tensors that lie in no block."""
        return [name for name, layer in self.layers.items() if layer is None]

    @property
    def coverage(self) -> float:
        """Share of the parameters that lie in blocks."""
        total = sum(self.sizes.values())
        out = sum(self.sizes[name] for name in self.outside)
        return 1 - out / total if total else 0.0

    def table(self) -> str:
        """Return one line a block and one for what is outside: number, place, tensors, elements."""
        rows = [("block", "name", "tensors", "elements")]
        groups: dict[int | None, list[str]] = defaultdict(list)
        for name, layer in self.layers.items():
            groups[layer].append(name)
        for number, label in enumerate(self.labels):
            names = groups[number]
            rows.append((str(number), label, str(len(names)), str(self._elements(names))))
        before = [name for name in groups[None] if not is_tail(name)]
        after = [name for name in groups[None] if is_tail(name)]
        for label, names in (("outside", before), ("outside (tail)", after)):
            if names:
                shown = f"{label}: {listing(names, 2)}"
                rows.append(("-", shown, str(len(names)), str(self._elements(names))))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
            cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def _elements(self, names: Iterable[str]) -> int:
        return sum(self.sizes[name] for name in names)

    def require(self, purpose: str) -> "DepthMap":
        """Return the map if it has two blocks or more; warn if it leaves half of the model out.

        Raises InputError with the model's module paths.
        """
        if self.count < 2:
            modules = dict.fromkeys(name.rpartition(".")[0] for name in self.layers)
            raise InputError(
                f"{purpose} needs two numbered blocks or more, and {self.count} were found among: "
                f"{listing(modules, 12)}. Name them, e.g. ['model.layers.{{}}'] or ['a', 'b']."
            )
        if self.coverage < 0.5:
            warnings.warn(
                f"{purpose}: only {self.coverage:.0%} of the parameters lie in the {self.count} "
                f"blocks {self.labels[0]} ... {self.labels[-1]}; outside are "
                f"{listing(self.outside)}",
                stacklevel=2,
            )
        return self


def depth_map(
    tensors: Mapping[str, Any],
    rule: Rule = "auto",
    *,
    decoder: Literal["continue", "restart"] = "continue",
) -> DepthMap:
    """Number the blocks of a model given as `Weights`, specs, arrays or shapes by name.

    `rule` is "auto"; or a list of block prefixes in their order, where one with `{}` stands for a
    numbered family; or a callable from a name to its block (None: outside). Raises InputError for a
    prefix that no tensor has. A map without blocks is a valid answer: `require` refuses it.
    """
    specs = getattr(tensors, "spec", tensors)
    sizes = {name: _size(value) for name, value in specs.items()}
    if callable(rule):
        return _by_function(sizes, rule)
    if isinstance(rule, str):
        if rule != "auto":
            raise InputError(f"depth = {rule!r}: give 'auto', a list of prefixes, or a function")
        families = _automatic(sizes)
    else:
        families = [_explicit(sizes, prefix) for prefix in rule]
    if decoder == "restart":
        return _restarting(sizes, families)
    layers: dict[str, int | None] = dict.fromkeys(sizes)
    labels: list[str] = []
    for family in families:
        for label, names in family:
            for name in names:
                layers[name] = len(labels)
            labels.append(label)
    return DepthMap(layers, len(labels), tuple(labels), sizes)


Family = list[tuple[str, list[str]]]  # blocks in order: label and tensor names


def _size(value: Any) -> int:
    shape = getattr(value, "shape", value)
    return math.prod(shape)


def _by_function(sizes: Mapping[str, int], rule: Callable[[str], int | None]) -> DepthMap:
    layers: dict[str, int | None] = {}
    for name in sizes:
        layer = rule(name)
        if layer is not None and (not isinstance(layer, int) or layer < 0):
            raise InputError(
                f"the depth of {name!r} is {layer!r}; a block is numbered from 0, outside is None"
            )
        layers[name] = layer
    count = 1 + max((layer for layer in layers.values() if layer is not None), default=-1)
    return DepthMap(layers, count, tuple(f"block {i}" for i in range(count)), sizes)


def _restarting(sizes: Mapping[str, int], families: list[Family]) -> DepthMap:
    """Number each family from 0; shorter ones are stretched to the depth of the longest."""
    count = max((len(family) for family in families), default=0)
    layers: dict[str, int | None] = dict.fromkeys(sizes)
    labels: list[list[str]] = [[] for _ in range(count)]
    for family in families:
        for k, (label, names) in enumerate(family):
            depth = k if len(family) == 1 else round(k * (count - 1) / (len(family) - 1))
            labels[depth].append(label)
            for name in names:
                layers[name] = depth
    return DepthMap(layers, count, tuple(" and ".join(both) for both in labels), sizes)


def _explicit(sizes: Mapping[str, int], prefix: str) -> Family:
    """Return the blocks that a prefix names: one, or one for each number in place of `{}`."""
    if prefix.count("{}") > 1:
        raise InputError(f"the prefix {prefix!r} has more than one {{}}")
    pattern = re.escape(prefix).replace(r"\{\}", r"(\d+)")
    found: dict[int, list[str]] = defaultdict(list)
    for name in sizes:
        match = re.match(pattern + r"(\.|$)", name)
        if match:
            found[int(match[1]) if "{}" in prefix else 0].append(name)
    if not found:
        stems = {name[: i.start()] for name in sizes for i in re.finditer(r"\.", name)}
        raise InputError(f"no tensor lies in {prefix!r}.{nearest(prefix, sorted(stems))}")
    return [(prefix.replace("{}", str(i)), found[i]) for i in sorted(found)]


def _automatic(sizes: Mapping[str, int]) -> list[Family]:
    members: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in sizes:
        parts = name.split(".")
        for i, part in enumerate(parts[:-1]):
            match = _NUMBERED.fullmatch(part)
            if match is None or (match[1] and match[1].rstrip("_") not in _STAGES):
                continue
            prefix = ".".join([*parts[:i], match[1]])
            # The rest of the name, with inner numbers made alike: what kind of member this is.
            rest = re.sub(r"\d+", "#", ".".join(parts[i + 1 :]))
            members[prefix][int(match[2])][name] = rest
    best, most = None, 0
    for prefix in sorted(members, key=lambda p: (p.count("."), p)):
        blocks = members[prefix]
        alike = _alike(blocks, sizes)
        if len(blocks) > 1 and alike > most:
            best, most = prefix, alike
    if best is None:
        return []
    return [_family(prefix, members[prefix]) for prefix in _with_decoder(best, members)]


def _alike(blocks: Mapping[int, Mapping[str, str]], sizes: Mapping[str, int]) -> int:
    """Count the parameters of the members that share a tensor with half of the family or more.

    0 if they hold fewer tensors than the other members: then those contain the blocks.
    """
    seen: dict[str, int] = defaultdict(int)
    for names in blocks.values():
        for rest in set(names.values()):
            seen[rest] += 1
    typical = {rest for rest, count in seen.items() if count > 1 and 2 * count >= len(blocks)}
    alike = [names for names in blocks.values() if typical & set(names.values())]
    total = sum(len(names) for names in blocks.values())
    if 2 * sum(len(names) for names in alike) < total:
        return 0
    return sum(sizes[name] for names in alike for name in names)


def _family(prefix: str, blocks: Mapping[int, Mapping[str, str]]) -> Family:
    return [(f"{prefix}{i}", list(blocks[i])) for i in sorted(blocks)]


def _with_decoder(prefix: str, members: Mapping[str, Any]) -> list[str]:
    """Return encoder and decoder families in that order, if `prefix` is one and has the other."""
    parts = prefix.split(".")
    for one, other in (("encoder", "decoder"), ("decoder", "encoder")):
        if one not in parts:
            continue
        twin = ".".join(other if part == one else part for part in parts)
        if twin in members:
            return [prefix, twin] if one == "encoder" else [twin, prefix]
    return [prefix]
