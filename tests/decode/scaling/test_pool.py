"""One pool of samples: resumed after a kill, and read by every strategy of whole samples."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
from toys import Outcomes, said

import pluribus
from pluribus.agents import Metered, Scripted
from pluribus.core.errors import FormatError, InputError, OutputError
from pluribus.decode.scaling import (
    BeamSearch,
    BestOfN,
    Budget,
    Pool,
    Problem,
    Sample,
    Sampling,
    SelfConsistency,
    SelfRefine,
    curve,
    live,
    pass_at_k,
)
from pluribus.decode.scaling.curves import passes, sizes, slopes, subsets_of
from pluribus.decode.scaling.journal import Journal, read

PROBLEMS = [Problem(question="p", answer="a", id="1"), Problem(question="q", answer="b", id="2")]


def numbered(asked):
    """A text that depends on question and seed alone."""
    return [f"{asked.prompt}{asked.seed + i}" for i in range(asked.n)]


def drawn(pool):
    return [[one.text for one in pool.samples(problem)] for problem in PROBLEMS]


WHOLE = [[f"{one.question}{one.seed(42) + i}" for i in range(5)] for one in PROBLEMS]


def test_problems_have_seeds_of_their_own():
    """By CRC-32 of what they are called, below 2^30."""
    [first, second] = (one.seed(42) for one in PROBLEMS)
    assert first == 42 + 0x83DCEFB7 % 2**30
    assert second != first
    assert Problem(question="another", id="1").seed(42) == first
    assert Problem(question="1").seed(0) == first - 42


def test_strategies_draw_as_pools_do():
    """On a task every problem has its own chance; asked by itself, a strategy has its seed."""
    model = Scripted(numbered)
    live({"sample": Sample(n=1)}, PROBLEMS, model)
    assert [asked.seed for asked in model.asked] == [one.seed(42) for one in PROBLEMS]
    Sample(n=1).run(PROBLEMS[0], model)
    assert model.asked[-1].seed == 42


def test_a_strategy_without_settings_runs_as_it_is():
    class Own:
        def run(self, problem, generator, verifier=None, budget=None):
            return Sample(n=1).run(problem, generator, verifier, budget)

    model = Scripted(numbered)
    live({"own": Own()}, PROBLEMS, model)
    assert [asked.seed for asked in model.asked] == [42, 42]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_pool_is_the_same_however_it_is_filled(tmp_path, batch):
    path = tmp_path / "pool.jsonl"
    with Pool(Sampling(), model="m", path=path) as pool:
        pool.fill(PROBLEMS, Metered(Scripted(numbered), Budget(calls=3)), 5, batch=batch)
        assert sum(map(len, drawn(pool))) == 3
    with Pool(Sampling(), model="m", path=path) as pool:
        pool.fill(PROBLEMS, Scripted(numbered), 5, batch=batch)
        assert drawn(pool) == WHOLE
    with Pool(Sampling(), model="m", path=path) as pool:
        model = Scripted(numbered)
        pool.fill(PROBLEMS, model, 5)
        assert not model.asked
        assert drawn(pool) == WHOLE


class Together(Scripted):
    """Answers rows of several prompts, and notes how many there were."""

    def __init__(self):
        super().__init__(numbered)
        self.rows = []

    def sample_many(self, prompts, seeds, **settings):
        assert "seed" not in settings
        self.rows.append(list(prompts))
        return [self.sample(p, seed=s, **settings)[0] for p, s in zip(prompts, seeds, strict=True)]


@pytest.mark.parametrize(
    ("batch", "requests"),
    [(2, 0), (9, 0), (10, 1), (100, 1)],  # 5 samples of each of 2 problems
)
def test_a_request_with_room_for_two_problems_takes_both(tmp_path, batch, requests):
    path, model, told = tmp_path / "pool.jsonl", Together(), []
    with Pool(Sampling(), model="m", path=path) as pool:
        pool.fill(PROBLEMS, model, 5, batch=batch, told=lambda *step: told.append(step))
        assert drawn(pool) == WHOLE
    assert model.rows == [["p"] * 5 + ["q"] * 5] * requests
    assert told[-1] == ("samples", 10, 10)
    with Pool(Sampling(), model="m", path=path) as pool:
        assert drawn(pool) == WHOLE


def test_a_request_of_several_problems_takes_what_they_lack(tmp_path):
    path, model = tmp_path / "pool.jsonl", Together()
    with Pool(Sampling(), model="m", path=path) as pool:
        pool.fill(PROBLEMS[1:], Scripted(numbered), 2)
    with Pool(Sampling(), model="m", path=path) as pool:
        pool.fill(PROBLEMS, model, 5, batch=10)
        assert drawn(pool) == WHOLE
        assert model.rows == [["p"] * 5 + ["q"] * 3]
        pool.fill(PROBLEMS, model, 5, batch=10)
        assert len(model.rows) == 1


def test_limits_of_tokens_are_each_problems_own(tmp_path):
    model = Together()
    with Pool(Sampling()) as pool:
        pool.fill(PROBLEMS, model, 5, batch=10, tokens=1)
        assert [len(samples) for samples in drawn(pool)] == [5, 5]  # one request each
    assert model.rows == []


def test_a_line_that_was_cut_off_is_drawn_again(tmp_path):
    path = tmp_path / "pool.jsonl"
    with Pool(Sampling(), path=path) as pool:
        pool.fill(PROBLEMS, Scripted(numbered), 5)
    whole = path.read_bytes()
    ends = [at for at, byte in enumerate(whole) if byte == 10]
    for cut in [*random.Random(0).sample(range(len(whole)), 30), ends[0], ends[0] + 1]:
        path.write_bytes(whole[:cut])
        with Pool(Sampling(), path=path) as pool:
            kept = sum(map(len, drawn(pool)))
            assert kept == max(0, sum(end < cut for end in ends) - 1)
            pool.fill(PROBLEMS, Scripted(numbered), 5)
        assert path.read_bytes() == whole


def test_a_kill_loses_the_sample_under_way_alone(tmp_path):
    path = tmp_path / "pool.jsonl"
    code = """
