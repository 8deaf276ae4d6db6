"""`pluribus ui` as a process: its address, its end, and what it refuses."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from ui_help import WAIT, start, state, token

import pluribus
from pluribus.ui.run import prepared
from pluribus.ui.store import VERSION, Store

# A shell may have started the tests in the background, where SIGINT is ignored.
MAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pluribus.ui import commands
commands.program = lambda words: [sys.executable, "-c", "import signal; signal.pause()", *words]
from pluribus.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def server(tmp_path):
    """Starts the command with a store of its own; gives the process."""
    source = str(Path(pluribus.__file__).parents[1])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {
        "PYTHONPATH": path,
        "PLURIBUS_DEBUG": "",
        "PLURIBUS_HOME": str(tmp_path),
        "PLURIBUS_CACHE": str(tmp_path / "cache"),
    }
    begun = []

    def begin(*words):
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "ui", "--no-browser", *words],
            env={**os.environ, **settings},
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        begun.append(process)
        return process

    yield begin
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_from_start_to_ctrl_c(server, tmp_path):
    """One server, a second one on its store, a run, an interrupt: nothing is left."""
    process = server("--port", "0", "--json")
    told = ""
    while not told.rstrip().endswith("}"):
        line = process.stdout.readline()
        assert line, process.stderr.read()
        told += line
    url = json.loads(told)["url"]
    with httpx.Client(base_url=url, timeout=WAIT) as client:
        assert "Merge what agrees" in client.get("/").text
        run = start(client)
        child = state(client, run)["pid"]
        other = server("--port", "0")
        _, said = other.communicate(timeout=WAIT)
        assert other.returncode == 1
        assert "another `pluribus ui` uses this store" in said
        assert said.count("\n") == 1
        assert token(client)
        with client.stream("GET", f"/runs/{run}/events"):  # a page that watches does not hold it up
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=WAIT)
    assert "Traceback" not in said
    assert process.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
    assert (tmp_path / "ui.sqlite").is_file()


def test_small_answers_do_not_wait_for_the_last_ones_acknowledgement(tmp_path):
    """Two small writes an answer took 48 ms; asyncio only sees to sockets that name TCP."""
    with prepared("127.0.0.1", 0, (), tmp_path / "ui.sqlite", tmp_path) as (_, listening, url):
        address = (httpx.URL(url).host, httpx.URL(url).port)
        with socket.create_connection(address), listening.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def refused(monkeypatch, capsys, *words):
    from pluribus.cli import main

    monkeypatch.delenv("PLURIBUS_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["ui", "--no-browser", *map(str, words)])
    said = capsys.readouterr()
    assert stop.value.code == 1
    assert (said.out, said.err.count("\n")) == ("", 1)
    return said.err


def test_what_is_refused(tmp_path, monkeypatch, capsys):
    store = ("--store", tmp_path / "ui.sqlite")
    assert "--key-env" in refused(monkeypatch, capsys, "--host", "0.0.0.0", *store)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert "NO_SUCH_KEY is not set" in refused(
        monkeypatch, capsys, "--key-env", "NO_SUCH_KEY", *store
    )
    assert not (tmp_path / "ui.sqlite").exists()
    Store.open(tmp_path / "newer").close()
    base = sqlite3.connect(tmp_path / "newer")
    base.execute(f"PRAGMA user_version = {VERSION + 1}")
    base.close()
    told = refused(monkeypatch, capsys, "--port", "0", "--store", tmp_path / "newer")
    assert "from a newer pluribus" in told
    (tmp_path / "notes").write_text("no store " * 200)
    before = (tmp_path / "notes").read_text()
    told = refused(monkeypatch, capsys, "--port", "0", "--store", tmp_path / "notes")
    assert "not a store of runs" in told
    assert (tmp_path / "notes").read_text() == before
