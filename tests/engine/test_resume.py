"""Killed anywhere, damaged, or changed between runs: the same command ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import pluribus
from pluribus.core.errors import OutputError
from pluribus.core.pool import Pool
from pluribus.engine import sink
from pluribus.engine.driver import Options, execute, merge, plan_pool
from pluribus.engine.spans import Worker
from pluribus.merge.linear import Linear
from pluribus.merge.ties import Ties

SHAPES = {"a": (40, 30), "b": (17,), "c": (25, 40), "empty": (0, 2), "d": (513,)}
METHOD = Ties(density=0.3, scope="model")


class Stop(Exception):
    """Stands for a crash."""


@pytest.fixture
def crash(monkeypatch):
    """Makes a run stop after so many blocks were written; undone for the next run."""

    def after(blocks):
        original = sink.FileSink.write
        left = [blocks]

        def write(self, job, block, raw):
            left[0] -= 1
            if left[0] < 0:
                raise Stop
            original(self, job, block, raw)

        monkeypatch.setattr(sink.FileSink, "write", write)
        return lambda: monkeypatch.setattr(sink.FileSink, "write", original)

    return after


@pytest.fixture
def written(monkeypatch):
    """Counts the blocks that are written."""
    original, seen = sink.FileSink.write, []

    def write(self, job, block, raw):
        seen.append((job.name, block))
        original(self, job, block, raw)

    monkeypatch.setattr(sink.FileSink, "write", write)
    return seen


def interrupted(pool, out, crash, blocks=20, method=METHOD, **options):
    restore = crash(blocks)
    with pytest.raises(Stop):
        merge(pool, method, out, threads=1, **options)
    restore()
    assert not out.exists()
    return out.with_name(out.name + ".partial")


@pytest.fixture
def pool(models, small_blocks):
    return models.write(2, SHAPES, ["BF16"])


@pytest.fixture
def wanted(pool, sha, tmp_path):
    (tmp_path / "whole").mkdir()
    merge(pool, METHOD, tmp_path / "whole" / "out", max_shard_size=3000)
    return sha(tmp_path / "whole" / "out")


def go_on(pool, out, method=METHOD, **options):
    return execute(plan_pool(pool, method), out, Options(max_shard_size=3000, **options))


def test_an_interrupted_run_goes_on_where_it_stopped(pool, wanted, sha, tmp_path, crash, written):
    out = tmp_path / "out"
    interrupted(pool, out, crash, max_shard_size=3000)
    written.clear()
    result = go_on(pool, out)
    assert result.resumed
    total = sum(job.blocks for job in plan_pool(pool, METHOD).jobs)
    assert total - 20 <= len(written) < total - 15
    assert sha(out) == wanted
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("threads", [1, 4])
def test_every_stopping_point(pool, wanted, sha, tmp_path, crash, threads):
    for blocks in range(0, 45, 7):
        out = tmp_path / f"out{blocks}"
        interrupted(pool, out, crash, blocks, max_shard_size=3000)
        go_on(pool, out, threads=threads)
        assert sha(out) == wanted


def test_methods_of_one_pass_skip_whole_tensors(pool, tmp_path, crash, written, raw_bytes):
    interrupted(pool, tmp_path / "out", crash, 30, Linear(), max_shard_size=3000)
    written.clear()
    go_on(pool, tmp_path / "out", Linear())
    assert not [name for name, _ in written if name == "a"]
    assert raw_bytes(merge(pool, Linear())) == raw_bytes(
        merge(pool, Linear(), tmp_path / "out", max_shard_size=3000)
    )


# -- damage ----------------------------------------------------------------------------------------


def test_a_torn_last_line_costs_one_span(pool, wanted, sha, tmp_path, crash, written):
    out = tmp_path / "out"
    stage = interrupted(pool, out, crash, max_shard_size=3000)
    journal = stage / "journal"
    text = journal.read_bytes()
    journal.write_bytes(text[:-9])
    restore = crash(6)  # stops again: lines written after a torn one must not be lost
    with pytest.raises(Stop):
        go_on(pool, out, threads=1)
    restore()
    lines = journal.read_bytes().split(b"\n")
    assert all(line[8:9] == b" " for line in lines[:-1])
    assert len(sink._read_journal(journal)[0]) == len(lines) - 1 > text.count(b"\n")
    written.clear()
    go_on(pool, out)
    assert sha(out) == wanted


@pytest.mark.parametrize("line", [0, 1, 3])
def test_a_damaged_line_and_what_follows_is_done_again(pool, wanted, sha, tmp_path, crash, line):
    out = tmp_path / "out"
    stage = interrupted(pool, out, crash, max_shard_size=3000)
    lines = (stage / "journal").read_bytes().split(b"\n")
    lines[line] = lines[line].replace(b'"', b"'", 1)
    (stage / "journal").write_bytes(b"\n".join(lines))
    go_on(pool, out)
    assert sha(out) == wanted


@pytest.mark.parametrize("junk", [b"", b"\n", b"\0" * 500, b"null\n", os.urandom(300)])
def test_a_journal_of_junk_starts_afresh(pool, wanted, sha, tmp_path, crash, junk):
    out = tmp_path / "out"
    stage = interrupted(pool, out, crash, max_shard_size=3000)
    (stage / "journal").write_bytes(junk)
    assert not go_on(pool, out).resumed
    assert sha(out) == wanted


def test_a_damaged_block_of_a_noted_span_is_done_again(pool, wanted, sha, tmp_path, crash, written):
    out = tmp_path / "out"
    stage = interrupted(pool, out, crash, max_shard_size=3000)
    shard = stage / "model-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + 300] ^= 1  # element 150 of "a": block 2, span 1
    shard.write_bytes(data)
    written.clear()
    assert go_on(pool, out).resumed
    assert [entry for entry in written if entry[0] == "a"][:2] == [("a", 2), ("a", 3)]
    assert sha(out) == wanted


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_shard_that_is_gone_starts_afresh(pool, wanted, sha, tmp_path, crash, damage):
    out = tmp_path / "out"
    stage = interrupted(pool, out, crash, max_shard_size=3000)
    shard = stage / "model-00002-of-00003.safetensors"
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, 500)
    assert not go_on(pool, out).resumed
    assert sha(out) == wanted


# -- changes between runs --------------------------------------------------------------------------


def test_a_changed_input_starts_afresh(pool, models, tmp_path, crash, raw_bytes):
    out = tmp_path / "out"
    interrupted(pool, out, crash, max_shard_size=3000)
    file = models.folder / "e1" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    again = models.pool()
    assert not go_on(again, out).resumed
    assert raw_bytes(merge(again, METHOD)) == raw_bytes(pool.base.open(out))


@pytest.mark.parametrize(
    ("method", "keywords"),
    [
        (Ties(density=0.31, scope="model"), {}),
        (METHOD, {"seed": 1}),
        (METHOD, {"out_dtype": "float32"}),
        (METHOD, {"max_shard_size": 2000}),
    ],
)
def test_a_changed_recipe_starts_afresh(
    pool, tmp_path, crash, raw_bytes, written, method, keywords
):
    out = tmp_path / "out"
    interrupted(pool, out, crash, max_shard_size=3000)
    written.clear()
    keywords = {"max_shard_size": 3000, **keywords}
    got = merge(pool, method, out, **keywords)
    assert len(written) == sum(job.blocks for job in plan_pool(pool, METHOD).jobs)
    assert raw_bytes(got) == raw_bytes(merge(pool, method, **keywords))


def test_resume_false_starts_over(pool, wanted, sha, tmp_path, crash, written):
    out = tmp_path / "out"
    interrupted(pool, out, crash, max_shard_size=3000)
    written.clear()
    assert not go_on(pool, out, resume=False).resumed
    assert len(written) == sum(job.blocks for job in plan_pool(pool, METHOD).jobs)
    assert sha(out) == wanted


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_finished_output_is_recognised_without_reading(pool, tmp_path, monkeypatch, name, sha):
    out = tmp_path / name
    merge(pool, METHOD, out)
    before = sha(out)

    def read(self, task):
        raise AssertionError("read again")

    monkeypatch.setattr(Worker, "__call__", read)
    result = execute(plan_pool(pool, METHOD), out, Options())
    assert (result.resumed, result.bytes_read, result.bytes_written) == (True, 0, 0)
    assert sha(out) == before


def test_a_finished_output_of_something_else_is_not(pool, tmp_path):
    merge(pool, METHOD, tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        merge(pool, Linear(), tmp_path / "out")


# -- other processes -------------------------------------------------------------------------------


def test_a_second_run_on_the_same_output_is_refused(pool, wanted, sha, tmp_path, monkeypatch):
    out = tmp_path / "out"
    original = sink.FileSink.write
    inside, leave = threading.Event(), threading.Event()

    def write(self, job, block, raw):
        inside.set()
        assert leave.wait(30)
        original(self, job, block, raw)

    monkeypatch.setattr(sink.FileSink, "write", write)
    first = threading.Thread(target=go_on, args=(pool, out))
    first.start()
    assert inside.wait(30)
    with pytest.raises(OutputError, match="another process is writing it"):
        go_on(pool, out)
    with pytest.raises(OutputError, match="another process is writing it"):
        go_on(pool, out, resume=False, overwrite=True)
    leave.set()
    first.join()
    assert sha(out) == wanted


def test_a_finished_output_leaves_a_run_that_replaces_it_alone(pool, tmp_path, monkeypatch):
    """The old command again, while another recipe is on its way to the same name."""
    out = tmp_path / "out"
    merge(pool, METHOD, out)
    original = sink.FileSink.write
    inside, leave = threading.Event(), threading.Event()

    def write(self, job, block, raw):
        inside.set()
        assert leave.wait(30)
        original(self, job, block, raw)

    monkeypatch.setattr(sink.FileSink, "write", write)
    first = threading.Thread(target=merge, args=(pool, Linear(), out), kwargs={"overwrite": True})
    first.start()
    assert inside.wait(30)
    merge(pool, METHOD, out)  # recognised as complete
    leave.set()
    first.join()
    assert json.loads((out / "pluribus.json").read_bytes())["recipe"]["merge_method"] == "linear"


# Every system call that changes the disk is a point to die at. One process imports everything, and
# forks a child for each point, which kills itself there; the next child must find the way.
POINTS = """
import builtins, hashlib, json, os, shutil, signal, sys
from pathlib import Path
from pluribus.core import fold
from pluribus.core.pool import Pool
from pluribus.engine import blocks, driver, plan, provenance, run, sink
from pluribus.merge.ties import Ties

