"""The probe: decisions, how soon, several modes, and what is refused."""

import sys
from pathlib import Path

import pytest

from pluribus.agents import Scripted
from pluribus.agents.thinking import ByStrategy, CoT, CoTProbe, Direct, Effect
from pluribus.core.errors import InputError
from pluribus.decode.scaling import Budget, SelfConsistency
from pluribus.decode.scaling.interface import Completion

sys.path.insert(0, str(Path(__file__).parent))  # tests have no package
from worlds import COT, knowing, task  # type: ignore[import-not-found]


def measured(pattern, **settings):
    found = task(pattern, n=settings.pop("n", 200))
    return CoTProbe(knowing(found), **settings).measure(found)


def test_thinking_that_helps_is_found_soon():
    effect = measured(["wr", "rr", "ww"])
    assert (effect.decision, effect.chosen) == ("cot", "cot")
    assert effect.n % 8 == 0
    assert effect.n <= 80
    assert effect.delta > 0.15
    assert effect.pairs[0].losses == 0
    assert effect.cost == 18
    assert [(arm.mode, arm.tokens, arm.unparsed) for arm in effect.arms] == [
        ("direct", 2, 0),
        ("cot", 20, 0),
    ]
    low, high = effect.pairs[0].net_ci
    assert 0 < low < effect.pairs[0].net < high
    assert len(effect.questions) == 32


def test_thinking_that_hurts():
    effect = measured(["rw", "rr", "ww"])
    assert effect.decision == effect.chosen == "direct"
    assert effect.pairs[0].net_ci[1] < 0


def test_no_difference_is_undecided_and_stays_cheap():
    effect = measured(["rr", "ww", "wr", "rw"])
    assert (effect.decision, effect.chosen, effect.n) == ("undecided", "direct", 200)
    assert abs(effect.delta) < 1e-9
    assert effect.p == 1.0


def test_the_price_decides():
    """A gain of a third, at 18 tokens more: worth it at 0.001 a token, not at 0.05."""
    cheap = measured(["wr", "rr", "ww"], price=0.001, modes=[Direct(), CoT(max_tokens=40)])
    assert cheap.decision == "cot"
    dear = measured(["wr", "rr", "ww"], price=0.05, modes=[Direct(), CoT(max_tokens=40)])
    assert dear.decision == "direct"
    assert dear.delta > 0
    assert dear.pairs[0].net == pytest.approx(dear.delta - 18 * 0.05)


def test_alpha_is_shared_by_tasks():
    one, many = measured(["wr", "rr", "rw", "wr"]), measured(["wr", "rr", "rw", "wr"], tasks=50)
    assert many.alpha == pytest.approx(0.001)
    assert many.n > one.n


def test_a_few_problems_stop_with_the_task():
    assert measured(["rr", "wr", "rw"], n=21).n == 21
    assert measured(["rr", "wr", "rw"], n_max=30).n == 30


def test_unread_answers_are_wrong_counted_and_warned_of():
    found = task(["rn", "rr"])
    with pytest.warns(UserWarning, match="toy: cot: .* texts hold no answer that can be read"):
        effect = CoTProbe(knowing(found)).measure(found)
    pair = effect.pairs[0]
    assert effect.decision == "direct"
    assert pair.delta < -0.3
    assert pair.delta_parsed == 0.0  # no harm where answers could be read
    assert pair.n_parsed == effect.n - effect.arms[1].unparsed
    assert effect.arms[1].accuracy_parsed == 1.0
    assert "mend the format" in effect.notes[0]


def test_a_model_that_thinks_unasked_is_told_of():
    found = task(["rr"], n=24)
    by = {one.question: one.answer for one in found.problems}

    def say(asked):
        return Completion(f"Answer: {by[asked.prompt.partition(chr(10))[0]]}", 300)

    with pytest.warns(UserWarning, match="direct wrote 300 tokens a problem where 10"):
        CoTProbe(Scripted(say)).measure(found)


