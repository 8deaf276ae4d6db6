"""ENAS: shared weights and a controller take turns; the controller learns from validation batches.

Pham et al., "Efficient Neural Architecture Search via Parameter Sharing", ICML 2018,
https://arxiv.org/abs/1802.03268, sections 2.2 and 2.3.

    per batch      a ~ pi;  one SGD step of the shared weights on L_train(a, w)
    per epoch      `controller_steps` times:  a ~ pi, REINFORCE with R = score(a, w) on a batch of
                   the validation examples
    in the end     of `derive` choices of pi, the best on validation; trained from new weights

`controller="lstm"` is the published one, "logits" gives each decision logits of its own. Entropy
and baseline constants vary between the paper and the released code; the page's are taken.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pluribus.core.merger import Fraction, PositiveInt
from pluribus.search.algorithms import algorithm
from pluribus.search.reinforce import Logits, Recurrent, Reinforce
from pluribus.search.sharing import Shared
from pluribus.search.space import Space
from pluribus.search.study import Session


@algorithm("enas", paper="arXiv:1802.03268", shares_weights=True)
@dataclass(frozen=True, kw_only=True)
class Enas:
    """A policy over choices, learned on shared weights."""

    epochs: PositiveInt = 10  # of the shared weights
    controller: Literal["logits", "lstm"] = "logits"
    controller_steps: PositiveInt = 50  # after each epoch
    controller_lr: float = 3.5e-4  # of Adam
    decay: Fraction = 0.95  # of the baseline
    entropy: float = 1e-4
    derive: PositiveInt = 20  # choices to compare in the end
    retrain: PositiveInt = 1  # of them to train alone, each a trial

    def search(self, space: Space, evaluate: Any, session: Session) -> None:
        """Train the shared weights and the controller; record what the derived choices score."""
        shared = Shared("enas", space, evaluate, session, self.epochs)
        found = shared.net.decisions
        policy = Logits(found)
        if self.controller == "lstm":
            policy = Recurrent(found, shared.rng("controller"))
        controller = Reinforce(
            policy, shared.rng("choices"), self.controller_lr, self.decay, self.entropy
        )
        for batch in shared.batches():
            shared.descend(batch, controller.sample())
            if shared.epoch_ended:
                for _ in range(self.controller_steps):
                    choice = controller.sample()
                    controller.update(shared.quality(choice, shared.validation()))
        drawn = [controller.sample() for _ in range(self.derive)]
        shared.train_anew(shared.best(drawn, self.retrain), {"baseline": controller.baseline})
