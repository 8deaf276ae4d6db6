"""Searches over steps on trees that are small enough to be worked by hand."""

import math
import random

import pytest
from toys import Table, Tree

from pluribus.decode.scaling import (
    DVTS,
    MCTS,
    BeamSearch,
    Budget,
    ParticleFiltering,
    ParticleGibbs,
    Rebase,
    Sampling,
)
from pluribus.decode.scaling.strategies.rebase import shares

# Two steps: a or b, then an end. The best leaf, b|y, lies behind the better first step; a|z is good
# but its first step is not.
CHILDREN = {"": ["a|", "b|"], "a|": ["z", "w"], "b|": ["x", "y"]}
SCORES = {"a|": 0.3, "b|": 0.6, "a|z": 0.8, "a|w": 0.1, "b|x": 0.2, "b|y": 0.9}
PLAIN = {"separator": "|"}


def every_leaf():
    return max((text for text in SCORES if not text.endswith("|")), key=SCORES.__getitem__)


@pytest.mark.parametrize(
    "strategy",
    [
        BeamSearch(n=4, width=2, **PLAIN),
        DVTS(n=4, width=4, **PLAIN),
        Rebase(n=8, balance=0.2, choose="best", **PLAIN),
        ParticleFiltering(n=16, **PLAIN),
        ParticleGibbs(n=8, passes=3, **PLAIN),
        MCTS(simulations=24, k=2, **PLAIN),
        MCTS(simulations=24, k=2, choose="weighted", **PLAIN),
        MCTS(simulations=40, k=2, value="rollout", c=2.0, **PLAIN),
    ],
    ids=lambda strategy: repr(strategy)[:40].partition(", rounds")[0],
)
def test_the_best_leaf_of_all_is_found(strategy):
    done = strategy.run("q", Tree(CHILDREN), Table(SCORES))
    assert done.chosen is not None
    assert done.chosen.text == every_leaf() == "b|y"
    assert done.answer == "b|y"
    assert done.chosen.finished


# -- beams -----------------------------------------------------------------------------------------


def test_beam_search_by_hand():
    tree, table = Tree(CHILDREN), Table(SCORES)
    done = BeamSearch(n=4, width=2, **PLAIN).run("q", tree, table)
    # Four copies of the root in one request: a b a b. The best two are both b, so four copies of b.
    assert tree.requests == [("", 4), ("b|", 4)]
    assert [one.text for one in done.candidates] == ["b|x", "b|y", "b|x", "b|y"]
    assert done.trace[0].values["scores"] == [0.6, 0.6, 0.3, 0.3]
    assert done.cost.tokens == 8
    assert done.cost.calls == 8


def test_distinct_beams_are_kept_once():
    tree = Tree(CHILDREN)
    BeamSearch(n=4, width=2, distinct=True, **PLAIN).run("q", tree, Table(SCORES))
    assert tree.requests == [("", 4), ("b|", 2), ("a|", 2)]


def test_the_last_round_runs_to_the_end():
    chain = {"": ["a|"], "a|": ["b|"], "a|b|": ["c"]}
    scores = dict.fromkeys(["a|", "a|b|c"], 0.5)

    class Whole(Table):
        def score(self, problem, candidate):
            return [0.5] * len(candidate)

    tree = Tree(chain)
    done = BeamSearch(n=2, width=2, rounds=2, **PLAIN).run("q", tree, Whole(scores))
    assert done.answer == "a|b|c"
    assert tree.asked[-1][2]["stop"] == ()
    assert tree.asked[0][2]["stop"] == ("|",)


def test_a_spent_budget_gives_the_best_that_finished():
    done = BeamSearch(n=4, width=2, **PLAIN).run(
        "q", Tree(CHILDREN), Table(SCORES), Budget(tokens=4)
    )
    assert done.cost.tokens == 4
    assert done.chosen is not None
    assert (done.chosen.text, done.chosen.finished) == ("b|", False)
    done = BeamSearch(n=4, width=2, **PLAIN).run(
        "q", Tree(CHILDREN), Table(SCORES), Budget(tokens=5)
    )
    assert done.chosen is not None
    assert (done.cost.tokens, done.chosen.text) == (5, "b|x")


