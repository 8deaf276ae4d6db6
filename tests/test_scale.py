import json
import math

import pytest
import torch

from pluribus.core.errors import InputError
from pluribus.core.pool import Pool
from pluribus.merge.linear import Linear
from pluribus.merge.magmax import MagMax
from pluribus.merge.task_arithmetic import TaskArithmetic
from pluribus.merge.ties import Ties
from pluribus.scale import configured, search_scale


def model(seed, base=None):
    rng = torch.Generator().manual_seed(seed)
    drawn = {"w": torch.randn(4, 5, generator=rng), "b": torch.randn(4, generator=rng)}
    if base is not None:
        drawn = {k: base[k] + 0.1 * v for k, v in drawn.items()}
    return drawn | {"steps": torch.tensor([7])}


BASE = model(0)
EXPERTS = [model(1, BASE), model(2, BASE)]


@pytest.fixture
def pool():
    return Pool(BASE, EXPERTS)


def closeness(target):
    return lambda state: -sum(float((state[k] - target[k]).square().sum()) for k in ("w", "b"))


def mixed(*weights):
    return {
        k: BASE[k] + sum(w * (e[k] - BASE[k]) for w, e in zip(weights, EXPERTS, strict=True))
        for k in ("w", "b")
    }


def test_finds_the_scale_with_two_merges(pool):
    seen = []

    def score(state):
        seen.append(state)
        return closeness(mixed(0.3, 0.3))(state)

    found = search_scale(score, {"scale": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]}, TaskArithmetic(), pool)
    assert found.parameters == {"scale": 0.3}
    assert found.method == TaskArithmetic(scale=0.3)
    assert found.merges == 2  # the update, and one in full to check that it may be scaled
    assert found.score == max(t.score for t in found.trials)
    assert [t.parameters["scale"] for t in found.trials] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    torch.testing.assert_close(seen[5]["w"], mixed(0.5, 0.5)["w"])
    assert seen[5]["steps"].equal(BASE["steps"])
    assert seen[5].keys() == BASE.keys()


@pytest.mark.parametrize("method", [Ties(density=0.5), MagMax(), TaskArithmetic()])
def test_scaled_candidates_are_the_merges_they_stand_for(method, pool):
    from pluribus.engine.driver import merge

    states = []
    with pytest.warns(UserWarning, match="edge"):
        search_scale(
            lambda state: states.append(state) or 0.0, {"scale": [0.2, 0.7, 1.5]}, method, pool
        )
    for scale, state in zip([0.2, 0.7, 1.5], states, strict=True):
        true = merge(pool, configured(method, {"scale": scale}, 2))
        for name in ("w", "b"):
            torch.testing.assert_close(state[name], true[name], atol=1e-6, rtol=1e-5)


def test_finds_one_weight_per_task(pool):
    grid = {"weight[*]": [0.0, 0.25, 0.5, 0.75, 1.0]}
    found = search_scale(closeness(mixed(0.75, 0.25)), grid, TaskArithmetic(), pool)
    assert found.parameters == {"weight[0]": 0.75, "weight[1]": 0.25}
    assert found.method == TaskArithmetic(weight=(0.75, 0.25))
    assert len(found.trials) == 25
    assert found.merges == 3  # one update an expert, and the check


def test_one_expert_alone(pool):
    found = search_scale(
        closeness(mixed(1.0, 0.5)), {"weight[1]": [0.0, 0.25, 0.5, 0.75]}, TaskArithmetic(), pool
    )
    assert found.parameters == {"weight[1]": 0.5}


def test_weights_and_scale_together(pool):
    grid = {"weight[0]": [0.5, 1.0, 2.0], "scale": [0.1, 0.2, 0.4]}
    found = search_scale(closeness(mixed(0.2, 0.2)), grid, TaskArithmetic(), pool)
    assert found.parameters == {"weight[0]": 1.0, "scale": 0.2}
    assert found.merges == 3


def test_other_parameters_are_merged_anew_but_share_their_scales(pool):
    target = {k: v for k, v in _merged(Ties(density=0.5, scale=0.6)).items() if k != "steps"}
    grid = {"density": [0.2, 0.5, 1.0], "scale": [0.2, 0.4, 0.6, 0.8]}
    found = search_scale(closeness(target), grid, Ties(), pool)
    assert found.parameters == {"density": 0.5, "scale": 0.6}
    assert len(found.trials) == 12
    assert found.merges == 4  # three densities and the check


def _merged(method):
    from pluribus.engine.driver import merge

    out = merge(Pool(BASE, EXPERTS), method)
    return {name: out[name] for name in out}


def test_a_method_without_base_is_merged_each_time(pool):
    found = search_scale(
        closeness(_merged(Linear(weight=(1.0, 3.0)))),
        {"weight[1]": [1.0, 2.0, 3.0, 4.0]},
        Linear(),
        pool,
    )
    assert found.parameters == {"weight[1]": 3.0}
    assert found.merges == 4


def test_a_method_that_is_not_affine_in_its_scale_is_noticed(pool, monkeypatch):
    monkeypatch.setattr(
        MagMax, "__call__", lambda self, base, experts: base + self.scale**2 * (experts[0] - base)
    )
    target = {k: BASE[k] + 0.25 * (EXPERTS[0][k] - BASE[k]) for k in ("w", "b")}
    found = search_scale(closeness(target), {"scale": [0.3, 0.5, 0.7, 0.9]}, MagMax(), pool)
    assert found.parameters == {"scale": 0.5}
    assert found.score == pytest.approx(0, abs=1e-9)
    assert found.merges == 5  # the update, the check that failed, and the other three


