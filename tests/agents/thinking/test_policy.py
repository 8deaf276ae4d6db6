"""Policies: tables, neighbours, cards, files; drift; passes to learn."""

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pluribus.agents import Scripted
from pluribus.agents.thinking import CoT, CoTPolicy, CoTProbe, Direct, Drift, learn, passes_effect
from pluribus.agents.thinking.card import Card, auc, left_out
from pluribus.agents.thinking.policy import letters
from pluribus.core.errors import (
    FormatError,
    InputError,
    MismatchError,
    MissingError,
    OutputError,
)
from pluribus.decode.scaling.interface import Problem
from pluribus.tasks.suites import TRAITS
from pluribus.tasks.suites.exceptions import draw

sys.path.insert(0, str(Path(__file__).parent))  # tests have no package
from worlds import knowing, task  # type: ignore[import-not-found]

FATES = {"sums": ["wr", "rr"], "faces": ["rw", "rr"], "same": ["rr", "ww"]}


def card(*yes):
    return {name: name in yes for name in TRAITS}


@pytest.fixture(scope="module")
def effects():
    """One task that gains by thinking, one that loses, one that is undecided."""
    found = [task(fates, name=name) for name, fates in FATES.items()]
    return [CoTProbe(knowing(one), tasks=3).measure(one) for one in found]


@pytest.fixture
def policy(effects):
    return CoTPolicy.fit(effects)


def test_a_measured_task_is_looked_up(policy):
    assert policy.choose("sums") == ("cot", "measured")
    assert policy.choose("faces") == ("direct", "measured")
    assert policy.choose("same") == ("direct", "undecided")


def test_a_question_goes_to_the_nearest_task(policy):
    chosen = policy.choose(Problem(question="Item 500 of sums [?]"))
    assert chosen.mode == "cot"
    assert chosen.why.startswith("near sums (0.")
    assert policy.choose("Item 7 of faces [?]").mode == "direct"
    assert policy.choose("Wholly other words, nowhere near") == ("direct", "default")
    assert policy.choose("") == ("direct", "default")
    assert replace(policy, cutoff=0.0).choose("Item 500 of sums [?]").why == "default"


def test_an_embedding_of_ones_own(effects):
    """Two axes: sums lie on one, all else on the other; distances by hand."""

    def embed(text):
        if text == "between":
            return [1.0, 1.0]
        return [3.0, 0.0] if "sums" in text else [0.0, 2.0]

    policy = CoTPolicy.fit(effects, embed=embed, cutoff=0.3)
    assert policy.choose("more sums") == ("cot", "near sums (0.00)")
    assert policy.choose("between") == ("cot", "near sums (0.29)")  # 1 - cos 45 degrees
    with pytest.raises(InputError, match="embedding is empty"):
        CoTPolicy.fit(effects, embed=lambda text: [0.0, 0.0])


def test_letters_are_counted_in_threes():
    assert letters("Sums") == letters(" sums ")
    assert sum(x * x for x in letters("some text")) == pytest.approx(1.0)
    assert sum(x > 0 for x in letters("abc")) == 3  # " ab", "abc", "bc "


def test_the_card_guesses_from_traits(effects):
    gains, loses = effects[0], effects[1]
    told = [
        replace(gains, task=f"s{i}", traits=card("symbolic_steps", *more), questions=())
        for i, more in enumerate([(), ("needs_state",), ("long_aggregation",)])
    ]
    told += [
        replace(loses, task=f"p{i}", traits=card("implicit_pattern", *more), questions=())
        for i, more in enumerate([(), ("exceptions_dominate",), ("hard_to_verbalise",)])
    ]
    policy = CoTPolicy.fit(told)
    assert policy.card is not None
    assert policy.card.auc == 1.0
    mode, why = policy.choose("new", card("symbolic_steps"))
    assert mode == "cot"
    assert why.startswith("card (0.")
    assert policy.choose("new", card("implicit_pattern")).mode == "direct"
    assert policy.choose("new") == ("direct", "default")
    assert "area 1.00" in policy.report()
    with pytest.raises(InputError, match="says nothing of"):
        policy.choose("new", {"needs_state": True})


