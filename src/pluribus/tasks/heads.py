"""Heads over features that no joint training made them for: a linear probe, or class means.

    probe        W, b = argmin mean cross_entropy(f W' + b, y) + decay * |W|^2 / 2
    class_means  W_v = scale * m_v / |m_v|, b = 0; m_v the mean of the features of class v

The first suits a pre-trained encoder with training data, the second a new task with a few shots:
over features of constant length it is a nearest mean by angle. Both are deterministic.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from pluribus.core.errors import InputError, listing
from pluribus.core.shapes import Float, Int

Head = dict[str, Tensor]  # weight (v, d), bias (v,)


def probe(
    features: Float[Tensor, "b d"],
    labels: Int[Tensor, " b"],
    classes: int,
    *,
    decay: float = 1e-3,
    steps: int = 100,
) -> Head:
    """Fit a linear classifier by L-BFGS, from zero: `weight` (classes, d), `bias` (classes,)."""
    weight = torch.zeros(classes, features.shape[1], dtype=features.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=features.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = cross_entropy(linear(features, weight, bias), labels)
        value = value + decay * weight.square().sum() / 2
        value.backward()
        return value

    optimiser.step(loss)
    return {"weight": weight.detach(), "bias": bias.detach()}


def class_means(
    features: Float[Tensor, "b d"], labels: Int[Tensor, " b"], classes: int, *, scale: float = 1.0
) -> Head:
    """Point each class at the mean of its features; classes without an example get zeros.

    Raises InputError if no class has an example, or if a mean is zero.
    """
    if not len(labels):
        raise InputError("class means of no examples: give at least one example of some class")
    weight = features.new_zeros(classes, features.shape[1])
    weight.index_add_(0, labels, features)
    lengths = weight.norm(dim=1)
    seen = torch.bincount(labels, minlength=classes) > 0
    if bad := (seen & (lengths == 0)).nonzero().flatten().tolist():
        raise InputError(f"the mean feature of class {listing(map(str, bad))} is zero")
    weight[seen] *= scale / lengths[seen, None]
    return {"weight": weight, "bias": features.new_zeros(classes)}
