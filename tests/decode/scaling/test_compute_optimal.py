"""The strategy by difficulty: bins, what is chosen for them, and what a run costs."""

import pytest
from toys import Outcomes, said

from pluribus.agents import Scripted
from pluribus.core.errors import InputError
from pluribus.decode.scaling import BestOfN, Budget, ComputeOptimal, Sample, SelfConsistency
from pluribus.decode.scaling.strategies.compute_optimal import Measured, fit

SCORES = Outcomes({"a": 0.1, "b": 0.9, "c": 0.2})
CHOICES = ComputeOptimal(edges=(0.5,), choices=({"kind": "best_of_n", "n": 6}, "sample"), probe=4)


def test_a_hard_problem_gets_more_and_the_probe_is_used():
    model = Scripted(said("a", "c", "a", "c", "b", "a"))
    done = CHOICES.run("q", model, SCORES)
    assert done.answer == "b"
    assert done.cost.calls == 6  # four of the probe, of which none is drawn again
    assert done.cost.tokens == 6
    assert done.trace[0].values["strategy"] == "best_of_n"
    assert done.trace[0].values["mean"] == pytest.approx(0.15)


def test_an_easy_one_is_done():
    done = CHOICES.run("q", Scripted(said("b", "b", "a", "b")), SCORES)
    assert (done.answer, done.cost.calls, done.cost.tokens) == ("b", 4, 4)


def test_the_budget_is_that_of_both():
    model = Scripted(said("a", "c", "a", "c", "b", "a"))
    done = CHOICES.run("q", model, SCORES, Budget(calls=5))
    assert (done.answer, done.cost.calls) == ("b", 5)
    done = CHOICES.run("q", Scripted(said("a", "c", "a", "c", "b")), SCORES, Budget(calls=2))
    assert (done.answer, done.cost.calls) == ("c", 2)


def test_fitting_by_hand():
    few, many = Sample(), BestOfN(n=8)
    runs = [
        # hard ones (.1, .2): many is right half the time, few never; easy ones: both always
        *(Measured(few, level, level > 0.5, 10) for level in (0.1, 0.2, 0.8, 0.9)),
        *(Measured(many, level, level != 0.1, 80) for level in (0.1, 0.2, 0.8, 0.9)),
    ]
    fitted = fit(runs, budget=100, bins=2)
    assert fitted.edges == (0.8,)
    assert fitted.choices == (many, few)  # of equals the cheaper
    assert fit(runs, budget=20, bins=2).choices == (few, few)
    with pytest.raises(InputError, match="the cheapest uses 10"):
        fit(runs, budget=5, bins=2)


def test_what_is_refused():
    with pytest.raises(InputError, match="must rise"):
        ComputeOptimal(edges=(0.5, 0.2), choices=("sample",) * 3)
    with pytest.raises(InputError, match="make 2 bins"):
        ComputeOptimal(edges=(0.5,), choices=("sample",) * 3)
    with pytest.raises(InputError, match="at least one of each"):
        fit([], budget=1)
    with pytest.raises(InputError, match="needs a verifier"):
        CHOICES.run("q", Scripted([]))


def test_a_strategy_that_is_not_pooled_draws_its_own():
    scores = Outcomes({"a": 0.1, "b": 0.9, "f": 0.5})
    model = Scripted(said("a", "a", "a", "CORRECT"))
    refine = ComputeOptimal(edges=(0.5,), choices=("self_refine", SelfConsistency()), probe=2)
    done = refine.run("q", model, scores)
    assert (done.answer, done.cost.calls) == ("a", 4)
