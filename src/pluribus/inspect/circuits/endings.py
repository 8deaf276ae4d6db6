"""Many interventions at the end of the same prompts, each in a pass of one token.

What is changed at the last token changes nothing before it, so keys and values of all others are
read once. A head that looks at set places gives the mean of their values, which are known too.

    endings = Endings(heads, prompts)
    endings.score().accuracy
    endings.ablate([(23, 3)], "mean").mean_difference
    endings.force_attention([(24, 4)], ["wrong1", "wrong2"]).accuracy

Equal to `measure.evaluate`, `ablate` and `force_attention`, but for rounding.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from pluribus.core.errors import InputError
from pluribus.inspect.circuits.fast import Sweep
from pluribus.inspect.circuits.measure import KINDS, PART, Kind, Score, Tally, looked_at
from pluribus.inspect.circuits.model import Head, HeadModel
from pluribus.inspect.circuits.patching import OnStep
from pluribus.inspect.circuits.prompts import Prompts

Watch = Mapping[Head, Collection[str]]


class Endings:
    """Prompts whose keys and values are kept. Memory: keys and values of all of their tokens."""

    def __init__(self, heads: HeadModel, prompts: Prompts, on_step: OnStep | None = None) -> None:
        self.heads, self.prompts = heads, prompts
        self._sweeps: list[Sweep] = []
        parts = prompts.parts(PART)
        for number, part in enumerate(parts):
            with torch.no_grad():
                self._sweeps.append(Sweep(heads, part, part.ends, later=True))
            if on_step is not None:
                on_step("reading prompts", number + 1, len(parts))

    def score(self, watch: Watch | None = None) -> Score:
        """Return the score of the model as it is; see `measure.evaluate`."""
        return self._scored([{} for _ in self._sweeps], watch)

    def ablate(self, ablated: Collection[Head], kind: Kind = "mean") -> Score:
        """Return the score without what some heads add at the end; see `measure.ablate`."""
        if kind not in KINDS:
            raise InputError(f"heads are ablated by {', '.join(KINDS)}, not {kind!r}")
        if not ablated:
            raise InputError("name at least one head to ablate")
        self.heads.check(ablated)
        values: list[dict[Head, Tensor]] = []
        for sweep in self._sweeps:
            own = {}
            for layer, head in ablated:
                if kind == "resample":
                    own[layer, head] = sweep.corrupt.z[layer][:, 0, head]
                else:
                    own[layer, head] = torch.zeros_like(sweep.here(sweep.clean.z[layer])[:, head])
            values.append(own)
        if kind == "mean":
            for layer, head in ablated:
                kept = [sweep.here(sweep.clean.z[layer])[:, head] for sweep in self._sweeps]
                mean = torch.cat(kept).float().mean(0)
                for own, part in zip(values, kept, strict=True):
                    own[layer, head] = mean.expand(len(part), -1)
        return self._scored(values)

    def force_attention(
        self, forced: Collection[Head], positions: Sequence[str], watch: Watch | None = None
    ) -> Score:
        """Return the score when some heads look at named positions; see `measure`."""
        looked_at(self.heads, self.prompts, forced, positions)
        values: list[dict[Head, Tensor]] = []
        for sweep in self._sweeps:
            places = [sweep.prompts.position(name).to(self.heads.device) for name in positions]
            row = torch.zeros(sweep.prompts.clean.shape, device=self.heads.device)
            for place in places:
                row[sweep.rows, place] = 1.0
            row = row / row.sum(1, keepdim=True)
            own = {}
            for layer, head in forced:
                kept = sweep.clean.v[layer][:, self.heads.group_of(head)]
                own[layer, head] = torch.einsum("bs,bse->be", row.to(kept), kept)
            values.append(own)
        return self._scored(values, watch)

    def _scored(self, values: Sequence[dict[Head, Tensor]], watch: Watch | None = None) -> Score:
        watch = watch or {}
        tally = Tally(self.heads, self.prompts, watch)
        layers = sorted({layer for layer, _ in watch})
        with torch.no_grad():
            for sweep, own in zip(self._sweeps, values, strict=True):
                logits, seen = sweep.settled(own, layers)
                rows = {}
                for layer, head in watch:
                    row = seen[layer][:, head, :-1].clone()
                    row[sweep.rows, sweep.clean.ends] = seen[layer][:, head, -1]  # its own place
                    rows[layer, head] = row
                tally.add(sweep.prompts, logits, rows)
        return tally.score()
