"""Self-refine, revision chains and budget forcing, with scripted models."""

import pytest
from toys import Outcomes, said

from pluribus.agents import Scripted
from pluribus.core.errors import InputError
from pluribus.decode.scaling import (
    Budget,
    BudgetForcing,
    RevisionChains,
    SelfRefine,
    controllability,
)
from pluribus.decode.scaling.interface import Completion

# -- self-refine -----------------------------------------------------------------------------------


def test_it_refines_until_the_feedback_is_content():
    model = Scripted(["one", "too small", "two", "CORRECT"])
    done = SelfRefine().run("How many {things}?", model)
    assert (done.answer, done.cost.calls) == ("two", 4)
    first, feedback, refine, last = [asked.prompt for asked in model.asked]
    assert first == "How many {things}?"  # braces of a question are its own
    assert "How many {things}?" in feedback
    assert "one" in feedback
    assert "CORRECT" in feedback
    assert all(text in refine for text in ("How many {things}?", "one", "too small"))
    assert "two" in last
    assert "too small" not in last


def test_later_refinements_see_all_that_was_said():
    model = Scripted(["y0", "f0", "y1", "f1", "y2"])
    done = SelfRefine(rounds=2).run("q", model)
    assert done.answer == "y2"
    shown = model.asked[-1].prompt
    places = [shown.index(part) for part in ("y0", "f0", "y1", "f1")]
    assert places == sorted(places)


def test_a_verifier_accepts_or_picks_the_best():
    model = Scripted(said("a", "f", "b", "f", "c"))
    done = SelfRefine(rounds=2).run("q", model, Outcomes({"a": 0.2, "b": 0.8, "c": 0.5}))
    assert done.answer == "b"
    accepted = SelfRefine(accept=0.7).run(
        "q", Scripted(said("a", "f", "b")), Outcomes({"a": 0.2, "b": 0.8})
    )
    assert (accepted.answer, accepted.cost.calls) == ("b", 3)


def test_a_budget_ends_it_between_calls():
    done = SelfRefine().run("q", Scripted(["a", "f"]), budget=Budget(calls=2))
    assert (done.answer, done.cost.calls) == ("a", 2)


# -- revision chains -------------------------------------------------------------------------------


def test_chains_choose_then_vote():
    # Chains: (a .1, b .6), (c .5, a .2), (a .3, b .1): chosen b .6, c .5, a .3 -> b
    model = Scripted(said("a", "c", "a", "b", "a", "b"))

    class InTurn:
        scores = iter([0.1, 0.5, 0.6])

        def score(self, problem, candidate):
            return [{"a": 0.1, "b": 0.6, "c": 0.5}["".join(candidate)]]

    done = RevisionChains(chains=3, length=2).run("q", model, InTurn())
    # b and b against c: .6 + .6
    assert done.answer == "b"
    assert done.trace[-1].values["answers"] == [["a", "b"], ["c", "a"], ["a", "b"]]
    assert len(done.candidates) == 6


def test_without_a_verifier_the_last_of_each_chain_votes():
    model = Scripted(said("a", "a", "b", "c", "b", "b"))  # chains (a, c), (a, b), (b, b)
    done = RevisionChains(chains=3, length=2).run("q", model)
    assert done.answer == "b"
    assert "1. a" in model.asked[1].prompt


def test_a_revision_sees_the_last_few():
    model = Scripted(said("a", "b", "c", "d"))
    RevisionChains(chains=1, length=4, shown=2).run("q", model)
    last = model.asked[-1].prompt
    assert "1. b" in last
    assert "2. c" in last
    assert "a\n" not in last.replace("answer", "")


# -- budget forcing --------------------------------------------------------------------------------


class Thinker:
    """Thinks in words of one letter: `first` of them, then `more` after each Wait; answers 4."""

    def __init__(self, first, more=2):
        self.first, self.more, self.asked = first, more, []

    def count(self, text):
        return len(text.split())

    def sample(self, prompt, n=1, *, prefix="", stop=(), max_tokens=99, **settings):
        self.asked.append((prefix, max_tokens, tuple(stop), settings["temperature"]))
        if "Answer:" in prefix:
            return [Completion(" 4", 1, "end")]
        want = self.more if prefix.endswith("Wait") else self.first
        made = min(want, max_tokens)
        return [Completion(" x" * made, made, "length" if made < want else "stop")]


def test_an_early_end_is_not_taken_at_first():
    model = Thinker(3)
    done = BudgetForcing(thinking=10, ignore=2).run("q", model)
    begin = "<think> x x x"
    assert [asked[:2] for asked in model.asked] == [
        ("<think>", 10),
        (f"{begin}Wait", 7),
        (f"{begin}Wait x xWait", 5),
        (f"{begin}Wait x xWait x x</think>\nFinal Answer:", 256),
    ]
    assert done.answer == "4"
    assert done.cost.tokens == 3 + 2 + 2 + 1
    assert done.cost.appended == 1 + 1 + 1 + 3  # <think>, Wait, Wait, </think> Final Answer:
    assert done.trace[-1].to_dict() == {
        "kind": "thinking",
        "tokens": 7,
        "ignored": 2,
        "limit": 10,
    }
    assert {asked[3] for asked in model.asked} == {0.0}
    assert [asked[2] for asked in model.asked] == [("</think>",)] * 3 + [()]


def test_thinking_is_cut_at_the_limit():
    model = Thinker(50)
    done = BudgetForcing(thinking=6, ignore=1).run("q", model)
    assert done.trace[-1].values["tokens"] == 6
    assert len(model.asked) == 2
    assert done.answer == "4"


def test_tokens_are_within_the_limit_in_every_run():
    runs = [
        BudgetForcing(thinking=12, ignore=ignore).run("q", Thinker(first, more))
        for first in (1, 5, 11, 12, 13, 40)
        for more in (1, 7, 30)
        for ignore in (0, 1, 3)
    ]
    thought = [done.trace[-1].values["tokens"] for done in runs]
    assert controllability(thought, most=12) == 1.0
    assert max(thought) == 12


def test_what_is_refused():
    with pytest.raises(InputError, match="end is empty"):
        BudgetForcing(end="")
    with pytest.raises(InputError, match="ignore = -1"):
        BudgetForcing(ignore=-1)
    with pytest.raises(InputError, match=r"it needs \{answer\}"):
        SelfRefine(feedback="What of {question}?")
    with pytest.raises(InputError, match=r"it needs \{attempts\}"):
        RevisionChains(revise="{question} again")