def test_the_card_is_the_penalised_optimum():
    """The gradient of the loss is 0 at the weights, and the area is counted by hand."""
    chance = random.Random(0)
    traits = [{name: chance.random() < 0.5 for name in TRAITS} for _ in range(12)]
    pays = [one["symbolic_steps"] or chance.random() < 0.2 for one in traits]
    fitted = Card.fit(traits, pays)

    def loss(weights):
        total = 0.0005 * weights[0] ** 2 + sum(w * w for w in weights[1:]) / 2
        for one, label in zip(traits, pays, strict=True):
            z = weights[0] + sum(w * one[n] for w, n in zip(weights[1:], TRAITS, strict=True))
            total += math.log1p(math.exp(z)) - z * label
        return total

    best = loss(list(fitted.weights))
    for k in range(7):
        for step in (-1e-3, 1e-3):
            moved = [w + step * (i == k) for i, w in enumerate(fitted.weights)]
            assert loss(moved) > best
    assert fitted.auc == left_out(traits, pays)
    assert auc([0.9, 0.4, 0.4, 0.1], [True, True, False, False]) == 3.5 / 4
    assert auc([1.0], [True]) is None
    with pytest.raises(InputError, match="there are 3, of which 1 gain"):
        Card.fit(traits[:3], [True, False, False])


def test_a_router_runs_the_chosen_mode(policy):
    found = task(FATES["sums"], name="sums")
    model = knowing(found)
    router = policy.as_router([Direct(), CoT(max_tokens=64)])
    assert router.run(found.problems[0], model).tokens == 20
    assert router.most_tokens == 64
    named = policy.as_router([Direct(), CoT()], task="faces")
    assert named.run(found.problems[0], model).tokens == 2
    with pytest.raises(InputError, match="may choose cot; give that mode too"):
        policy.as_router([Direct()])


def test_policies_go_through_files(policy, effects, tmp_path):
    path = tmp_path / "policy.json"
    policy.save(path)
    again = CoTPolicy.load(path)
    assert again.effects == policy.effects
    assert again.choose("Item 500 of sums [?]") == policy.choose("Item 500 of sums [?]")
    assert again == policy
    with pytest.raises(OutputError, match="exists"):
        policy.save(path)
    policy.save(path, overwrite=True)
    with pytest.raises(OutputError, match="no folder"):
        policy.save(tmp_path / "none" / "policy.json")
    own = CoTPolicy.fit(effects, embed=lambda text: [1.0, float(len(text))])
    own.save(tmp_path / "own.json")
    with pytest.raises(InputError, match="embedding of your own"):
        CoTPolicy.load(tmp_path / "own.json")
    assert CoTPolicy.load(tmp_path / "own.json", embed=own.embed) == own


def test_damaged_files(policy, tmp_path):
    path = tmp_path / "policy.json"
    with pytest.raises(MissingError, match="no such policy"):
        CoTPolicy.load(path)
    path.write_text("{")
    with pytest.raises(FormatError, match="not a policy that can be read"):
        CoTPolicy.load(path)
    path.write_text("{}")
    with pytest.raises(FormatError, match="no thinking policy"):
        CoTPolicy.load(path)
    told = policy.to_dict()
    del told["effects"][0]["arms"]
    path.write_text(json.dumps(told))
    with pytest.raises(FormatError, match="no effect as pluribus writes it"):
        CoTPolicy.load(path)
    told = policy.to_dict()
    del told["cutoff"]
    path.write_text(json.dumps(told))
    with pytest.raises(FormatError, match="damaged policy"):
        CoTPolicy.load(path)