for module in (plan, blocks, run, provenance):
    module.SPAN = 2
plan.BLOCK = 256
folder, name, overwrite = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "1"
out = folder / name

def merge():
    pool = Pool(folder / "base", [folder / "e0", folder / "e1"])
    driver.merge(pool, Ties(density=0.3, scope="model"), out, threads=1, max_shard_size=3000,
                 overwrite=overwrite)

def digest():
    if not out.exists():
        return None
    files = sorted(p for p in out.rglob("*") if p.is_file()) if out.is_dir() else [out]
    return [(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files
            if p.name != "journal"]

def lethal(point):
    left = [point]
    def wrap(function):
        def call(*arguments, **keywords):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments, **keywords)
        return call
    for where, what in ((os, "pwrite"), (os, "write"), (os, "replace"), (os, "posix_fallocate"),
                        (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (Path, "write_bytes"),
                        (Path, "mkdir"), (Path, "unlink"), (shutil, "rmtree")):
        setattr(where, what, wrap(getattr(where, what)))

def child(point=None):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        if point is not None:
            lethal(point)
        merge()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

def reset():
    for path in folder.glob(name + "*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if overwrite:
        if out.suffix:
            shutil.copy(folder / "base" / "model.safetensors", out)
        else:
            shutil.copytree(folder / "base", out)

reset()
old = digest()
merge()  # in this process, so that the children find every kernel loaded
wanted = digest()
point, faults = 0, []
while True:
    reset()
    status = child(point)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and status:
        faults.append([point, "status", status])
    found, replaced = digest(), (folder / (name + ".replaced")).exists()
    if found not in (old, wanted) and not (found is None and replaced):
        faults.append([point, "neither old nor new"])
    if child():
        faults.append([point, "the second run failed"])
    elif digest() != wanted:
        faults.append([point, "other bytes"])
    rest = sorted(p.name for p in folder.glob(name + "*") if not p.name.endswith(".json"))
    if rest != [name]:
        faults.append([point, "left behind", rest])
    if out.is_dir() and (out / "journal").exists():
        faults.append([point, "journal left"])
    if not killed:
        break
    point += 1
print(json.dumps({"points": point, "faults": faults}))
"""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_killed_at_every_change_to_the_disk(models, child, name, overwrite):
    models.write(2, {"a": (40, 30), "b": (17,), "c": (25, 40)}, ["BF16"])
    process = child(POINTS, models.folder, name, int(overwrite))
    said, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    found = json.loads(said)
    assert found["faults"] == []
    assert found["points"] >= 20


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_ctrl_c_leaves_a_state_to_go_on_from(models, child, sha, tmp_path, scope):
    """The real signal, in a process of its own."""
    pool = models.write(2, {f"t{i}": (400, 600) for i in range(12)}, ["BF16"])
    code = """
import sys, time
from pluribus.core.pool import Pool
from pluribus.engine import sink
from pluribus.engine.driver import merge
from pluribus.merge.ties import Ties
folder, scope = sys.argv[1:]
original = sink.FileSink.done
def done(self, *noted):
    original(self, *noted)
    print("noted", flush=True)
    time.sleep(0.05)
sink.FileSink.done = done
experts = {name: f"{folder}/{name}" for name in ("e0", "e1")}
merge(Pool(f"{folder}/base", experts), Ties(density=0.3, scope=scope), f"{folder}/out", threads=1)
"""
    process = child(code, models.folder, scope)
    for _ in range(3):
        assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert "KeyboardInterrupt" in errors
    method = Ties(density=0.3, scope=scope)
    result = execute(plan_pool(pool, method), tmp_path / "out", Options())
    assert result.resumed
    (tmp_path / "whole").mkdir()
    merge(pool, method, tmp_path / "whole" / "out")
    assert sha(tmp_path / "out") == sha(tmp_path / "whole" / "out")


@pytest.mark.slow
def test_random_kills():
    """A short run of benchmarks/kill_test.py."""
    root = Path(__file__).parents[2]
    source = str(Path(pluribus.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, root / "benchmarks/kill_test.py", "--kills", "5", "--mb", "15"],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["ok"]
    assert summary["kills"] >= 5
    assert summary["outputs_compared"] == 5


def test_kills_may_change_the_number_of_threads_and_the_budget(pool, wanted, sha, tmp_path, crash):
    out = tmp_path / "out"
    interrupted(pool, out, crash, 11, max_shard_size=3000)
    restore = crash(11)
    with pytest.raises(Stop):
        go_on(pool, out, threads=3, memory=1 << 30)
    restore()
    go_on(Pool(pool.base, pool.experts), out, threads=2, memory=1 << 20)
    assert sha(out) == wanted
