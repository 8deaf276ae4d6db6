"""Tree of thoughts: what is kept at every level, against a breadth-first search written plainly."""

import pytest
from toys import Table, said

from pluribus.agents import Scripted
from pluribus.core.errors import InputError
from pluribus.decode.scaling import Budget, Sampling, TreeOfThoughts

WORTH = {"impossible": 0.001, "likely": 1.0, "sure": 20.0}


def opinion(thoughts):
    """What the scripted model thinks of a state: three judgements, by the sum of its letters."""
    rank = sum(map(ord, thoughts.replace("\n", ""))) % 7
    return [("impossible", "likely", "sure")[(rank + i) % 3] for i in range(3)]


def model(asked):
    thoughts = asked.prompt.partition("Steps so far:\n")[2].partition("\n\n")[0]
    if "Propose" in asked.prompt:
        depth = len(thoughts.splitlines())
        return "\n".join(f"{letter}{depth}" for letter in "abcda")  # one of them twice
    return [f"I see.\n{word.title()}." for word in opinion(thoughts)]


def plainly(levels, keep):
    """The authors' search, without a model: states by level."""
    states = [[]]
    for depth in range(levels):
        grown = [[*state, f"{letter}{depth}"] for state in states for letter in "abcda"]
        values, seen = [], []
        for state in grown:
            values.append(0 if state in seen else sum(WORTH[w] for w in opinion("\n".join(state))))
            seen.append(state)
        order = sorted(range(len(grown)), key=lambda i: values[i], reverse=True)
        states = [grown[i] for i in order[:keep]]
        yield ["\n".join(state) for state in states]


@pytest.mark.parametrize(("levels", "keep"), [(1, 5), (3, 1), (3, 2), (2, 9)])
def test_the_states_kept_are_those_of_a_plain_search(levels, keep):
    done = TreeOfThoughts(levels=levels, keep=keep).run("q", Scripted(model))
    told = [event.values["kept"] for event in done.trace]
    assert told == list(plainly(levels, keep))
    assert done.chosen is not None
    assert done.chosen.text == told[-1][0]


def test_calls_are_counted():
    done = TreeOfThoughts(levels=1, keep=2).run("q", Scripted(model))
    assert done.cost.calls == 1 + 4 * 3  # one proposal; the fifth state is like the first


def test_votes():
    replies = [*said("left\nright\nback"), *said("2", "The best is choice 2", "3")]
    done = TreeOfThoughts(levels=1, evaluate="vote", keep=2).run("q", Scripted(replies))
    assert done.trace[0].values["kept"] == ["right", "back"]
    assert done.trace[0].values["values"] == [2, 1]


def test_samples_and_a_verifier():
    scripted = Scripted([*said("x\nmore", "y", "z")])
    scores = {"x": 0.1, "y": 0.9, "z": 0.4}
    done = TreeOfThoughts(levels=1, generate="sample", k=3, evaluate="verifier", keep=2).run(
        "q", scripted, Table(scores)
    )
    assert done.trace[0].values["kept"] == ["y", "z"]
    assert done.answer == "y"


def test_states_drawn_by_chance_are_those_with_a_value():
    replies = [*said("a\nb\nc"), *said("impossible", "no idea", "", *["sure"] * 3, *["hm"] * 3)]
    done = TreeOfThoughts(levels=1, select="sample", keep=4, sampling=Sampling(seed=5)).run(
        "q", Scripted(replies)
    )
    assert done.trace[0].values["values"] == [60.0] * 4
    assert set(done.trace[0].values["kept"]) == {"b"}


def test_a_budget_ends_it_at_a_level():
    done = TreeOfThoughts(levels=3, keep=1).run("q", Scripted(model), budget=Budget(calls=14))
    assert done.cost.calls == 14
    assert done.chosen is not None
    assert len(done.chosen.text.splitlines()) == 1


def test_a_verifier_that_is_missing():
    with pytest.raises(InputError, match="let the model judge"):
        TreeOfThoughts(evaluate="verifier").run("q", Scripted([]))
