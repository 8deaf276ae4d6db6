"""`Blend`: a differentiable composition of a pool, without a graph through the merge.

    theta_j = theta0_j + m_j * sum_t c[r(j), t, g] tau_tj

The merged tensors are leaves. Run the model on them, let it collect gradients G_j = dL/dtheta_j,
over as many tasks and batches as wanted, and the coefficients' gradients are inner products:

    dL/dc[r, t, g] = sum over j in r of <(m_j * G_j) restricted to g, tau_tj>
    dL/dm_j        = G_j * sum_t c tau_tj

so a step costs one model, its gradient and one task vector at a time in memory, and two reads of
the task vectors. Task vectors are held in memory, or read from their files at every use
(`resident=False`). Coefficients are clamped as torch clamps: outside the range no gradient passes,
on its ends it does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pluribus.core.chain import Chain, parse
from pluribus.core.coefficients import Coefficients, groups
from pluribus.core.depth import depth_map
from pluribus.core.errors import InputError, listing, nearest
from pluribus.core.pool import Pool
from pluribus.core.weights import Weights

By = Literal["model", "layer", "tensor"]
Leaves = dict[str, Tensor]


class Blend:
    """Coefficients (r, t, g) over a pool: rows r are tensors, layers or the whole model.

    `coefficients` is the tensor to optimise. `tensors` maps each blended tensor to its row, in the
    pool's order; all others (integers, `exclude`) stay the base's. Raises InputError if nothing
    can be blended.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        by: By | Callable[[str], str] = "tensor",
        init: float = 0.3,
        clamp: tuple[float, float] | None = None,
        of: str = "",
        partitions: int = 1,
        seed: int = 0,
        exclude: Sequence[str] | Callable[[str], bool] = (),
        resident: bool = True,
        task_vector_dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if pool.base is None:
            raise InputError("coefficients are learned for updates of a base; give a base model")
        self.pool, self.of, self.clamp = pool, of, clamp
        self.partitions, self.seed, self.device = partitions, seed, torch.device(device)
        self.base: Weights = pool.base
        self.experts = tuple(pool.experts)
        floats = [name for name in pool.names if self.base.source(name).spec.kind.is_float]
        leave = _chosen(floats, exclude)
        names = [name for name in floats if name not in leave]
        if not names:
            raise InputError(
                "none of the models' tensors is floating point and not excluded: there is nothing "
                "to blend"
            )
        rows = _rows(names, by, self.base)
        self.rows: tuple[str, ...] = tuple(dict.fromkeys(rows.values()))
        self.tensors: dict[str, int] = {name: self.rows.index(rows[name]) for name in names}
        shape = (len(self.rows), len(self.experts), partitions)
        self.coefficients = torch.full(shape, init, device=self.device, requires_grad=True)
        self.fixed = {
            name: _whole(self.base, name, self.device) for name in pool.names if name not in names
        }
        self._base = {name: _whole(self.base, name, self.device).float() for name in names}
        self._groups = (
            {n: torch.from_numpy(groups(n, self._base[n].numel(), partitions, seed)) for n in names}
            if partitions > 1
            else {}
        )
        self._groups = {name: index.to(self.device) for name, index in self._groups.items()}
        self.kept: dict[str, tuple[int, ...]] = {n: tuple(range(len(self.experts))) for n in names}
        if of:
            _check_steps(of)
            resident = True  # steps look at whole models; their result is kept
        self._dtype = task_vector_dtype
        self._held: dict[str, Tensor] | None = None
        if resident:
            self._held = {
                name: self._stored(tau)
                for name, tau in (_stepped(pool, of, names) if of else self._streamed(names))
            }

    # -- task vectors ----------------------------------------------------------------------------

    def _streamed(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, self._read(name)

    def _read(self, name: str) -> Tensor:
        base = self._base[name].reshape(-1)
        out = torch.empty(len(self.kept[name]), base.numel(), device=self.device)
        labels = [self.experts[t] for t in self.kept[name]]
        for row, label in zip(out, labels, strict=True):
            expert = torch.from_numpy(self.pool.experts[label].source(name).floats())
            torch.sub(expert.to(self.device), base, out=row)
        return out

    def _stored(self, tau: Tensor) -> Tensor:
        return tau.to(self.device, self._dtype or tau.dtype)

    def task_vectors(self, name: str) -> Tensor:
        """Return the task vectors of one tensor, flattened, after the steps: (t, n) float32."""
        if self._held is None:
            return self._stored(self._read(name)).float()
        return self._held[name].float()

    def keep(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Let only some experts take part in some tensors; the others' coefficients become 0.

        `kept` gives positions of experts by tensor; `by` must be "tensor".
        """
        if len(self.rows) != len(self.tensors):
            raise InputError("experts are left out tensor by tensor: build the Blend by='tensor'")
        with torch.no_grad():
            for name, wanted in kept.items():
                wanted = tuple(sorted(wanted))
                if self._held is not None:
                    places = [self.kept[name].index(t) for t in wanted]
                    self._held[name] = self._held[name][places].contiguous()
                self.kept[name] = wanted
                gone = [t for t in range(len(self.experts)) if t not in wanted]
                self.coefficients[self.tensors[name], gone] = 0.0

    # -- forwards and backwards ------------------------------------------------------------------

    def effective(self, name: str) -> Tensor:
        """Return a tensor's coefficients as they are applied, (t kept, g), without a gradient."""
        found = self.coefficients.detach()[self.tensors[name], list(self.kept[name])]
        return found if self.clamp is None else found.clamp(*self.clamp)

    def update(self, name: str) -> Tensor:
        """Return sum_t c tau_t of one tensor, flattened, before any mask: (n,)."""
        return self._sum(name, self.task_vectors(name))

    def _sum(self, name: str, tau: Tensor) -> Tensor:
        scale = self.effective(name)
        if self.partitions == 1:
            return torch.mv(tau.t(), scale[:, 0])
        return (scale[:, self._groups[name]] * tau).sum(0)

    def leaves(self, masks: Mapping[str, Tensor] | None = None, *, only: str = "merged") -> Leaves:
        """Return the merged tensors as leaves that collect gradients, by name.

        `only="update"` gives theta - theta_0 instead (for linearised models). Use `refresh` for
        the next step.
        """
        out = {name: torch.empty_like(base) for name, base in self._base.items()}
        self.refresh(out, masks, only=only)
        return {name: leaf.requires_grad_() for name, leaf in out.items()}

    def refresh(
        self,
        leaves: Leaves,
        masks: Mapping[str, Tensor] | None = None,
        *,
        only: str = "merged",
    ) -> None:
        """Merge anew into the leaves' own memory, and drop their gradients."""
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.grad = None
                flat, base = leaf.view(-1), self._base[name].view(-1)
                if masks is None and self.partitions == 1 and only == "merged":
                    scale = self.effective(name)[:, 0]
                    torch.addmv(base, self.task_vectors(name).t(), scale, out=flat)
                    continue
                update = self.update(name)
                if masks is not None and name in masks:
                    update.mul_(masks[name].reshape(-1))
                flat.copy_(update if only == "update" else update.add_(base))

    def parameters(self, leaves: Leaves) -> dict[str, Tensor]:
        """Return all tensors of the merged model under all their names, for a forward pass."""
        known = {**self.fixed, **leaves}
        return known | {name: known[target] for name, target in self.pool.aliases.items()}

    def pull(
        self,
        leaves: Leaves,
        masks: Mapping[str, Tensor] | None = None,
        *,
        mask_gradients: bool = False,
    ) -> dict[str, Tensor]:
        """Turn the leaves' gradients into the coefficients' (set as `coefficients.grad`).

        Returns dL/dm by name if `mask_gradients`. A leaf without a gradient counts as one of zeros.
        """
        raw = self.coefficients.detach()
        total = torch.zeros_like(raw)
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, leaf in leaves.items():
                if leaf.grad is None:
                    continue
                slope, tau = leaf.grad.reshape(-1), self.task_vectors(name)
                if mask_gradients:
                    found[name] = (slope * self._sum(name, tau)).reshape(leaf.shape)
                if masks is not None and name in masks:
                    slope = slope * masks[name].reshape(-1)
                row = total[self.tensors[name]]
                kept = list(self.kept[name])
                if self.partitions == 1:
                    row[kept, 0] += torch.mv(tau, slope)
                else:
                    row[kept] += torch.zeros(
                        len(kept), self.partitions, device=self.device
                    ).index_add_(1, self._groups[name], tau * slope)
            if self.clamp is not None:
                low, high = self.clamp
                total *= (raw >= low) & (raw <= high)
        self.coefficients.grad = total
        return found

    def __call__(self) -> dict[str, Tensor]:
        """Return the merged tensors under all names, connected to `coefficients` for autograd.

        For loops of one's own: `functional_call(module, blend(), x)`, then `backward()`. Nothing
        but the coefficients is kept for the backward pass; task vectors are read again there. Each
        backward pass reads them once, so with several tasks `leaves` and `pull` cost less.
        """
        made = {name: _Merged.apply(self.coefficients, self, name) for name in self._base}
        return self.parameters(made)

    def export(
        self, masks: Mapping[str, Tensor] | None = None, note: Mapping[str, str] | None = None
    ) -> Coefficients:
        """Return the coefficients as the merge engine replays them; excluded tensors get zeros."""
        scales = {}
        for name in self.pool.names:
            if not self.base.source(name).spec.kind.is_float:
                continue
            scale = torch.zeros(len(self.experts), self.partitions)
            if name in self.tensors:
                scale[list(self.kept[name])] = self.effective(name).cpu()
            scales[name] = (scale[:, 0] if self.partitions == 1 else scale).numpy()
        kept = None
        if masks is not None:
            kept = Weights.of(
                {n: m.detach().float().cpu() for n, m in masks.items()}, label="masks"
            )
        return Coefficients(scales, self.experts, kept, self.partitions, self.seed, note or {})

    def load(self, found: Coefficients) -> None:
        """Take over coefficients, for instance to go on from a file.

        Raises InputError if they are for other experts or another partition.
        """
        if found.experts != self.experts or (found.partitions, found.seed) != (
            self.partitions,
            self.seed,
        ):
            raise InputError(
                f"the coefficients are for experts {listing(found.experts)} in {found.partitions} "
                f"partition(s) of seed {found.seed}, not for {listing(self.experts)} in "
                f"{self.partitions} of seed {self.seed}"
            )
        with torch.no_grad():
            for name, row in self.tensors.items():
                scale = torch.from_numpy(found.of(name).copy())
                self.coefficients[row] = scale.reshape(len(self.experts), -1)


class _Merged(torch.autograd.Function):
    """One merged tensor; its backward pass reads the task vectors again."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, blend: Blend, name: str) -> Tensor:
        ctx.blend, ctx.name, ctx.raw = blend, name, coefficients.detach()
        base = blend._base[name]
        return (base.view(-1) + blend.update(name)).view(base.shape)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        blend, name = ctx.blend, ctx.name
        out = torch.zeros_like(ctx.raw)
        slope, tau = slopes[0].reshape(-1), blend.task_vectors(name)
        kept = list(blend.kept[name])
        row = out[blend.tensors[name]]
        if blend.partitions == 1:
            row[kept, 0] = torch.mv(tau, slope)
        else:
            row[kept] = torch.zeros(len(kept), blend.partitions, device=tau.device).index_add_(
                1, blend._groups[name], tau * slope
            )
        if blend.clamp is not None:
            low, high = blend.clamp
            out *= (ctx.raw >= low) & (ctx.raw <= high)
        return out, None, None


def _whole(weights: Weights, name: str, device: torch.device) -> Tensor:
    return weights[name].to(device)


def _chosen(names: Sequence[str], exclude: Sequence[str] | Callable[[str], bool]) -> set[str]:
    """Return the names to leave out. Raises InputError for a name that isn't there."""
    if callable(exclude):
        return {name for name in names if exclude(name)}
    for name in exclude:
        if name not in names:
            raise InputError(f"exclude: no tensor is called {name!r}.{nearest(name, names)}")
    return set(exclude)


def _rows(names: Sequence[str], by: By | Callable[[str], str], base: Weights) -> dict[str, str]:
    """Return the name of each tensor's row."""
    if callable(by):
        return {name: by(name) for name in names}
    if by == "model":
        return dict.fromkeys(names, "model")
    if by == "tensor":
        return {name: name for name in names}
    if by != "layer":
        raise InputError(f"by = {by!r}: coefficients go by model, layer or tensor")
    layers = depth_map(base, "auto").layers
    return {
        name: "outside" if layers.get(name) is None else f"layer {layers[name]}" for name in names
    }


def _check_steps(of: str) -> None:
    from pluribus.core.chain import STEP

    for part in parse(of).parts:
        known = getattr(part, STEP, None)
        if known is None or known.kind != "each":
            raise InputError(
                f"of = {of!r}: only steps that keep the experts apart can come before learned "
                "coefficients, such as trim and elect"
            )


def _stepped(pool: Pool, of: str, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Return every tensor's task vectors behind some steps: (t, n) float32.

    The steps see all floating tensors, as they will when the result is replayed.
    """
    from pluribus.engine.driver import merge
    from pluribus.merge.steps.sum import Sum

    assert pool.base is not None
    floats = [name for name in pool.names if pool.base.source(name).spec.kind.is_float]
    zero: dict[str, Tensor] = {}
    taus: dict[str, dict[str, Tensor]] = {label: {} for label in pool.experts}
    for name in floats:
        base = torch.from_numpy(pool.base.source(name).floats())
        zero[name] = torch.zeros_like(base)
        for label, expert in pool.experts.items():
            taus[label][name] = torch.from_numpy(expert.source(name).floats()) - base
    shapes = {name: pool.base.source(name).spec.shape for name in floats}
    whole = Pool(
        {name: values.reshape(shapes[name]) for name, values in zero.items()},
        {k: {n: v.reshape(shapes[n]) for n, v in tau.items()} for k, tau in taus.items()},
    )
    count = len(taus)
    out = {name: torch.empty(count, zero[name].numel()) for name in names}
    for t in range(count):
        one = Sum(weight=tuple(float(k == t) for k in range(count)))
        found = merge(whole, Chain((*parse(of).parts, one)))
        for name in names:
            out[name][t] = found[name].reshape(-1)
    yield from out.items()
