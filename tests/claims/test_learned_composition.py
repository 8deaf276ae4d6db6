"""The static merges that a search of the claim tries."""

import pytest
import torch

from pluribus.claims.learned_composition import candidates
from pluribus.core.pool import Pool
from pluribus.engine.driver import merge


def pool() -> Pool:
    def state() -> dict[str, torch.Tensor]:
        return {f"blocks.{i}.weight": torch.randn(16, 16, generator=rng) for i in range(4)}

    rng = torch.Generator().manual_seed(0)
    base = state()
    return Pool(base, {task: {n: t + 0.1 * state()[n] for n, t in base.items()} for task in "abc"})


@pytest.mark.parametrize("text", [*candidates()])
def test_every_candidate_merges(text):
    models = pool()
    weights = merge(models, text)
    assert all(bool(weights[name].isfinite().all()) for name in weights)
    assert any(not torch.equal(weights[name], models.base[name]) for name in weights)
