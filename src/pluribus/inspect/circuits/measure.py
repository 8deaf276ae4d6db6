"""How well a model does a task: as it is, with heads ablated, or with heads' attention set.

Accuracy is the share of prompts whose likeliest token, of the whole vocabulary, is the answer (or
another right one); `among` the share where the answer is the likeliest of the prompt's options.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pluribus.core.errors import InputError
from pluribus.core.shapes import Float
from pluribus.inspect.circuits.model import Cache, Head, HeadModel
from pluribus.inspect.circuits.prompts import Prompts, logit_difference

Kind = Literal["zero", "mean", "resample"]
KINDS: tuple[Kind, ...] = ("zero", "mean", "resample")
PART = 32  # prompts at once


@dataclass(frozen=True)
class Score:
    """What a model, as it was run, said to some prompts."""

    hits: tuple[bool, ...]  # the likeliest token is right
    hits_among: tuple[bool, ...]  # the answer is the likeliest option; empty: no options
    difference: Float[Tensor, " b"]  # logit(answer) - logit(alternative)
    attention: Mapping[Head, Mapping[str, float]] = field(default_factory=dict)  # of watched heads

    @property
    def accuracy(self) -> float:
        """Return the share of right answers, over the whole vocabulary."""
        return sum(self.hits) / len(self.hits)

    @property
    def among(self) -> float | None:
        """Return the share of prompts whose answer beats the other options; None: no options."""
        return sum(self.hits_among) / len(self.hits_among) if self.hits_among else None

    @property
    def mean_difference(self) -> float:
        """Return the mean logit difference."""
        return float(self.difference.mean())


def evaluate(
    heads: HeadModel, prompts: Prompts, watch: Mapping[Head, Collection[str]] | None = None
) -> Score:
    """Return the score of the model as it is; `watch`: attention from the end to named positions.

    Raises InputError for positions that prompts lack.
    """
    keep = ("pattern",) if watch else ()
    return _scored(heads, prompts, watch or {}, lambda part: heads.run(part.clean, part.ends, keep))


def ablate(
    heads: HeadModel,
    prompts: Prompts,
    ablated: Collection[Head],
    kind: Kind = "mean",
    *,
    everywhere: bool = False,
) -> Score:
    """Return the score without what some heads add.

    zero: their output is 0; mean: its mean over the prompts (with `everywhere`, at each place from
    the end); resample: that of the prompt's twin. At the end alone, or `everywhere`.

    Raises InputError for heads that are not there or another kind.
    """
    if kind not in KINDS:
        raise InputError(f"heads are ablated by {', '.join(KINDS)}, not {kind!r}")
    if not ablated:
        raise InputError("name at least one head to ablate")
    heads.check(ablated)
    nothing = torch.zeros(prompts.clean.shape[1], heads.size, device=heads.device)
    means = dict.fromkeys(ablated, nothing)
    if kind == "mean":
        means = _means(heads, prompts, ablated, everywhere)

    def run(part: Prompts) -> Cache:
        start = Cache.of(part.clean.to(heads.device), part.ends.to(heads.device))
        at = None if everywhere else part.ends[:, None]
        if kind == "resample":
            twin = heads.run(part.corrupt, part.ends, ("z",), at=at)
            values = {(layer, head): twin.z[layer][:, :, head] for layer, head in ablated}
        else:  # (b, s) places from the end; those of the padding do not matter
            width = part.clean.shape[1] if everywhere else 1
            first = torch.arange(width) if everywhere else part.ends[:, None]
            back = (part.ends[:, None] - first).clamp(min=0).to(heads.device)
            values = {head: means[head][back] for head in ablated}
        if not everywhere:
            values = {head: value[:, 0] for head, value in values.items()}
        return heads.patched(start, z=values)

    return _scored(heads, prompts, {}, run)


def force_attention(
    heads: HeadModel,
    prompts: Prompts,
    forced: Collection[Head],
    positions: Sequence[str],
    watch: Mapping[Head, Collection[str]] | None = None,
) -> Score:
    """Return the score when some heads look, from the end, at named positions in equal shares.

    The repair of the paper: heads that hinder the movers look at the WRONG options alone. Which
    options are wrong is the answer key, so this is a causal test and no fix to ship.

    Raises InputError for heads that are not there, no positions, or positions that prompts lack.
    """
    looked_at(heads, prompts, forced, positions)

    def run(part: Prompts) -> Cache:
        start = Cache.of(part.clean.to(heads.device), part.ends.to(heads.device))
        row = torch.zeros(part.clean.shape, device=heads.device)
        for name in positions:
            row[torch.arange(len(part)), part.position(name)] = 1.0
        row = row / row.sum(1, keepdim=True)
        keep = ("pattern",) if watch else ()
        return heads.patched(start, pattern=dict.fromkeys(forced, row), keep=keep)

    return _scored(heads, prompts, watch or {}, run)


def _means(
    heads: HeadModel, prompts: Prompts, ablated: Collection[Head], everywhere: bool
) -> dict[Head, Tensor]:
    """Return each head's mean z (s, e) by how far a token is from the end."""
    width = prompts.clean.shape[1]
    sums = {head: torch.zeros(width, heads.size, device=heads.device) for head in ablated}
    counts = torch.zeros(width, 1, device=heads.device)
    for part in prompts.parts(PART):
        back = part.ends[:, None] - torch.arange(part.clean.shape[1])
        if not everywhere:
            back = back.where(back == 0, -1)
        real = (back >= 0).to(heads.device)
        places = back[back >= 0].to(heads.device)
        kept = heads.run(part.clean, part.ends, ("z",))
        counts.index_add_(0, places, torch.ones(len(places), 1, device=heads.device))
        for layer, head in ablated:
            sums[layer, head].index_add_(0, places, kept.z[layer][:, :, head][real].float())
    return {head: total / counts.clamp(min=1) for head, total in sums.items()}


