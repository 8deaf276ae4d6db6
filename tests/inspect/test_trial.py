"""Trials: merges of a pool scored one by one, worked by hand, and the advice that follows."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from pluribus import Pool
from pluribus.cli import build
from pluribus.core.errors import InputError, NonFiniteError
from pluribus.core.weights import Weights
from pluribus.inspect import inspect
from pluribus.inspect.trial import USUAL, methods_to_try, trials

BASE = {"layers.0.w": np.zeros((2, 2), np.float32), "layers.1.w": np.ones((2, 2), np.float32)}
METHODS = ["task_arithmetic(scale=0.5)", "task_arithmetic(scale=1.0)", "linear"]


def expert(place, value):
    w = BASE["layers.0.w"].copy()
    w[0, place] = value
    return {**BASE, "layers.0.w": w}


@pytest.fixture
def pool():
    return Pool(BASE, {"a": expert(0, 1.0), "b": expert(1, 2.0)})


def score(weights):
    """Highest where an expert went: `one` wants 1 in its place, `two` wants 2."""
    w = np.asarray(weights["layers.0.w"])
    return {"one": 1 - abs(1 - float(w[0, 0])), "two": 2 - abs(2 - float(w[0, 1]))}


def test_by_hand(pool):
    found = trials(pool, METHODS, score)
    assert found.ceilings == {"one": 1.0, "two": 2.0}
    # The sum of both updates is at both places; half of each scores half.
    assert [one.method for one in found.tried] == [METHODS[1], METHODS[0], METHODS[2]]
    assert found.best.scores == {"one": 1.0, "two": 2.0}
    assert [one.kept for one in found.tried] == pytest.approx([1.0, 0.5, 0.5])
    assert found.to_dict()["tried"][1]["scores"] == pytest.approx({"one": 0.5, "two": 1.0})


def test_one_number_is_a_score_too(pool):
    found = trials(pool, ["linear"], lambda weights: score(weights)["two"])
    assert found.ceilings == {"score": 2.0}
    assert found.best.kept == pytest.approx(0.5)


def test_steps_are_told(pool):
    seen = []
    trials(pool, METHODS, score, on_step=lambda *step: seen.append(step))
    assert seen == [("trials", n, 5) for n in range(1, 6)]


def test_what_cannot_be_compared_is_refused(pool):
    with pytest.raises(InputError, match="at least one method"):
        trials(pool, [], score)
    with pytest.raises(InputError, match="no expert scores above 0 on score"):
        trials(pool, ["linear"], lambda weights: -1.0)
    with pytest.raises(NonFiniteError, match="a: its score is nan"):
        trials(pool, ["linear"], lambda weights: float("nan"))
    with pytest.raises(InputError, match="no score to tell"):
        inspect(pool, tries=2)


def test_which_methods_are_tried():
    assert methods_to_try(["pcb", "iso_c", "linear"], "linear", 2) == ["pcb", "iso_c"]
    assert methods_to_try([], "linear", 3) == ["linear", *USUAL[1:3]]
    with pytest.raises(InputError, match="0 methods"):
        methods_to_try([], "linear", 0)


def test_the_best_is_recommended(pool):
    plain = inspect(pool)
    found = inspect(pool, score=score, tries=99, points=0)
    assert found.connectivity is None
    assert found.trials is not None
    assert not plain.advice.tried
    assert found.advice.tried
    assert found.advice.text == found.trials.best.method
    assert "keeps" in found.advice.reasons[0]
    assert f"without trials the advice was {plain.advice.text}" in found.advice.reasons[-1]
    told = found.to_dict()
    assert told["recommendation"]["rule_of_thumb"] is False
    assert told["trials"]["tried"][0]["method"] == found.advice.text
    table = found.table()
    assert "best expert of each" in table
    assert "first to try (kept most of those tried on this pool)" in table
    page = found.html()
    assert "best expert of each" in page
    assert "(--try)" not in page
    assert "(--try)" in plain.html()


def test_from_the_command_line(tmp_path, monkeypatch):
    from pluribus.tasks import zoo as zoos

    class Toy:
        base = BASE
        tasks = ("one", "two")

        def score(self, state, task, split, limit):
            return score(state)[task]

    monkeypatch.setattr(zoos, "build", lambda name, seed: Toy())
    for name, values in (("base", BASE), ("a", expert(0, 1.0)), ("b", expert(1, 2.0))):
        Weights.of(values).save(tmp_path / f"{name}.safetensors")
    models = [str(tmp_path / f"{name}.safetensors") for name in ("base", "a", "b")]
    words = ["inspect", *models, "--quiet", "--json"]
    made = CliRunner().invoke(build(), [*words, "--zoo", "toy", "--try", "2", "--no-lines"])
    assert made.exit_code == 0, made.output
    told = json.loads(made.stdout)
    assert told["connectivity"] is None
    assert len(told["trials"]["tried"]) == 2
    refused = CliRunner().invoke(build(), [*words, "--try", "2"])
    assert "--try 2 needs a score" in str(refused.exception)
