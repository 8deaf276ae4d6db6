"""Clients that say nothing, half of it, or never listen; many of them; and engines that died."""

import json
import socket
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from server_help import Told, rows, tiny, tokenizer
from serving import background, httpx

from pluribus.serve import Limits, Served
from pluribus.serve import flow as flows
from pluribus.serve import run as runs
from pluribus.serve.engine import Engine
from pluribus.serve.gate import Gate

WORDS = tokenizer()
BODY = {"model": "one", "prompt": "a", "max_tokens": 1, "temperature": 0}
WAIT = 60.0


def one(**changes):
    return {"one": Served("one", tiny(3, **changes), WORDS)}


def opened(url):
    host, port = url.split("/")[2].split(":")
    made = socket.create_connection((host, int(port)))
    made.settimeout(WAIT)
    return made


def until(condition):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def whole(made):
    """All that a server says until it closes."""
    told = b""
    while part := made.recv(65536):
        told += part
    return told


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


MORE = b"Content-Length: 100\r\n\r\n"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"P",
        HEAD,
        HEAD + b"Content-Length: 100\r\n\r\n",
        HEAD + b"Content-Length: 100\r\n\r\n{",
    ],
    ids=["nothing", "letter", "half-a-head", "no-body", "half-a-body"],
)
def test_a_client_that_goes_silent_is_told_and_left(said):
    with background(one(), Limits(read_seconds=0.3)) as url, closing(opened(url)) as made:
        made.sendall(said)
        told = whole(made)  # the server closes, after its answer
        assert told.startswith(b"HTTP/1.1 408 ")
        assert json.loads(told.partition(b"\r\n\r\n")[2])["error"]["type"] == (
            "invalid_request_error"
        )
        assert httpx.post(f"{url}/completions", json=BODY).status_code == 200


def test_a_kept_connection_that_stops_in_its_second_request():
    with background(one(), Limits(read_seconds=0.3)) as url, closing(opened(url)) as made:
        body = json.dumps(BODY).encode()
        made.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body + HEAD)
        told = whole(made)
        first, _, second = told.partition(b"HTTP/1.1 408 ")
        assert first.startswith(b"HTTP/1.1 200 ")
        assert b"did not arrive in time" in second


def test_idle_connections_make_room():
    """More of them than there may be keep nobody out; the oldest are closed."""
    with background(one(), Limits(max_connections=6)) as url, ExitStack() as held:
        idle = [held.enter_context(closing(opened(url))) for _ in range(30)]
        for _ in range(3):
            assert httpx.post(f"{url}/completions", json=BODY, timeout=WAIT).status_code == 200
        for made in idle[:20]:
            assert whole(made) == b""


def test_connections_that_are_all_busy_turn_others_away():
    body = {**BODY, "max_tokens": 4000, "stream": True, "ignore_eos": True}
    raw = json.dumps(body).encode()
    with background(one(positions=8192), Limits(max_connections=2)) as url, ExitStack() as held:
        for _ in range(2):
            made = held.enter_context(closing(opened(url)))
            made.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(raw) + raw)
            assert made.recv(4).startswith(b"HTTP")
        told = whole(held.enter_context(closing(opened(url))))
        assert told.startswith(b"HTTP/1.1 503 ")
        assert (
            "too many connections" in json.loads(told.partition(b"\r\n\r\n")[2])["error"]["message"]
        )
        held.close()
        until(lambda: httpx.get(f"{url[:-3]}/health").status_code == 200)


def asleep(url, body):
    """A client that sends a request, and never reads."""
    host, port = url.split("/")[2].split(":")
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect((host, int(port)))
    raw = json.dumps(body).encode()
    made.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(raw) + raw)
    return made


@pytest.fixture
def small(monkeypatch):
    """Connections whose buffers are soon full."""

    def bound(*where):
        made = real(*where)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return made

    real = runs.bound
    monkeypatch.setattr(runs, "bound", bound)


LONG = {**BODY, "max_tokens": 60_000, "stream": True, "ignore_eos": True, "logprobs": 20}


def test_a_client_that_stops_reading_is_left(small, caplog):
    """Its buffers fill up, and the answer ends long before its tokens are written."""
    served = one(positions=100_000)
    limits = Limits(write_seconds=0.3, max_new_tokens=60_000)
    with background(served, limits) as url, closing(asleep(url, LONG)):
        until(lambda: served["one"].engine.counts.running == 1)
        until(lambda: served["one"].engine.counts.running == 0)
        until(lambda: httpx.get(f"{url[:-3]}/health").json()["requests"] == 0)
        assert served["one"].engine.counts.tokens < 60_000
        assert 'pluribus_cancelled_total{model="one"} 1.0' in httpx.get(f"{url[:-3]}/metrics").text
    assert not caplog.records


