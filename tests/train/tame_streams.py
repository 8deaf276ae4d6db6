"""Streams of small tasks, and learners of them, for the tests of TAME."""

import torch
from torch import nn

from pluribus.train.continual.tame import Tame, TameLearner
from pluribus.train.prune import Pruning, Tuning

WIDTH = 6
SHORT = Tuning(lr=0.1, momentum=0.9, epochs=30, batch_size=32)
PRUNE = Pruning(amount=0.5, tuning=Tuning(lr=0.05, epochs=20))
HOW = Tame(
    lr=0.2, momentum=0.5, window=20, buffer=120, prune=None, selector=SHORT, prune_selector=None
)


def net(out: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), nn.Linear(12, out))


def calm() -> nn.Module:
    """Starts at the loss of guessing exactly, so that no bad draw alarms at once."""
    made = net()
    nn.init.zeros_(made[2].weight)
    nn.init.zeros_(made[2].bias)
    return made


def batch(task: int, seed: int, count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tasks with opposite labels, and more along other axes; x tells which it is."""
    rng = torch.Generator().manual_seed(1000 * task + seed)
    x = torch.randn(count, WIDTH, generator=rng)
    sign = -1 if task % 2 else 1
    y = (sign * x[:, task // 2] > 0).long()
    x[:, WIDTH - 1] = 0.3 * x[:, WIDTH - 1] + 2.0 * (task - 1)
    return x, y


def learner(how: Tame = HOW, **settings) -> TameLearner:
    return TameLearner(
        settings.pop("make", calm), settings.pop("selector", net), 2, how, **settings
    )


def streamed(one: TameLearner, order=(0, 1, 2), length: int = 60, first: int = 0) -> list:
    return [
        one.observe(*batch(task, first + at * length + i))
        for at, task in enumerate(order)
        for i in range(length)
    ]


def tensors(state) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list | tuple):
        return [tensor for part in state for tensor in tensors(part)]
    return []


def plain(state):
    """The values of a state that are no tensors."""
    if isinstance(state, torch.Tensor):
        return None
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, list | tuple) else state


def same(one, other) -> None:
    assert plain(one) == plain(other)
    for a, b in zip(tensors(one), tensors(other), strict=True):
        assert torch.equal(a, b)
