"""The linearised model: a first-order view of the network around the base, which adds up exactly.

Zhang et al., aTLAS, NeurIPS 2024, https://arxiv.org/abs/2407.02880; Ortiz-Jimenez et al.,
https://arxiv.org/abs/2305.12827, section 2.

    out = f(x; theta_0) + J(x; theta_0) (theta - theta_0)

by one forward-mode product (`torch.func.jvp`), so a pass costs about two and a half plain ones.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pluribus.core.pool import Pool
from pluribus.tune._blend import Blend
from pluribus.tune._model import Forward


class Linearised:
    """A `Forward` whose blended tensors are updates theta - theta_0; all others are the model's.

    `plain` is the forward it is made of. Outputs must be one tensor, or have `logits`.
    """

    def __init__(self, plain: Forward, blend: Blend) -> None:
        self.plain, self._base, self._aliases = plain, dict(blend._base), blend.pool.aliases

    def __call__(self, parameters: Mapping[str, Tensor], inputs: Any, task: str) -> Tensor:
        """Return the outputs of the linear model, differentiable in the updates."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        updates = {name: parameters[name] for name in self._base}
        rest = {name: tensor for name, tensor in parameters.items() if name not in updates}

        def run(moving: dict[str, Tensor]) -> Tensor:
            known = {**rest, **moving}
            known |= {n: moving[to] for n, to in self._aliases.items() if to in moving}
            outputs = self.plain(known, inputs, task)
            return getattr(outputs, "logits", outputs)

        # The fused attention kernels have no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".torch\.jit\.script. is")  # torch's own, in jvp
            found = torch.func.jvp(run, (self._base,), (updates,))
        return found[0] + found[1]


def linear_scores(pool: Pool, coefficients: Any, forward: Forward) -> Callable[[Any, str], Tensor]:
    """Return scores(inputs, task) of the linear model with learned coefficients.

    The exported weights are base + update, whose ordinary outputs are not the linear model's.
    Raises InputError for coefficients of other experts.
    """
    blend = Blend(
        pool, partitions=coefficients.partitions, seed=coefficients.seed, init=0.0, resident=False
    )
    blend.load(coefficients)
    parameters = blend.parameters(blend.leaves(only="update"))
    linear = Linearised(forward, blend)

    def scores(inputs: Any, task: str) -> Tensor:
        with torch.no_grad():
            return linear(parameters, inputs, task)

    return scores
