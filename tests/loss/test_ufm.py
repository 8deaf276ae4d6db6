"""UFM against loops over inputs and classes."""

import math

import pytest
import torch

from pluribus.core.errors import InputError
from pluribus.loss import loss_of, needs
from pluribus.loss.ufm import Ufm, masked


@pytest.fixture
def outputs():
    return 2 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def slow(strong, q, threshold):
    """The page's formula, input by input."""
    total, weight = 0.0, 0.0
    for scores, guess in zip(strong.tolist(), q.tolist(), strict=True):
        if max(guess) > threshold:
            log_z = math.log(sum(math.exp(s) for s in scores))
            total -= sum(g * (s - log_z) for g, s in zip(guess, scores, strict=True))
            weight += 1
    return total / max(weight, 1)


@pytest.mark.parametrize("threshold", [0.2, 0.7, 0.95])
def test_the_loss_counts_sure_guesses_alone(outputs, threshold):
    loss = Ufm(threshold=threshold)
    q = loss.guess(outputs.flip(0))
    got = loss(outputs, q)
    assert float(got) == pytest.approx(slow(outputs, q, threshold), rel=1e-5)
    bars = torch.full((4,), threshold)
    torch.testing.assert_close(loss(outputs, masked(q, bars)), got)


def test_sharpening_is_a_power_not_a_factor(outputs):
    """The authors' code multiplies by T and renormalises, which gives softmax itself."""
    p = outputs.softmax(1)
    wanted = p**2 / (p**2).sum(1, keepdim=True)
    q = Ufm(temperature=0.5).guess(outputs)
    torch.testing.assert_close(q, wanted)
    assert bool((q.amax(1) > p.amax(1)).all())


def test_trusted_labels_replace_guesses_and_nothing_else(outputs):
    trusted = torch.tensor([-1, 2, -1, 0, -1, -1])
    q = Ufm().guess(outputs, trusted)
    plain = Ufm().guess(outputs)
    assert q[1].tolist() == [0, 0, 1, 0]
    assert q[3].tolist() == [1, 0, 0, 0]
    others = torch.tensor([0, 2, 4, 5])
    torch.testing.assert_close(q[others], plain[others])


def test_no_gradient_through_the_guesses(outputs):
    outputs.requires_grad_()
    assert not Ufm().guess(outputs).requires_grad


def test_a_batch_without_a_sure_guess_has_no_loss_and_no_gradient(outputs):
    strong = outputs.clone().requires_grad_()
    loss = Ufm(threshold=1.0)(strong, Ufm().guess(outputs))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not bool(strong.grad.any())


def test_adaptive_bars_by_hand():
    """Class 0 has 6 sure inputs of 10, class 1 has 3, class 2 none, and one is unsure."""
    loss = Ufm(threshold="adaptive", top=0.9)
    bars = loss.bars(torch.tensor([6, 3, 0]), 1)
    torch.testing.assert_close(bars, torch.tensor([0.9, 0.9 * 0.5 / 1.5, 0.0]))
    early = loss.bars(torch.tensor([2, 1, 0]), 8)  # most are unsure: measured against those
    torch.testing.assert_close(early, 0.9 * torch.tensor([0.25 / 1.75, 0.125 / 1.875, 0.0]))
    fixed = Ufm(threshold=0.8).bars(torch.tensor([6, 3, 0]), 1)
    torch.testing.assert_close(fixed, torch.full((3,), 0.8))


def test_bars_apply_to_the_class_that_is_named():
    q = torch.tensor([[0.6, 0.4], [0.4, 0.6]])
    kept = masked(q, torch.tensor([0.5, 0.7]))
    torch.testing.assert_close(kept, torch.tensor([[0.6, 0.4], [0.0, 0.0]]))
    strong = torch.tensor([[1.0, 0.0], [5.0, 0.0]])
    wanted = slow(strong[:1], q[:1], 0.0)
    assert float(Ufm(threshold="adaptive")(strong, kept)) == pytest.approx(wanted, rel=1e-5)


def test_bad_inputs(outputs):
    assert needs(loss_of("ufm")) == "guesses"
    with pytest.raises(InputError, match="same shape, not nothing"):
        Ufm()(outputs, None)
    with pytest.raises(InputError, match=r"not \[6, 3\]"):
        Ufm()(outputs, outputs[:, :3])
    with pytest.raises(InputError, match="threshold"):
        Ufm(threshold="often")
    with pytest.raises(InputError, match="temperature"):
        Ufm(temperature=0.0)
