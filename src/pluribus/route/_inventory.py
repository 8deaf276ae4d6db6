"""One adapted layer: an inventory of small adapters, and per task how to mix them at each head.

Caccia et al., NeurIPS 2023 (https://arxiv.org/abs/2211.03831), section 3; Ponti et al., EACL 2023
(Poly, https://arxiv.org/abs/2202.13914), is heads = 1; skills = heads = 1 is LoRA.

    A (h, S, d_in/h, r),  B (h, S, r, d_out/h),  Z (tasks, h S)
    p = sigmoid(Z[t]), alpha = p / sum_S p                     (h, S), each head sums to 1
    A_t = heads of sum_s alpha_s A_s, side by side             (d_in, r); B_t (r, d_out) likewise
    y = W x + x A_t B_t lora_alpha / r

Means of A and of B are taken first, then multiplied: that is not the mean of the products.

The authors' options that are off by default (normalised Z, dropout on p, a skill for all tasks,
square roots in place of sums) are left out. Where all of a head's p are exactly 0, which rounding
can do, alpha is 0 as by their formula, but its gradient is finite.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn

from pluribus.core.errors import InputError, MismatchError
from pluribus.core.shapes import Float, Int

Mode = Literal["sigmoid", "relaxed", "straight_through"]
EPSILON = 1e-12


class AdapterInventory(nn.Module):
    """The adapters of one linear layer: `a` (h, S, d_in/h, r), `b` (h, S, r, d_out/h).

    `a` starts uniform in +-1/sqrt(3 d_in), `b` at 0. `own_a` and `own_b` are adapters of single
    tasks that are not mixed any more. Raises InputError for sizes below 1, a layer of another
    kind, or heads that do not divide both of its widths.
    """

    def __init__(
        self,
        layer: nn.Module,
        rank: int,
        skills: int,
        heads: int,
        alpha: float = 1.0,
        *,
        generator: Generator,
    ) -> None:
        super().__init__()
        for name, value in (("rank", rank), ("skills", skills), ("heads", heads)):
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        self.transposed = is_transposed(layer)
        inputs, outputs = widths(layer)
        for name, width in (("inputs", inputs), ("outputs", outputs)):
            if width % heads:
                fit = [h for h in range(1, heads + 1) if not inputs % h and not outputs % h]
                raise InputError(
                    f"{heads} heads do not divide the layer's {width} {name}; the largest number "
                    f"below that fits is {fit[-1]}, or leave the layer out of the targets"
                )
        self.inputs, self.outputs, self.scale = inputs, outputs, alpha / rank
        like = next(layer.parameters())
        kind = like.dtype if like.is_floating_point() else torch.float32
        bound = 1 / math.sqrt(3 * inputs)
        drawn = torch.rand(heads, skills, inputs // heads, rank, generator=generator)
        self.a = nn.Parameter(((2 * drawn - 1) * bound).to(like.device, kind))
        self.b = nn.Parameter(self.a.new_zeros(heads, skills, rank, outputs // heads))
        self.own_a, self.own_b = nn.ParameterDict(), nn.ParameterDict()

    def mixed(self, weights: Float[Tensor, "u h S"]) -> tuple[Tensor, Tensor]:
        """Return the adapters of these mixtures, (u, d_in, r) and (u, r, d_out)."""
        weights = weights.to(self.a.dtype)
        a = torch.einsum("uhs,hsdr->uhdr", weights, self.a).flatten(1, 2)
        b = torch.einsum("uhs,hsrd->urhd", weights, self.b).flatten(2)
        return a, b

    def mean(self) -> tuple[Tensor, Tensor]:
        """Return the mean adapter, (d_in, r) and (r, d_out)."""
        heads, skills = self.a.shape[:2]
        a, b = self.mixed(self.a.new_full((1, heads, skills), 1 / skills))
        return a[0], b[0]

    def adapters(
        self, weights: Float[Tensor, "u h S"], numbers: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return mixtures, but for negative task numbers -1, -2, ... the tasks' own adapters."""
        a, b = self.mixed(weights)
        if all(number >= 0 for number in numbers):
            return a, b
        pairs = [
            (a[place], b[place])
            if number >= 0
            else (self.own_a[str(-1 - number)], self.own_b[str(-1 - number)])
            for place, number in enumerate(numbers)
        ]
        return torch.stack([one for one, _ in pairs]), torch.stack([two for _, two in pairs])

    def add_own(self) -> None:
        """Give one more task an adapter of its own, which starts as the mean of the inventory."""
        a, b = self.mean()
        key = str(len(self.own_a))
        self.own_a[key] = nn.Parameter(a.detach().clone())
        self.own_b[key] = nn.Parameter(b.detach().clone())