import sys
from pluribus.agents import Scripted
from pluribus.decode.scaling import Pool, Problem, Sampling
def slow(asked):
    if asked.seed == problem.seed(46):
        print("asked", flush=True)
        sys.stdin.read()  # until it is killed
    return f"{asked.prompt}{asked.seed}"
problem = Problem(question="p", id="1")
Pool(Sampling(), path=sys.argv[1]).fill([problem], Scripted(slow), 9)
"""
    source = str(Path(pluribus.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": source},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    with Pool(Sampling(), path=path) as pool:
        assert drawn(pool)[0] == WHOLE[0][:4]


def test_two_processes_do_not_write_one_pool(tmp_path):
    with (
        Pool(Sampling(), path=tmp_path / "pool.jsonl"),
        pytest.raises(OutputError, match="another process writes"),
    ):
        Pool(Sampling(), path=tmp_path / "pool.jsonl")


@pytest.mark.parametrize(
    ("settings", "said_of"),
    [
        ({"sampling": Sampling(temperature=0.5), "model": "m"}, "temperature = 0.8, not 0.5"),
        ({"sampling": Sampling(), "model": "other"}, "model = 'm', not 'other'"),
        ({"sampling": Sampling(stop=("x",)), "model": "m"}, r"stop = \[\], not \['x'\]"),
    ],
)
def test_another_pool_is_not_continued(tmp_path, settings, said_of):
    path = tmp_path / "pool.jsonl"
    Pool(Sampling(), model="m", path=path).close()
    before = path.read_bytes()
    with pytest.raises(InputError, match=said_of):
        Pool(**settings, path=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "said_of"),
    [
        ("[1]\n", "expected a JSON object"),
        ("hello\nworld\n", "line 1: not JSON"),
        ("hello", "no file of JSON lines"),
        ('{"kind": "other"}\n', "is no pool"),
    ],
)
def test_other_files_are_left_alone(tmp_path, text, said_of):
    path = tmp_path / "pool.jsonl"
    path.write_text(text)
    with pytest.raises(FormatError, match=said_of):
        Pool(Sampling(), path=path)
    assert path.read_text() == text


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "pool.jsonl"
    with Pool(Sampling(), path=path) as pool:
        pool.fill(PROBLEMS, Scripted(numbered), 2)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], *lines[3:]]))
    Pool(Sampling(), path=path).close()  # a problem with fewer samples: no fault
    path.write_text("".join([lines[0], lines[2], *lines[3:]]))
    with pytest.raises(FormatError, match="line 2: expected sample 0 of '1'"):
        Pool(Sampling(), path=path)


def test_a_full_disk_takes_nothing_half(tmp_path, monkeypatch):
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.append({"a": 1})

        def full(file, text):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OutputError, match="No space left"):
                journal.append({"b": 2})
    assert read(path) == [{"a": 1}]


def test_what_is_refused(tmp_path):
    pool = Pool(Sampling())
    with pytest.raises(InputError, match="n is 0"):
        pool.fill(PROBLEMS, Scripted(numbered), 0)
    with pytest.raises(InputError, match="no problem"):
        pool.fill([], Scripted(numbered), 1)
    with pytest.raises(InputError, match="two problems are called '1'"):
        pool.fill([PROBLEMS[0], PROBLEMS[0]], Scripted(numbered), 1)
    with pytest.raises(InputError, match="no sample of problem 1"):
        curve({"sample": Sample()}, PROBLEMS, pool)
    pool.fill(PROBLEMS, Scripted(numbered), 2)
    with pytest.raises(InputError, match="does not draw whole samples"):
        curve({"beams": BeamSearch()}, PROBLEMS, pool)
    with pytest.raises(InputError, match="problem 1 has no answer"):
        curve({"sample": Sample()}, [Problem(question="p", id="1")], pool)
    with pytest.raises(InputError, match="a size is 0"):
        curve({"sample": Sample()}, PROBLEMS, pool, ns=[0, 1])
    with pytest.raises(InputError, match="subsets is 0"):
        curve({"sample": Sample()}, PROBLEMS, pool, subsets=0)
    with pytest.raises(OutputError, match="cannot be written"):
        Pool(Sampling(), path=tmp_path / "no" / "pool.jsonl")


# -- the curve -------------------------------------------------------------------------------------

FIRST, SECOND = "abacab", "bbbaac"
SCORES = Outcomes({"a": 0.6, "b": 0.5, "c": 0.9})


@pytest.fixture
def pool():
    filled = Pool(Sampling())
    filled.fill(PROBLEMS, Scripted([*said(*FIRST, tokens=3), *said(*SECOND, tokens=5)]), 6, batch=6)
    return filled


def slow_majority(letters):
    return max(dict.fromkeys(letters), key=letters.count)


def test_all_samples_give_what_the_strategy_gives_on_them(pool):
    strategies = {"sc": SelfConsistency(), "bon": BestOfN()}
    points = curve(strategies, PROBLEMS, pool, SCORES, ns=[6])
    by = {point.strategy: point for point in points}
    assert (by["sc"].accuracy, by["sc"].tokens, by["sc"].calls) == (1.0, 6 * 4, 6)
    assert by["bon"].accuracy == 0.0  # c scores highest, and is wrong
    assert by["bon"].verifier_calls == 3
    assert by["sc"].error == 0.0


def test_smaller_sizes_are_means_over_subsets(pool):
    points = curve({"sc": SelfConsistency()}, PROBLEMS, pool, ns=[3], subsets=4000)
    exact = statistics.fmean(
        statistics.fmean(
            slow_majority([letters[i] for i in order]) == problem.answer
            for order in permutations(range(6), 3)
        )
        for problem, letters in zip(PROBLEMS, (FIRST, SECOND), strict=True)
    )
    assert points[0].accuracy == pytest.approx(exact, abs=0.02)
    assert points[0].tokens == pytest.approx(3 * 4)


def test_one_sample_is_pass_at_one(pool):
    points = curve({"s": Sample()}, PROBLEMS, pool, ns=[1], subsets=4000)
    exact = (pass_at_k(6, 3, 1) + pass_at_k(6, 3, 1)) / 2
    assert points[0].accuracy == pytest.approx(exact, abs=0.02)
    assert passes(PROBLEMS, pool, [1, 2, 7]) == {1: exact, 2: pass_at_k(6, 3, 2)}


def test_an_early_stop_saves_tokens(pool):
    strategies = {"all": SelfConsistency(), "early": SelfConsistency(confidence=0.7)}
    points = {p.strategy: p for p in curve(strategies, PROBLEMS, pool, ns=[6], subsets=50)}
    assert points["early"].tokens < points["all"].tokens


def test_the_same_seed_gives_the_same_curve(pool):
    def told(seed):
        return curve({"sc": SelfConsistency()}, PROBLEMS, pool, seed=seed, subsets=5)

    assert told(1) == told(1)
    assert told(1) != told(2)
    assert [point.n for point in told(1)] == [1, 2, 4, 6]


def test_sizes_and_subsets():
    assert sizes(1) == [1]
    assert sizes(8) == [1, 2, 4, 8]
    assert subsets_of(3, 3, 9, "s") == [[0, 1, 2]]
    drawn_sets = subsets_of(5, 2, 40, "s")
    assert len(drawn_sets) == 40
    assert all(len(set(one)) == 2 for one in drawn_sets)


def test_a_verifier_that_costs_is_paid_by_each_point(pool):
    class Judge:
        tokens = calls = 0

        def score(self, problem, candidate):
            self.tokens += 10
            self.calls += 1
            return [0.5]

    judge = Judge()
    points = curve({"bon": BestOfN()}, PROBLEMS, pool, judge, ns=[6, 6])
    assert points[0].tokens == 6 * 4 + 3 * 10
    assert judge.calls == 6  # three texts of each problem, once for all sizes


def test_slopes():
    pool = Pool(Sampling())
    pool.fill(PROBLEMS[:1], Scripted(said(*"aaaa", tokens=10)), 4, batch=4)
    points = curve({"s": SelfConsistency()}, PROBLEMS[:1], pool, ns=[1, 4])
    assert slopes(points) == {"s": 0.0}


def test_live_strategies_are_kept_in_the_pool(tmp_path):
    path = tmp_path / "pool.jsonl"
    strategies = {"refine": SelfRefine(rounds=1)}
    with Pool(Sampling(), path=path) as pool:
        model = Scripted(said("a", "CORRECT", "a", "CORRECT"))
        [point] = live(strategies, PROBLEMS, model, pool=pool)
        assert (point.accuracy, point.n, point.calls) == (0.5, None, 2)
    with Pool(Sampling(), path=path) as pool:
        assert live(strategies, PROBLEMS, Scripted([]), pool=pool) == [point]
        other = {"refine": SelfRefine(rounds=2)}
        with pytest.raises(InputError, match="no line left"):
            live(other, PROBLEMS, Scripted([]), pool=pool)
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == [
        "pool",
        "result",
        "result",
    ]
