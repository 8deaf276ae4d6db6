"""Bad input, for every strategy that it can reach."""

import math

import pytest

from pluribus.agents import Scripted
from pluribus.core.errors import InputError, RecipeError
from pluribus.decode.scaling import STRATEGIES, BeamSearch, BestOfN, Sampling
from pluribus.decode.scaling.strategies import build, facts

NAMES = list(STRATEGIES)
NEEDY = [name for name in NAMES if facts(STRATEGIES[name]).verifier == "required"]
STEPS = [name for name in NAMES if facts(STRATEGIES[name]).continues]
SIZED = [name for name in NAMES if hasattr(build(name), "n")]
SPLIT = [name for name in NAMES if hasattr(build(name), "separator")]


class Fixed:
    def __init__(self, *scores):
        self.scores = scores

    def score(self, problem, candidate):
        return list(self.scores)


def test_all_strategies_of_the_page_are_there():
    assert NAMES == [
        "beam_search",
        "best_of_n",
        "budget_forcing",
        "compute_optimal",
        "dvts",
        "mcts",
        "particle_filtering",
        "particle_gibbs",
        "rebase",
        "revision_chains",
        "sample",
        "self_consistency",
        "self_refine",
        "tree_of_thoughts",
        "weighted",
    ]


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("n", [0, -3])
def test_fewer_than_one(name, n):
    with pytest.raises(InputError, match=rf"{name}: n = {n}.*greater than 0"):
        build({"kind": name, "n": n})


@pytest.mark.parametrize("name", ["beam_search", "dvts"])
def test_a_width_that_does_not_divide(name):
    with pytest.raises(InputError, match="no multiple of width = 4; give n = 8 or 12"):
        build({"kind": name, "n": 10, "width": 4})
    with pytest.raises(InputError, match="give n = 4 or 8"):
        build({"kind": name, "n": 2, "width": 4})


@pytest.mark.parametrize("name", SPLIT)
def test_an_empty_separator(name):
    with pytest.raises(InputError, match="separator of steps is empty"):
        build({"kind": name, "separator": ""})


@pytest.mark.parametrize("name", NEEDY)
def test_a_missing_verifier(name):
    with pytest.raises(InputError) as told:
        build(name).run("q", Scripted([]))
    assert f"{name} needs a verifier" in str(told.value)
    free = str(told.value).partition("works without: ")[2].split(", ")
    assert set(free) == set(NAMES) - set(NEEDY)


@pytest.mark.parametrize("name", STEPS)
def test_a_generator_that_cannot_go_on(name):
    with pytest.raises(InputError, match="goes on from what was written, which this generator"):
        build(name).run("q", Scripted([], continues=False), Fixed(0.5))


@pytest.mark.parametrize("score", [math.nan, -0.1, 1.5, math.inf])
def test_scores_out_of_range(score):
    with pytest.raises(InputError, match=r"Fixed gave the score .*\[0, 1\]"):
        BestOfN(n=1).run("q", Scripted(["a"]), Fixed(score))
    with pytest.raises(InputError, match=r"Fixed gave the score .*\[0, 1\]"):
        BeamSearch().run("q", Scripted(lambda asked: "a"), Fixed(0.5, score))


def test_no_score_at_all():
    with pytest.raises(InputError, match="gave no score"):
        BestOfN(n=1).run("q", Scripted(["a"]), Fixed())


def test_copies_at_temperature_zero_would_be_the_same():
    cold = Sampling(temperature=0)
    with pytest.raises(InputError, match="compares 16 completions, but at temperature 0"):
        BeamSearch(sampling=cold).run("q", Scripted([]), Fixed(0.5))
    assert (
        build({"kind": "sample", "sampling": {"temperature": 0}}).run("q", Scripted(["a"])).answer
        == "a"
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "beam_serch"}, "Did you mean 'beam_search'"),
        ({"n": 3}, "a strategy needs a kind"),
    ],
)
def test_unknown_kinds(settings, said):
    with pytest.raises(RecipeError, match=said):
        build(settings)


def test_an_unknown_parameter():
    with pytest.raises(InputError, match="best_of_n has no parameter 'm'"):
        build({"kind": "best_of_n", "m": 3})


@pytest.mark.parametrize(
    "settings", [{"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}, {"temprature": 1}]
)
def test_bad_sampling(settings):
    with pytest.raises(InputError):
        Sampling(**settings)


def test_a_generator_that_says_nothing():
    class Mute:
        def sample(self, prompt, n=1, **settings):
            return []

    with pytest.raises(InputError, match="Mute gave no completion when asked for 1"):
        build("sample").run("q", Mute())
