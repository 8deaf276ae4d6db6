"""Statistics of batch norms, measured anew."""

import pytest
import torch
from torch import nn

from pluribus.core.errors import InputError, NonFiniteError
from pluribus.renorm import renorm


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    )


def inputs(count: int = 3) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [2 + 3 * torch.randn(8, 3, 9, 9, generator=rng) for _ in range(count)]


def test_statistics_are_those_of_the_activations(network):
    batches = inputs(1)
    assert renorm(network, batches) == 1
    first = network[0](batches[0]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(network[1].running_mean, first.mean(1))
    torch.testing.assert_close(network[1].running_var, first.var(1))
    normed = (first - first.mean(1, keepdim=True)) / (first.var(1, correction=0) + 1e-5).sqrt()[
        :, None
    ]
    hidden = normed.unflatten(1, (8, 7, 7)).transpose(0, 1).relu()
    second = network[3](hidden).transpose(0, 1).flatten(1)
    torch.testing.assert_close(network[4].running_mean, second.mean(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network[4].running_var, second.var(1), atol=1e-5, rtol=1e-4)


def test_batches_are_averaged(network):
    batches = inputs(3)
    assert renorm(network, iter(batches)) == 3
    maps = [network[0](x).transpose(0, 1).flatten(1) for x in batches]
    torch.testing.assert_close(
        network[1].running_mean, torch.stack([m.mean(1) for m in maps]).mean(0)
    )
    torch.testing.assert_close(
        network[1].running_var, torch.stack([m.var(1) for m in maps]).mean(0)
    )


def test_modes_momentum_and_weights_stay(network):
    network[2].eval()
    weights = {name: p.clone() for name, p in network.named_parameters()}
    renorm(network, inputs())
    assert network[1].training
    assert not network[2].training
    assert network[1].momentum == 0.1
    assert all(torch.equal(p, weights[name]) for name, p in network.named_parameters())


def test_it_repairs_an_average(network):
    """Weights that cancelled leave activations without spread; measured anew, they have it."""
    x = inputs(1)[0]
    network.eval()
    renorm(network, [x])
    with torch.no_grad():
        network[0].weight.mul_(0.1)
    assert float(network[:2](x).detach().var()) < 0.2
    renorm(network, [x])
    assert float(network[:2](x).detach().var()) == pytest.approx(1, abs=0.01)


def test_bad_input(network):
    with pytest.raises(InputError, match="Linear has no batch norm that keeps statistics"):
        renorm(nn.Linear(2, 2), inputs())
    renorm(network, inputs())
    before = {name: b.clone() for name, b in network.named_buffers()}
    with pytest.raises(InputError, match="no batch was given"):
        renorm(network, [])
    broken = inputs(1)
    broken[0][0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"1\.running_mean is not finite after 1 batches"):
        renorm(network, broken)
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())
    assert network[1].momentum == 0.1
