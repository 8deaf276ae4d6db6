"""A server of pages on a free port, runs of small programs, and waiting without sleeping long."""

import re
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager

import httpx

from pluribus.ui import commands
from pluribus.ui.run import background

WAIT = 120.0  # seconds; a slow machine only takes longer


def until(found: Callable[[], object], what: str) -> object:
    """Wait until something is true, and return it."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        if told := found():
            return told
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come in {WAIT} s")


@contextmanager
def site(folder, **settings):
    """A client of a server whose store lies in a folder."""
    with (
        background(folder / "ui.sqlite", folder, **settings) as url,
        httpx.Client(base_url=url, timeout=WAIT) as client,
    ):
        yield client


def token(client, path="/card/ties") -> str:
    return re.search(r'name="token" value="([0-9a-f]+)"', client.get(path).text)[1]


def start(client, form="demo", **values) -> int:
    """Start a run as a page would and return its number."""
    answer = client.post("/runs", data={"token": token(client), "form": form, **values})
    assert answer.status_code == 303, answer.text
    return int(answer.headers["location"].rpartition("/")[2])


def state(client, run: int) -> dict:
    return client.get(f"/runs/{run}/state").json()


def ended(client, run: int) -> dict:
    def over():
        told = state(client, run)
        return told["status"] != "running" and told

    return until(over, f"the end of run {run}")  # type: ignore[return-value]


def instead(monkeypatch, code: str) -> None:
    """Let every run execute some Python in place of the command; its arguments are the same."""
    monkeypatch.setattr(commands, "program", lambda words: [sys.executable, "-c", code, *words])