def test_the_table_and_the_page(policy):
    head, *rows = policy.report().splitlines()
    told = "task mode use decision n delta low high p net extra tokens unread delta read"
    assert " ".join(head.split()) == told
    assert [row.split()[0] for row in rows] == ["sums", "faces", "same"]
    assert rows[0].split()[1:5] == ["cot", "cot", "cot", str(policy.effects["sums"].n)]
    assert rows[2].split()[1:5] == ["cot", "direct", "undecided", "200"]
    assert "0 / 0" in rows[0]
    page = policy.page()
    assert "Does thinking pay?" in page
    assert "faces, cot" in page


def test_refused(effects):
    with pytest.raises(InputError, match="no task was measured"):
        CoTPolicy.fit([])
    with pytest.raises(InputError, match="measured twice"):
        CoTPolicy.fit([effects[0], effects[0]])
    with pytest.raises(InputError, match="cut-off is 3"):
        CoTPolicy.fit(effects, cutoff=3.0)
    other = replace(effects[1], arms=effects[1].arms[::-1])
    with pytest.raises(InputError, match="different modes: cot, direct; direct, cot"):
        CoTPolicy.fit([effects[0], other])


def test_drift_alarms_when_the_choice_turns_bad():
    drift = Drift(price=0.001, most_tokens=100)
    for _ in range(30):
        assert not drift.add((True, 10), (True, 10))
    alarms = [drift.add((False, 10), (True, 10)) for _ in range(30)]
    assert not alarms[3]
    assert alarms[-1]
    assert drift.alarm
    assert drift.net[1] < 0
    assert len(drift) == 60
    good = Drift()
    assert not any(good.add((True, 10), (False, 10)) for _ in range(60))
    assert good.net[0] > 0


def test_a_share_of_requests_is_asked_twice():
    drift = Drift(share=0.05)
    asked = [drift.asks(f"request {i}") for i in range(4000)]
    assert 150 <= sum(asked) <= 250
    assert asked == [Drift(share=0.05).asks(f"request {i}") for i in range(4000)]
    with pytest.raises(InputError, match="share is 0"):
        Drift(share=0.0)
    with pytest.raises(InputError, match="give most_tokens"):
        Drift(price=0.1)
    with pytest.raises(InputError, match="bounds on value and tokens"):
        Drift(price=0.1, most_tokens=5).add((True, 99), (True, 1))


def remembering(asked):
    """Answers as the plate was told before, A where it was not."""
    *seen, question = asked.prompt.partition("\n\nWhich")[0].split("\n\n")[0], asked.prompt
    plate = question.rpartition("plate ")[2].partition("\n")[0]
    told = "\n".join(seen).partition(f"plate {plate}: ")[2]
    return f"Answer: {told[:1] or 'A'}"


def test_models_learn_lists_as_agents_do():
    lists = [draw(random.Random(seed)) for seed in range(4)]
    assert learn(Direct(), Scripted(remembering), lists) == [2, 2, 2, 2]
    assert learn(CoT(), Scripted(lambda asked: "Hard to say"), lists[:1], most=3) == [4]
    with pytest.raises(InputError, match="no list of vehicles"):
        learn(Direct(), Scripted(remembering), [])


def test_passes_are_compared_by_their_ratio():
    told = passes_effect([2, 2, 2, 2, 4, 2, 2, 2], [8, 8, 8, 8, 16, 8, 8, 8])
    assert told.ratio == pytest.approx(4.0)
    assert told.ci == pytest.approx((4.0, 4.0))
    assert told.p == 2 / 2**8  # all signs one way, or all the other
    assert told.means == (2.25, 9.0)
    assert passes_effect([2, 4], [4, 2]).ratio == pytest.approx(1.0)
    with pytest.raises(MismatchError, match="1 and 2 lists"):
        passes_effect([2], [2, 2])
    with pytest.raises(InputError, match="1 or more"):
        passes_effect([0], [2])
