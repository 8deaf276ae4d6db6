"""Runs started from pages: live, cancelled, killed, kept, and never left behind."""

import json
import os
import signal

import httpx
import pytest
from ui_help import WAIT, ended, instead, site, start, state, token, until

from pluribus.ui.store import Store

TALKS = """
import sys
print("to stdout <b>")
sys.stderr.write("\\x1b[31mred\\x1b[0m line\\n")
sys.stderr.write("\\r 10 %\\r 50 %")
sys.stderr.flush()
import signal
signal.pause()
"""
WRITES = """
import pathlib, sys
place = pathlib.Path([word for word in sys.argv if word.startswith("--out=")][0][6:])
place.mkdir(parents=True)
(place / "report.html").write_text("<!doctype html><title>r</title><p>measured</p>")
(place / "result.json").write_text('{"text": "<script>x</script>"}')
(place / "model.bin").write_text("not a report")
print("written")
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def client(tmp_path):
    with site(tmp_path) as found:
        yield found


def talking(client):
    """A run that has said what it says and goes on; its number and what is known of it."""
    run = start(client)

    def shown():
        told = state(client, run)
        return told["progress"].strip() == "50 %" and told

    return run, until(shown, "the progress")


def test_a_run_says_what_it_does_while_it_does(client, monkeypatch):
    instead(monkeypatch, TALKS)
    run, told = talking(client)
    assert told["status"] == "running"
    assert told["command"][:2] == ["pluribus", "demo"]
    page = client.get(f"/runs/{run}").text
    assert "to stdout &lt;b&gt;" in page
    assert "red line" in page  # without the terminal's codes
    assert "\x1b" not in page
    assert '<noscript><meta http-equiv="refresh"' in page
    client.post(f"/runs/{run}/cancel", data={"token": token(client)})
    told = ended(client, run)
    assert (told["status"], told["note"]) == ("cancelled", "cancelled from a page")
    assert not alive(told["pid"])
    assert "refresh" not in client.get(f"/runs/{run}").text


def test_events(client, monkeypatch):
    """Lines, progress and the end, as they come; a reader that comes back gets what it missed."""
    instead(monkeypatch, TALKS)
    run, _ = talking(client)
    found = []
    with client.stream("GET", f"/runs/{run}/events?after=1") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        kind = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                found.append((kind, json.loads(line.removeprefix("data: "))))
                if kind == "progress" and found[-1][1]:
                    client_two = httpx.post(
                        f"{client.base_url}/runs/{run}/cancel",
                        data={"token": token(client)},
                        timeout=WAIT,
                    )
                    assert client_two.status_code == 303
    assert found[0][0] == "line"
    assert found[0][1]["number"] == 2
    assert ("progress", " 50 %") in found
    assert found[-1] == ("end", "cancelled")


def test_a_run_that_is_killed_is_shown_as_killed(client, monkeypatch):
    instead(monkeypatch, TALKS)
    run, told = talking(client)
    os.kill(told["pid"], signal.SIGKILL)
    told = ended(client, run)
    assert (told["status"], told["code"]) == ("killed", -9)
    page = client.get(f"/runs/{run}").text
    assert 'class="badge killed"' in page
    assert "ended from outside by SIGKILL" in page
    assert "to stdout" in page  # the log is kept


def test_a_child_that_does_not_listen_is_ended_all_the_same(client, monkeypatch):
    from pluribus.ui import runs

    monkeypatch.setattr(runs, "GRACE_SECONDS", 0.2)
    deaf = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + TALKS
    instead(monkeypatch, deaf)
    run, told = talking(client)
    client.post(f"/runs/{run}/cancel", data={"token": token(client)})
    told = ended(client, run)
    assert (told["status"], told["code"]) == ("cancelled", -9)


def test_its_children_are_ended_with_it(client, monkeypatch):
    code = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(child.pid, flush=True)
import signal
signal.pause()
"""
    instead(monkeypatch, code)
    run = start(client)

    def said():
        import re

        found = re.search(r'<span class="out">(\d+)</span>', client.get(f"/runs/{run}").text)
        return found and int(found[1])

    grandchild = until(said, "the number of the grandchild")
    os.kill(state(client, run)["pid"], signal.SIGKILL)
    assert ended(client, run)["status"] == "killed"
    until(lambda: not alive(grandchild), "the end of the grandchild")


