"""A small vision transformer, the encoder of `vision6` and `vision8`.

    tokens   stem(x) + positions                                   (b, s, d)
    block    x + Attention(LN(x)), then x + Linear(GELU(Linear(LN(x))))
    features LN(mean over tokens), then, if `scale`, scale * f / |f|

Dosovitskiy et al., ICLR 2021 (arXiv:2010.11929), pre-norm blocks, with mean pooling and no class
token. The convolutional stem is that of Xiao et al., NeurIPS 2021 (arXiv:2106.14881), shorter.

Features of unit length times a constant give logits whose scale no merge can inflate, as CLIP's
have: the adamerging page, section "Claim check", measured that entropy misleads without it.
"""

import itertools
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from pluribus.core.errors import InputError
from pluribus.core.shapes import Float


class Patches(nn.Module):
    """Cut the image into squares and map each to a token."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.project = nn.Linear(channels * patch * patch, width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b s d"]:
        """Return one token a square, row by row."""
        size = self.patch
        squares = x.unfold(2, size, size).unfold(3, size, size)  # b c rows columns size size
        return self.project(squares.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2))


class Convolutions(nn.Module):
    """Halve the image log2(patch) times by 3x3 convolutions, then map each place to a token."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        halvings = patch.bit_length() - 1
        sizes = [channels, *(max(16, width >> (halvings - i)) for i in range(1, halvings + 1))]
        self.halve = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(sizes)
        )
        self.project = nn.Linear(sizes[-1], width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b s d"]:
        """Return one token for every patch x patch pixels, row by row."""
        for convolution in self.halve:
            x = gelu(convolution(x))
        return self.project(x.flatten(2).transpose(1, 2))


class Attention(nn.Module):
    """Multi-head self-attention, written out so that every kind of differentiation works."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """Return what each token gathers from all."""
        split = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind(0)  # each b, heads, s, d / heads
        weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and perceptron, each behind a norm and beside an identity."""

    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """Return the block's output, of the input's shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Tokens of a square image through `depth` blocks; the output is the features."""

    def __init__(
        self,
        *,
        channels: int,
        side: int,
        patch: int,
        width: int,
        depth: int,
        heads: int = 4,
        expansion: int = 2,
        stem: Literal["patches", "convolutions"] = "patches",
        scale: float | None = 12.0,
    ) -> None:
        super().__init__()
        for name, value, part, divisor in (
            ("width", width, "heads", heads),
            ("side", side, "patch", patch),
        ):
            if value < 1 or divisor < 1 or value % divisor:
                raise InputError(f"{name} is {value}; it must be a multiple of {part}, {divisor}")
        self.width, self.scale = width, scale
        make = {"patches": Patches, "convolutions": Convolutions}[stem]
        self.stem = make(channels, patch, width)
        self.positions = nn.Embedding((side // patch) ** 2, width)
        self.blocks = nn.Sequential(*(Layer(width, heads, expansion) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Return the features."""
        tokens = self.stem(x) + self.positions.weight
        pooled = self.norm(self.blocks(tokens).mean(1))
        return pooled if self.scale is None else self.scale * normalize(pooled, dim=1)
