"""TuNAS: weights and controller step by step, with a reward that holds a cost at its target.

Bender et al., "Can weight sharing outperform random architecture search? An investigation with
TuNAS", CVPR 2020, https://arxiv.org/abs/2008.06120, sections 3 and 4; the efficient algorithm of
the PyGlove paper on ImageNet.

    per batch      a ~ pi;  one SGD step of the shared weights on L_train(a, w);  then, after the
                   first quarter:  a ~ pi, REINFORCE with R = Q(a, w) + beta |T(a) / target - 1|
    in the end     the likeliest choice; trained from new weights

Q is the score on a validation batch and T the cost that `run(cost=...)` names; without one R = Q.
`target` defaults to the mean cost of 20 random points. Each decision has logits of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any

from annotated_types import Interval

from pluribus.core.errors import InputError, listing
from pluribus.core.merger import Fraction, PositiveInt
from pluribus.search.algorithms import algorithm
from pluribus.search.cost import absolute
from pluribus.search.decisions import Choice, drawn
from pluribus.search.reinforce import Logits, Reinforce, likeliest
from pluribus.search.sharing import Shared, remembered
from pluribus.search.space import Space
from pluribus.search.study import Session

SAMPLES = 20  # points whose mean cost is the target where none is given


@algorithm("tunas", paper="arXiv:2008.06120", shares_weights=True)
@dataclass(frozen=True, kw_only=True)
class Tunas:
    """A policy over choices, learned beside the shared weights, at a given cost."""

    epochs: PositiveInt = 10  # of the shared weights
    beta: float = -0.07  # weight of the cost's distance from its target
    target: float | None = None  # cost to aim at, in the unit of the cost
    warmup: Annotated[float, Interval(ge=0, lt=1)] = 0.25  # share of steps before the controller's
    controller_lr: float = 3.5e-4  # of Adam
    decay: Fraction = 0.95  # of the baseline
    entropy: float = 1e-4

    def search(self, space: Space, evaluate: Any, session: Session) -> None:
        """Train the shared weights and the controller; record what the likeliest choice scores.

        Raises InputError for several costs, or a target that is not above 0.
        """
        shared = Shared("tunas", space, evaluate, session, self.epochs)
        policy = Logits(shared.net.decisions)
        controller = Reinforce(
            policy, shared.rng("choices"), self.controller_lr, self.decay, self.entropy
        )
        told: dict[str, Any] = {}
        distance = self._distance(shared, told)
        for batch in shared.batches():
            shared.descend(batch, controller.sample())
            if shared.step > self.warmup * shared.total:
                choice = controller.sample()
                quality = shared.quality(choice, shared.validation())
                controller.update(quality + distance(choice))
        shared.train_anew([likeliest(policy)], {"baseline": controller.baseline, **told})

    def _distance(self, shared: Shared, told: dict[str, Any]) -> Callable[[Choice], float]:
        """Return the reward's second part; what it aims at is written into `told`."""
        named = list(shared.session.costs.items())
        if not named:
            return lambda choice: 0.0
        if len(named) > 1:
            raise InputError(
                f"tunas holds one cost at its target, got {listing(shared.session.costs)}; give one"
            )
        ((name, function),) = named
        if function is None:
            raise InputError(
                f"tunas needs the cost {name} of points that aren't trained: give run(cost=...) a "
                "function of the object, such as search.cost.Parameters(build)"
            )
        price = remembered(lambda choice: float(function(shared.decoded(choice))))
        target = self.target
        if target is None:
            rng = shared.rng("target")
            target = fmean(price(drawn(shared.net.decisions, rng)) for _ in range(SAMPLES))
        told["target"] = target
        absolute(0.0, 1.0, target, self.beta)  # refuses a target of 0 or less before the training
        return lambda choice: absolute(0.0, price(choice), target, self.beta)
