"""Nested, factorised and hybrid flows, against loops written out."""

import pytest

from pluribus import search
from pluribus.core.errors import InputError
from pluribus.search import factorized, flat, floatv, hybrid, nested, oneof, run
from pluribus.search.loop import trial_seed

OPS = {
    "ops": [oneof([1, 2, 3]), oneof([1, 2, 3])],
    "wires": {"a": oneof([0, 1]), "b": oneof([0, 1])},
}


def value(point):
    a, b = point["ops"]
    wires = point["wires"]
    return 10.0 * a + b + 0.5 * wires["a"] - 0.25 * wires["b"]


def test_outer_reward_is_the_best_inner_score():
    """Both sweeps: every point is evaluated once, in the order of two loops."""
    seen = []

    def evaluate(point):
        seen.append((*point["ops"], *point["wires"].values()))
        return value(point)

    study = nested(OPS, evaluate, "sweep", "sweep", ["ops"], outer_trials=99, inner_trials=99)
    by_hand = [(a, b, c, d) for a in (1, 2, 3) for b in (1, 2, 3) for c in (0, 1) for d in (0, 1)]
    assert seen == by_hand
    assert len(study.trials) == 36
    assert [trial.number for trial in study.trials] == list(range(36))
    assert study.best_value == {"ops": [3, 3], "wires": {"a": 1, "b": 0}}
    assert study.algorithm == "nested(sweep, sweep)"


@pytest.mark.parametrize(("top", "expected"), [(1, 0.5), (2, 0.375), (4, 0.125)])
def test_outer_reward_is_the_mean_of_the_top_scores(top, expected, tmp_path):
    """Inner scores of ops (a, b) are 10 a + b + {0, -0.25, 0.5, 0.25}."""
    store = tmp_path / "outer.sqlite"
    nested(
        OPS,
        value,
        "sweep",
        "sweep",
        ["ops"],
        outer_trials=2,
        inner_trials=4,
        top=top,
        store=store,
    )
    stored = search.run(
        search.space(OPS).split(lambda h: str(h.sym_path).startswith("ops")),
        lambda p: 1 / 0,
        "sweep",
        2,
        store=store,
        evaluation=f"nested: Sweep(), 4 trials, top {top}",
    )
    assert [t.scores["score"] for t in stored.trials] == [11 + expected, 12 + expected]


def test_points_of_the_whole_space_come_back():
    """Also where an outer choice brings inner ones with it."""
    space = search.space(
        {
            "kind": oneof([{"name": "plain"}, {"name": "scaled", "scale": oneof([2.0, 3.0])}]),
            "x": oneof([1.0, 5.0]),
        }
    )

    def evaluate(point):
        return point["kind"].get("scale", 1.0) * point["x"]

    study = nested(space, evaluate, "sweep", "sweep", ["x"], outer_trials=9, inner_trials=9)
    assert len(study.trials) == 6
    for trial in study.trials:
        assert evaluate(study.value(trial)) == trial.scores["score"]
    assert study.best_value == {"kind": {"name": "scaled", "scale": 3.0}, "x": 5.0}


def test_the_outer_choice_may_hold_the_inner_ones():
    space = search.space({"kind": oneof([{"s": oneof([1.0, 2.0])}, {"s": oneof([0.5, 9.0])}])})
    study = nested(
        space,
        lambda point: point["kind"]["s"],
        "sweep",
        "sweep",
        lambda placeholder: (
            len(placeholder.candidates) == 2 and not isinstance(placeholder.candidates[0], float)
        ),
        outer_trials=9,
        inner_trials=9,
    )
    assert [t.scores["score"] for t in study.trials] == [1.0, 2.0, 0.5, 9.0]
    assert study.best_value == {"kind": {"s": 9.0}}