class Fixed:
    """A mode that is right by the place of its letter in the question."""

    def __init__(self, name, place, tokens):
        self.name, self.place, self.tokens, self.most_tokens = name, place, tokens, tokens
        self.asked = 0

    def run(self, problem, model, budget=None):
        from pluribus.agents.thinking import Attempt

        self.asked += 1
        fate = problem.question.partition("{")[2][self.place]
        wrong = "Yes" if problem.answer == "No" else "No"
        return Attempt(problem.answer if fate == "r" else wrong, "", self.tokens)


def race(fates, modes, **settings):
    import dataclasses

    plain = task(["rr"], n=200)
    problems = tuple(
        dataclasses.replace(one, question=f"{i} {{{fates[i % len(fates)]}")
        for i, one in enumerate(plain.problems)
    )
    return CoTProbe(Scripted([]), modes, **settings).measure(
        dataclasses.replace(plain, problems=problems)
    )


def test_several_modes_drop_out_one_after_another():
    modes = [Fixed("direct", 0, 1), Fixed("bad", 1, 5), Fixed("good", 2, 9)]
    effect = race(["rwr", "wwr", "rwr", "www", "rrr"], modes)
    assert (effect.decision, effect.chosen) == ("good", "good")
    assert modes[1].asked < modes[0].asked == modes[2].asked == effect.n
    assert [(pair.over, pair.mode) for pair in effect.pairs] == [
        ("direct", "bad"),
        ("direct", "good"),
        ("bad", "good"),
    ]
    assert effect.pairs[0].n == effect.pairs[2].n == modes[1].asked


def test_equals_that_beat_the_default_go_to_the_cheaper():
    modes = [Fixed("direct", 0, 1), Fixed("long", 1, 90), Fixed("short", 2, 9)]
    effect = race(["wrr", "wrr", "www"], modes)
    assert (effect.decision, effect.chosen) == ("undecided", "short")


def test_effects_go_through_json():
    import json

    effect = measured(["wr", "rr", "ww"])
    assert Effect.of(json.loads(json.dumps(effect.to_dict()))) == effect


def test_steps_are_told():
    found, seen = task(["wr", "rr"]), []
    effect = CoTProbe(knowing(found)).measure(found, lambda *step: seen.append(step))
    assert seen[0] == ("toy", 8, 200)
    assert seen[-1] == ("toy", 200, 200)
    assert len(seen) == effect.n // 8 + 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"n_max": 19}, "n_max is 19, too few problems"),
        ({"value": -1.0}, "the value is -1.0"),
        ({"price": -1e-3}, "the price is -0.001"),
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"tasks": 0}, "tasks is 0"),
        ({"modes": [Direct()]}, "the modes are direct; give two"),
        ({"modes": [CoT(), CoT()]}, "the modes are cot, cot"),
    ],
)
def test_refused(settings, told):
    with pytest.raises(InputError, match=told):
        CoTProbe(Scripted([]), **settings)


def test_tasks_are_refused_before_a_model_is_asked():
    model = Scripted([])
    with pytest.raises(InputError, match="toy has 19 problems, too few"):
        CoTProbe(model).measure(task(["rr"], n=19))
    with pytest.raises(InputError, match="give each once"):
        CoTProbe(model).check([task(["rr"]), task(["rw"])])
    with pytest.raises(InputError, match="has no model"):
        CoTProbe(None).measure(task(["rr"]))
    assert model.asked == []


def test_prices_need_a_bound_on_tokens():
    from dataclasses import replace

    vote = ByStrategy(strategy=SelfConsistency(n=2))
    free = replace(vote)
    object.__setattr__(free, "most_tokens", None)
    with pytest.raises(InputError, match="self_consistency has no bound on its tokens"):
        CoTProbe(Scripted([]), [Direct(), free], price=0.1)
    CoTProbe(Scripted([]), [Direct(), free], price=0.1, budget=Budget(tokens=50))
    found = task(["rr"])
    wild = Scripted(lambda asked: Completion("Answer: Yes", 5000 if COT in asked.prompt else 1))
    with pytest.raises(InputError, match="the bounds on value and tokens don't hold"):
        CoTProbe(wild, price=1.0).measure(found)