def test_warns_at_the_edge(pool):
    with pytest.warns(UserWarning, match=r"scale = 0\.4 lies on the edge"):
        found = search_scale(
            closeness(mixed(1.0, 1.0)), {"scale": [0.1, 0.2, 0.4]}, TaskArithmetic(), pool
        )
    assert found.at_edge == ("scale",)


def test_a_range_becomes_even_steps(pool):
    found = search_scale(
        closeness(mixed(0.5, 0.5)), {"scale": (0.0, 1.0)}, TaskArithmetic(), pool, points=5
    )
    assert [t.parameters["scale"] for t in found.trials] == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.filterwarnings("ignore:search_scale")
def test_a_budget_samples_the_grid_the_same_way_each_time(pool):
    def run(seed):
        found = search_scale(
            closeness(mixed(0.5, 0.5)),
            {"weight[*]": [0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0]},
            TaskArithmetic(),
            pool,
            budget=9,
            seed=seed,
        )
        return [tuple(t.parameters.values()) for t in found.trials]

    first = run(0)
    assert run(0) == first
    assert len(set(first)) == 9


def test_nan_scores_are_kept_but_never_win(pool):
    def score(state):
        value = closeness(mixed(0.2, 0.2))(state)
        return math.nan if value > -1e-9 else value

    found = search_scale(score, {"scale": [0.0, 0.1, 0.2, 0.4]}, TaskArithmetic(), pool)
    assert found.parameters == {"scale": 0.1}
    assert math.isnan(found.trials[2].score)
    with pytest.raises(InputError, match="NaN for all 2"):
        search_scale(lambda _: math.nan, {"scale": [0.1, 0.2]}, TaskArithmetic(), pool)


def test_candidates_have_the_models_element_type():
    half = [
        {k: v.bfloat16() if v.is_floating_point() else v for k, v in m.items()}
        for m in (BASE, *EXPERTS)
    ]
    kinds = set()

    def score(state):
        kinds.add(state["w"].dtype)
        return -abs(float((state["w"].float() - BASE["w"]).norm()) - 0.2)

    search_scale(score, {"scale": [0.0, 0.1, 0.4, 1.0]}, TaskArithmetic(), Pool(half[0], half[1:]))
    assert kinds == {torch.bfloat16}


def test_inputs_are_untouched(pool):
    before = {k: v.clone() for k, v in BASE.items()}

    def score(state):
        value = closeness(mixed(0.2, 0.2))(state)
        state["w"].fill_(0)  # a careless caller
        return value

    found = search_scale(score, {"scale": [0.1, 0.2, 0.3, 0.4]}, TaskArithmetic(), pool)
    assert found.parameters == {"scale": 0.2}
    assert all(BASE[k].equal(before[k]) for k in BASE)


def test_result_is_plain_data(pool):
    found = search_scale(
        closeness(mixed(0.2, 0.2)), {"scale": [0.1, 0.2, 0.3]}, TaskArithmetic(), pool
    )
    text = json.loads(json.dumps(found.to_dict()))
    assert text["parameters"] == {"scale": 0.2}
    assert text["merge_method"] == "task_arithmetic"
    assert len(text["trials"]) == 3


def test_cma_finds_a_weight_per_task(pool):
    pytest.importorskip("cma")
    found = search_scale(
        closeness(mixed(0.83, 0.27)),
        {"weight[*]": (0.0, 1.5)},
        TaskArithmetic(),
        pool,
        optimizer="cma",
        budget=150,
    )
    assert found.parameters["weight[0]"] == pytest.approx(0.83, abs=0.02)
    assert found.parameters["weight[1]"] == pytest.approx(0.27, abs=0.02)
    assert found.merges == 3
    assert len(found.trials) <= 150


def test_cma_takes_a_single_parameter_and_repeats(pool):
    pytest.importorskip("cma")
    runs = [
        search_scale(
            closeness(mixed(0.4, 0.4)),
            {"scale": (0.0, 1.0)},
            TaskArithmetic(),
            pool,
            optimizer="cma",
            budget=60,
            seed=3,
        )
        for _ in range(2)
    ]
    assert runs[0].parameters["scale"] == pytest.approx(0.4, abs=0.02)
    assert runs[0].trials == runs[1].trials


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"scal": [1.0]}, "no parameter 'scal'.*Did you mean 'scale'"),
        ({}, "at least one parameter"),
        ({"scale": []}, "neither a list of values nor a pair"),
        ({"scale": (1.0, 0.5)}, "low < high"),
        ({"weight[2]": [0.1]}, "there are 2 experts"),
    ],
)
def test_bad_spans(spans, message, pool):
    with pytest.raises(InputError, match=message):
        search_scale(lambda _: 0.0, spans, TaskArithmetic(), pool)


def test_bad_options(pool):
    with pytest.raises(InputError, match="budget = 0"):
        search_scale(lambda _: 0.0, {"scale": [1.0]}, TaskArithmetic(), pool, budget=0)
    with pytest.raises(InputError, match=r"ties: density = 2\.0"):
        search_scale(lambda _: 0.0, {"density": [2.0]}, Ties(), pool)
