"""ENAS and its REINFORCE: the gradient is that of the expected reward."""

import math
import time

import pytest
import torch
from torch import nn

from pluribus import search
from pluribus.search.algorithms.enas import Enas
from pluribus.search.decisions import decisions, everything
from pluribus.search.reinforce import (
    Draw,
    Logits,
    Recurrent,
    Reinforce,
    draw,
    likeliest,
    objective,
    rated,
)
from pluribus.search.training import Examples, Training

TWO = decisions(search.space({"a": search.oneof([1, 2, 3]), "b": search.oneof([1, 2])}))
REWARDS = {(0, 0): 0.2, (0, 1): 0.9, (1, 0): 0.5, (1, 1): 0.1, (2, 0): 0.7, (2, 1): 0.4}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def reward(choice):
    return REWARDS[choice["a"], choice["b"]]


def policies():
    logits = Logits(TWO)
    with torch.no_grad():
        logits.table["a"].copy_(torch.tensor([0.3, -0.2, 0.6]))
        logits.table["b"].copy_(torch.tensor([-0.4, 0.1]))
    return [logits, Recurrent(TWO, rng(), width=5)]


def gradient(policy, loss):
    found = torch.autograd.grad(loss, policy.parameters(), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("policy", policies(), ids=["logits", "lstm"])
@pytest.mark.parametrize("baseline", [0.0, 0.45])
def test_gradient_is_that_of_the_expected_reward(policy, baseline):
    """By enumeration: sum over a of pi(a) times the step's gradient, for any baseline."""
    exact, steps = torch.zeros(()), []
    for choice in everything(TWO):
        told = rated(policy, choice)
        exact = exact - told.log_prob.exp() * reward(choice)
        step = gradient(policy, objective(rated(policy, choice), reward(choice), baseline, 0.0))
        steps.append(told.log_prob.exp().detach() * step)
    torch.testing.assert_close(torch.stack(steps).sum(0), gradient(policy, exact))


def test_sampled_gradient_agrees_within_its_standard_error():
    policy = policies()[0]
    exact = -sum(rated(policy, c).log_prob.exp() * reward(c) for c in everything(TWO))
    source = rng(3)
    drawn = [draw(policy, source) for _ in range(3000)]
    steps = torch.stack([gradient(policy, objective(d, reward(d.choice), 0.5, 0.0)) for d in drawn])
    error = steps.std(0) / math.sqrt(len(steps))
    assert ((steps.mean(0) - gradient(policy, exact)).abs() < 4 * error).all()


@pytest.mark.parametrize("policy", policies(), ids=["logits", "lstm"])
def test_probabilities_and_entropy(policy):
    told = [rated(policy, choice) for choice in everything(TWO)]
    p = torch.stack([each.log_prob for each in told]).exp()
    torch.testing.assert_close(p.sum(), torch.ones(()))
    # of independent decisions it is the joint entropy; of dependent ones it is so on average
    expected = -(p * p.log()).sum()
    mean = (p * torch.stack([each.entropy for each in told])).sum()
    torch.testing.assert_close(mean, expected)


def test_published_controller_bounds_its_logits():
    policy = Recurrent(TWO, rng())
    assert policy.cell.hidden_size == 100
    with torch.no_grad():
        for parameter in policy.parameters():
            assert parameter.abs().max() <= 0.1
        policy.write[0].bias.copy_(torch.tensor([1e6, -1e6, 1.0]))
        first = policy.start().logits(TWO["a"])
        torch.testing.assert_close(first[:2], torch.tensor([2.5, -2.5]))
        policy.write[0].weight.zero_()
        torch.testing.assert_close(
            policy.start().logits(TWO["a"])[2], torch.tensor(2.5 * math.tanh(0.2))
        )


def test_baseline_and_first_step_by_hand():
    controller = Reinforce(Logits(TWO), rng(), lr=0.1, decay=0.9, entropy=0.0)
    controller.sample()
    controller.update(0.5)  # the baseline starts here: nothing to learn yet
    assert controller.baseline == pytest.approx(0.5)
    assert not controller.policy.table["a"].any()
    choice = controller.sample()
    controller.update(0.8)
    assert controller.baseline == pytest.approx(0.9 * 0.5 + 0.1 * 0.8)
    # gradient of -0.3 log pi at even odds, then Adam's second step after a first one of zeros
    g = 0.3 * (torch.full((3,), 1 / 3) - torch.eye(3)[choice["a"]])
    m, v = 0.1 * g / (1 - 0.9**2), 0.001 * g.square() / (1 - 0.999**2)
    torch.testing.assert_close(controller.policy.table["a"].detach(), -0.1 * m / (v.sqrt() + 1e-8))
    with pytest.raises(ValueError, match="call that first"):
        controller.update(0.1)


def test_entropy_pulls_towards_even_odds():
    policy = policies()[0]
    loss = objective(
        Draw({}, torch.zeros(()), rated(policy, {"a": 0, "b": 0}).entropy), 1.0, 1.0, 0.5
    )
    p = policy.table["b"].detach().softmax(0)
    by_hand = 0.5 * p * (p.log() - (p * p.log()).sum())  # d(-H)/d logits
    torch.testing.assert_close(torch.autograd.grad(loss, policy.table["b"])[0], by_hand)


def test_learns_the_best_of_six():
    controller = Reinforce(Logits(TWO), rng(1), lr=0.05)
    for _ in range(800):
        controller.update(reward(controller.sample()))
    assert likeliest(controller.policy) == {"a": 0, "b": 1}


def test_distinct_choices_are_never_drawn_twice():
    found = decisions(search.space({"m": search.manyof(3, [1, 2, 3, 4], distinct=True)}))
    policy, source = Logits(found), rng()
    for _ in range(50):
        told = draw(policy, source)
        assert len(set(told.choice.values())) == 3
        assert told.log_prob.item() == pytest.approx(-math.log(24))


# -- the algorithm ---------------------------------------------------------------------------------


class Linear(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)


class Zero(nn.Module):
    def forward(self, x):
        return x[:, :2] * 0


class Wrong(nn.Module):
    """Sees only what doesn't matter."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(2, 2)

    def forward(self, x):
        return self.part(x[:, 2:])


def signs(count, seed):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return Examples(x, (x[:, 0] + x[:, 1] > 0).long())


SPACE = search.space({"op": search.oneof([Zero, Wrong, Linear])})


def task(**changes):
    return Training(
        build=lambda p: p["op"](), train=signs(200, 0), val=signs(100, 1), batch=20, **changes
    )


@pytest.mark.parametrize("controller", ["logits", "lstm"])
def test_finds_the_candidate_that_can_learn(controller):
    algorithm = Enas(epochs=3, controller=controller, controller_steps=20, derive=10)
    study = search.run(SPACE, task(), algorithm=algorithm, trials=5)
    assert len(study.trials) == 1
    assert study.best_value == {"op": Linear}
    assert study.best.scores["score"] == task()({"op": Linear})  # trained alone, from new weights
    assert study.best.report["shared_steps"] == 30


def test_several_choices_are_trained_anew_best_first_and_once_each():
    algorithm = Enas(epochs=3, controller_steps=5, derive=30, retrain=3)
    study = search.run(SPACE, task(), algorithm=algorithm, trials=2)
    assert study.value(study.trials[0])["op"] is Linear
    assert len({str(trial.dna) for trial in study.trials}) == 2


def test_stops_when_the_time_is_up_and_still_trains_what_it_found():
    found = []

    def record(dna, score, report, seconds):
        found.append(search.Trial(len(found), dna, 0, "done", {"score": score}, report=report))
        return found[-1]

    session = search.Session(
        seed=0,
        trials=3,
        objectives=(search.Objective("score"),),
        costs={},
        deadline=time.monotonic(),
        _record=record,
    )
    Enas(retrain=3).search(SPACE, task(), session)
    assert len(found) == 1
    assert found[0].report["shared_steps"] == 0
    assert "the time was up after 0 of 100 steps" in session.notes[0]


def test_a_store_that_holds_the_trials_is_not_searched_again(tmp_path):
    first = search.run(SPACE, task(), algorithm="enas", trials=1, store=tmp_path / "s.sqlite")
    again = search.run(SPACE, task(), algorithm="enas", trials=1, store=tmp_path / "s.sqlite")
    assert again.resumed == 1
    assert again.best.scores == first.best.scores


def test_trials_share_no_weights():
    same = task()
    assert same({"op": Linear}) == same({"op": Linear})
    one, two = same.made({"op": Linear}), same.made({"op": Linear})
    assert torch.equal(one.weight, two.weight)
    assert one.weight is not two.weight


def test_a_loss_that_is_not_finite_ends_the_search():
    wild = task(lr=1e30, clip=1e30)
    with pytest.raises(ValueError, match=r"the loss is .* at step \d+"):
        search.run(SPACE, wild, algorithm="enas", trials=1)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="batch = 300"):
        Training(build=lambda p: p, train=signs(200, 0), val=signs(9, 1), batch=300)
    with pytest.raises(ValueError, match="3 inputs and 2 targets"):
        Training(build=lambda p: p, train=Examples(torch.zeros(3), torch.zeros(2)), val=signs(9, 1))
    with pytest.raises(ValueError, match="epochs"):
        Enas(epochs=0)