# -- dvts ------------------------------------------------------------------------------------------


def test_subtrees_do_not_compete_and_only_finished_ones_count():
    # Trees of width 1: the first gets a, the second b; then z and x.
    tree = Tree(CHILDREN)
    done = DVTS(n=2, width=1, **PLAIN).run("q", tree, Table(SCORES))
    assert tree.requests == [("", 1), ("", 1), ("a|", 1), ("b|", 1)]
    assert [one.text for one in done.candidates] == ["a|z", "b|x"]
    assert done.answer == "a|z"


def test_an_unfinished_last_step_is_no_candidate():
    children = {"": ["a|", "e"], "a|": ["b", "c|"], "a|c|": ["d"]}
    scores = {"a|": 0.5, "e": 0.1, "a|b": 0.4, "a|c|": 0.9, "a|c|d": 0.7}
    done = DVTS(n=2, width=2, **PLAIN).run("q", Tree(children), Table(scores))
    assert [one.text for one in done.candidates] == ["e", "a|b", "a|c|d", "a|c|d"]
    assert done.answer == "a|c|d"


def test_a_lookahead_judges_what_follows_and_keeps_the_step():
    children = {"": ["a|", "b|"], "a|": ["z"], "b|": ["x"]}
    scores = {"a|": 0.1, "b|": 0.6, "a|z": 0.9, "b|x": 0.2}
    short = DVTS(n=2, width=2, **PLAIN).run("q", Tree(children), Table(scores))
    assert short.answer == "b|x"
    tree = Tree(children)
    far = DVTS(n=2, width=2, lookahead=1, **PLAIN).run("q", tree, Table(scores))
    assert far.answer == "a|z"
    greedy = [prefix for prefix, _, settings in tree.asked if settings["temperature"] == 0]
    assert greedy == ["a|", "b|"]
    assert far.trace[0].values["kept"] == ["a|"]


# -- rebase ----------------------------------------------------------------------------------------


def test_children_by_softmax():
    weights = [math.exp(score / 0.2) for score in (0.3, 0.6)]
    exact = [8 * weight / sum(weights) for weight in weights]
    assert [round(share, 2) for share in exact] == [1.46, 6.54]
    assert shares([0.3, 0.6], 8, 0.2) == [1, 7]
    assert shares([0.5, 0.5, 0.5], 8, 0.2) == [3, 3, 2]
    assert shares([0.0, 1.0], 4, 0.01) == [0, 4]


@pytest.mark.parametrize("seed", range(20))
def test_children_sum_to_what_is_left_and_are_near_their_share(seed):
    rng = random.Random(seed)
    scores = [rng.random() for _ in range(rng.randrange(1, 9))]
    total = rng.randrange(20)
    counts = shares(scores, total, 0.3)
    weights = [math.exp(score / 0.3) for score in scores]
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1


def test_rebase_by_hand():
    tree = Tree(CHILDREN)
    done = Rebase(n=4, balance=0.2, **PLAIN).run("q", tree, Table(SCORES))
    # a b a b; softmax of .3 .6 .3 .6 at T = .2: weights 1 4.48 1 4.48 of 10.96, of 4: .36 1.64 ...
    assert done.trace[1].values["children"] == [0, 2, 0, 2]
    assert tree.requests == [("", 4), ("b|", 4)]
    assert done.answer == "b|y"  # .9 + .9 against .2 + .2


# -- particles -------------------------------------------------------------------------------------


def logit(score):
    return math.log(score / (1 - score))


