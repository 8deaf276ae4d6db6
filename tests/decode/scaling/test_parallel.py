"""Strategies of whole samples, worked by hand."""

import pytest
from toys import Outcomes, Table, said

from pluribus.agents import Scripted
from pluribus.decode.scaling import (
    BestOfN,
    Problem,
    Sample,
    Sampling,
    SelfConsistency,
    Weighted,
)
from pluribus.decode.scaling.interface import Completion


def texts(*answers):
    return [f"x\n#### {answer}" for answer in answers]


def test_sample_takes_the_first():
    done = Sample(n=3).run("q", Scripted(texts(1, 2, 3)))
    assert (done.answer, len(done.candidates), done.cost.calls) == ("1", 3, 3)


def test_the_majority_wins_and_the_first_of_equals():
    done = SelfConsistency(n=5).run("q", Scripted(texts(1, 2, 2, 3, 1)))
    assert done.answer == "1"
    assert done.chosen is done.candidates[0]
    assert SelfConsistency(n=5).run("q", Scripted(texts(1, 2, 2, 3, 3))).answer == "2"


def test_it_stops_once_it_is_sure():
    model = Scripted(texts(*"7777777777"))
    done = SelfConsistency(n=10, confidence=0.95).run("q", model)
    assert done.cost.calls == 4  # 1 - 1/32 = .969 >= .95, and 1 - 1/16 = .9375 is not
    assert done.trace[-1].to_dict() == {"kind": "settled", "samples": 4, "first": 4, "second": 0}
    # 7 7 3 7 7 7: P = I_{1/2}(2, 6) = 1 - 8/128 = .9375 after five 7s, I(2, 7) = 1 - 9/256
    done = SelfConsistency(n=10, confidence=0.95).run("q", Scripted(texts(*"7737777777")))
    assert done.cost.calls == 7
    split = SelfConsistency(n=6, confidence=0.95).run("q", Scripted(texts(*"121212")))
    assert (split.cost.calls, split.answer) == (6, "1")


def test_samples_without_answer_do_not_count_for_the_stop():
    problem = Problem(question="q", extract=lambda text: None if "?" in text else text)
    done = SelfConsistency(n=9, confidence=0.95).run(problem, Scripted([*"?a?a?a?a", "z"]))
    assert (done.cost.calls, done.answer) == (8, "a")


def test_best_of_n_by_hand():
    model = Scripted(said("a", "b", "c", "d"))
    done = BestOfN(n=4).run("q", model, Outcomes({"a": 0.2, "b": 0.9, "c": 0.9, "d": 0.1}))
    assert done.answer == "b"
    assert [one.score for one in done.candidates] == [0.2, 0.9, 0.9, 0.1]
    assert done.cost.verifier_calls == 4


def test_what_was_cut_is_chosen_only_if_nothing_ended():
    cut = Completion("b", 5, "length")
    scores = Outcomes({"a": 0.2, "b": 0.9})
    assert BestOfN(n=2).run("q", Scripted([*said("a"), cut]), scores).answer == "a"
    assert BestOfN(n=1).run("q", Scripted([cut]), scores).answer == "b"


def test_equal_candidates_are_judged_once():
    table = Table({"a": 0.5, "b": 0.6})
    BestOfN(n=4).run("q", Scripted(said("a", "b", "a", "a")), table)
    assert table.asked == ["a", "b"]


@pytest.mark.parametrize(("how", "answer"), [("last", "x"), ("min", "y"), ("prod", "y")])
def test_how_scores_aggregate_changes_who_wins(how, answer):
    class Two:
        def score(self, problem, candidate):
            return {"x": [0.1, 0.9], "y": [0.7, 0.7]}["".join(candidate)]

    done = BestOfN(n=2, aggregate=how).run("q", Scripted(said("x", "y")), Two())
    assert done.answer == answer


def test_weighted_by_hand():
    # 1: .4 + .35 = .75;  2: .7;  3: .1 -> 1, shown by its better sample
    scores = dict(zip("abcd", (0.35, 0.7, 0.4, 0.1), strict=True))
    problem = Problem(question="q", extract=lambda t: {"a": "1", "b": "2", "c": "1", "d": "3"}[t])
    done = Weighted(n=4).run(problem, Scripted(said(*"abcd")), Outcomes(scores))
    assert done.answer == "1"
    assert done.chosen is not None
    assert done.chosen.text == "c"
    assert BestOfN(n=4).run(problem, Scripted(said(*"abcd")), Outcomes(scores)).answer == "2"


def test_an_extractor_that_raises_is_no_answer_and_is_told_of():
    def extract(text):
        if text == "b":
            raise KeyError("no such")
        return text

    done = SelfConsistency(n=3).run(
        Problem(question="q", extract=extract), Scripted(said("b", "b", "a"))
    )
    assert done.answer == "a"
    told = [event.to_dict() for event in done.trace]
    assert told == [{"kind": "extractor", "error": "KeyError: 'no such'", "text": "b"}] * 2


def test_settings_reach_the_model():
    model = Scripted(said("a"))
    sampling = Sampling(temperature=0.3, top_p=0.9, max_tokens=5, stop=("\n",), seed=11)
    Sample(sampling=sampling).run("why?", model)
    [asked] = model.asked
    assert asked[1:] == (1, 0.3, 0.9, 5, ("\n",), 11, "")


def test_results_are_plain_json():
    import json

    done = BestOfN(n=2).run("q", Scripted(said("a", "b")), Outcomes({"a": 0.2, "b": 0.9}))
    told = json.loads(json.dumps(done.to_dict()))
    assert told["answer"] == "b"
    assert told["chosen"]["scores"] == [0.9]
    assert told["cost"]["tokens"] == 2
