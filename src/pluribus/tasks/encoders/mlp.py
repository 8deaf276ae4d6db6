"""A wide residual perceptron, the encoder of `merge8` and `demo8`.

    Linear n -> width, depth x [x + Linear(GELU(Linear(LN(x))))], LN

The recipe of the tall-masks page, section "Claim check".
"""

from torch import Tensor, nn

from pluribus.core.shapes import Float


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
        self.width = width
        self.stem = nn.Linear(inputs, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        """Return the features."""
        return self.norm(self.blocks(self.stem(x)))
