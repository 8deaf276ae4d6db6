import json
import math
import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest

from pluribus.core.errors import InputError, OutputError
from pluribus.core.pool import Pool
from pluribus.inspect import advice, calibrate, forecast, inspect
from pluribus.inspect.calibrate import CANDIDATES, Bed, Measured, measure_pool
from pluribus.inspect.features import NAMES, features


def pool(bed, value, losses, seed=0):
    told = dict.fromkeys(NAMES, 1.0) | {"cosine": value}
    return Measured(bed, seed, ("a", "b"), told, losses, 0.5, 0.5)


def crossing(bed, values, noise=0.0):
    """`up` loses the cosine, `down` 1 minus it: the better one changes at 0.5."""
    return [pool(bed, v, {"up": v + noise, "down": 1 - v + noise}) for v in values]


def test_a_line_is_found_and_used_where_it_pays():
    pools = [p for bed in "abc" for p in crossing(bed, np.linspace(0.05, 0.95, 6))]
    model = forecast.fit(pools)
    assert math.isfinite(model.penalty)
    low, high = (model.predict(pool("x", v, {}).features) for v in (0.1, 0.9))
    assert low[0].method == "up"
    assert high[0].method == "down"
    assert low[0].loss == pytest.approx(0.1, abs=0.02)
    assert [one.loss for one in low] == sorted(one.loss for one in low)


def test_the_smallest_penalty_is_least_squares():
    pools = [p for bed in "ab" for p in crossing(bed, [0.1, 0.4, 0.9])]
    model = forecast._solved(pools, 1e-9)
    x = np.array([[1, p.features["cosine"]] for p in pools])
    for place, method in enumerate(model.methods):
        by_hand = np.linalg.lstsq(x, [p.loss[method] for p in pools], rcond=None)[0]
        told = {one.method: one.loss for one in model.predict(pools[1].features)}
        assert told[method] == pytest.approx(by_hand @ [1, 0.4], abs=1e-6)
        assert model.means[place] == pytest.approx(np.mean([p.loss[method] for p in pools]))


def test_every_bed_weighs_the_same():
    pools = [*crossing("a", [0.0] * 9), *crossing("b", [1.0])]
    assert forecast._solved(pools, math.inf).means.tolist() == pytest.approx([0.5, 0.5])


def test_where_features_tell_nothing_the_best_on_average_is_chosen():
    rng = np.random.default_rng(0)
    pools = [
        pool(bed, float(rng.random()), {"good": 0.1 + 0.01 * rng.random(), "bad": 0.3})
        for bed in "abcd"
        for _ in range(5)
    ]
    model = forecast.fit(pools)
    assert model.penalty == math.inf
    assert forecast.fit(pools, by_features=False).means.tolist() == model.means.tolist()
    assert all(model.predict(one.features)[0].method == "good" for one in pools)
    assert 0.001 < model.spread[list(model.methods).index("good")] < 0.01


def test_similar_pools_come_first():
    pools = [*crossing("a", [0.1, 0.2]), *crossing("b", [0.8, 0.9])]
    found = forecast.fit(pools).near(pool("x", 0.82, {}).features, 2)
    assert [one.label for one in found] == ["b (2 experts)"] * 2
    assert [one.best for one in found] == ["down", "down"]
    assert found[0].loss == pytest.approx(0.2)
    assert found[0].distance < found[1].distance


def test_one_bed_is_too_few():
    with pytest.raises(InputError, match="needs two"):
        forecast.fit(crossing("a", [0.1, 0.9]))


def test_the_packages_own_file():
    known = forecast.calibrated()
    assert known is not None
    model, told = known
    assert model.methods == CANDIDATES
    assert model.penalty == math.inf
    assert len({one.bed for one in model.pools}) >= 3
    assert set(told["versions"]) >= {"pluribus", "torch", "numpy"}
    for one in model.pools:
        assert set(one.features) == set(NAMES)
        assert len(one.tasks) >= 2
        assert np.isfinite(list(one.loss.values())).all()


# -- features, advice ------------------------------------------------------------------------------


