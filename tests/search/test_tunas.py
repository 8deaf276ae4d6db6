"""TuNAS: the absolute reward, its target, and a controller that starts late."""

import pytest
import torch
from torch import nn

from pluribus import search
from pluribus.search.algorithms.tunas import Tunas
from pluribus.search.cost import Parameters, absolute
from pluribus.search.training import Examples, Training


class Small(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)  # 10 parameters


class Large(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 2))  # 142 parameters


class Zero(nn.Module):
    def forward(self, x):
        return x[:, :2] * 0


def signs(count, seed):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return Examples(x, (x[:, 0] + x[:, 1] > 0).long())


def build(point):
    return point["op"]()


def task():
    return Training(build=build, train=signs(200, 0), val=signs(100, 1), batch=20)


def space(*candidates):
    return search.space({"op": search.oneof(list(candidates))})


def test_reward_by_hand():
    assert absolute(0.8, 120.0, 100.0) == pytest.approx(0.8 - 0.07 * 0.2)
    assert absolute(0.8, 80.0, 100.0) == pytest.approx(0.8 - 0.07 * 0.2)  # cheaper is no better
    assert absolute(0.8, 100.0, 100.0, -1.0) == 0.8


@pytest.mark.parametrize(("target", "wanted"), [(10.0, Small), (142.0, Large)])
def test_holds_the_cost_at_its_target(target, wanted):
    """Both learn the task; the cost decides."""
    algorithm = Tunas(epochs=8, beta=-0.5, target=target, controller_lr=0.05)
    study = search.run(
        space(Small, Large), task(), algorithm=algorithm, trials=1, cost=Parameters(build)
    )
    assert study.best_value == {"op": wanted}
    assert study.best.figure("parameters") == target
    assert study.best.report["target"] == target


def test_target_is_the_mean_cost_of_random_points_by_default():
    study = search.run(
        space(Small, Large), task(), Tunas(epochs=1), trials=1, cost=Parameters(build)
    )
    small = (142 - study.best.report["target"]) / 132 * 20  # of 20 draws
    assert small == pytest.approx(round(small))
    assert 3 <= round(small) <= 17


def test_without_a_cost_the_score_decides():
    algorithm = Tunas(epochs=8, controller_lr=0.05)
    study = search.run(space(Zero, Small), task(), algorithm=algorithm, trials=1)
    assert study.best_value == {"op": Small}
    assert "target" not in study.best.report


@pytest.mark.parametrize(("warmup", "updates"), [(0.0, 40), (0.25, 30), (0.9, 4)])
def test_controller_starts_after_the_warmup(warmup, updates, monkeypatch):
    from pluribus.search import reinforce

    seen = []
    real = reinforce.Reinforce.update
    monkeypatch.setattr(
        reinforce.Reinforce, "update", lambda self, r: (seen.append(r), real(self, r))[1]
    )
    search.run(space(Zero, Small), task(), Tunas(epochs=4, warmup=warmup), trials=1)
    assert len(seen) == updates  # of 40 steps


def test_refusals():
    two = {"a": Parameters(build), "b": Parameters(build)}
    with pytest.raises(ValueError, match="one cost at its target, got a, b"):
        search.run(space(Zero, Small), task(), Tunas(epochs=1), trials=1, cost=two)
    with pytest.raises(ValueError, match=r"target = -1.0"):
        search.run(
            space(Zero, Small), task(), Tunas(epochs=1, target=-1.0), trials=1, cost=two["a"]
        )
    with pytest.raises(ValueError, match="op is a float"):
        search.run({"op": search.floatv(0.0, 1.0)}, task(), "tunas", trials=1)
