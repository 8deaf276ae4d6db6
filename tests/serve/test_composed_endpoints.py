"""Strategies over an endpoint: what it is asked, and that it is left when the client leaves."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from composed_help import ASK, chat, raw, running, until
from serving import background, openai

from pluribus.serve.composed import Scaled
from pluribus.serve.config import Endpoint
from pluribus.serve.recipes import Scale
from pluribus.serve.remote import Remote


class Far(BaseHTTPRequestHandler):
    """Says `answer is K` in turn, and grades answers by K; waits for good where asked to."""

    protocol_version = "HTTP/1.1"
    taken: ClassVar[list] = []
    left = threading.Event()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.taken.append(body)
        said = body["messages"][-1]["content"]
        if said == "wait":
            self.connection.settimeout(60)
            if self.connection.recv(1) == b"":
                self.left.set()
            return
        if said == "fail":
            self.answer(429, {"error": {"message": "slow down"}})
            return
        if body.get("n", 1) > 1:  # as endpoints do that have no such field
            self.answer(400, {"error": {"message": "n is not supported"}})
            return
        grade = {"answer is 1": "3", "answer is 2": "9", "answer is 3": "I say 5"}
        text = next((v for k, v in grade.items() if k in said), None)
        if text is None:
            text = f"well, the answer is {body['seed'] % 3 + 1}"
        choice = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 11, "completion_tokens": len(text.split())}
        self.answer(200, {"choices": [choice], "usage": usage, "model": "x"})

    def answer(self, status, told):
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def far():
    Far.taken, Far.left = [], threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Far) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        found = Endpoint(endpoint=f"http://127.0.0.1:{server.server_port}/v1", model="big")
        remote = Remote("far", found)
        recipes = {
            "best": {"strategy": "best_of_n(n=3)", "verifier": "judge"},
            "voted": {"strategy": "self_consistency(n=4)", "temperature": 0.5},
        }
        made = {n: Scaled(n, remote, Scale(scale="far", **r)) for n, r in recipes.items()}
        try:
            with background({"far": remote, **made}) as url:
                yield url
        finally:
            server.shutdown()
            thread.join()


def test_samples_of_an_endpoint(far):
    with openai.OpenAI(base_url=far, api_key="-", max_retries=0, timeout=60) as client:
        said = [{"role": "system", "content": "Count."}, *ASK]
        got = chat(client, "best", messages=said, seed=0)
        assert got.choices[0].message.content == "well, the answer is 2"
        assert got.usage.completion_tokens == 3 * 5 + (1 + 1 + 3)
        assert got.usage.prompt_tokens == 11
        drawn = [body for body in Far.taken if body["messages"] == said and "n" not in body]
        assert sorted(body["seed"] for body in drawn) == [0, 1, 2]
        assert {(body["temperature"], body["max_tokens"]) for body in drawn} == {(0.8, 12)}
        got = chat(client, "voted", seed=0)  # seeds 0 to 3: 1, 2, 3, 1
        assert got.choices[0].message.content == "well, the answer is 1"
        with pytest.raises(openai.RateLimitError, match="'far' says: slow down"):
            chat(client, "voted", messages=[{"role": "user", "content": "fail"}])


def test_an_endpoint_is_left_when_the_client_leaves(far):
    with raw(far, {"model": "voted", "messages": [{"role": "user", "content": "wait"}]}):
        until(lambda: Far.taken)
    assert Far.left.wait(60)
    until(lambda: sum(running(far, "voted")) == 0)