def drawn(step=0.05, experts=3, size=4000):
    rng = np.random.default_rng(0)
    base = rng.standard_normal(size).astype(np.float32)
    models = [
        {"layers.0.w": base, "layers.1.w": base.copy()},
        *(
            {f"layers.{i}.w": (base + step * rng.standard_normal(size)).astype(np.float32)
             for i in range(2)}
            for _ in range(experts)
        ),
    ]  # fmt: skip
    return Pool(models[0], {f"e{i}": model for i, model in enumerate(models[1:])})


def test_features_of_independent_experts():
    found = features(inspect(drawn()).model, 0.2)
    assert found is not None
    assert list(found) == list(NAMES)
    assert found["experts"] == pytest.approx(math.log2(3))
    assert found["cosine"] == pytest.approx(0, abs=0.05)
    assert found["ratio"] == pytest.approx(math.log10(0.05), abs=0.02)
    assert found["even"] == pytest.approx(2 / math.pi, abs=0.01)
    assert found["crowded"] == pytest.approx(0, abs=0.1)
    assert found["opposed"] == pytest.approx(0.5, abs=0.05)


def test_one_model_or_a_task_vector_of_zero_has_none():
    one = drawn(experts=1)
    assert features(inspect(one).model, 0.2) is None
    still = Pool(one.base, {"same": one.base, "moved": one.experts["e0"]})
    found = inspect(still)
    assert features(found.model, 0.2) is None
    assert found.advice.method == "task_arithmetic"
    assert not found.advice.expected


@pytest.fixture
def known(monkeypatch):
    """A calibration on pools like `drawn`'s, on which the winner is a depth method."""
    seen = features(inspect(drawn()).model, 0.2)
    losses = {"lines(beta=0.3)": 0.05, "ties(density=0.2)": 0.1, "linear": 0.2}
    pools = [
        Measured(bed, 0, ("a", "b"), seen | {"cosine": seen["cosine"] + 0.01 * i}, losses, 0.5, 0.5)
        for bed in "ab"
        for i in range(3)
    ]
    told = {"density": 0.2, "made_by": "a test", "versions": {}}
    monkeypatch.setattr(forecast, "calibrated", lambda: (forecast.fit(pools), told))


def test_advice_is_what_loses_least(known):
    found = inspect(drawn())
    assert found.advice.method == "lines"
    assert found.advice.parameters == {"beta": 0.3}
    assert "expected to lose 5.0%" in found.advice.reasons[0]
    assert "lost least on measured pools" in found.table()
    assert "ties(density=0.2)" in found.html()
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))["recommendation"]
    assert told["rule_of_thumb"] is False
    assert told["expected"][0]["method"] == "lines(beta=0.3)"
    assert len(told["similar_pools"]) == 3


def test_without_blocks_no_depth_method(known):
    found = inspect(drawn())
    assert advice.recommend(found.model, 0, 0.2).text == "ties(density=0.2)"


def test_rules_where_nothing_was_measured(known):
    other = inspect(drawn(), density=0.5).advice
    assert any("supports of 20% only" in one for one in other.reasons)
    far = inspect(drawn(experts=30)).advice
    assert not far.expected
    assert any("no pool that was measured is like this one" in one for one in far.reasons)


# -- measuring -------------------------------------------------------------------------------------


def test_pools_are_different_and_repeat():
    bed = Bed(name="b", zoo="z", sizes=(2, 2, 3, 4, 9))
    tasks = ["p", "q", "r", "s"]
    found = bed.pools(tasks, 0)
    assert found == bed.pools(tasks, 0)
    assert len(set(found)) == len(found) == 4
    assert [len(one) for one in found] == [2, 2, 3, 4]
    assert found != bed.pools(tasks, 1)


class Zoo:
    """A zoo whose expert t is right where the weights' element t is above a half."""

    seed = 0

    def __init__(self):
        import torch

        eye = torch.eye(40)
        self.base = {name: torch.zeros(40) for name in ("layers.0.w", "layers.1.w")}
        self.base["layers.0.w"][3] = 9.0
        self.experts = {
            task: {n: v + eye[i] for n, v in self.base.items()} for i, task in enumerate("abc")
        }

    def expert_scores(self, split, limit):
        return {task: self.score(self.experts[task], task, split, limit) for task in "abc"}

    def score(self, state, task, split, limit):
        assert (split, limit) in (("val", 10), ("test", 10))
        power = {"val": 1, "test": 2}[split]
        return min(float(state["layers.1.w"]["abc".index(task)]), 1.0) ** power / 2


