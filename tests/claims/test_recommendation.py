"""The claim `recommendation` at toy size: who chooses what, and what that scores."""

from dataclasses import replace

import pytest

from pluribus.claims import Outcome, recommendation
from pluribus.inspect.calibrate import Measured
from pluribus.inspect.features import NAMES


def pool(bed, cosine):
    told = dict.fromkeys(NAMES, 1.0) | {"cosine": cosine}
    # `linear` is best for like experts, `pcb` for unlike ones, and better on average.
    val = {"linear": 1 - cosine, "pcb": 0.8 * cosine}
    test = {method: loss / 2 for method, loss in val.items()}  # what counts in the end
    return Measured(bed, 0, ("a", "b"), told, val, 0.5, 0.9, test, 0.9)


@pytest.fixture(scope="module")
def figures():
    beds = ("vision6", "vision6-harder", "vision8", "vision8-pretrained", "text6")
    return recommendation.held_out([pool(bed, c) for bed in beds for c in (0.1, 0.2, 0.3, 0.9)], 0)


def test_figures_by_hand(figures):
    # Losses of pcb 0.08, 0.16, 0.24, 0.72 (mean 0.3); of linear 0.9, 0.8, 0.7, 0.1 (mean 0.625); on
    # test inputs half of that.
    assert figures["single"] == pytest.approx(100 * (1 - 0.15))
    assert figures["average"] == pytest.approx(100 * (1 - 0.3125))
    assert figures["best"] == pytest.approx(100 * (1 - (0.08 + 0.16 + 0.24 + 0.1) / 8))
    assert figures["recommended"] == pytest.approx(figures["best"])
    assert figures["tried"] == pytest.approx(figures["best"])
    assert figures["rules"] == pytest.approx(10)
    assert figures["single_data"] == pytest.approx(figures["single"])


def test_every_check_has_its_figures(figures):
    outcome = Outcome(recommendation.CLAIM, (0,), {k: [v] for k, v in figures.items()}, 0.0)
    assert outcome.verdict == "holds"
    assert all(check["holds"] for check in outcome.to_dict()["checks"])


def test_what_is_left_out_decides_nothing():
    beds = ("vision6", "vision8", "text6")
    pools = [pool(bed, c) for bed in beds for c in (0.1, 0.2, 0.3, 0.9)]
    other = [
        replace(p, loss={"linear": p.loss["pcb"], "pcb": 0.0}, test=p.loss)
        if p.bed == "text6"
        else p
        for p in pools
    ]
    before, after = (recommendation.held_out(given, 0) for given in (pools, other))
    # Choices by weights for text6 are the other zoos', whatever its own losses are: pcb thrice.
    assert before["recommended_text6"] == pytest.approx(100 * (1 - (0.08 + 0.16 + 0.24 + 0.1) / 8))
    assert after["recommended_text6"] == pytest.approx(100 * (1 - (0.08 + 0.16 + 0.24 + 0.1) / 4))
    # A trial looks at validation inputs of the pool: there pcb has become the better one always.
    assert before["tried_text6"] == pytest.approx(before["recommended_text6"])
    assert after["tried_text6"] == pytest.approx(100 * (1 - 0.3))


def test_a_trial_is_of_the_first_of_the_ranking(monkeypatch):
    monkeypatch.setattr(recommendation, "TRIES", 1)
    beds = ("vision6", "vision8", "text6")
    told = recommendation.held_out([pool(bed, c) for bed in beds for c in (0.1, 0.2, 0.3, 0.9)], 0)
    assert told["tried"] == told["single"]
