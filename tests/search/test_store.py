"""The store: what is in it, resuming to the letter, kill -9, and files that are something else."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pluribus.core.errors import FormatError, InputError, OutputError
from pluribus.search import floatv, oneof, run, space
from pluribus.search.algorithms.evolution import Evolution
from pluribus.search.store import Store
from pluribus.search.study import Objective

sys.path.insert(0, str(Path(__file__).parent))
import ones

ALGORITHMS = ["random", "sweep", "evolution", "hill", "nsga2", "cma", "tpe"]
SMALL = {"a": oneof([1, 2, 3]), "b": oneof(["x", "y"]), "c": oneof([True, False])}


def told(study):
    return [(t.number, str(t.dna), t.seed, t.status, repr(dict(t.scores))) for t in study.trials]


def cut(function, after):
    """The function for so many calls, then an interrupt."""
    left = [after]

    def once(point):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(point)

    return once


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.sqlite"


def rows(path, query):
    base = sqlite3.connect(path)
    try:
        return base.execute(query).fetchall()
    finally:
        base.close()


# -- what is in it ---------------------------------------------------------------------------------


def test_a_trial_is_stored_with_all_that_it_was(path):
    def evaluate(point, report):
        report["note"] = "kept"
        return {"score": 0.1 + 0.2, "n": 7}

    study = run(ones.CHOICES, evaluate, trials=2, store=path, seed=4)
    found = Store.open(path, space(ones.CHOICES), [Objective("score")])
    try:
        stored = [row.trial for row in found.rows()]
    finally:
        found.close()
    assert [str(t.dna) for t in stored] == [str(t.dna) for t in study.trials]
    assert stored[0].scores == {"score": 0.30000000000000004}  # to the bit
    assert (stored[0].metrics, stored[0].report) == ({"n": 7.0}, {"note": "kept"})
    assert stored[0].seed == study.trials[0].seed
    assert stored[0].seconds == study.trials[0].seconds
    assert stored[1].settled == 1


def test_a_finished_study_is_read_and_nothing_evaluated(path):
    first = run(ones.CHOICES, ones.score, "evolution", 8, store=path)

    def never(point):
        raise AssertionError("evaluated")

    again = run(ones.CHOICES, never, "evolution", 8, store=path)
    assert told(again) == told(first)
    assert (first.resumed, again.resumed) == (0, 8)
    assert again.best.number == first.best.number


def test_failures_are_kept(path):
    values = iter([float("nan"), 1.0, 2.0])
    run(ones.CHOICES, lambda p: next(values), "hill", 3, store=path)
    again = run(ones.CHOICES, ones.score, "hill", 3, store=path)
    assert [t.status for t in again.trials] == ["failed", "done", "done"]
    assert again.trials[0].error == "score is nan"


# -- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_resumed_study_is_the_uninterrupted_one(algorithm, path):
    where, function = (SMALL, ones.ones) if algorithm == "sweep" else (ones.CHOICES, ones.score)
    if algorithm == "sweep":
        function = lambda point: point["a"]  # noqa: E731
    settings = {"algorithm": algorithm, "trials": 12, "seed": 3}
    if algorithm == "evolution":
        settings["algorithm"] = Evolution(population_size=4, tournament_size=2)
    whole = run(where, function, **settings)
    for after in (5, 3):  # the trial that was cut off is run again
        with pytest.raises(KeyboardInterrupt):
            run(where, cut(function, after), store=path, **settings)
        assert rows(path, "SELECT count(*) FROM trials WHERE status = 'running'") == [(1,)]
    resumed = run(where, function, store=path, **settings)
    assert told(resumed) == told(whole)
    assert resumed.resumed == 8
    assert resumed.notes == whole.notes


def test_failures_resume_to_the_letter_too(path):
    def evaluate(point):
        return float("nan") if point["method"] == "max" else ones.score(point)

    whole = run(ones.CHOICES, evaluate, "hill", 14, seed=1)
    assert {trial.status for trial in whole.trials} == {"done", "failed"}
    run(ones.CHOICES, evaluate, "hill", 6, seed=1, store=path)
    assert told(run(ones.CHOICES, evaluate, "hill", 14, seed=1, store=path)) == told(whole)


@pytest.mark.parametrize("algorithm", ["evolution", "cma", "tpe", "random", "nsga2"])
def test_another_algorithm_goes_on_from_a_store(algorithm, path):
    first = run(ones.CHOICES, ones.score, "random", 6, store=path, seed=9)
    settings = {"algorithm": algorithm, "trials": 12, "seed": 3}
    second = run(ones.CHOICES, ones.score, store=path, **settings)
    assert told(second)[:6] == told(first)
    assert "the first 6 trials were proposed by Random(), seed 9" in second.notes[0]
    # And that study, cut off, resumes to the letter as well.
    other = path.with_name("other.sqlite")
    run(ones.CHOICES, ones.score, "random", 6, store=other, seed=9)
    with pytest.raises(KeyboardInterrupt):
        run(ones.CHOICES, cut(ones.score, 2), store=other, **settings)
    assert told(run(ones.CHOICES, ones.score, store=other, **settings)) == told(second)


def test_a_history_that_does_not_repeat_is_told_instead(path):
    run(ones.CHOICES, ones.score, "evolution", 6, store=path, seed=3)
    base = sqlite3.connect(path)
    (first,) = base.execute("SELECT dna FROM trials WHERE number = 0").fetchone()
    base.execute("UPDATE trials SET dna = ? WHERE number = 4", (first,))
    base.commit()
    base.close()
    study = run(ones.CHOICES, ones.score, "evolution", 9, store=path, seed=3)
    assert "trial 4 of the store is not what the algorithm proposes there now" in study.notes[0]
    assert len(study.done) == 9


def killed(path, algorithm, workers, rng, trials=14):
    """Run ones.py over and over, killed -9 at random times, until it comes to its end."""
    code = [
        sys.executable,
        str(Path(ones.__file__)),
        str(path),
        algorithm,
        str(trials),
        str(workers),
    ]
    kills = 0
    while True:
        process = subprocess.Popen(code, start_new_session=True, stderr=subprocess.PIPE)
        before = len(rows(path, "SELECT 1 FROM trials")) if kills else 0
        until = time.monotonic() + 60
        while kills < 3 and process.poll() is None and time.monotonic() < until:
            try:  # not before it has begun to work, or it would never get anywhere
                begun = len(rows(path, "SELECT 1 FROM trials WHERE status = 'done'")) > before
            except sqlite3.OperationalError:
                begun = False
            if begun:
                time.sleep(rng.uniform(0.0, 0.1))
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        _, stderr = process.communicate(timeout=60)
        if process.returncode == 0:
            return kills
        assert process.returncode == -signal.SIGKILL, stderr.decode()


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("algorithm", "workers"), [("hill", 1), ("random", 2)])
def test_kill_9_loses_nothing(algorithm, workers, path):
    kills = killed(path, algorithm, workers, random.Random(0))
    assert kills >= 2
    resumed = run(ones.CHOICES, ones.score, algorithm, 14, store=path, seed=3, workers=1)
    whole = run(ones.CHOICES, ones.score, algorithm, 14, seed=3)
    assert told(resumed) == told(whole)
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


# -- refusals --------------------------------------------------------------------------------------


def test_a_store_of_another_space_is_refused_and_both_are_told(path):
    run({"a": oneof([1, 2]), "b": floatv(0.0, 1.0)}, lambda p: 1.0, trials=2, store=path)
    before = path.read_bytes()
    with pytest.raises(InputError) as caught:
        run({"a": oneof([1, 2, 3])}, lambda p: 1.0, trials=2, store=path)
    said = str(caught.value)
    assert "holds trials of another space (digest" in said
    assert "a is one of 2: 1, 2 there and one of 3: 1, 2, 3 here" in said
    assert "b is float [0, 1] there and nothing here" in said
    with pytest.raises(InputError, match="the values between the placeholders differ"):
        run({"a": oneof([1, 2]), "b": floatv(0.0, 1.0), "c": 1}, len, trials=2, store=path)
    assert path.read_bytes() == before


def test_other_objectives_and_evaluations_are_refused(path):
    run(SMALL, lambda p: 1.0, trials=2, store=path, evaluation="on val")
    with pytest.raises(InputError, match=r"other objectives: {'score': 'max'}, but now {'loss'"):
        run(SMALL, len, store=path, objectives={"loss": "min"}, evaluation="on val")
    with pytest.raises(InputError, match="other evaluation: 'on val', but now 'on test'"):
        run(SMALL, len, store=path, evaluation="on test")


def test_files_that_are_no_store(path, tmp_path):
    path.write_text("something else that is not a database, and is long enough to look like one")
    with pytest.raises(FormatError, match=r"study\.sqlite: not a store of trials"):
        run(SMALL, len, store=path)
    assert path.read_text().startswith("something else")
    other = tmp_path / "other.sqlite"
    base = sqlite3.connect(other)
    base.execute("CREATE TABLE mine (a)")
    base.commit()
    base.close()
    before = other.read_bytes()
    with pytest.raises(FormatError, match="an SQLite file of something else"):
        run(SMALL, len, store=other)
    assert other.read_bytes() == before
    with pytest.raises(OutputError, match="is a folder; name a file"):
        run(SMALL, len, store=tmp_path)
    with pytest.raises(OutputError, match="its folder does not exist"):
        run(SMALL, len, store=tmp_path / "no" / "study.sqlite")


def test_a_store_of_a_later_version_is_refused(path):
    run(SMALL, lambda p: 1.0, trials=1, store=path)
    base = sqlite3.connect(path)
    base.execute("UPDATE study SET value = '99' WHERE key = 'version'")
    base.commit()
    base.close()
    with pytest.raises(FormatError, match="a store of version 99, but this reads 1"):
        run(SMALL, len, store=path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE trials SET dna = '{' WHERE number = 1", "trial 1 cannot be read"),
        ("UPDATE trials SET dna = '3' WHERE number = 1", "trial 1 cannot be read"),
        ("UPDATE trials SET scores = 'x' WHERE number = 1", "trial 1 cannot be read"),
        ("UPDATE trials SET scores = '[1]' WHERE number = 1", "trial 1 cannot be read"),
        ("UPDATE trials SET scores = '{}' WHERE number = 1", "(no 'score')"),
        ('UPDATE trials SET scores = \'{"score": "x"}\' WHERE number = 1', "its scores are"),
        ("UPDATE trials SET status = 'odd' WHERE number = 1", "its status is 'odd'"),
        ("UPDATE trials SET settled = 9 WHERE number = 1", "after 9 settled ones"),
        ("DELETE FROM trials WHERE number = 1", "(trial 1 is missing)"),
        ("DELETE FROM study WHERE key = 'digest'", "(no digest)"),
        ("UPDATE study SET value = '3' WHERE key = 'decisions'", "(no decisions)"),
        ("UPDATE study SET value = '{' WHERE key = 'digest'", "what it says of its search"),
        ("DROP TABLE trials", "an SQLite file of something else"),
    ],
)
def test_a_damaged_store_is_refused_and_kept(path, change, said):
    run(SMALL, lambda p: 1.0, "random", trials=3, store=path)
    base = sqlite3.connect(path)
    base.execute(change)
    base.commit()
    base.close()
    before = path.read_bytes()
    with pytest.raises(FormatError) as caught:
        run(SMALL, len, "random", trials=5, store=path)
    assert said in str(caught.value)
    assert "study.sqlite: " in str(caught.value)
    assert path.read_bytes() == before


def test_one_search_writes_at_a_time(path):
    store = Store.open(path, space(SMALL), [Objective("score")])
    with pytest.raises(OutputError, match="another search is writing it"):
        run(SMALL, len, store=path)
    store.close()
    assert len(run(SMALL, lambda p: 1.0, "sweep", 2, store=path).trials) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_store_that_can_not_be_written(path):
    path.parent.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="cannot be"):
            run(SMALL, len, store=path)
    finally:
        path.parent.chmod(0o700)
