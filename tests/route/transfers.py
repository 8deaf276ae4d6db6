"""A small net, sources beside it, and a task with few labels, for the tests of transfers."""

import torch
from torch import nn

from pluribus.route.adapters import AdapterSet
from pluribus.route.parts import Bottleneck
from pluribus.route.transfer import Examples, Target

LAYERS = ("up", "down")  # modules of `Net`


class Net(nn.Module):
    """Two feed-forward steps of one width on sequences; features are (b, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (b, s, 8)."""
        x = torch.tanh(self.stem(x))
        x = x + self.drop(torch.tanh(self.up(x)))
        return x + torch.tanh(self.down(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def source(seed: int, width: int = 8, bottleneck: int = 3, layers=LAYERS, **more) -> AdapterSet:
    rng = torch.Generator().manual_seed(seed)

    def one() -> Bottleneck:
        shapes = ((bottleneck, width), (bottleneck,), (width, bottleneck), (width,))
        return Bottleneck(
            *(0.6 * torch.randn(shape, generator=rng) for shape in shapes),
            activation=more.get("activation", "relu"),
        )

    return AdapterSet({path: one() for path in layers}, more.get("placement", "behind"))


def sources() -> dict[str, AdapterSet]:
    return {"a": source(1), "b": source(2, bottleneck=2), "c": source(3)}


def data(count: int = 24, seed: int = 5) -> Target:
    """Three classes that the inputs' means decide."""
    rng = torch.Generator().manual_seed(seed)
    rule = torch.randn(5, 3, generator=torch.Generator().manual_seed(9))

    def some(n: int) -> Examples:
        x = torch.randn(n, 4, 5, generator=rng)
        return Examples(x, (x.mean(1) @ rule).argmax(1))

    return Target(some(count), some(40), some(60))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
