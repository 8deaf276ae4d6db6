"""The loop: what is proposed, told and recorded; several workers; bad input."""

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyglove as pg
import pytest

from pluribus import search
from pluribus.core.errors import ExtraError, InputError, RecipeError
from pluribus.search import Objective, floatv, front, oneof, run
from pluribus.search.algorithms.evolution import Evolution
from pluribus.search.loop import trial_seed

sys.path.insert(0, str(Path(__file__).parent))  # other processes import it from there
import ones

DETERMINISTIC = ["random", "evolution", "hill", "nsga2", "cma", "tpe"]


def dnas(study):
    return [str(trial.dna) for trial in study.trials]


class Spy(pg.DNAGenerator):
    """Notes what it is told."""

    told: list

    def _setup(self):
        self.heard = []

    def _propose(self):
        return pg.geno.random_dna(self.dna_spec)

    def _feedback(self, dna, reward):
        self.heard.append(reward)


@search.algorithm("spy")
@dataclass(frozen=True, kw_only=True)
class _Spy:
    made: list = field(default_factory=list)

    def generator(self, space, objectives, seed):
        self.made.append(Spy(told=[]))
        return self.made[-1]

    @property
    def heard(self):
        return self.made[-1].heard


# -- what comes back -------------------------------------------------------------------------------


def test_the_best_is_the_largest_and_the_earliest_of_equals():
    scores = iter([1.0, 3.0, 3.0, 2.0])
    study = run({"a": floatv(0.0, 1.0)}, lambda point: next(scores), trials=4)
    assert (study.best.number, study.best.scores) == (1, {"score": 3.0})
    assert study.best_value == study.value(study.trials[1])
    assert [trial.number for trial in study.front] == [1]


def test_directions_and_the_front_by_hand():
    points = [(1, 5), (2, 4), (2, 5), (3, 9), (0, 4), (2, 4)]  # score up, size down
    rows = iter({"score": s, "size": z, "other": 7} for s, z in points)
    study = run(
        {"a": floatv(0.0, 1.0)},
        lambda point: next(rows),
        "nsga2",
        6,
        objectives={"score": "max", "size": "min"},
    )
    assert [trial.number for trial in study.front] == [3, 1]
    assert study.best.number == 3
    assert study.trials[0].metrics == {"other": 7.0}


def test_front_leaves_out_what_is_dominated():
    objectives = [Objective("x"), Objective("y", "min")]
    made = [
        search.Trial(i, None, 0, "done", {"x": x, "y": y})
        for i, (x, y) in enumerate([(1.0, 1.0), (2.0, 2.0), (2.0, 3.0), (0.5, 1.0)])
    ]
    assert [t.number for t in front(made, objectives)] == [1, 0]


def test_a_minimised_objective():
    study = run({"a": oneof([3, 1, 2])}, lambda p: p["a"], "sweep", objectives={"loss": "min"})
    assert study.best_value == {"a": 1}
    assert len(study.trials) == 3
    assert study.notes == ("all 3 points of the space were tried",)


def test_the_algorithm_hears_rewards_with_their_sign():
    spy = _Spy()
    rows = iter([2.0, 5.0, 1.0])
    run({"a": floatv(0.0, 1.0)}, lambda p: next(rows), spy, 3, objectives={"loss": "min"})
    assert spy.heard == [-2.0, -5.0, -1.0]


def test_costs_are_recorded_and_only_several_objectives_minimise_them():
    def size(point):
        return 10.0 * point["a"]

    space = {"a": oneof([1, 2, 3])}
    one = run(space, lambda p: p["a"], "sweep", cost=size)
    assert [t.scores for t in one.trials] == [
        {"score": 1.0, "size": 10.0},
        {"score": 2.0, "size": 20.0},
        {"score": 3.0, "size": 30.0},
    ]
    assert len(one.front) == 3
    named = run(space, lambda p: {"score": p["a"], "n": p["a"] ** 2}, "sweep", cost="n")
    assert named.objectives == (Objective("score"), Objective("n", "min"))
    assert named.trials[2].scores == {"score": 3.0, "n": 9.0}

    both = _Spy()
    run(space, lambda p: p["a"], both, 2, cost=size)  # one objective: the score alone
    assert all(isinstance(reward, float) for reward in both.heard)