def test_particles_by_hand_for_the_same_draws():
    n, seed = 6, 3
    done = ParticleFiltering(n=n, sampling=Sampling(seed=seed), **PLAIN).run(
        "q", Tree(CHILDREN), Table(SCORES)
    )
    first = ["a|", "b|"] * 3
    odds = [math.exp(logit(SCORES[text])) for text in first]
    weights = [weight / sum(odds) for weight in odds]
    assert done.trace[0].values["texts"] == first
    assert done.trace[0].values["weights"] == pytest.approx(weights)
    chance, drawn = random.Random(seed), []
    for _ in range(n):  # the first particle whose cumulative weight exceeds the number
        uniform, total = chance.random(), 0.0
        for text, weight in zip(first, weights, strict=True):
            total += weight
            if uniform < total:
                drawn.append(text)
                break
    turns = {"a|": iter(["z", "w"] * n), "b|": iter(["x", "y"] * n)}
    assert len(set(drawn)) == 2  # or the draws would tell nothing
    wanted = [text + next(turns[text]) for text in drawn]
    assert done.trace[1].values["texts"] == wanted
    assert [one.text for one in done.candidates] == wanted


def test_finished_particles_are_kept_and_not_written_again():
    children = {"": ["e", "a|"], "a|": ["z"]}
    tree = Tree(children)
    done = ParticleFiltering(n=4, sampling=Sampling(seed=2), **PLAIN).run(
        "q", tree, Table({"e": 0.5, "a|": 0.5, "a|z": 0.4})
    )
    second = done.trace[0].values
    assert second["texts"] == ["e", "a|", "e", "a|"]
    assert second["weights"] == [0.25] * 4
    kept = [text for text in done.trace[1].values["texts"] if text == "e"]
    assert kept
    assert done.cost.calls == 4 + (4 - len(kept))
    assert [prefix for prefix, _ in tree.requests] == ["", "a|"]


def test_scores_at_the_ends_are_clipped():
    done = ParticleFiltering(n=2, **PLAIN).run(
        "q", Tree({"": ["e", "f"]}), Table({"e": 1.0, "f": 0.0})
    )
    assert done.trace[0].values["weights"][0] == pytest.approx(1.0)
    assert done.answer == "e"


def test_gibbs_keeps_its_reference():
    done = ParticleGibbs(n=4, passes=2, sampling=Sampling(seed=1), **PLAIN).run(
        "q", Tree(CHILDREN), Table(SCORES)
    )
    passes = [event for event in done.trace if event.kind == "pass"]
    [reference] = passes[0].values["kept"]
    at = done.trace.index(passes[0])
    later = [event for event in done.trace[at + 1 :] if event.kind == "round"]
    assert later[0].values["texts"][0] == reference[:2]  # its first step
    assert later[1].values["texts"][0] == reference
    assert reference in [one.text for one in done.candidates]


# -- monte-carlo tree search -----------------------------------------------------------------------


def test_mcts_by_hand():
    tree, table = Tree(CHILDREN), Table(SCORES)
    done = MCTS(simulations=4, k=2, c=1.4, **PLAIN).run("q", tree, table)
    # 1: a (never visited), .3.   2: b, .6.
    # 3: a: .3 + 1.4 sqrt(ln 2) = 1.466, b: .6 + 1.166 = 1.766 -> b grows, its first child x: .2
    # 4: root 3 visits: a: .3 + 1.4 sqrt(ln 3) = 1.767; b: .4 + 1.4 sqrt(ln 3 / 2) = 1.438
    #    -> a grows, its first child z: .8
    told = [(event.values["text"], event.values["value"]) for event in done.trace]
    assert told == [("a|", 0.3), ("b|", 0.6), ("b|x", 0.2), ("a|z", 0.8)]
    assert tree.requests == [("", 2), ("b|", 2), ("a|", 2)]
    assert done.answer == "a|z"  # one visit each, and the higher value


def test_rollouts_are_greedy_counted_and_thrown_away():
    tree = Tree(CHILDREN)
    done = MCTS(simulations=2, k=2, value="rollout", **PLAIN).run("q", tree, Table(SCORES))
    assert [event.values["value"] for event in done.trace[:2]] == [0.8, 0.2]  # a|z and b|x
    assert [settings["temperature"] for _, _, settings in tree.asked[:3]] == [0.8, 0.0, 0.0]
    assert done.cost.calls >= 4


def test_a_tree_without_an_end_is_finished():
    done = MCTS(simulations=1, k=2, **PLAIN).run("q", Tree(CHILDREN), Table(SCORES))
    assert done.chosen is not None
    assert done.chosen.finished
    assert done.trace[-1].kind == "finishing"
