import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.core.pool import Pool
from pluribus.inspect import inspect
from pluribus.inspect.connectivity import connectivity


def at(x, y):
    return {"w": np.array([x, y], np.float64)}


def pool_of():
    return Pool(at(0, 0), {"a": at(2, 0), "b": at(-2, 0)})


def height(weights):
    """A double well seen from above: best, 0, at x = -2 and 2; -16 between them."""
    x = float(weights["w"][0])
    return -((x * x - 4) ** 2)


def test_barriers_by_hand():
    found = connectivity(pool_of(), height, points=5, with_base=False)
    (line,) = found.lines
    assert line.label == "a – b"
    assert [p.weight for p in line.curve.points] == [0, 0.25, 0.5, 0.75, 1]
    assert [p.score for p in line.curve.points] == [0, -9, -16, -9, 0]
    assert line.barrier == 16


def test_the_line_between_unequal_ends_is_slanted():
    found = connectivity(pool_of(), height, points=3)
    lines = {line.label: line for line in found.lines}
    assert set(lines) == {"state dict – a", "state dict – b", "a – b"}
    # S: -16 at the base, -9 at x = 1, 0 at a: the ends' line has -8 there.
    assert lines["state dict – a"].barrier == 1


def test_a_loss_counts_the_other_way():
    (line,) = connectivity(
        pool_of(), lambda w: -height(w), points=3, higher_is_better=False, with_base=False
    ).lines
    assert line.barrier == 16


def test_every_score_has_a_barrier_of_its_own():
    def scores(weights):
        return {"well": height(weights), "flat": 1.0}

    (line,) = connectivity(pool_of(), scores, points=3, with_base=False).lines
    assert line.barriers == {"well": 16, "flat": 0}
    assert line.barrier == 8  # of the mean score


def test_ends_are_scored_once_and_progress_is_told():
    seen, steps = [], []

    def score(weights):
        seen.append(float(weights["w"][0]))
        return 1.0

    connectivity(pool_of(), score, points=4, on_step=lambda *step: steps.append(step))
    assert len(seen) == 3 + 3 * 2
    assert seen.count(0.0) == 1
    assert seen.count(2.0) == 1
    assert steps[-1] == ("connectivity", 9, 9)


def test_the_report_shows_lines():
    models = [
        {f"layers.{i}.w": v + step for i in range(2)}
        for step, v in ((0, np.ones((4, 3))), (0.1, np.ones((4, 3))), (-0.1, np.ones((4, 3))))
    ]
    pool = Pool(models[0], {"a": models[1], "b": models[2]})
    found = inspect(pool, score=lambda w: float(w["layers.0.w"].sum()), points=3)
    assert "barrier" in found.table()
    assert "Lines between models" in found.html()
    told = found.to_dict()["connectivity"]["lines"]
    assert len(told) == 3
    assert told[0]["barrier"] == pytest.approx(0, abs=1e-9)


def test_refusals():
    with pytest.raises(InputError, match="points = 2"):
        connectivity(pool_of(), height, points=2)
    with pytest.raises(InputError, match="needs two models"):
        connectivity(Pool(None, {"a": at(0, 0)}), height)
    with pytest.raises(InputError, match=r"score at lambda = 0\.5 is nan"):
        connectivity(pool_of(), lambda w: float("nan") if w["w"][0] == 0 else 1.0, with_base=False)
