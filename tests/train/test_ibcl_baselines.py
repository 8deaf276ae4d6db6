"""What IBCL is compared with: each against a slow version or a case worked by hand."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn

from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.train.continual import (
    GradientEpisodicMemory,
    Inference,
    Rehearsal,
    SequentialPosterior,
    joint,
)
from pluribus.train.continual.baselines import _pooled, projected
from pluribus.train.continual.network import Labelled, Network, stream
from pluribus.train.continual.variational import centred, fit

NET = partial(nn.Linear, 5, 1)
HOW = Inference(kl_weight="elbo", epochs=4, lr=3e-2, batch_size=25)


def task(seed: int, sign: float, count: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows around +-1 on an axis of its own; on the last axis tasks contradict each other."""
    rng = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(count, 5, generator=rng)
    y = torch.randint(2, (count,), generator=rng)
    x[:, seed] += 0.5 * (2 * y - 1)
    x[:, 4] += sign * (2 * y - 1)
    return x, y


ONE, TWO = task(0, 1.0), task(1, -1.0)


def accuracy(state, data) -> float:
    x, y = data
    return float((((x @ state["weight"][0] + state["bias"]) > 0).long() == y).float().mean())


# -- GEM's projection ------------------------------------------------------------------------------


def enumerated(gradient: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    """Return the projection by trying every set of active constraints."""
    best, distance = gradient, float("inf")
    for size in range(len(earlier) + 1):
        for active in itertools.combinations(range(len(earlier)), size):
            rows = earlier[list(active)]
            z = gradient - rows.T @ torch.linalg.pinv(rows @ rows.T) @ rows @ gradient
            gap = float((z - gradient).norm())
            if (earlier @ z >= -1e-9).all() and gap < distance:
                best, distance = z, gap
    return best


@pytest.mark.parametrize("seed", range(6))
def test_projection_is_the_nearest_vector_that_harms_no_task(seed):
    rng = torch.Generator().manual_seed(seed)
    gradient = torch.randn(8, generator=rng, dtype=torch.float64)
    earlier = torch.randn(4, 8, generator=rng, dtype=torch.float64) - 0.5 * gradient
    found = projected(gradient, earlier)
    assert float((earlier @ gradient).min()) < 0
    assert float((earlier @ found).min()) > -1e-8
    torch.testing.assert_close(found, enumerated(gradient, earlier), rtol=1e-6, atol=1e-8)


def test_projection_worked_by_hand():
    earlier = torch.tensor([[0.0, 1.0]])
    assert torch.equal(projected(torch.tensor([3.0, -2.0]), earlier), torch.tensor([3.0, 0.0]))
    untouched = torch.tensor([3.0, 2.0])
    assert torch.equal(projected(untouched, earlier), untouched)
    assert torch.equal(projected(-untouched, torch.zeros(1, 2)), -untouched)


# -- chains ----------------------------------------------------------------------------------------


def test_the_sequential_posterior_is_a_chain_of_inferences():
    chain = SequentialPosterior(NET, 0.3, HOW, seed=4)
    chain.learn("one", ONE)
    chain.learn("two", TWO)
    network = Network(NET)
    posterior = centred(network, 0.3)
    for name, data in (("one", ONE), ("two", TWO)):
        rng = stream(4, name, "sequential")
        posterior = fit(network, posterior, Labelled(*data), HOW, rng, task=name).posterior
    assert torch.equal(chain.mean({"one": 1.0})["weight"], posterior.mu["weight"])
    assert chain.model({"one": 0.5, "two": 0.5}) == [chain.posterior.mu]
    assert chain.steps == 2 * 4 * 4
    assert [state for _, state in chain.sweep("one", 2)] == [chain.posterior.mu] * 2


def test_rehearsal_follows_the_preference_where_tasks_contradict():
    model = Rehearsal(NET, 0.5, HOW, memory=40)
    model.learn("one", ONE)
    model.learn("two", TWO)
    assert (model.tasks, model.steps) == (("one", "two"), 4 * 4 + 4 * 6)  # 100, then 140 rows
    first, last = model.train({"one": 1.0}), model.train({"two": 1.0})
    assert accuracy(first, ONE) > 0.95
    assert accuracy(last, TWO) > 0.9
    assert accuracy(first, ONE) > accuracy(last, ONE) + 0.1
    assert model.steps == 16 + 24 * 3


def test_gem_forgets_less_than_the_same_training_without_memory():
    gem = GradientEpisodicMemory(NET, HOW, memory=50)
    gem.learn("one", ONE)
    assert accuracy(gem.state, ONE) > 0.95
    gem.learn("two", TWO)
    bare = GradientEpisodicMemory(NET, HOW, memory=50)
    bare.learn("one", ONE)
    bare._kept.clear()
    bare.learn("two", TWO)
    assert accuracy(gem.state, ONE) > accuracy(bare.state, ONE) + 0.1
    assert (gem.tasks, gem.steps) == (("one", "two"), 32)


# -- joint -----------------------------------------------------------------------------------------


def test_pooled_weights_sum_to_each_tasks_share():
    parts = {"a": Labelled(*task(0, 1.0, 30)), "b": Labelled(*task(1, 1.0, 90))}
    data, importance = _pooled(parts, {"a": 0.8, "b": 0.2})
    assert len(data.y) == 120
    assert float(importance[:30].sum() / 120) == pytest.approx(0.8)
    assert float(importance[30:].sum() / 120) == pytest.approx(0.2)


def test_joint_training_reaches_the_weighted_optimum():
    """Full batches, many steps: the gradient of the preference's loss vanishes."""
    how = Inference(steps=1500, lr=2e-2, batch_size=200)
    noisy = {}
    for name, (x, y) in {"one": ONE, "two": TWO}.items():
        flipped = y.clone()
        flipped[::4] = 1 - flipped[::4]  # not separable, so that there is an optimum
        noisy[name] = (x, flipped)
    found = joint(NET, noisy, {"one": 0.7, "two": 0.3}, how)
    assert found.steps == 1500
    weight = found.state["weight"].clone().requires_grad_()
    loss = sum(
        share
        * nn.functional.binary_cross_entropy_with_logits(
            x @ weight[0] + found.state["bias"], y.float()
        )
        for share, (x, y) in zip((0.7, 0.3), noisy.values(), strict=True)
    )
    assert float(torch.autograd.grad(loss, weight)[0].abs().max()) < 1e-3


def test_joint_training_costs_a_training_each():
    how = Inference(epochs=2, batch_size=50)
    assert joint(NET, {"one": ONE, "two": TWO}, {"one": 1.0}, how).steps == 2 * 4


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SequentialPosterior, Rehearsal, GradientEpisodicMemory])
def test_names_data_and_preferences_that_are_refused(kind):
    model = kind(NET)
    model.learn("one", ONE)
    with pytest.raises(InputError, match="'one' is taken"):
        model.learn("one", ONE)
    with pytest.raises(MismatchError, match=r"features are \[4\]"):
        model.learn("two", (TWO[0][:, :4], TWO[1]))
    with pytest.raises(InputError, match="labels span"):
        model.learn("two", (TWO[0], TWO[1] + 1))
    assert model.tasks == ("one",)


def test_other_arguments_that_are_refused():
    for kind in (Rehearsal, GradientEpisodicMemory):
        with pytest.raises(InputError, match="memory = 0"):
            kind(NET, memory=0)
    with pytest.raises(InputError, match="prior standard deviation 0"):
        SequentialPosterior(NET, 0)
    with pytest.raises(InputError, match="no task has been learned"):
        Rehearsal(NET).train({"one": 1.0})
    with pytest.raises(InputError, match=r"sum to 0\.5"):
        joint(NET, {"one": ONE}, {"one": 0.5})
    with pytest.raises(InputError, match="no task"):
        joint(NET, {}, {"one": 1.0})


def test_a_loss_that_is_no_number_stops():
    with pytest.raises(NonFiniteError, match="joint training: the loss became"):
        joint(NET, {"one": (ONE[0].sign() * 3e38, ONE[1])}, {"one": 1.0}, HOW)
