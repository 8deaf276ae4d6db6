"""Budgets: nothing goes over, what is left is used, and runs stop cleanly."""

import pytest

from pluribus.agents import Metered, Scripted
from pluribus.core.errors import InputError
from pluribus.decode.scaling import BestOfN, Budget, BudgetSpent, SelfConsistency
from pluribus.decode.scaling.budget import Meter

TEN = "a b c d e f g h i j"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_tokens_are_a_hard_limit():
    model = Scripted(lambda asked: TEN)
    meter = Meter(model, Budget(tokens=25))
    made = meter.sample("q", 5, max_tokens=10)
    assert [one.tokens for one in made] == [10, 10, 5]
    assert [one.finish for one in made] == ["end", "end", "length"]
    assert (meter.tokens, meter.calls, meter.spent) == (25, 3, True)
    assert [(asked.n, asked.max_tokens) for asked in model.asked] == [(2, 10), (1, 5)]
    assert meter.sample("q") == []


def test_short_completions_leave_room_for_more():
    model = Scripted(lambda asked: "a b")
    meter = Meter(model, Budget(tokens=12))
    assert len(meter.sample("q", 9, max_tokens=5)) == 6  # at worst 2 fitted, in truth 6 did
    assert meter.tokens == 12


def test_calls_are_completions():
    meter = Meter(Scripted(lambda asked: TEN), Budget(calls=3))
    assert len(meter.sample("q", 5)) == 3
    assert meter.spent


def test_time_is_looked_at_before_every_call():
    clock = Clock()

    def slow(asked):
        clock.now += 2
        return "a"

    meter = Meter(Scripted(slow), Budget(seconds=5, tokens=99), clock=clock)
    made = [one for _ in range(9) for one in meter.sample("q", 1)]
    assert len(made) == 3  # at 0, 2 and 4 seconds
    assert meter.cost.seconds == 6


def test_every_request_has_a_seed_of_its_own():
    model = Scripted(lambda asked: "a")
    meter = Meter(model, seed=7)
    meter.sample("q", 3)
    meter.sample("q", 1)
    assert [asked.seed for asked in model.asked] == [7, 10]


@pytest.mark.parametrize("limit", [{"tokens": 0}, {"calls": -1}, {"seconds": 0.0}])
def test_a_budget_of_nothing(limit):
    with pytest.raises(InputError, match="allows nothing"):
        Budget(**limit)


def test_a_metered_model_says_when_it_is_spent():
    model = Metered(Scripted(lambda asked: TEN), Budget(calls=3))
    assert len(model.sample("q", 2)) == 2
    assert len(model.sample("q", 2)) == 1
    with pytest.raises(BudgetSpent, match="after 3 calls and 30 tokens"):
        model.sample("q")
    assert model.count("a b") == 2


def test_a_strategy_takes_a_spent_generator_as_the_end():
    model = Metered(Scripted(lambda asked: "answer is 4"), Budget(calls=3))
    done = SelfConsistency(n=8).run("q", model)
    assert done.answer == "4"
    assert len(done.candidates) == 3
    assert done.trace[0].to_dict() == {"kind": "budget", "wanted": 8, "made": 3}


def test_a_judge_that_costs_is_not_asked_when_all_is_spent():
    class Judge:
        tokens = 0
        asked = 0

        def score(self, problem, candidate):
            self.tokens += 10
            self.asked += 1
            return [0.5]

    judge = Judge()
    done = BestOfN(n=4).run("q", Scripted(["a 1", "b 2", "c 3", "d 4"]), judge, Budget(tokens=18))
    assert judge.asked == 1  # 8 tokens of samples and 10 of one judgement
    assert done.cost.all_tokens == 18
    assert done.chosen is not None
    assert done.chosen.text == "a 1"
    assert [event.kind for event in done.trace] == ["unjudged"] * 3


def test_flops():
    done = SelfConsistency(n=2).run("q", Scripted(["a b", "a b"]))
    assert done.cost.flops(1000) == 2 * 1000 * 4
