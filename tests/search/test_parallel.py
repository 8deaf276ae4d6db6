"""Trials on a local Ray of two workers: the points and scores of this process."""

import importlib.util
import logging
import sys
import warnings
from pathlib import Path

import pytest

import pluribus
from pluribus.search import run

sys.path.insert(0, str(Path(__file__).parent))
import ones

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two workers that lives for this file."""
    import ray

    paths = f"{Path(pluribus.__file__).parents[1]}:{Path(__file__).parent}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=100 << 20,
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
        )
        yield ray
        ray.shutdown()


@pytest.fixture(autouse=True)
def quiet(cluster):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def told(study):
    return [(str(t.dna), dict(t.scores), t.seed, t.status) for t in study.trials]


def test_random_search_is_the_same_study():
    far = run(ones.CHOICES, ones.slow, "random", 8, workers=2, ray=True, seed=3)
    assert told(far) == told(run(ones.CHOICES, ones.score, "random", 8, seed=3))


def test_feedback_follows_the_rule_of_what_was_known():
    """As two local workers would, whatever takes how long."""
    quick, slow = (
        run(ones.CHOICES, f, "hill", 8, workers=2, ray=True, seed=3)
        for f in (ones.score, ones.slow)
    )
    assert told(quick) == told(slow)
    assert [trial.settled for trial in slow.trials] == [0, 0, 1, 2, 3, 4, 5, 6]


def test_functions_without_a_module_travel_too():
    """Ray pickles by value."""
    study = run(ones.CHOICES, lambda point: point["scale"] * 2, "random", 3, ray=True)
    assert [t.scores["score"] for t in study.trials] == [
        2 * study.value(trial)["scale"] for trial in study.trials
    ]


def test_a_stored_search_goes_on_on_ray(tmp_path):
    store = tmp_path / "study.sqlite"
    run(ones.CHOICES, ones.score, "random", 3, store=store, seed=3)
    far = run(ones.CHOICES, ones.score, "random", 7, store=store, seed=3, workers=2, ray=True)
    assert far.resumed == 3
    assert told(far) == told(run(ones.CHOICES, ones.score, "random", 7, seed=3))


def test_errors_come_back_as_they_are():
    with pytest.raises(ValueError, match="max is not to be had") as caught:
        run(ones.CHOICES, ones.fails_at_max, trials=12, ray=True, workers=2)
    assert "ray" not in type(caught.value).__module__
