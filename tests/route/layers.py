"""Layers of other libraries, remade for the tests."""

import torch
from torch import nn


class Conv1D(nn.Module):
    """A linear layer whose weight lies transposed, as GPT-2's does."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W + b."""
        return x @ self.weight + self.bias
