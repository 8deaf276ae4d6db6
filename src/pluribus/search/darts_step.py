"""One step of differentiable architecture search.

Liu, Simonyan, Yang, "DARTS", ICLR 2019, https://arxiv.org/abs/1806.09055, sections 2.2 and 2.3.

    first order     grad_a L_val(w, a)
    second order    grad_a L_val(w', a) - rate (grad_a L_train(w+, a) - grad_a L_train(w-, a)) / 2e
                    w' = w - rate * grad_w L_train(w, a)
                    w+- = w +- e * grad_w' L_val(w', a),    e = 0.01 / ||grad_w' L_val(w', a)||

Here a are the architecture's parameters and w the weights, both lists of tensors, and a loss is a
function of the two. Differs from the authors' code: w' takes no momentum and no weight decay.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor

from pluribus.core.shapes import Float
from pluribus.search.decisions import Choice, Decision, heaviest

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Float[Tensor, ""]]  # of weights and a


def first_order(
    val_loss: Loss, weights: Sequence[Tensor], alphas: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradient of the validation loss at the present weights, one for each alpha."""
    fixed = [w.detach() for w in weights]
    return _gradients(val_loss(fixed, alphas), alphas)


def second_order(
    train_loss: Loss,
    val_loss: Loss,
    weights: Sequence[Tensor],
    alphas: Sequence[Tensor],
    rate: float,
) -> list[Tensor]:
    """Return the gradient of the validation loss after a step of the weights, for each alpha.

    The part through that step is a difference of two gradients. Where the validation loss doesn't
    depend on the weights it is zero.
    """
    now = _leaves(weights)
    step = _gradients(train_loss(now, [a.detach() for a in alphas]), now)
    ahead = _leaves([w - rate * g for w, g in zip(now, step, strict=True)])
    both = _gradients(val_loss(ahead, alphas), [*alphas, *ahead])
    outer, towards = both[: len(alphas)], both[len(alphas) :]
    norm = torch.sqrt(sum((g.square().sum() for g in towards), torch.zeros(())))
    if not norm > 0:
        return outer
    epsilon = float(0.01 / norm)
    ends = []
    for sign in (1, -1):
        moved = [w.detach() + sign * epsilon * g for w, g in zip(weights, towards, strict=True)]
        ends.append(_gradients(train_loss(moved, alphas), alphas))
    return [
        a - rate * (plus - minus) / (2 * epsilon)
        for a, plus, minus in zip(outer, *ends, strict=True)
    ]


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def _gradients(loss: Tensor, at: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(at), allow_unused=True)
    return [
        torch.zeros_like(x) if g is None else g.detach() for x, g in zip(at, found, strict=True)
    ]


class Mixer:
    """One vector of alphas for each decision; the mixture is their softmax."""

    def __init__(
        self,
        decisions: Mapping[str, Decision],
        rng: Generator,
        lr: float = 3e-4,
        device: str = "cpu",
    ) -> None:
        self.decisions = decisions
        self.alphas = {
            path: (1e-3 * torch.randn(d.count, generator=rng)).to(device).requires_grad_()
            for path, d in decisions.items()
        }
        self.optimiser = torch.optim.Adam(
            self.alphas.values(), lr, betas=(0.5, 0.999), weight_decay=1e-3
        )

    def sample(self) -> dict[str, Tensor]:
        """Return the mixture, the same at every call between two updates."""
        return self.mixture(list(self.alphas.values()))

    def mixture(self, alphas: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the mixture of given alphas."""
        return {path: a.softmax(0) for path, a in zip(self.alphas, alphas, strict=True)}

    def update(self, loss: Float[Tensor, ""]) -> None:
        """Descend a loss of the mixture: the first-order step."""
        self.apply(_gradients(loss, list(self.alphas.values())))

    def apply(self, gradients: Sequence[Tensor]) -> None:
        """Take one step along gradients of the alphas."""
        for a, gradient in zip(self.alphas.values(), gradients, strict=True):
            a.grad = gradient
        self.optimiser.step()

    def derived(self) -> Choice:
        """Return the choice with the largest alpha at each decision in turn."""
        return heaviest(self.decisions, self.alphas)
