"""Signals, kills, full disks and streams that are closed: the command line as a process."""

import os
import signal
import subprocess

import pytest

# Each span of work takes a while, and says so once it is noted in the journal.
SLOW = """
import os, sys, time
from pluribus.engine import sink
done = sink.FileSink.done
def slow(self, *given):
    done(self, *given)
    os.write(2, b"SPAN\\n")
    time.sleep(0.2)
sink.FileSink.done = slow
"""


def wait_for_work(process, spans=2):
    for _ in range(spans):
        assert process.stderr.readline() == "SPAN\n"


def test_an_interrupted_merge_goes_on(child, cli, place):
    assert cli("merge", "ties.yml", "whole").code == 0
    process = child("merge", "ties.yml", "out", "--threads", "1", before=SLOW)
    wait_for_work(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert [line for line in err.splitlines() if line != "SPAN"] == [
        "pluribus: interrupted; run the same command again: what keeps a journal (a merge, a "
        "search with --store, claims) goes on where it stopped"
    ]
    assert not (place / "out").exists()
    assert (place / "out.partial").is_dir()
    told = cli("merge", "ties.yml", "out", "--json", "--verify").json
    assert (told["resumed"], told["verified"]) == (True, True)
    for name in ("model.safetensors", "pluribus.json"):
        assert (place / "out" / name).read_bytes() == (place / "whole" / name).read_bytes()
    assert not list(place.glob("out.*"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_merge_goes_on(child, cli, place, number):
    assert cli("merge", "ties.yml", "whole").code == 0
    process = child("merge", "ties.yml", "out", "--threads", "1", before=SLOW)
    wait_for_work(process)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == -number
    assert not (place / "out").exists()
    told = cli("merge", "ties.yml", "out", "--json", "--verify").json
    assert (told["resumed"], told["verified"]) == (True, True)
    for name in ("model.safetensors", "pluribus.json"):
        assert (place / "out" / name).read_bytes() == (place / "whole" / name).read_bytes()


def test_an_interrupt_before_the_first_span_leaves_nothing(child, place):
    early = """
import os, signal
from pluribus.engine import spans
def stop(self, task):
    os.kill(os.getpid(), signal.SIGINT)
    import time
    time.sleep(0.5)
    raise KeyError("no one reads this")
spans.Worker.__call__ = stop
"""
    before = sorted(place.iterdir())
    process = child("merge", "ties.yml", "out", "--threads", "1", before=early)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize("words", ["methods", "methods --json", "methods show ties"])
def test_a_pipe_that_nobody_reads_is_no_error(child, words):
    read, write = os.pipe()
    os.close(read)
    process = child(*words.split(), stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 141
    assert err == ""


def test_streams_that_are_closed_from_the_start(place):
    """`>&-` leaves Python without a stdout; the first file it opens must not become one."""
    import sys

    script = 'exec "$0" -m pluribus merge ties.yml out <&- >&- 2>&-'
    done = subprocess.run(["bash", "-c", script, sys.executable], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    script = 'exec "$0" -m pluribus verify out 2>&-'
    done = subprocess.run(["bash", "-c", script, sys.executable], capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"out: every tensor is as it was written\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_under_stdout(child, place):
    with open("/dev/full", "w") as full:
        process = child("methods", stdout=full)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err == "pluribus: cannot be read or written: No space left on device\n"


def test_a_terminal_that_cannot_show_a_letter(child, place, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    (place / "modèle.yml").write_text("merge_method: linear\nmodels: [{model: math}]\nsédd: 1\n")
    process = child("merge", "modèle.yml", "out")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.startswith("pluribus: mod\\xe8le.yml:3: s\\xe9dd: unknown key")


def test_no_space_left(child, place, tmp_path):
    """On a filesystem of 64 kB, where mounting one is permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        (disk / "ballast").write_bytes(b"x" * 60_000)
        for words in ("merge ties.yml", "compress bank.yml"):
            process = child(*words.split(), disk / "out")
            _, err = process.communicate(timeout=30)
            assert process.returncode == 1
            assert err.startswith(f"pluribus: {disk}/out")
            assert err.count("\n") == 1
            assert "are free there; free some space" in err or "No space left on device" in err
            assert [path.name for path in disk.iterdir()] == ["ballast"]
        (disk / "ballast").unlink()
        process = child("merge", "ties.yml", disk / "out", "--verify")
        assert "verified" in process.communicate(timeout=30)[0]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
