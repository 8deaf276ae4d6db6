"""DARTS: gradients through a step of the weights, by automatic differentiation and by hand."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from pluribus import search
from pluribus.core.errors import InputError
from pluribus.search.algorithms.darts import Darts
from pluribus.search.darts_step import Mixer, first_order, second_order
from pluribus.search.decisions import decisions
from pluribus.search.supernet import supernet
from pluribus.search.training import Examples, Training

A = torch.tensor([[1.0, 0.4], [0.3, 2.0]], dtype=torch.float64)


def train_loss(weights, alphas):
    (w,), (a,) = weights, alphas
    return 0.5 * w @ A @ w + (a.softmax(0) * w).sum() + 0.1 * (w**4).sum() * a[0]


def val_loss(weights, alphas):
    (w,), (a,) = weights, alphas
    return ((w - torch.tensor([1.0, -2.0])) ** 2 * a.softmax(0)).sum() + 0.3 * a[1] * w.prod()


def toy():
    w = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([0.2, -0.5], dtype=torch.float64, requires_grad=True)
    return w, a


def test_first_order_is_the_gradient_at_the_present_weights():
    w, a = toy()
    (ours,) = first_order(val_loss, [w], [a])
    torch.testing.assert_close(ours, torch.autograd.grad(val_loss([w], [a]), a)[0])
    assert w.grad is None


@pytest.mark.parametrize("rate", [0.025, 0.1, 0.4])
def test_second_order_is_the_gradient_through_an_unrolled_step(rate):
    w, a = toy()
    (g,) = torch.autograd.grad(train_loss([w], [a]), w, create_graph=True)
    (exact,) = torch.autograd.grad(val_loss([w - rate * g], [a]), a)
    (ours,) = second_order(train_loss, val_loss, [w], [a], rate)
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=0)
    (first,) = first_order(val_loss, [w], [a])
    assert (first - exact).abs().max() > 20 * (ours - exact).abs().max()


def test_second_order_without_weights_to_move_is_the_outer_gradient():
    w, a = toy()
    (ours,) = second_order(train_loss, lambda w, a: a[0][0] ** 2, [w], [a], 0.1)
    torch.testing.assert_close(ours, torch.tensor([0.4, 0.0], dtype=torch.float64))


class Narrow(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)


class Zero(nn.Module):
    def forward(self, x):
        return x[:, :2] * 0


def program(point):
    return nn.Sequential(
        nn.Linear(3, point["width"]), nn.Tanh(), nn.Linear(point["width"], 3), point["op"]()
    )


def test_second_order_through_a_network_of_switches_and_sizes():
    space = search.space({"width": search.oneof([2, 4]), "op": search.oneof([Narrow, Zero])})
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    net = supernet(space, program, x).double()
    x = x.double()
    mixer = Mixer(net.decisions, torch.Generator().manual_seed(1))
    alphas = [a.detach().double().requires_grad_() for a in mixer.alphas.values()]
    names = [name for name, _ in net.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for p in net.parameters()]

    def loss(rows):
        def of(weights, alphas):
            given = dict(zip(names, weights, strict=True))
            out = functional_call(net, given, (x[rows], mixer.mixture(alphas)))
            return nn.functional.cross_entropy(out, y[rows])

        return of

    train, val = loss([0, 1, 2]), loss([3, 4, 5])
    step = torch.autograd.grad(train(weights, alphas), weights, create_graph=True)
    ahead = [w - 0.5 * g for w, g in zip(weights, step, strict=True)]
    exact = torch.autograd.grad(val(ahead, alphas), alphas)
    ours = second_order(train, val, weights, alphas, 0.5)
    for one, two in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-9)


def test_first_step_of_the_mixer_by_hand():
    """Adam's first step is lr * sign(gradient + weight decay * alpha), but for its epsilon."""
    found = decisions(search.space({"op": search.oneof([Narrow, Zero])}))
    mixer = Mixer(found, torch.Generator().manual_seed(0), lr=0.01)
    before = mixer.alphas["op"].detach().clone()
    p = mixer.sample()["op"]
    torch.testing.assert_close(p, before.softmax(0))
    mixer.update((p * torch.tensor([3.0, 1.0])).sum())
    after = mixer.alphas["op"].detach()
    torch.testing.assert_close(after, before + torch.tensor([-0.01, 0.01]), rtol=0, atol=1e-6)
    assert mixer.derived() == {"op": 1}


def signs(count, seed):
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return Examples(x, (x[:, 0] > 0).long())


def task():
    return Training(build=lambda p: p["op"](), train=signs(200, 0), val=signs(100, 1), batch=20)


@pytest.mark.parametrize("order", [1, 2])
def test_finds_the_candidate_that_can_learn(order):
    space = search.space({"op": search.oneof([Zero, Narrow])})
    algorithm = Darts(epochs=4, order=order, alpha_lr=0.05, lr=0.2)
    study = search.run(space, task(), algorithm=algorithm, trials=1)
    assert study.best_value == {"op": Narrow}
    assert study.best.scores["score"] > 0.9
    alphas = study.best.report["alphas"]["op"]
    assert alphas[1] > alphas[0] + 0.2
    again = search.run(space, task(), algorithm=algorithm, trials=1)
    assert again.best.report["alphas"] == study.best.report["alphas"]


def test_needs_a_training():
    space = search.space({"op": search.oneof([Zero, Narrow])})
    with pytest.raises(InputError, match="darts trains all points in one network"):
        search.run(space, lambda p: 1.0, algorithm="darts", trials=1)