class Tally:
    """Counts what parts of some prompts gave; `watch`: heads and the positions they may look at."""

    def __init__(
        self, heads: HeadModel, prompts: Prompts, watch: Mapping[Head, Collection[str]]
    ) -> None:
        heads.check(list(watch))
        for name in {name for names in watch.values() for name in names}:
            prompts.position(name)
        self._count = len(prompts)
        self._hits: list[bool] = []
        self._among: list[bool] = []
        self._differences: list[Tensor] = []
        self._seen = {head: dict.fromkeys(names, 0.0) for head, names in watch.items()}

    def add(
        self,
        part: Prompts,
        logits: Float[Tensor, "b v"],
        rows: Mapping[Head, Float[Tensor, "b s"]],
    ) -> None:
        """Count a part's logits at the end, and watched heads' attention from there."""
        logits = logits.cpu()
        best = logits.argmax(-1).tolist()
        self._hits += [token in right for token, right in zip(best, part.right, strict=True)]
        for row, options in enumerate(part.options):
            if options:
                told = logits[row, list(options)]
                self._among.append(options[int(told.argmax())] in part.right[row])
        self._differences.append(logit_difference(logits, part))
        every = torch.arange(len(part))
        for head, names in self._seen.items():
            for name in names:
                names[name] += float(rows[head].cpu()[every, part.position(name)].sum())

    def score(self) -> Score:
        """Return the score of all parts."""
        seen = {
            head: {name: total / self._count for name, total in names.items()}
            for head, names in self._seen.items()
        }
        return Score(tuple(self._hits), tuple(self._among), torch.cat(self._differences), seen)


def looked_at(
    heads: HeadModel, prompts: Prompts, forced: Collection[Head], positions: Sequence[str]
) -> None:
    """Raise InputError for heads that are not there, and for positions that are none to look at."""
    if not forced or not positions:
        raise InputError("name at least one head and one position for it to look at")
    heads.check(forced)
    for name in positions:
        if bool((prompts.position(name) >= prompts.ends).any()):
            raise InputError(f"{name} is the end itself in some prompts; heads look back from it")


def _scored(
    heads: HeadModel,
    prompts: Prompts,
    watch: Mapping[Head, Collection[str]],
    run: Callable[[Prompts], Cache],
) -> Score:
    tally = Tally(heads, prompts, watch)
    for part in prompts.parts(PART):
        cache = run(part)
        every = torch.arange(len(part))
        rows = {(n, h): cache.pattern[n][every, h, part.ends] for n, h in watch}
        tally.add(part, cache.logits, rows)
    return tally.score()
