"""Tip and LP++ against loops, and that they are trained."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from pluribus.core.errors import InputError, MismatchError
from pluribus.tune._adapters import LpPlusPlus, Shots, Tip


@pytest.fixture
def shots():
    """Three classes around three directions; the model's own outputs are poor."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(8)
    centres = 2 * torch.randn(3, 5, generator=rng)
    features = centres[labels] + torch.randn(24, 5, generator=rng)
    return Shots(features, 0.5 * torch.randn(24, 3, generator=rng), labels)


def unit(vector):
    return [value / math.sqrt(sum(v * v for v in vector)) for value in vector]


def test_tip_by_a_loop(shots):
    adapter = Tip().start(shots)
    asked = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    own = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    got = adapter(asked, own)
    for b in range(4):
        wanted = own[b].tolist()
        h = unit(asked[b].tolist())
        for feature, label in zip(shots.features.tolist(), shots.labels.tolist(), strict=True):
            near = sum(x * y for x, y in zip(h, unit(feature), strict=True))
            wanted[label] += 2.0 * math.exp(-1.0 * (1 - near))
        assert got[b].tolist() == pytest.approx(wanted, rel=1e-4)


def test_lp_plus_plus_by_a_loop(shots):
    adapter = LpPlusPlus().start(shots)
    asked, own = shots.features[:4], shots.outputs[:4]
    got = adapter(asked, own)
    for b in range(4):
        h = unit(asked[b].tolist())
        for c in range(3):
            wanted = float(own[b, c])
            for feature, label in zip(shots.features.tolist(), shots.labels.tolist(), strict=True):
                if label == c:
                    wanted += sum(x * y for x, y in zip(h, unit(feature), strict=True))
            assert float(got[b, c]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("method", [Tip(lr=0.01), LpPlusPlus(lr=0.01)])
def test_they_are_trained(shots, method):
    """The authors' code never calls backward, so theirs stay as they start."""
    start, end = method.start(shots), method.fit(shots)
    losses = [
        float(cross_entropy(a(shots.features, shots.outputs), shots.labels)) for a in (start, end)
    ]
    assert losses[1] < losses[0] - 0.01
    for name in start.state:
        assert torch.equal(start.state[name], end.state[name]) == (name == "values"), name
    assert end.losses[-1] < end.losses[0]
    assert len(end.losses) == 10 * math.ceil(24 * 11 / 128)


@pytest.mark.parametrize("method", [Tip(), LpPlusPlus()])
def test_ten_steps_equal_explicit_ones(shots, method):
    """All shots in each batch, so their order doesn't matter."""
    from dataclasses import replace

    end = replace(method, fewest_batches=0, lr=0.05).fit(shots)
    state = {name: tensor.clone() for name, tensor in method.start(shots).state.items()}
    learned = [state[name].requires_grad_() for name in state if name != "values"]
    optimiser = torch.optim.AdamW(learned, lr=0.05, weight_decay=0.01)
    h = shots.features / shots.features.norm(dim=1, keepdim=True)
    for step in range(10):
        if isinstance(method, Tip):
            keys = state["keys"] / state["keys"].norm(dim=1, keepdim=True)
            near = torch.exp(-state["beta"] * (1 - h @ keys.T))
            scores = shots.outputs + state["alpha"] * near @ state["values"]
        else:
            scores = h @ state["weight"].T + state["bias"] + state["alpha"] * shots.outputs
        loss = -scores.log_softmax(1)[torch.arange(24), shots.labels].mean()
        assert end.losses[step] == pytest.approx(float(loss.detach()), abs=1e-5)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, tensor in state.items():
        torch.testing.assert_close(end.state[name], tensor.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [Tip(lr=0.5), LpPlusPlus(lr=0.5)])
def test_validation_keeps_the_best_epoch_the_start_included(shots, method):
    start = method.start(shots)
    named = start(shots.features, shots.outputs).argmax(1)
    held = shots._replace(labels=named)  # by which nothing is better than the start
    kept = method.fit(shots, validation=held)
    assert kept.kept_epoch == 0
    assert kept.accuracy(held) == 1.0
    better = method.fit(shots, validation=shots)
    assert better.accuracy(shots) >= start.accuracy(shots)


def test_bad_shots(shots):
    with pytest.raises(InputError, match="takes features"):
        Tip().fit(shots._replace(outputs=shots.labels))
    with pytest.raises(MismatchError, match="24 features, 23 outputs"):
        Tip().fit(shots._replace(outputs=shots.outputs[1:]))
    with pytest.raises(InputError, match="labels go from 0 to 7"):
        LpPlusPlus().fit(
            shots._replace(labels=torch.full((24,), 7).clone().index_fill(0, torch.tensor([0]), 0))
        )
    with pytest.raises(InputError, match="at least one shot"):
        Tip().fit(Shots(torch.zeros(0, 5), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)))
    with pytest.raises(InputError, match="lr"):
        Tip(lr=0)
