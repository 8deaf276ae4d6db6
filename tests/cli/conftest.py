"""A folder with small models, and the command line in this process and in others."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import pluribus
from pluribus.cli import main

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from checkpoints import BANK, TIES, model


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three experts of it, one in float32; written once."""
    root = tmp_path_factory.mktemp("zoo")
    model(root / "base", 0)
    model(root / "math", 1, 0)
    model(root / "code", 2, 0)
    model(root / "chat", 3, 0, "float32")
    (root / "ties.yml").write_text(TIES)
    (root / "bank.yml").write_text(BANK)
    return root


@pytest.fixture
def place(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of the zoo with `ties.yml` and `bank.yml`."""
    where = tmp_path / "place"
    shutil.copytree(zoo, where)
    monkeypatch.chdir(where)
    monkeypatch.delenv("PLURIBUS_DEBUG", raising=False)
    return where


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        """All of stdout as one strict JSON document."""
        return json.loads(self.out, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs a command in this process; with `terminal`, stderr is one."""

    def run(*arguments: object, terminal: bool = False) -> Outcome:
        out, err = io.StringIO(), Terminal() if terminal else io.StringIO()
        with monkeypatch.context() as patch:
            patch.setenv("TERM", "xterm")
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit) as stop:
                main([str(argument) for argument in arguments])
        return Outcome(int(stop.value.code or 0), out.getvalue(), err.getvalue())

    return run


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Everything below a folder: files with their bytes, folders with None."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


@pytest.fixture
def refused(cli: Callable[..., Outcome], place: Path) -> Callable[..., str]:
    """Runs a command that must fail; returns its message.

    One line on stderr, nothing on stdout, and every file and folder is as it was.
    """

    def run(*arguments: object, code: int = 1) -> str:
        before = snapshot(place)
        got = cli(*arguments)
        assert got.code == code, got
        assert got.out == ""
        assert got.err.count("\n") == 1
        assert got.err.startswith("pluribus: ")
        assert "Traceback" not in got.err
        assert "internal error" not in got.err
        assert snapshot(place) == before
        return got.err.removeprefix("pluribus: ").strip()

    return run


@pytest.fixture
def child(place: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts the command line in a process of its own, after some Python; ends it with the test."""
    source = str(Path(pluribus.__file__).parents[1])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    started: list[subprocess.Popen] = []

    def start(*arguments: object, before: str = "", **options) -> subprocess.Popen:
        # A shell may have started the tests in the background, where SIGINT is ignored.
        ready = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
        code = f"{ready}\n{before}\nimport sys\nfrom pluribus.cli import main\nmain(sys.argv[1:])"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path, "PLURIBUS_DEBUG": ""},
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
