"""`pluribus serve` as a process: it starts, lets running answers finish on SIGTERM, and stops."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from server_help import greedy, moved, tiny, tokenizer  # type: ignore[import-not-found]
from serving import httpx, openai  # type: ignore[import-not-found]

import pluribus

FILE = """models:
  one: one
  mix: {models: {large: one, base: base, expert: expert}, fuser: {kind: logits_fusion}}
keys: [SERVE_TEST_KEY]
limits: {grace_seconds: %s, max_new_tokens: 100000}
"""
WAIT = 120.0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("served")
    base = tiny(1)
    members = {"one": tiny(3, positions=100_000), "base": base, "expert": moved(base, 2)}
    for name, model in members.items():
        model.save_pretrained(where / name)
        tokenizer().save_pretrained(where / name)
    return where


@pytest.fixture
def start(place):
    started = []

    def run(*arguments):
        source = str(Path(pluribus.__file__).parents[1])
        path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        ready = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        one = subprocess.Popen(
            [sys.executable, "-c", f"{ready}\nfrom pluribus.cli import main; main()", *arguments],
            cwd=place,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "PLURIBUS_DEBUG": "",
                "SERVE_TEST_KEY": "k",
                "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(one)
        said = []
        for line in one.stderr:
            said.append(line)
            if found := re.search(r"at (http://\S+/v1)", line):
                return one, found[1], said
        one.wait(WAIT)
        return one, None, said

    yield run
    for one in started:
        if one.poll() is None:
            one.kill()
        one.communicate()


def test_sigterm(start, place):
    """Running answers are finished, new ones are refused, and then it stops."""
    (place / "patient.yml").write_text(FILE % WAIT)
    process, url, said = start("serve", "patient.yml", "--port", "0")
    assert url is not None, said
    assert "serving one, mix, mix:large, mix:base, mix:expert at" in said[-1]
    assert not [line for line in said if "one answer at a time" in line]
    with openai.OpenAI(base_url=url, api_key="k", max_retries=0, timeout=WAIT) as client:
        small = client.completions.create(model="mix:base", prompt="a", max_tokens=3, temperature=0)
        ids = greedy(tiny(1), tokenizer()("a")["input_ids"], 3)
        assert small.choices[0].text == tokenizer().decode(ids, skip_special_tokens=True)
        endless = long(client, 90_000)  # holds the server until its client leaves
        short = long(client, 300)
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + WAIT
        while True:
            got = httpx.post(
                f"{url}/completions",
                json={"model": "one", "prompt": "a", "max_tokens": 1},
                headers={"Authorization": "Bearer k"},
            )
            if got.status_code == 503:
                break
            assert time.monotonic() < deadline
        assert "stopping" in got.json()["error"]["message"]
        assert got.headers["retry-after"] == "5"
        *_, last = short
        assert last.usage.completion_tokens == 300
        endless.close()
    assert stopped(process) == ""


def test_ctrl_c_without_time(start, place):
    """What runs is cut off, and told so."""
    (place / "hasty.yml").write_text(FILE % 0)
    process, url, said = start("serve", "hasty.yml", "--port", "0", "--json")
    assert url is not None, said
    with openai.OpenAI(base_url=url, api_key="k", max_retries=0, timeout=WAIT) as client:
        endless = long(client, 90_000)
        process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="cut off: the server is stopping"):
            list(endless)
    told = json.loads(stopped(process))
    assert told == {"url": url, "models": ["one", "mix", "mix:large", "mix:base", "mix:expert"]}


def long(client, most):
    stream = client.completions.create(
        model="one",
        prompt="a",
        max_tokens=most,
        stream=True,
        temperature=0,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    return stream


def stopped(process):
    out, rest = process.communicate(timeout=WAIT)
    assert process.returncode == 0, rest
    assert rest == "stopped\n"
    return out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "nowhere"),
        (("nowhere.yml",), "no such recipe"),
        (("one", "--host", "0.0.0.0"), "there are no keys"),
        (("one", "--key-env", "NOT_SET_HERE"), "NOT_SET_HERE is not set"),
        (("one", "--device", "tpu9"), "expected cpu, cuda or cuda:N"),
    ],
)
def test_what_is_refused(place, monkeypatch, capsys, arguments, said):
    from pluribus.cli import main

    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as stop:
        main(["serve", *arguments, "--port", "0"])
    told = capsys.readouterr()
    assert stop.value.code == 1
    assert said in told.err
    assert told.err.splitlines()[-1].startswith("pluribus: ")
    assert "Traceback" not in told.err


def test_idle_and_slow_clients_keep_nobody_waiting(place):
    """Connections that say nothing, and one that sends half a request."""
    import socket

    from pluribus.serve import Limits, Served, background

    model = {"one": Served("one", tiny(3), tokenizer())}
    with background(model, Limits(read_seconds=0.2)) as url:
        host, port = url.split("/")[2].split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(200)]
        try:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            idle[0].sendall(head + b"Content-Length: 100\r\n\r\n{")
            got = httpx.post(
                f"{url}/completions", json={"model": "one", "prompt": "a", "max_tokens": 1}
            )
            assert got.status_code == 200
            idle[0].settimeout(WAIT)
            assert idle[0].recv(65536).startswith(b"HTTP/1.1 408")
        finally:
            for one in idle:
                one.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("pluribus")]