class TaskRouter(nn.Module):
    """Routing logits of each task: `logits` (tasks, h S), and (1, h S) for each task added since.

    Starts uniform in +-1e-3. `mode`: sigmoid; relaxed, which in training adds logistic noise drawn
    from `generator` for every row; straight_through, which rounds and passes gradients as they
    are. `anneal` in [0, 1] moves the weights towards 1 / S: 0 leaves them, 1 is the mean.
    """

    def __init__(
        self,
        tasks: int,
        skills: int,
        heads: int,
        mode: Mode = "sigmoid",
        *,
        generator: Generator,
    ) -> None:
        super().__init__()
        checked_mode(mode)
        self.skills, self.heads, self.mode = skills, heads, mode
        self.generator, self.anneal = generator, 0.0
        self.logits = nn.Parameter(self._drawn(tasks))
        self.added = nn.ParameterList()

    def _drawn(self, rows: int) -> Tensor:
        uniform = torch.rand(rows, self.heads * self.skills, generator=self.generator)
        return (2 * uniform - 1) * 1e-3

    def add(self) -> None:
        """Give one more task a fresh row."""
        self.added.append(nn.Parameter(self._drawn(1).to(self.logits)))

    def table(self) -> Float[Tensor, "t hS"]:
        """Return the logits of all tasks."""
        return torch.cat([self.logits, *self.added]) if len(self.added) else self.logits

    @property
    def noisy(self) -> bool:
        """Whether every row of a batch gets a mixture of its own."""
        return self.mode == "relaxed" and self.training

    def forward(self, tasks: Int[Tensor, " u"], *, noise: bool = True) -> Float[Tensor, "u h S"]:
        """Return the weights of some tasks; each head's sum to 1."""
        z = self.table()[tasks].view(-1, self.heads, self.skills)
        if self.noisy and noise:
            uniform = torch.rand(z.shape, generator=self.generator).to(z.device)
            p = relaxed(z, uniform)
        else:
            p = torch.sigmoid(z)
        if self.mode == "straight_through":
            p = p + (p.round() - p).detach()
        total = p.sum(-1, keepdim=True)
        weights = p / torch.where(total == 0, torch.ones_like(total), total + EPSILON)
        if not self.anneal:
            return weights
        kept = math.cos(math.pi / 2 * self.anneal)
        return kept * weights + (1 - kept) / self.skills


