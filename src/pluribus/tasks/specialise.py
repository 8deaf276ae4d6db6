"""Train one shared base for a moment, then one specialist per task from it.

The recipe of the tall-masks page, section "Claim check": encoder and one linear head per task are
trained jointly for `base_steps`, on the first `base_pool` training images of each task; the heads
are then frozen, and each expert trains the encoder alone on its task.

    encoder: Linear d -> width, depth x [x + Linear(GELU(Linear(LN(x))))], LN
    expert:  AdamW, linear warm-up then cosine to 0, label smoothing

Weights are dictionaries of tensors and the modules are skeletons on the meta device, so the only
state is the one passed in. Every random draw comes from a generator named after what it is for.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear

from pluribus.core.shapes import Float, Int
from pluribus.tasks.views import Split, TaskData, generator

OnStep = Callable[[str, int, int], None]  # stage ("base" or a task), steps done, steps in it


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the encoder and of the training."""

    width: int = 512
    depth: int = 6
    base_steps: int = 40
    base_batch: int = 32  # inputs per task and step
    base_pool: int = 60  # training images per task that the base may see
    base_lr: float = 1e-3
    epochs: int = 8
    batch: int = 64
    lr: float = 3e-4
    weight_decay: float = 0.05
    warmup: int = 30  # steps
    smoothing: float = 0.05
    threads: int = 2  # part of the result: another count sums in another order


class Block(nn.Module):
    """x + Linear(GELU(Linear(LN(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Return the block's output, of the input's shape."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class ResidualMLP(nn.Module):
    """A wide residual perceptron over flattened images; its output is the features."""

    def __init__(self, inputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        """Return the features."""
        return self.norm(self.blocks(self.stem(x)))


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


def drawn(module: nn.Module, rng: Generator) -> dict[str, Tensor]:
    """Draw weights for a skeleton as torch does by default: U(+-1/sqrt(inputs)), norms at 1, 0."""
    weights = {}
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(part, nn.Linear):
            bound = part.in_features**-0.5
            for name, tensor in part.named_parameters():
                uniform = torch.rand(tensor.shape, generator=rng)
                weights[prefix + name] = (2 * uniform - 1) * bound
        elif isinstance(part, nn.LayerNorm):
            weights[prefix + "weight"] = torch.ones(part.normalized_shape)
            weights[prefix + "bias"] = torch.zeros(part.normalized_shape)
    return {name: weights[name] for name in module.state_dict()}


def train_base(
    encoder: nn.Module, tasks: Mapping[str, TaskData], plan: Plan, seed: int, on_step: OnStep
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Train encoder and heads jointly; returns the encoder's weights and the heads by task."""
    base = drawn(encoder, generator(seed, "base", "init"))
    heads = {
        name: drawn(
            skeleton(partial(nn.Linear, plan.width, len(task.classes))),
            generator(seed, name, "head"),
        )
        for name, task in tasks.items()
    }
    rng = generator(seed, "base", "batches")
    pools = {name: _first(task.train, plan.base_pool) for name, task in tasks.items()}
    leaves = [*base.values(), *(tensor for head in heads.values() for tensor in head.values())]
    optimiser = _adamw(leaves, plan.base_lr, plan.weight_decay)
    for step in range(plan.base_steps):
        batches = [_sample(pool, plan.base_batch, rng) for pool in pools.values()]
        features = functional_call(encoder, base, (torch.cat([x for x, _ in batches]),))
        parts = features.split([len(x) for x, _ in batches])
        losses = [
            cross_entropy(linear(part, head["weight"], head["bias"]), y)
            for part, head, (_, y) in zip(parts, heads.values(), batches, strict=True)
        ]
        _update(optimiser, torch.stack(losses).mean())
        on_step("base", step + 1, plan.base_steps)
    return _frozen(base), {name: _frozen(head) for name, head in heads.items()}


def train_expert(
    encoder: nn.Module,
    base: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    task: TaskData,
    plan: Plan,
    seed: int,
    on_step: OnStep,
) -> dict[str, Tensor]:
    """Train a copy of the base on one task under its frozen head; returns the encoder's weights."""
    expert = {name: tensor.clone() for name, tensor in base.items()}
    rng = generator(seed, task.name, "batches")
    optimiser = _adamw(list(expert.values()), plan.lr, plan.weight_decay)
    x, y = task.train
    total = plan.epochs * math.ceil(len(x) / plan.batch)
    step = 0
    for _ in range(plan.epochs):
        for rows in torch.randperm(len(x), generator=rng).split(plan.batch):
            optimiser.param_groups[0]["lr"] = plan.lr * _schedule(step, total, plan.warmup)
            features = functional_call(encoder, expert, (x[rows],))
            logits = linear(features, head["weight"], head["bias"])
            _update(optimiser, cross_entropy(logits, y[rows], label_smoothing=plan.smoothing))
            step += 1
            on_step(task.name, step, total)
    return _frozen(expert)


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


def _first(split: Split, count: int) -> Split:
    return Split(split.x[:count], split.y[:count])


def _sample(pool: Split, count: int, rng: Generator) -> tuple[Tensor, Int[Tensor, " b"]]:
    rows = torch.randperm(len(pool.x), generator=rng)[:count]
    return pool.x[rows], pool.y[rows]


def _frozen(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in weights.items()}
