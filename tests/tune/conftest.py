import copy

import pytest
import torch
from torch import Tensor, nn

from pluribus import Pool
from pluribus.tune import ModuleForward

TASKS = ("a", "b", "c")


class Net(nn.Module):
    """Two blocks with a norm, a buffer of whole numbers and a tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 6, bias=False)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(self.norm(x))


class Bed:
    """A base, three experts, a head for each task, and inputs."""

    def __init__(self, seed: int = 0, spread: float = 0.2) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.net = Net()

        def drawn(like: Tensor, size: float) -> Tensor:
            return size * torch.randn(like.shape, generator=rng)

        state = self.net.state_dict()
        floats = [name for name, tensor in state.items() if tensor.is_floating_point()]
        self.base = {n: drawn(t, 0.4) if n in floats else t for n, t in state.items()}
        self.experts = {
            task: {n: t + drawn(t, spread) if n in floats else t for n, t in self.base.items()}
            for task in TASKS
        }
        self.heads = {
            task: {"weight": drawn(torch.empty(4, 6), 1.0), "bias": torch.zeros(4)}
            for task in TASKS
        }
        self.inputs = {task: [drawn(torch.empty(16, 6), 1.0) for _ in range(4)] for task in TASKS}
        self.floats = floats

    @property
    def pool(self) -> Pool:
        return Pool(copy.copy(self.base), dict(self.experts))

    @property
    def forward(self) -> ModuleForward:
        return ModuleForward(self.net, self.heads)

    def labelled(self, seed: int = 1) -> dict[str, list[tuple[Tensor, Tensor]]]:
        rng = torch.Generator().manual_seed(seed)
        return {
            task: [(x, torch.randint(4, (len(x),), generator=rng)) for x in batches]
            for task, batches in self.inputs.items()
        }


@pytest.fixture
def bed() -> Bed:
    return Bed()