def relaxed(logits: Float[Tensor, "..."], uniform: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return relaxed Bernoulli draws at temperature 1, from numbers uniform in [0, 1)."""
    edge = torch.finfo(uniform.dtype).eps
    u = uniform.clamp(edge, 1 - edge)
    return torch.sigmoid(logits + u.log() - (-u).log1p())


def checked_mode(mode: Any) -> None:
    """Raise InputError unless it is one mode: noise and rounding are never used together."""
    if mode not in get_args(Mode):
        raise InputError(
            f"mode {mode!r}; expected one of {', '.join(get_args(Mode))}. Noise (relaxed) and "
            "rounding (straight_through) are never used together"
        )


class TaskBatch:
    """The tasks of a batch's rows: those that occur, and which of them each row has.

    Rows of a layer's input may outnumber the batch, as beams of one prompt do; both lie
    batch-major, so each row's task is repeated.
    """

    def __init__(self, numbers: Int[Tensor, " b"]) -> None:
        self.rows = len(numbers)
        self.row_tasks = numbers
        self.tasks, self.which = torch.unique(numbers, return_inverse=True)

    def of(self, rows: int, *, apart: bool) -> tuple[Tensor, Tensor]:
        """Return tasks (u,) and which of them each of a layer's rows has; `apart`: one a row."""
        if rows % self.rows:
            raise MismatchError(
                f"a layer was given {rows} rows, but {self.rows} task ids were set; give one id "
                "for each row of the batch, and keep the batch as the first axis"
            )
        times = rows // self.rows
        if apart:
            tasks = self.row_tasks.repeat_interleave(times)
            return tasks, torch.arange(rows)
        return self.tasks, self.which if times == 1 else self.which.repeat_interleave(times)


class CurrentTasks:
    """The batch that a model's layers read; None: the base as it is."""

    def __init__(self) -> None:
        self.batch: TaskBatch | None = None


def attach(
    layer: nn.Module, inventory: AdapterInventory, router: TaskRouter, current: CurrentTasks
) -> Any:
    """Add the rows' adapters when the layer runs and tasks are set; return the hook's handle."""

    def hook(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        if current.batch is None:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        tasks, which = current.batch.of(len(x), apart=router.noisy)
        weights = router(tasks.clamp(min=0).to(router.logits.device))
        a, b = inventory.adapters(weights, tasks.tolist())
        flat_x, flat_y = x.reshape(len(x), -1, x.shape[-1]), out.reshape(len(x), -1, out.shape[-1])
        added = low_rank(flat_x.to(a.dtype), a, b * inventory.scale, which)
        return (flat_y + added.to(out.dtype)).view(out.shape)

    return layer.register_forward_hook(hook, with_kwargs=True)


def low_rank(
    x: Float[Tensor, "b s c"],
    a: Float[Tensor, "u c r"],
    b: Float[Tensor, "u r R"],
    which: Int[Tensor, " b"],
) -> Float[Tensor, "b s R"]:
    """Return x A B, each row by the one of u adapters that `which` names.

    `which` lies on the CPU. Rows are taken together where one adapter serves all, or where equal
    numbers of them lie side by side. Otherwise adapters are copied to their rows; if those are
    larger than the rows themselves, each adapter runs on its rows in turn.
    """
    rows, places, _ = x.shape
    kinds, _, rank = a.shape
    if kinds == 1:
        return (x @ a[0]) @ b[0]
    if rows % kinds == 0:
        each = rows // kinds
        if torch.equal(which, torch.arange(kinds).repeat_interleave(each)):
            together = x.reshape(kinds, each * places, -1)
            return torch.bmm(torch.bmm(together, a), b).view(rows, places, -1)
    if rank <= places:
        return torch.bmm(torch.bmm(x, a[which]), b[which])
    out = x.new_zeros(rows, places, b.shape[-1])
    for kind in range(kinds):
        own = (which == kind).nonzero().flatten().to(x.device)
        out = out.index_copy(0, own, (x[own] @ a[kind]) @ b[kind])
    return out


def is_transposed(layer: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer, whose weight is (inputs, outputs)."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def widths(layer: nn.Module) -> tuple[int, int]:
    """Return inputs and outputs of a linear layer. Raises InputError for another kind."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if is_transposed(layer):
        inputs, outputs = layer.weight.shape  # type: ignore[union-attr, misc]
        return int(inputs), int(outputs)
    raise InputError(
        f"a {type(layer).__name__} is no linear layer; expected torch.nn.Linear or the Conv1D of "
        "GPT-2: name those by the targets"
    )