def test_seeds_and_reports():
    study = run(ones.CHOICES, ones.seeded, trials=3, seed=5)
    seeds = [trial.seed for trial in study.trials]
    assert seeds == [trial_seed(5, i) for i in range(3)]
    assert len(set(seeds)) == 3
    assert [t.report for t in study.trials] == [{"seen": seed} for seed in seeds]
    assert [t.metrics["seed"] for t in study.trials] == seeds


def test_a_report_of_an_evaluation_is_kept():
    class Report:
        def to_dict(self):
            return {"score": 0.5, "n": 20, "task": "t", "nested": {"a": 1}}

    trial = run({"a": oneof([1, 2])}, lambda p: Report(), trials=1).trials[0]
    assert trial.scores == {"score": 0.5}
    assert trial.metrics == {"n": 20.0}
    assert trial.report == Report().to_dict()


@pytest.mark.parametrize("algorithm", DETERMINISTIC)
def test_equal_arguments_give_equal_studies(algorithm):
    studies = [run(ones.CHOICES, ones.score, algorithm, 15, seed=2) for _ in range(2)]
    assert dnas(studies[0]) == dnas(studies[1])
    assert dnas(run(ones.CHOICES, ones.score, algorithm, 15, seed=3)) != dnas(studies[0])


def test_trials_know_of_all_before_them_on_one_worker():
    study = run(ones.CHOICES, ones.score, "evolution", 6)
    assert [trial.settled for trial in study.trials] == [0, 1, 2, 3, 4, 5]


def test_a_space_without_placeholders_is_evaluated_once():
    study = run({"a": 3}, lambda point: point["a"], "evolution", 60)
    assert len(study.trials) == 1
    assert study.best_value == {"a": 3}
    assert study.notes == ("the space has no placeholder: what it holds was evaluated once",)


def test_the_budget_ends_a_search():
    began = time.monotonic()
    study = run(
        {"a": floatv(0.0, 1.0)}, lambda p: time.sleep(0.05) or p["a"], trials=10**6, budget_s=0.4
    )
    assert 1 <= len(study.trials) <= 9
    assert all(trial.status == "done" for trial in study.trials)
    assert time.monotonic() - began < 5


def test_an_earlier_study_starts_a_new_one():
    first = run(ones.CHOICES, ones.score, "random", 10)
    second = run(ones.CHOICES, ones.score, "evolution", 16, known=first.trials)
    assert dnas(second)[:10] == dnas(first)
    assert len(second.trials) == 16
    again = run(ones.CHOICES, ones.score, "evolution", 16, known=first.trials)
    assert dnas(again) == dnas(second)
    with pytest.raises(InputError, match="has no 'loss'"):
        run(ones.CHOICES, ones.score, trials=12, known=first.trials, objectives={"loss": "min"})


def test_on_trial_hears_of_each():
    seen = []
    run(
        ones.CHOICES,
        ones.score,
        trials=3,
        on_trial=lambda trial, study: seen.append((trial.number, len(study.done))),
    )
    assert seen == [(0, 1), (1, 2), (2, 3)]


# -- failures --------------------------------------------------------------------------------------


def test_nan_is_failed_and_the_algorithm_hears_the_worst_so_far():
    spy = _Spy()
    rows = iter([math.nan, 4.0, math.nan, 1.0, math.inf, 2.0, 3.0])
    study = run({"a": floatv(0.0, 1.0)}, lambda p: next(rows), spy, 7)
    assert [t.status for t in study.trials] == [
        *("failed", "done", "failed", "done", "failed", "done", "done")
    ]
    # The first waits for a score to be compared with.
    assert spy.heard == [4.0, 4.0, 4.0, 1.0, 1.0, 2.0, 3.0]
    assert study.trials[0].error == "score is nan"
    assert study.best.scores == {"score": 4.0}


def test_a_search_in_which_everything_fails_says_why():
    study = run({"a": floatv(0.0, 1.0)}, lambda p: math.nan, "evolution", 30)
    assert study.front == ()
    with pytest.raises(InputError, match="none of 30 trials has a score: score is nan"):
        _ = study.best


def test_errors_end_the_search_or_are_recorded():
    with pytest.raises(ValueError, match="max is not to be had"):
        run(ones.CHOICES, ones.fails_at_max, trials=30)
    study = run(ones.CHOICES, ones.fails_at_max, trials=30, on_error="record")
    failed = [trial for trial in study.trials if trial.status == "failed"]
    assert 0 < len(failed) < 30
    assert {trial.error for trial in failed} == {"ValueError: max is not to be had"}
    assert all(study.value(trial)["method"] == "max" for trial in failed)


