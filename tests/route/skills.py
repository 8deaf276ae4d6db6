"""A small net and inventories of adapters beside it, for the tests of mhr."""

import torch
from torch import nn

from pluribus.route import mhr

TASKS = ("a", "b", "c")


class Net(nn.Module):
    """Two linear layers on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (b, s, 4)."""
        return self.down(torch.tanh(self.up(x)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def stir(model: mhr.Skilled, seed: int = 1) -> mhr.Skilled:
    """Give every adapter and every logit a value that matters."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in [
            *model.inventories.named_parameters(),
            *model.routers.named_parameters(),
        ]:
            scale = 2.0 if "logits" in name or "added" in name else 0.4
            parameter.copy_(scale * torch.randn(parameter.shape, generator=rng))
    return model


def wrapped(base: nn.Module | None = None, **changes) -> mhr.Skilled:
    settings = {"targets": "up|down", "rank": 2, "skills": 3, "heads": 2, "tasks": TASKS} | changes
    return stir(mhr.wrap(net() if base is None else base, **settings))


def inputs(rows: int = 6) -> torch.Tensor:
    return torch.randn(rows, 5, 8, generator=torch.Generator().manual_seed(7))
