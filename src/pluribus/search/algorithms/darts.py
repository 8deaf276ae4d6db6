"""DARTS: every decision is a mixture, and its weights are learned by gradients.

Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019,
https://arxiv.org/abs/1806.09055, algorithm 1.

    per batch      alphas: one Adam step on L_val, through a step of the weights if `order` is 2
                   weights: one SGD step on L_train of the mixture
    in the end     the largest alpha of each decision; trained from new weights

See `pluribus.search.darts_step` for the gradients. A step costs as much as all candidates together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.func import functional_call

from pluribus.core.merger import PositiveInt
from pluribus.search.algorithms import algorithm
from pluribus.search.darts_step import Loss, Mixer, first_order, second_order
from pluribus.search.sharing import Shared
from pluribus.search.space import Space
from pluribus.search.study import Session
from pluribus.search.training import Examples


@algorithm("darts", paper="arXiv:1806.09055", shares_weights=True)
@dataclass(frozen=True, kw_only=True)
class Darts:
    """A mixture of all candidates, learned by gradients."""

    epochs: PositiveInt = 10
    order: Literal[1, 2] = 1
    alpha_lr: float = 3e-4  # of Adam with betas 0.5, 0.999 and weight decay 1e-3
    lr: float = 0.025  # of the weights, down to lr_end on a cosine
    lr_end: float = 0.001

    def search(self, space: Space, evaluate: Any, session: Session) -> None:
        """Train weights and alphas; record what the derived choice scores."""
        shared = Shared(
            "darts", space, evaluate, session, self.epochs, lr=self.lr, lr_end=self.lr_end
        )
        net, device = shared.net, shared.training.device
        mixer = Mixer(net.decisions, shared.rng("alphas"), self.alpha_lr, device)
        names = [name for name, _ in net.named_parameters()]

        def loss(batch: Examples) -> Loss:
            def of(weights: Sequence[Tensor], alphas: Sequence[Tensor]) -> Tensor:
                given = dict(zip(names, weights, strict=True))
                outputs = functional_call(net, given, (batch.x, mixer.mixture(alphas)))
                return shared.training.loss(outputs, batch.y)

            return of

        for batch in shared.batches():
            weights, alphas = list(net.parameters()), list(mixer.alphas.values())
            net.train()
            val = loss(shared.validation())
            if self.order == 1:
                mixer.apply(first_order(val, weights, alphas))
            else:
                mixer.apply(second_order(loss(batch), val, weights, alphas, shared.rate))
            shared.descend(batch, {path: p.detach() for path, p in mixer.sample().items()})
        told = {"alphas": {path: a.tolist() for path, a in mixer.alphas.items()}}
        shared.train_anew([mixer.derived()], told)