def test_a_point_that_can_not_be_made_is_recorded_too():
    space = search.space(
        search.symbolic(Evolution)(population_size=oneof([3, 30]), tournament_size=oneof([2, 20]))
    )
    study = run(space, lambda made: made.population_size, "sweep", on_error="record")
    assert [trial.status for trial in study.trials] == ["done", "failed", "done", "done"]
    assert "tournament_size = 20 must lie between 2 and" in str(study.trials[1].error)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ((1.0, 2.0), "2 values without names: return a mapping"),
        ("good", "evaluate returned str: return a number"),
        (None, "evaluate returned NoneType"),
        (True, "evaluate returned bool"),
        ({"loss": 1.0}, "returned loss, but not the objective 'score'"),
        ({"score": "high"}, "score = 'high', which is no number"),
    ],
)
def test_what_is_no_score_is_refused(result, told):
    with pytest.raises(InputError, match=told):
        run({"a": oneof([1, 2])}, lambda point: result)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"trials": 0}, "trials = 0: give a whole number, 1 or more"),
        ({"workers": 0}, "workers = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"budget_s": 0.0}, "budget_s = 0.0: give seconds above 0"),
        ({"objectives": {"a": "up"}}, "'up' is no direction"),
        ({"objectives": []}, "name each once, and at least one"),
        ({"cost": 3}, "'cost' = 3: give a function"),
        ({"cost": {"score": len}}, "'score' is both an objective and a cost"),
        ({"algorithm": 3}, "algorithm = 3: give a name"),
        ({"algorithm": Evolution}, "give a name"),
    ],
)
def test_arguments_are_checked_before_a_trial(options, told):
    def never(point):
        raise AssertionError("evaluated")

    with pytest.raises(InputError, match=told):
        run({"a": oneof([1, 2])}, never, **options)


def test_an_unknown_algorithm_is_named_with_the_nearest():
    with pytest.raises(RecipeError, match=r"no search algorithm is called 'evolutio'.*'evolution'"):
        run({"a": oneof([1, 2])}, len, "evolutio")


def test_several_objectives_need_an_algorithm_for_them():
    with pytest.raises(InputError, match="evolution optimises one objective, but a, b are 2"):
        run({"a": oneof([1, 2])}, len, "evolution", objectives=["a", "b"])
    with pytest.raises(InputError, match="returned one number, but the objectives are a, b"):
        run({"a": oneof([1, 2])}, lambda p: 1.0, "nsga2", objectives=["a", "b"])


def test_a_sweep_of_an_infinite_space_is_refused():
    space = {"a": oneof([1, 2]), "b": floatv(0.0, 1.0)}
    with pytest.raises(InputError, match="a sweep tries every point, but b can be any number"):
        run(space, len, "sweep")


# -- several workers -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_processes_give_what_was_promised():
    """Random search the same points and scores; evolution by the rule of what it knows."""
    alone = run(ones.CHOICES, ones.score, "random", 8)
    many = run(ones.CHOICES, ones.slow, "random", 8, workers=2)
    assert dnas(many) == dnas(alone)
    assert [t.scores for t in many.trials] == [t.scores for t in alone.trials]
    quick, slow = (run(ones.CHOICES, f, "hill", 10, workers=2) for f in (ones.score, ones.slow))
    assert dnas(quick) == dnas(slow)  # whatever takes how long
    assert [trial.settled for trial in quick.trials] == [0, 0, *range(1, 9)]
    failing = run(ones.CHOICES, ones.fails_at_max, trials=8, workers=2, on_error="record")
    assert "ValueError: max is not to be had" in {t.error for t in failing.trials}
    with pytest.raises(ValueError, match="max is not to be had"):
        run(ones.CHOICES, ones.fails_at_max, trials=8, workers=2)


def test_what_can_not_be_sent_is_refused():
    with pytest.raises(InputError, match="evaluate or cost can't be sent to other processes"):
        run({"a": oneof([1, 2])}, lambda point: 1.0, workers=2)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExtraError, match=r"needs the package 'ray'.*pluribus\[ray\]"):
        run({"a": oneof([1, 2])}, len, ray=True)