def test_what_waits_for_a_client_is_bounded(small, monkeypatch):
    monkeypatch.setattr(flows, "BUFFERED", 50)
    served = one(positions=100_000)
    limits = Limits(write_seconds=1000, max_new_tokens=60_000)
    with background(served, limits) as url, closing(asleep(url, LONG)) as made:
        until(lambda: served["one"].engine.counts.running == 1)
        until(lambda: served["one"].engine.counts.running == 0)  # though it has not left
        assert served["one"].engine.counts.tokens < 60_000
        told = b""
        while b"reads too slowly" not in told:
            told = told[-1000:] + made.recv(1 << 20)


# -- engines that died -----------------------------------------------------------------------------


class Gone(BaseException):
    """What no code catches."""


def test_a_dead_engine_is_told(caplog):
    """503 from /health with the reason, and from every request; nobody waits for ever."""
    model = tiny(3)
    served = {"one": Served("one", model, WORDS), "two": Served("two", tiny(4), WORDS)}

    def fail(*args, **kwargs):
        raise Gone("a secret path")

    model.model.forward = fail
    with background(served) as url:
        health = f"{url[:-3]}/health"
        assert httpx.get(health).json()["status"] == "ok"
        got = httpx.post(f"{url}/completions", json=BODY, timeout=WAIT)
        assert got.status_code == 500
        assert "Gone" in got.json()["error"]["message"]
        until(lambda: httpx.get(health).status_code == 503)
        told = httpx.get(health).json()
        assert told["status"] == "failed"
        assert told["reason"] == "the engine of one has died; start the server anew"
        assert told["models"]["one"]["died"] == "Gone"
        assert "died" not in told["models"]["two"]
        assert "secret" not in json.dumps(told)
        for path, body in (("completions", BODY), ("embeddings", {"model": "one", "input": "a"})):
            got = httpx.post(f"{url}/{path}", json=body)
            assert got.status_code == 503
            assert "has stopped" in got.json()["error"]["message"]
        assert httpx.post(f"{url}/completions", json={**BODY, "model": "two"}).status_code == 200
    assert "the engine has died" in caplog.text


def test_who_waits_for_a_dying_engine_is_told(caplog):
    model = tiny(3)
    found = Engine(model, WORDS, (), rows=1)
    first, second = (Told(ids, 400) for ids in rows([5, 6]))
    found.submit(first.ask)
    found.submit(second.ask)
    first.next()
    call = found.call(lambda: (_ for _ in ()).throw(Gone()))
    for told in (first, second):
        with pytest.raises(Gone):
            told.all()
    with pytest.raises(RuntimeError, match="the engine died: Gone"):
        call.result(WAIT)
    until(lambda: found.dead is not None)
    with pytest.raises(RuntimeError, match="has died: Gone"):
        found.submit(Told([5]).ask)
    found.close()


def test_a_client_who_cannot_be_told_ends_no_other(caplog):
    found = Engine(tiny(3), WORDS, (), rows=4)
    good, bad = (Told(ids, 30) for ids in rows([5, 6]))

    def broken(event):
        raise OSError("nobody there")

    bad.ask.send = broken
    found.submit(bad.ask)
    until(lambda: "could not be told" in caplog.text)
    found.submit(good.ask)
    assert len(good.all().ids) == 30
    assert found.dead is None
    found.close()


# -- keys ------------------------------------------------------------------------------------------


def test_keys_are_compared_in_constant_time(monkeypatch):
    """Every key is compared, whole digest with whole digest, wherever the given one differs."""
    from pluribus.serve import gate as gates
    from pluribus.serve.errors import ApiError

    compared = []
    real = gates.hmac.compare_digest

    def compare(a, b):
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(gates.hmac, "compare_digest", compare)
    gate = Gate(("first-key", "second", "a" * 500), 4)
    for given, fits in (
        ("first-key", True),
        ("second", True),
        ("first-kez", False),
        ("xirst-key", False),
        ("", False),
        ("a" * 100_000, False),
    ):
        compared.clear()
        if fits:
            gate.check(f"Bearer {given}")
        else:
            with pytest.raises(ApiError):
                gate.check(f"Bearer {given}")
        assert compared == [(32, 32)] * 3
