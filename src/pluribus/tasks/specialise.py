"""Train one shared base for a moment, then one specialist per task from it.

The recipe of the tall-masks page, section "Claim check": encoder and one linear head per task are
trained jointly for `base_steps`, on the first `base_pool` training inputs of each task; the heads
are then frozen, and each expert trains the encoder alone on its task. A base that is already
trained only has its heads made (`pluribus.tasks.heads`).

    base:    AdamW; constant learning rate, or cosine to 0
    expert:  AdamW, linear warm-up then cosine to 0, label smoothing

Weights are dictionaries of tensors and the modules are skeletons on the meta device, so the only
state is the one passed in: parameters, and buffers such as the statistics of batch norms, which
an expert updates or keeps as `statistics` says. Every random draw comes from a generator named
after what it is for.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear

from pluribus.core.shapes import Float, Shaped
from pluribus.tasks.views import Split, TaskData, generator

OnStep = Callable[[str, int, int], None]  # stage ("base" or a task), steps done, steps in it
State = Mapping[str, Tensor]

CHUNK = 256  # inputs that are in the encoder at a time when nothing is learnt


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How base and experts are trained."""

    base_steps: int = 40
    base_batch: int = 32  # inputs per task and step
    base_pool: int = 60  # training inputs per task that the base may see
    base_lr: float = 1e-3
    base_schedule: Literal["constant", "cosine"] = "constant"
    epochs: int = 8
    steps: int | None = None  # of each expert; None: `epochs`
    batch: int = 64
    lr: float = 3e-4
    weight_decay: float = 0.05
    warmup: int = 30  # steps
    smoothing: float = 0.05
    frozen: tuple[str, ...] = ()  # first parts of the names that no expert trains
    statistics: Literal["running", "frozen"] = "running"  # batch norms of an expert in training
    threads: int = 2  # part of the result: another count sums in another order


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch on `count` threads, and put the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def skeleton(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a module without memory or random draws: shapes to call with weights passed in."""
    with torch.device("meta"):
        return make().eval()


def features(
    encoder: nn.Module, weights: dict[str, Tensor], x: Shaped[Tensor, "b ..."]
) -> Float[Tensor, "b d"]:
    """Return what a skeleton with these weights makes of the inputs, a chunk of them at a time."""
    with torch.inference_mode():
        parts = [functional_call(encoder, weights, (part,), strict=True) for part in x.split(CHUNK)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def drawn(module: nn.Module, rng: Generator) -> dict[str, Tensor]:
    """Draw weights for a skeleton.

    Linear and convolution layers as torch does by default, U(+-1/sqrt(inputs)); norms at 1 and 0;
    embeddings, which hold positions, N(0, 0.02^2).
    """
    weights = {}
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(part, nn.Linear | nn.Conv2d):
            bound = part.weight[0].numel() ** -0.5
            for name, tensor in part.named_parameters():
                uniform = torch.rand(tensor.shape, generator=rng)
                weights[prefix + name] = (2 * uniform - 1) * bound
        elif isinstance(part, nn.LayerNorm):
            weights[prefix + "weight"] = torch.ones(part.normalized_shape)
            weights[prefix + "bias"] = torch.zeros(part.normalized_shape)
        elif isinstance(part, nn.Embedding):
            weights[prefix + "weight"] = 0.02 * torch.randn(part.weight.shape, generator=rng)
    return {name: weights[name] for name in module.state_dict()}


def train_base(
    encoder: nn.Module, tasks: Mapping[str, TaskData], plan: Plan, seed: int, on_step: OnStep
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Train encoder and heads jointly; returns the encoder's weights and the heads by task."""
    base = drawn(encoder, generator(seed, "base", "init"))
    heads = {
        name: drawn(
            skeleton(partial(nn.Linear, cast(int, encoder.width), len(task.classes))),
            generator(seed, name, "head"),
        )
        for name, task in tasks.items()
    }
    rng = generator(seed, "base", "batches")
    pools = {name: task.train.first(plan.base_pool) for name, task in tasks.items()}
    leaves = [*base.values(), *(tensor for head in heads.values() for tensor in head.values())]
    optimiser = _adamw(leaves, plan.base_lr, plan.weight_decay)
    for step in range(plan.base_steps):
        if plan.base_schedule == "cosine":
            optimiser.param_groups[0]["lr"] = plan.base_lr * _schedule(step, plan.base_steps, 0)
        batches = [_sample(pool, plan.base_batch, rng) for pool in pools.values()]
        outputs = functional_call(encoder, base, (torch.cat([x for x, _ in batches]),))
        parts = outputs.split([len(x) for x, _ in batches])
        losses = [
            cross_entropy(linear(part, head["weight"], head["bias"]), y)
            for part, head, (_, y) in zip(parts, heads.values(), batches, strict=True)
        ]
        _update(optimiser, torch.stack(losses).mean())
        on_step("base", step + 1, plan.base_steps)
    return _frozen(base), {name: _frozen(head) for name, head in heads.items()}


def train_expert(
    encoder: nn.Module,
    base: State,
    head: State,
    task: TaskData,
    plan: Plan,
    seed: int,
    on_step: OnStep,
) -> dict[str, Tensor]:
    """Train a copy of the base on one task under its frozen head; returns the encoder's weights.

    What `plan.frozen` names is the base's own tensor, not a copy.
    """
    kept = {name for name in base if name.startswith(plan.frozen)} if plan.frozen else set()
    expert = {name: tensor if name in kept else tensor.clone() for name, tensor in base.items()}
    learnt = [expert[name] for name, _ in encoder.named_parameters() if name not in kept]
    rng = generator(seed, task.name, "batches")
    optimiser = _adamw(learnt, plan.lr, plan.weight_decay)
    x, y = task.train
    total = plan.steps or plan.epochs * math.ceil(len(x) / plan.batch)
    encoder.train(plan.statistics == "running")
    for step, rows in enumerate(_rows(len(x), plan.batch, total, rng)):
        optimiser.param_groups[0]["lr"] = plan.lr * _schedule(step, total, plan.warmup)
        outputs = functional_call(encoder, expert, (x[rows],))
        logits = linear(outputs, head["weight"], head["bias"])
        _update(optimiser, cross_entropy(logits, y[rows], label_smoothing=plan.smoothing))
        on_step(task.name, step + 1, total)
    encoder.eval()
    return _frozen(expert)


def _rows(count: int, batch: int, total: int, rng: Generator) -> Iterator[Tensor]:
    """Deal all rows in a new order each epoch, until `total` batches are dealt."""
    dealt = 0
    while dealt < total:
        for rows in torch.randperm(count, generator=rng).split(batch)[: total - dealt]:
            yield rows
            dealt += 1


def _schedule(step: int, total: int, warmup: int) -> float:
    """Return the share of the learning rate: linear up to 1, then cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _adamw(leaves: list[Tensor], lr: float, weight_decay: float) -> torch.optim.AdamW:
    for leaf in leaves:
        leaf.requires_grad_()
    return torch.optim.AdamW(leaves, lr=lr, weight_decay=weight_decay, fused=True)


def _update(optimiser: torch.optim.AdamW, loss: Float[Tensor, ""]) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


def _sample(pool: Split, count: int, rng: Generator) -> Split:
    return pool.at(torch.randperm(len(pool.x), generator=rng)[:count])


def _frozen(weights: State) -> dict[str, Tensor]:
    return {n: tensor.detach() if tensor.requires_grad else tensor for n, tensor in weights.items()}
