"""A micro-space of 729 cells on Fashion-MNIST, and the table of what each of them scores.

    x ─ op1 ─ n1     n2 = op2(wire2(x, n1))     n3 = op3(wire3(n1, n2))     out = end(x, n2, n3)

Three operations (conv 3x3, conv 1x1, max-pool 3x3, those of NAS-Bench-101), two wires (the first
input, the second, their sum) and an end (n3, n2 + n3, x + n3), three choices each: 3^6 = 729. A
network is a stem, a cell of 8 channels on 7x7, a reduction, the same cell of 16 channels on 4x4,
the mean over places and a linear layer. Each was trained for one epoch on 5000 images averaged to
14x14, see `benchmarks/nas_table.py`; validation takes the other 5000 training images, test the 2000
test ones.
"""

import json
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from pluribus.search.space import Space, oneof
from pluribus.search.space import space as space_of
from pluribus.search.training import Examples, Training
from pluribus.tasks.sets import images

IMAGES = 5000  # for training; the other 5000 are for validation
CHANNELS = 8
TABLE = "nas_fashion.npz"


class Conv3(nn.Sequential):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )


class Conv1(nn.Sequential):
    """1x1 convolution, batch norm, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )


class Pool3(nn.MaxPool2d):
    """3x3 maximum that keeps the size."""

    def __init__(self, channels: int) -> None:
        super().__init__(3, stride=1, padding=1)


class First(nn.Module):
    """Takes the earlier of two inputs."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a."""
        return a


class Second(nn.Module):
    """Takes the later of two inputs."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return b."""
        return b


class Both(nn.Module):
    """Takes the sum of two inputs."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a + b."""
        return a + b


class Plain(nn.Module):
    """Ends a cell with its last node."""

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return b."""
        return b


class Wide(nn.Module):
    """Ends a cell with the sum of its last two nodes."""

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return a + b."""
        return a + b


class Residual(nn.Module):
    """Ends a cell with the sum of its input and its last node."""

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return x + b."""
        return x + b


OPERATIONS = (Conv3, Conv1, Pool3)
WIRES = (First, Second, Both)
ENDS = (Plain, Wide, Residual)


class Cell(nn.Module):
    """Three nodes in a row, wired as the point says."""

    def __init__(self, point: Any, channels: int) -> None:
        super().__init__()
        self.nodes = nn.ModuleList(operation(channels) for operation in point["ops"])
        self.wires = nn.ModuleList(wire() for wire in point["wires"])
        self.end = point["end"]()

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, channels, h, w) to the same shape."""
        one = self.nodes[0](x)
        two = self.nodes[1](self.wires[0](x, one))
        three = self.nodes[2](self.wires[1](one, two))
        return self.end(x, two, three)


def build(point: Any) -> nn.Module:
    """Make the network of a point: (b, 1, 14, 14) to (b, 10)."""
    c = CHANNELS
    return nn.Sequential(
        nn.Conv2d(1, c, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(c),
        nn.ReLU(),
        Cell(point, c),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(c, 2 * c, 1, bias=False),
        nn.BatchNorm2d(2 * c),
        nn.ReLU(),
        Cell(point, 2 * c),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * c, 10),
    )


def space() -> Space:
    """Return the space of the 729 cells."""
    return space_of(
        {
            "ops": [oneof(OPERATIONS) for _ in range(3)],
            "wires": [oneof(WIRES) for _ in range(2)],
            "end": oneof(ENDS),
        }
    )


def fashion(side: int = 14, train: int = IMAGES) -> dict[str, Examples]:
    """Return train, val and test of Fashion-MNIST as (b, 1, side, side), mean 0 and variance 1.

    The first `train` of its 10000 training images are for training, the others for validation.
    Raises DataError if the set is not there.
    """
    found = images("fashion_mnist")

    def examples(x: np.ndarray, y: np.ndarray) -> Examples:
        pixels = torch.from_numpy(x)[:, None].float() / found.peak
        pixels = avg_pool2d(pixels, pixels.shape[-1] // side)
        return Examples((pixels - 0.286) / 0.33, torch.from_numpy(y).long())

    x, y = found.x_train, found.y_train
    return {
        "train": examples(x[:train], y[:train]),
        "val": examples(x[train:], y[train:]),
        "test": examples(found.x_test, found.y_test),
    }


def training(seed: int = 0) -> Training:
    """Return what the table was measured with: one epoch on 5000 images."""
    data = fashion()
    return Training(build=build, train=data["train"], val=data["val"], seed=seed)


class Table(NamedTuple):
    """What each of the 729 cells scored; rows by `row`."""

    val: np.ndarray  # accuracy, 0..1
    test: np.ndarray
    parameters: np.ndarray
    flops: np.ndarray  # of one image's forward pass
    seconds: np.ndarray  # of one processor for training
    made_with: dict[str, Any]


def row(dna: Any) -> int:
    """Return a point's row: its choices as digits to the base 3, in the order of the space."""
    return int("".join(str(choice) for choice in dna.to_numbers()), 3)


@lru_cache(maxsize=1)
def table() -> Table:
    """Return the table that ships with the package."""
    path = resources.files("pluribus.claims") / "data" / TABLE
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        columns = {name: stored[name] for name in stored.files}
    told = json.loads(str(columns.pop("made_with")))
    return Table(
        columns["val_right"] / told["val_images"],
        columns["test_right"] / told["test_images"],
        columns["parameters"].astype(np.int64),
        columns["flops"].astype(np.int64),
        columns["seconds"].astype(np.float64),
        told,
    )