def test_exit_codes(client, monkeypatch):
    instead(monkeypatch, "import sys; print('no such model', file=sys.stderr); sys.exit(1)")
    run = start(client)
    told = ended(client, run)
    assert (told["status"], told["code"]) == ("failed", 1)
    assert told["note"] == "it ended with exit code 1"
    assert "no such model" in client.get(f"/runs/{run}").text


def test_a_claim_that_does_not_hold_was_still_measured(client, monkeypatch):
    code = WRITES.replace('print("written")', "sys.exit(1)")
    instead(monkeypatch, code)
    run = start(client, "claims", claim="ties")
    told = ended(client, run)
    assert (told["status"], told["note"]) == ("done", "measured: the claim does not hold")
    assert "Measure the claim ties" in client.get("/runs").text


def test_reports_are_kept_and_opened_later(tmp_path, monkeypatch):
    instead(monkeypatch, WRITES)
    with site(tmp_path) as client:
        run = start(client)
        told = ended(client, run)
        assert told["status"] == "done"
        assert [report["name"] for report in told["reports"]] == [
            "demo/result.json",
            "demo/report.html",
        ]
        (tmp_path / "ui-runs" / str(run) / "demo" / "report.html").unlink()
    with site(tmp_path) as client:  # another server, another day
        document, page = (report["number"] for report in state(client, run)["reports"])
        answer = client.get(f"/reports/{page}")
        assert "<p>measured</p>" in answer.text
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("sandbox allow-scripts; default-src 'none'")
        assert "allow-same-origin" not in policy
        shown = client.get(f"/reports/{document}").text
        assert "&lt;script&gt;x&lt;/script&gt;" in shown
        assert f"/reports/{page}" in client.get("/runs").text
        assert (
            client.post(f"/runs/{run}/remove", data={"token": token(client)}).headers["location"]
            == "/runs"
        )
        assert client.get(f"/reports/{page}").status_code == 404
        assert client.get(f"/runs/{run}").status_code == 404


def test_real_command(models):
    """`pluribus inspect` of three small models, from the form to the page it leaves."""
    with site(models) as client:
        run = start(
            client,
            "inspect",
            base="base.safetensors",
            experts="one.safetensors\ntwo.safetensors",
        )
        told = ended(client, run)
        assert told["status"] == "done", client.get(f"/runs/{run}").text
        (report,) = told["reports"]
        assert "<table" in client.get(f"/reports/{report['number']}").text


def test_values_that_are_wrong_come_back_with_the_reason(client):
    data = {
        "token": token(client),
        "form": "inspect",
        "card": "ties",
        "base": "b",
        "experts": "<x>",
        "density": "much",
    }
    answer = client.post("/runs", data=data)
    assert answer.status_code == 400
    assert "Density: &#39;much&#39; is no number" in answer.text
    assert "&lt;x&gt;</textarea>" in answer.text  # what was typed is not lost
    del data["card"]
    assert client.post("/runs", data=data).status_code == 400
    data["form"] = "serve"
    answer = client.post("/runs", data=data)
    assert "cannot be started from a page" in answer.text
    assert "Nothing has been run" in client.get("/runs").text


def test_hostile_names_of_models_are_escaped(client, monkeypatch):
    name = "<img src=x onerror=alert(1)>"
    instead(monkeypatch, "import sys; print(sys.argv[-1]); print(sys.argv[-1], file=sys.stderr)")
    run = start(client, "inspect", base=name, experts=name)
    assert ended(client, run)["command"][-2:] == [name, name]
    page = client.get(f"/runs/{run}").text
    assert "<img" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") == 4  # twice said, twice in the command


def test_two_runs_at_a_time(client, monkeypatch):
    instead(monkeypatch, TALKS)
    runs = [talking(client)[0] for _ in range(2)]
    answer = client.post("/runs", data={"token": token(client), "form": "demo"})
    assert answer.status_code == 409
    assert "2 runs go on already" in answer.text
    removed = client.post(f"/runs/{runs[0]}/remove", data={"token": token(client)})
    assert removed.status_code == 409
    assert "cancel it first" in removed.text
    assert [state(client, run)["status"] for run in runs] == ["running"] * 2


def test_a_server_that_stops_leaves_nothing_running(tmp_path, monkeypatch):
    instead(monkeypatch, TALKS)
    with site(tmp_path) as client:
        run, told = talking(client)
    assert not alive(told["pid"])
    kept = Store.look(tmp_path / "ui.sqlite")
    assert (kept.run(run).status, kept.run(run).note) == ("cancelled", "its server was stopped")
    kept.close()
