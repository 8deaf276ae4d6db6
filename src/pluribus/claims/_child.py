"""A small program before and after it became a search space: what a user changes, line by line.

The program is `child` with `settings`; `ordinary` trains it, `searched` searches it. `changed`
counts the lines of the two that differ, in their own source.
"""

import difflib
import inspect
from typing import Any

from torch import nn

from pluribus.claims._cells import Conv1, Conv3, Pool3, fashion
from pluribus.search.run import run
from pluribus.search.space import oneof
from pluribus.search.study import Study
from pluribus.search.training import Training


def child(settings: Any) -> nn.Module:
    """Make a small network: (b, 1, 14, 14) to (b, 10)."""
    width, kernel = settings["width"], settings["kernel"]
    return nn.Sequential(
        nn.Conv2d(1, width, kernel, stride=2, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        settings["early"](width),
        nn.MaxPool2d(2, ceil_mode=True),
        settings["late"](width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


def training(seed: int) -> Training:
    """Return how a child is trained: 8000 images of Fashion-MNIST, validated on 2000 more."""
    data = fashion(train=8000)
    return Training(build=child, train=data["train"], val=data["val"], batch=100, seed=seed)


def ordinary(seed: int) -> float:
    """Train the program."""
    settings = {
        "width": 16,
        "kernel": 3,
        "early": Conv3,
        "late": Conv1,
    }
    return training(seed)(settings)


def searched(seed: int, algorithm: Any, trials: int) -> Study:
    """Search it."""
    settings = {
        "width": oneof([8, 16]),
        "kernel": oneof([3, 5]),
        "early": oneof([Conv3, Conv1, Pool3]),
        "late": oneof([Conv3, Conv1, Pool3]),
    }
    return run(settings, training(seed), algorithm, trials, seed=seed)


def changed() -> int:
    """Return how many lines differ between `ordinary` and `searched`, their docstrings apart."""
    before, after = (_body(function) for function in (ordinary, searched))
    marks = [line[0] for line in difflib.ndiff(before, after)]
    return max(marks.count("-"), marks.count("+"))


def _body(function: Any) -> list[str]:
    lines = inspect.getsource(function).splitlines()
    return [lines[0].replace(function.__name__, ""), *lines[2:]]
