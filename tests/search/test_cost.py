"""Costs, by hand."""

import time

import pytest
import torch
from torch import nn

from pluribus.core.errors import InputError
from pluribus.search import cost, oneof, run


def tower(width):
    return nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Linear(width, 3, bias=False))


def test_parameters_by_hand():
    assert cost.parameters(tower(7)) == 10 * 7 + 7 + 7 * 3
    assert cost.Parameters(tower)(7) == 98


def test_shared_parameters_count_once():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    assert cost.parameters(module) == 16 + 4 + 4
    assert cost.size(module) == 4 * 24


def test_flops_of_a_linear_net_by_hand():
    """A product of (b, n) and (n, m) is b n m multiplications and as many additions."""
    batch = torch.zeros(5, 10)
    assert cost.flops(tower(7), batch) == 2 * 5 * 10 * 7 + 2 * 5 * 7 * 3
    assert cost.Flops(lambda: torch.zeros(5, 10), tower)(7) == 910


def test_size_counts_bytes_by_element_type_and_buffers():
    module = nn.BatchNorm1d(6)  # weight, bias, running mean and variance; a whole-number counter
    assert cost.size(module) == 4 * 6 * 4 + 8
    assert cost.size(module.half()) == 2 * 6 * 4 + 8
    weights = {"a": torch.zeros(3, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.int8)}
    assert cost.Size()(weights) == 26
    tied = torch.zeros(4)
    assert cost.size({"a": tied, "b": tied, "c": tied.reshape(2, 2)}) == 16


class Sleeper(nn.Module):
    """Sleeps for the given milliseconds in turn, and notes mode, gradients and threads."""

    def __init__(self, naps):
        super().__init__()
        self.naps, self.seen = iter(naps), []

    def forward(self, x):
        modes = (self.training, torch.is_grad_enabled(), torch.get_num_threads())
        self.seen.append(modes)
        time.sleep(next(self.naps) / 1000)
        return x


def test_latency_is_the_median_of_the_passes_after_the_warm_up():
    module = Sleeper([80] * 2 + [5, 40, 60, 5, 20])
    before = torch.get_num_threads()
    found = cost.latency(module, torch.zeros(1), threads=1, warmups=2, runs=5)
    assert 0.020 <= found < 0.039
    assert set(module.seen) == {(False, False, 1)}
    assert module.training
    assert torch.get_num_threads() == before


def test_latency_by_default_is_twenty_after_five():
    module = Sleeper([0] * 25)
    assert cost.Latency(lambda: torch.zeros(1))(module) < 0.05
    assert len(module.seen) == 25
    with pytest.raises(InputError, match="runs = 0"):
        cost.latency(module, torch.zeros(1), runs=0)


def test_a_table_of_the_users():
    table = cost.Table({"small": 1.5, "large": 4.0}, lambda point: point["size"])
    assert table({"size": "large"}) == 4.0
    assert cost.Table({1: 2.0, 3: 5.0})([1, 3, 3]) == 12.0
    with pytest.raises(InputError, match=r"no 'larg'; it has: small, large. Did you mean 'large'"):
        table({"size": "larg"})


def test_absolute_reward_by_hand():
    assert cost.absolute(0.9, 150.0, 100.0) == pytest.approx(0.9 - 0.07 * 0.5)
    assert cost.absolute(0.9, 50.0, 100.0, beta=-0.2) == pytest.approx(0.9 - 0.2 * 0.5)
    assert cost.absolute(0.9, 100.0, 100.0) == 0.9
    with pytest.raises(InputError, match="target = 0"):
        cost.absolute(0.9, 1.0, 0.0)


def test_what_is_no_module_is_refused():
    with pytest.raises(InputError, match="measures a module, not int: give build="):
        cost.Parameters()(3)


def test_a_front_of_score_and_size():
    study = run(
        {"width": oneof([2, 8, 32])},
        lambda point: {2: 0.5, 8: 0.9, 32: 0.9}[point["width"]],
        "sweep",
        cost=cost.Parameters(lambda point: tower(point["width"])),
    )
    assert [study.value(trial)["width"] for trial in study.front] == [8, 2]
    assert study.front[0].scores == {"score": 0.9, "parameters": 10 * 8 + 8 + 24}
