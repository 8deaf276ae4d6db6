"""Gradient alignment, by hand and against a plain double loop."""

import math

import pytest
import torch

from pluribus.core.errors import InputError, NonFiniteError
from pluribus.inspect.alignment import gradient_alignment


def test_worked_by_hand():
    w = torch.zeros(2, requires_grad=True)
    losses = {"x": lambda: 3 * w[0], "both": lambda: w.sum(), "back": lambda: -w[0] / 2}
    found = gradient_alignment(losses, [w])
    half = 1 / math.sqrt(2)
    expected = torch.tensor([[1, half, -1], [half, 1, -half], [-1, -half, 1]])
    torch.testing.assert_close(found.cosines.float(), expected)
    torch.testing.assert_close(found.norms.float(), torch.tensor([3, math.sqrt(2), 0.5]))
    assert found.mean == pytest.approx((half - 1 - half) / 3)
    assert found.conflicts == pytest.approx(2 / 3)
    assert w.grad is None


def test_it_is_the_mean_of_all_pairs_cosines():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    data = {name: (torch.randn(5, 4), torch.randint(3, (5,))) for name in "abcd"}

    def loss(name):
        x, y = data[name]
        return torch.nn.functional.cross_entropy(net(x), y)

    found = gradient_alignment({n: lambda n=n: loss(n) for n in data}, net.parameters())
    rows = {}
    for name in data:
        net.zero_grad()
        loss(name).backward()
        rows[name] = torch.cat([p.grad.flatten() for p in net.parameters()])
    pairs = [
        float(torch.cosine_similarity(rows[a], rows[b], dim=0)) for a in data for b in data if a < b
    ]
    assert found.mean == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_bad_input():
    w, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    with pytest.raises(InputError, match="at least two"):
        gradient_alignment({"a": lambda: w.sum()}, [w])
    pair = {"a": lambda: w.sum(), "b": lambda: (w * 2).sum()}
    with pytest.raises(InputError, match="no parameter is given"):
        gradient_alignment(pair, [])
    with pytest.raises(InputError, match="parameters number 1 are frozen"):
        gradient_alignment(pair, [w, torch.ones(1)])
    with pytest.raises(InputError, match="the gradient of b is zero"):
        gradient_alignment(pair | {"b": lambda: 0 * w.sum()}, [w, other])
    with pytest.raises(NonFiniteError, match="of task 'b' is not finite"):
        gradient_alignment(pair | {"b": lambda: (w - 1).sqrt().sum()}, [w])
