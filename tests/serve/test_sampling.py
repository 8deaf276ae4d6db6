"""Drawn tokens: frequencies against the distribution, the nucleus by hand, seeds."""

import math

import pytest
import torch

from pluribus.serve.sampling import Sampler, Sampling, likely, likely_rows


def drawn(logits, count=4000, **settings):
    sampler = Sampler(Sampling(max_tokens=1, seed=7, **settings))
    found = torch.tensor([sampler(logits) for _ in range(count)])
    return torch.bincount(found, minlength=len(logits)) / count


def test_frequencies_are_the_probabilities():
    p = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    found = drawn(p.log(), temperature=1.0)
    assert found[1] == 0
    assert float((found - p).abs().max()) < 4 * math.sqrt(0.25 / 4000)
    hot = p.pow(0.5) / p.pow(0.5).sum()
    assert float((drawn(p.log(), temperature=2.0) - hot).abs().max()) < 4 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.49, [0]), (0.51, [0, 2]), (0.8, [0, 2]), (0.9, [0, 2, 3]), (1e-9, [0])]
)
def test_the_nucleus(top_p, kept):
    """The fewest likeliest with at least that sum."""
    p = torch.tensor([0.5, 0.0, 0.3125, 0.125, 0.0625])
    found = drawn(p.log(), 2000, temperature=1.0, top_p=top_p)
    assert found.nonzero()[:, 0].tolist() == kept
    expected = p[kept] / p[kept].sum()
    assert float((found[kept] - expected).abs().max()) < 4 * math.sqrt(0.25 / 2000)


def test_seeds_and_greed():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    samplers = [Sampler(Sampling(max_tokens=9, temperature=1.0, seed=s)) for s in (1, 1, 2)]
    one, two, other = ([sampler(logits) for _ in range(9)] for sampler in samplers)
    assert one == two != other
    several = Sampler(Sampling(max_tokens=9, temperature=1.0, seed=1))
    assert len({several(logits) for _ in range(30)}) > 5
    assert Sampler(Sampling(max_tokens=1))(logits) == int(logits.argmax())
    assert Sampler(Sampling(max_tokens=1, temperature=1.0, top_p=0.0))(logits) == int(
        logits.argmax()
    )
    unseeded = [Sampler(Sampling(max_tokens=1, temperature=1.0)) for _ in range(12)]
    assert len({sampler(logits) for sampler in unseeded}) > 1


def test_log_probabilities():
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 5.0]])
    total = math.log(math.e + math.e**2 + 1)
    found = likely(logits[0], 2, 2)
    assert found.log_prob == pytest.approx(0 - total, abs=1e-6)
    assert [token for token, _ in found.top] == [1, 0]
    assert [value for _, value in found.top] == pytest.approx([2 - total, 1 - total], abs=1e-6)
    rows = likely_rows(logits, torch.tensor([2, 0]), 2)
    assert rows[0] == found
    assert rows[1] == likely(logits[1], 0, 2)
    assert likely(logits[0], 1, 0).top == ()
