"""What changed between two checkpoints: `difference(before, after)`.

Tensors are matched by name, also where one file has a prefix (`model.`) that the other lacks. For
every pair of equal shape, with D = after - before, one pass in blocks gives

    change = |D| / |before|       largest = max |D|       changed = share of elements with D != 0

and whether `after` is exactly `before` rounded to another element type. Where rows were added or
taken away (an embedding for another vocabulary), the rows both have are compared. A changed matrix
is called *low rank* if at most `SKETCH` directions, and at most an eighth of its shorter side, hold
`HELD` of |D|^2: the range of D is sketched with random vectors (Halko, Martinsson and Tropp 2011,
https://arxiv.org/abs/0909.4061, algorithm 4.4 with one power step), so the rank given is an upper
bound, usually tight. A merge of a LoRA adapter is seen that way through the rounding of 16 bits.

Models of different architectures can be compared: what they share is, and the rest is listed.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pluribus.core.depth import depth_map, is_tail
from pluribus.core.errors import InputError
from pluribus.core.weights import Weights
from pluribus.engine.run import Progress
from pluribus.inspect.change import Change, Sum
from pluribus.inspect.compare import compare
from pluribus.inspect.kinds import ORDER
from pluribus.inspect.settings import files, settings, ties

LARGEST = 1 << 27  # elements of a matrix whose rank is looked for
PREFIXES = ("model.", "base_model.model.", "transformer.", "module.", "_orig_mod.", "encoder.")


@dataclass(frozen=True)
class Difference:
    """What `difference` found."""

    before: str
    after: str
    tensors: dict[str, Change]  # that both have, in the order of `before`
    removed: dict[str, str]  # only in `before`: what they are
    added: dict[str, str]
    settings: tuple[tuple[str, Any, Any], ...]  # keys of config.json, before and after
    files: tuple[tuple[str, str], ...]  # tokenizer and other files: name, what happened
    renamed: str  # the prefix that `before`'s names (-) or `after`'s (+) have more, "" if none
    blocks: int
    seconds: float
    bytes_read: int
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def layers(self) -> dict[str, Sum]:
        """Sums by block, between what comes before the blocks and what follows them."""
        order = ["before", *map(str, range(self.blocks)), "after"]
        return self._by(self.place, order)

    @cached_property
    def kinds(self) -> dict[str, Sum]:
        """Sums by module kind."""
        return self._by(lambda change: change.kind, ORDER)

    def place(self, change: Change) -> str:
        """Return the label of a tensor's layer."""
        if change.layer is not None:
            return str(change.layer)
        return "after" if self.blocks and is_tail(change.name) else "before"

    def _by(self, label: Callable[[Change], str], order: Sequence[str]) -> dict[str, Sum]:
        groups: dict[str, list[Change]] = {name: [] for name in order}
        for change in self.tensors.values():
            groups[label(change)].append(change)
        return {name: Sum.of(group) for name, group in groups.items() if group}

    @cached_property
    def model(self) -> Sum:
        """The sum over all tensors that both have."""
        return Sum.of(list(self.tensors.values()))

    @cached_property
    def verdicts(self) -> tuple[str, ...]:
        """What happened, in sentences, the most telling first."""
        from pluribus.inspect.verdicts import verdicts

        return verdicts(self)

    def table(self) -> str:
        """Return the findings for a terminal."""
        from pluribus.inspect.render_difference import terminal

        return terminal(self)

    def html(self, title: str = "") -> str:
        """Return the findings as one self-contained page."""
        from pluribus.inspect.render_difference import page

        return page(self, title)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "before": self.before,
            "after": self.after,
            "verdicts": list(self.verdicts),
            "model": self.model.to_dict(),
            "layers": {name: one.to_dict() for name, one in self.layers.items()},
            "kinds": {name: one.to_dict() for name, one in self.kinds.items()},
            "tensors": {
                name: {
                    "layer": one.layer,
                    "kind": one.kind,
                    "shape": list(one.shape),
                    "new_shape": list(one.new_shape),
                    "dtype": one.dtype,
                    "new_dtype": one.new_dtype,
                    "ratio": one.ratio,
                    "norm": one.moved,
                    "largest": one.largest,
                    "changed": one.share,
                    "rank": one.rank,
                    "rounded": one.rounded,
                    "non_finite": list(one.non_finite),
                }
                for name, one in self.tensors.items()
            },
            "removed": self.removed,
            "added": self.added,
            "config": [{"key": k, "before": b, "after": a} for k, b, a in self.settings],
            "files": dict(self.files),
            "prefix": self.renamed,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
            "bytes_read": self.bytes_read,
        }


def difference(
    before: Any,
    after: Any,
    *,
    ranks: bool = True,
    memory: int = 512 << 20,
    on_progress: Callable[[Progress], None] | None = None,
) -> Difference:
    """Compare two checkpoints of any kind that `Weights.open` takes; the first is the reference.

    `ranks` also tells low-rank from dense changes, for matrices that fit into `memory` bytes.
    Raises InputError if the two have no tensor in common, naming the first of each.
    """
    began = time.perf_counter()
    one, other = Weights.open(before), Weights.open(after)
    matched, renamed = _matched(list(one.spec), list(other.spec), one, other)
    if not matched:
        first, second = next(iter(one), "nothing"), next(iter(other), "nothing")
        raise InputError(
            f"{one.label} and {other.label} have no tensor name in common ({first!r} and "
            f"{second!r} are their first): there is nothing to compare"
        )
    blocks = depth_map(one)
    told = Progress(
        0, sum(one.source(a).spec.nbytes + other.source(b).spec.nbytes for a, b in matched.items())
    )
    found = {}
    for name, second in matched.items():
        pair = one.source(name), other.source(second)
        largest = min(LARGEST, memory // 12) if ranks else 0
        found[name] = compare(name, *pair, blocks.layers.get(name), largest)
        told.done += pair[0].spec.nbytes + pair[1].spec.nbytes
        if on_progress:
            on_progress(told)
    used = set(matched.values())
    return Difference(
        one.label,
        other.label,
        found,
        {name: str(spec) for name, spec in one.spec.items() if name not in matched},
        {name: str(spec) for name, spec in other.spec.items() if name not in used},
        settings(one.config(), other.config()),
        files(one.folder, other.folder),
        renamed,
        blocks.count,
        time.perf_counter() - began,
        told.done,
        ties(one, other),
    )


def _matched(
    names: list[str], others: list[str], one: Weights, other: Weights
) -> tuple[dict[str, str], str]:
    """Pair names, as they are or with a prefix that one side has more; the most pairs win."""
    known = set(others)

    def pairs(change: Callable[[str], str | None]) -> dict[str, str]:
        made = {name: change(name) for name in names}
        return {name: to for name, to in made.items() if to is not None and to in known}

    best, told = pairs(lambda name: name), ""
    if len(best) < len(names):
        for prefix in PREFIXES:
            less = pairs(lambda n, p=prefix: n.removeprefix(p) if n.startswith(p) else n)
            more = pairs(lambda n, p=prefix: n if n in known else p + n)
            for sign, found in (("-", less), ("+", more)):
                if len(found) > len(best) and len(set(found.values())) == len(found):
                    best, told = found, sign + prefix
    for name in names:  # a name that the other side ties to another tensor
        if name not in best and name in other:
            target = other.aliases.get(name, name)
            if target not in best.values():
                best[name] = target
    return {name: best[name] for name in names if name in best}, told