def test_factorized_is_nested_by_paths_and_flat_is_run():
    one = factorized(OPS, value, ["ops"], outer="random", inner="random", seed=4)
    two = nested(OPS, value, "random", "random", ["ops"], seed=4)
    assert [str(t.dna) for t in one.trials] == [str(t.dna) for t in two.trials]
    assert len(one.trials) == 64
    ours = flat(OPS, value, "evolution", 10, seed=4)
    assert [str(t.dna) for t in ours.trials] == [
        str(t.dna) for t in run(OPS, value, "evolution", 10, seed=4).trials
    ]


def test_inner_searches_have_seeds_of_their_own():
    study = nested(OPS, value, "sweep", "random", ["ops"], outer_trials=2, inner_trials=5, seed=7)
    for outer in (0, 1):
        rest = {"ops": [1, outer + 1], "wires": OPS["wires"]}
        inner = run(rest, value, "random", 5, seed=trial_seed(7, outer))
        mine = [study.value(trial) for trial in study.trials[5 * outer : 5 * outer + 5]]
        assert mine == [inner.value(trial) for trial in inner.trials]


def test_a_minimised_objective_inside_and_outside():
    study = nested(
        OPS,
        lambda p: {"loss": value(p)},
        "sweep",
        "sweep",
        ["ops"],
        outer_trials=99,
        inner_trials=99,
        objectives={"loss": "min"},
    )
    assert study.best.scores == {"loss": 10.75}


def test_hybrid_starts_flat_from_the_best():
    study = hybrid(
        OPS, value, ["ops"], outer="random", inner="random", outer_trials=3, inner_trials=4,
        trials=20, start=5, seed=2,
    )  # fmt: skip
    assert len(study.trials) == 20
    assert study.algorithm == "hybrid(nested(random, random), evolution)"
    first = nested(OPS, value, "random", "random", ["ops"], outer_trials=3, inner_trials=4, seed=2)
    ranked = sorted((t.scores["score"] for t in first.trials), reverse=True)
    known = [t.scores["score"] for t in study.trials[7:12]]
    assert known == ranked[:5][::-1]
    assert study.best.scores["score"] >= first.best.scores["score"]
    with pytest.raises(InputError, match="leaves none for the flat one"):
        hybrid(OPS, value, ["ops"], outer_trials=3, inner_trials=4, trials=12)


def test_a_killed_nested_search_goes_on(tmp_path):
    settings = {"outer_trials": 4, "inner_trials": 3, "seed": 1, "split": ["ops"]}
    whole = nested(OPS, value, "hill", "random", **settings)
    left = [7]

    def cut(point):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return value(point)

    store = tmp_path / "nested.sqlite"
    with pytest.raises(KeyboardInterrupt):
        nested(OPS, cut, "hill", "random", store=store, **settings)
    resumed = nested(OPS, value, "hill", "random", store=store, **settings)
    assert [str(t.dna) for t in resumed.trials] == [str(t.dna) for t in whole.trials]
    assert [t.scores for t in resumed.trials] == [t.scores for t in whole.trials]


@pytest.mark.parametrize(
    ("split", "told"),
    [
        (["ops", "wires"], "the split puts every choice outside"),
        ([], "the split puts every choice inside"),
        (["op"], r"no choice stands at 'op'; there are: ops\[0\]"),
    ],
)
def test_splits_that_split_nothing(split, told):
    with pytest.raises(InputError, match=told):
        nested(OPS, value, split=split)


def test_other_mistakes():
    with pytest.raises(InputError, match="a traced function can't be split"):
        nested(lambda: oneof([1, 2]) + oneof([1, 2]), len, split=["x"])
    with pytest.raises(InputError, match="top = 9: give 1 to inner_trials = 8"):
        nested(OPS, value, split=["ops"], top=9)
    with pytest.raises(InputError, match="nested searches have one objective"):
        nested(OPS, value, split=["ops"], objectives=["a", "b"])
    with pytest.raises(InputError, match="a sweep tries every point"):
        nested({"a": oneof([1, 2]), "b": floatv(0.0, 1.0)}, len, "sweep", "sweep", ["a"])
