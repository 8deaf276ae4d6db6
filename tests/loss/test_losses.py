"""Each objective against a slow obvious version or an outside one."""

import math

import pytest
import torch
from torch.distributions import Categorical

from pluribus.core.errors import InputError, MismatchError, RecipeError
from pluribus.loss import LOSSES, loss_of, needs
from pluribus.loss.cross_entropy import CrossEntropy
from pluribus.loss.entropy import Entropy
from pluribus.loss.kl import Kl


@pytest.fixture
def outputs():
    return 3 * torch.randn(7, 5, generator=torch.Generator().manual_seed(0))


def test_entropy_is_the_distributions(outputs):
    wanted = Categorical(logits=outputs).entropy().mean()
    torch.testing.assert_close(Entropy()(outputs), wanted, rtol=0, atol=1e-6)
    assert float(Entropy()(torch.zeros(2, 4))) == pytest.approx(math.log(4))


def test_entropy_with_fusion_benchs_epsilon_inside(outputs):
    """FusionBench adds 1e-8 inside the logarithm; the difference is beyond five decimals."""
    p = outputs.softmax(1)
    wanted = -(p * (p + 1e-8).log()).sum(1).mean()
    torch.testing.assert_close(Entropy()(outputs), wanted, rtol=0, atol=1e-5)


def test_entropy_stays_finite_for_sure_predictions():
    outputs = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
    loss = Entropy(diversity=0.5)(outputs)
    loss.backward()
    assert float(loss.detach()) == 0
    assert bool(outputs.grad.isfinite().all())


def test_diversity_pays_for_using_several_classes(outputs):
    mean = outputs.softmax(1).mean(0)
    wanted = Entropy()(outputs) + 0.3 * (mean * mean.log()).sum()
    torch.testing.assert_close(Entropy(diversity=0.3)(outputs), wanted, rtol=0, atol=1e-6)


def test_cross_entropy_by_hand():
    outputs = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    wanted = (-math.log(3 / 4) - math.log(1 / 2)) / 2
    assert float(CrossEntropy()(outputs, torch.tensor([1, 0]))) == pytest.approx(wanted)


def test_kl_is_the_distributions(outputs):
    expert = outputs.flip(0)
    for temperature in (1.0, 2.0):
        one, other = (Categorical(logits=x / temperature) for x in (expert, outputs))
        wanted = temperature**2 * torch.distributions.kl_divergence(one, other).mean()
        got = Kl(temperature=temperature)(outputs, expert)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert float(Kl()(outputs, outputs)) == 0


def test_what_they_need():
    assert {name: needs(LOSSES.build(name, {})) for name in ("entropy", "cross_entropy", "kl")} == {
        "entropy": "nothing",
        "cross_entropy": "labels",
        "kl": "experts",
    }
    assert needs(lambda outputs, targets: outputs.sum()) == "nothing"


def test_bad_input(outputs):
    with pytest.raises(InputError, match="class scores"):
        Entropy()(outputs[0])
    with pytest.raises(InputError, match="labels go from 0 to 5"):
        CrossEntropy()(outputs, torch.tensor([0, 5, 1, 1, 1, 1, 1]))
    with pytest.raises(InputError, match="one class"):
        CrossEntropy()(outputs, torch.tensor([0]))
    with pytest.raises(MismatchError, match="scores are"):
        Kl()(outputs, outputs[:, :4])
    with pytest.raises(RecipeError, match="Did you mean 'entropy'"):
        loss_of("entropie")
    with pytest.raises(InputError, match="is no loss"):
        loss_of(3)
    with pytest.raises(InputError, match="diversity"):
        Entropy(diversity=-1)