def test_losses_by_hand():
    found = measure_pool(
        Zoo(), "bed", ["a", "b"], 10, ["linear", "task_arithmetic(scale=0.3)", "ties(density=1.0)"]
    )
    assert found.loss["linear"] == pytest.approx(0.5)  # half of each expert
    assert found.loss["task_arithmetic(scale=0.3)"] == pytest.approx(0.7)
    assert found.loss["ties(density=1.0)"] == pytest.approx(0)
    assert found.test["linear"] == pytest.approx(0.75)  # scored by squares
    assert found.rules_test == pytest.approx(0)
    assert found.base == 1
    # Vectors at a right angle: lines, whose last block has 1/T + beta = 1 of the sum.
    assert found.rules == pytest.approx(0)
    assert found.tasks == ("a", "b")
    told = asdict(found)
    assert Measured(**{**told, "tasks": tuple(told["tasks"])}) == found
    with pytest.raises(InputError, match="two or more"):
        measure_pool(Zoo(), "bed", ["a"], 10)


def test_measured_pools_are_kept(tmp_path, monkeypatch):
    from pluribus.tasks import zoo as zoos

    def built(name, seed):
        made = Zoo()
        made.tasks = dict.fromkeys("abc")
        return made

    monkeypatch.setenv("PLURIBUS_CACHE", str(tmp_path))
    monkeypatch.setattr(zoos, "build", built)
    bed = Bed(name="toy", zoo="toy", sizes=(2, 3), limit=10)
    steps = []
    first = calibrate.measure_bed(bed, 0, lambda *step: steps.append(step))
    assert steps == [("toy", 1, 2), ("toy", 2, 2)]
    assert [len(one.tasks) for one in first] == [2, 3]
    assert list(first[0].loss) == list(CANDIDATES)
    monkeypatch.setattr(Zoo, "score", None)  # what was measured is not measured again
    assert calibrate.measure_bed(bed, 0) == first
    assert calibrate.kept(bed, 0) == first
    assert calibrate.kept(bed, 1) == []
    kept = sorted((tmp_path / "calibration").iterdir())
    kept[0].write_text("{")  # a damaged file counts as absent
    assert len(calibrate.kept(bed, 0)) == 1
    with pytest.raises(TypeError):
        calibrate.measure_bed(bed, 0)


SHARING = """
import json, sys, time
from pathlib import Path
from pluribus.inspect import calibrate

folder, me, *order = sys.argv[1:]
began = []

def measured(bed, seed, on_pool=None):
    name = f"{bed.name}-{seed}"
    path = Path(folder) / name
    if not path.exists():  # as pools are kept
        began.append(name)
        (Path(folder) / f"{me}-began").touch()
        while len(list(Path(folder).glob("*-began"))) < 2:  # both, before either is done
            time.sleep(0.01)
        path.write_text(name)
    return [name]

calibrate.measure_bed = measured
beds = [calibrate.Bed(name=name, zoo="toy") for name in ("a", "b")]
found = calibrate.measure_beds(beds, [int(seed) for seed in order])
print(json.dumps([began, sorted([*key, *value] for key, value in found.items())]))
"""


def test_processes_share_beds_out(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", SHARING, str(tmp_path), me, *order],
            stdout=subprocess.PIPE,
            env=os.environ | {"PLURIBUS_CACHE": str(tmp_path)},
        )
        for me, order in (("one", "01"), ("other", "10"))
    ]
    (one, found), (other, also) = (
        json.loads(worker.communicate(timeout=120)[0]) for worker in workers
    )
    every = [[name, seed, f"{name}-{seed}"] for name in "ab" for seed in (0, 1)]
    assert found == also == every, "each has all"
    assert sorted([*one, *other]) == ["a-0", "a-1", "b-0", "b-1"], "none is measured twice"
    assert one
    assert other


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLURIBUS_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"toy-0\.lock: cannot be written .Not a directory.; "):
        calibrate.measure_beds([Bed(name="toy", zoo="toy")], [0])
