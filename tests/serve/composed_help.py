"""What tests of workers and strategies behind the server share."""

import contextlib
import json
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # tests have no package
from server_help import tiny, tokenizer
from serving import httpx

from pluribus.serve.composed import Together
from pluribus.serve.recipes import Hogwild

WORDS = tokenizer()
ASK = [{"role": "user", "content": "How far is it ?"}]
ROOM = 4096


def workers(**changes):
    given = {"hogwild": "here", "workers": 2, "max_steps": 6, **changes}
    return Together("together", tiny(3, positions=ROOM), WORDS, Hogwild(**given))


def chat(client, model, **changes):
    given = {"model": model, "messages": ASK, "max_tokens": 12, "seed": 7, **changes}
    return client.chat.completions.create(**given)


def samples(client, n, kind="plain", **changes):
    """What the strategy draws: the same model, settings and seeds, asked for directly."""
    given = {"temperature": 0.8, "seed": 7, "n": n, **changes}
    return chat(client, kind, **given)


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def running(url, *names):
    told = httpx.get(f"{url[:-3]}/health").json()["models"]
    return [told[name]["running"] + told[name]["waiting"] for name in names]


def steps(url, name):
    text = httpx.get(f"{url[:-3]}/metrics").text
    start = f'pluribus_steps_total{{model="{name}"}} '
    return float(next(x for x in text.splitlines() if x.startswith(start)).removeprefix(start))


@contextlib.contextmanager
def raw(url, body):
    """A client that has sent a request and reads nothing."""
    host, port = url.split("/")[2].split(":")
    told = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(told)}\r\n"
    with socket.create_connection((host, int(port))) as made:
        made.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + told)
        yield made
