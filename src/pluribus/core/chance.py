"""The next token of rows by temperature and nucleus, each row by a number of its own.

    p = softmax(logits / temperature)      (v,)
    nucleus: the fewest likeliest tokens with sum p >= top_p (Holtzman et al., 2020, section 3.1)

A row takes the token whose share of [0, 1) its number falls into, so what else is in a batch does
not matter.
"""

import torch
from torch import Tensor

from pluribus.core.shapes import Float, Int

COLDEST = 1e-5  # what lower temperatures are taken as


def drawn(
    logits: Float[Tensor, "b v"], u: Float[Tensor, " b"], temperature: float, top_p: float = 1.0
) -> Int[Tensor, " b"]:
    """Return a token for each row and its number in [0, 1); a token of chance 0 is never drawn.

    In float64 on the processor: the sum of many small terms, and the same bits everywhere.
    """
    p = (logits.double().cpu() / max(temperature, COLDEST)).softmax(-1)
    if top_p >= 1.0:
        return _drawn(p, u)
    order = p.argsort(dim=-1, descending=True, stable=True)
    p = p.gather(-1, order)
    before = p.cumsum(-1) - p
    p = p.masked_fill(before >= top_p, 0.0)  # the first is always kept
    return order.gather(-1, _drawn(p, u)[:, None])[:, 0]


def _drawn(p: Float[Tensor, "b v"], u: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Return the index of every row whose share of [0, sum p) holds u."""
    edges = p.cumsum(-1)
    places = torch.arange(p.shape[-1])
    last = torch.where(p > 0, places, 0).amax(-1)
    found = torch.searchsorted(edges, (u.double() * edges[:, -1])[:, None], right=True)[:, 0]
    return torch.minimum(found, last)
