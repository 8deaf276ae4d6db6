"""An endpoint of OpenAI's protocol, played by a server in a thread."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pluribus.agents import OpenAICompatible
from pluribus.core.errors import FormatError, InputError, NetworkError


class Server:
    """Answers requests with what `reply(body)` gives: (status, headers, JSON or bytes)."""

    def __init__(self):
        self.asked, self.reply = [], lambda body: (200, {}, told("hello"))
        owner, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    owner.asked.append((self.path, dict(self.headers), body))
                    status, headers, said = owner.reply(body)
                if status == 0:  # the connection breaks
                    self.close_connection = True
                    return
                raw = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(raw))}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # who asked has left
                    self.wfile.write(raw)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    @property
    def bodies(self):
        return [body for _, _, body in self.asked]


def told(*texts, finish="stop", usage=None, **more):
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        | more
        for i, text in enumerate(texts)
    ]
    return {"choices": choices, "usage": usage or {"completion_tokens": 4, "prompt_tokens": 9}}


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


def model(server, **settings):
    return OpenAICompatible(server.url, "m", **{"backoff": 0.0, "key": "TEST_KEY", **settings})


def test_a_chat_request(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "s3cret")
    server.reply = lambda body: (200, {}, told("hi there"))
    [made] = model(server, extra={"top_k": 5}).sample(
        "q", temperature=0.5, top_p=0.9, max_tokens=7, stop=("\n",), seed=3
    )
    assert (made.text, made.tokens, made.prompt_tokens, made.finish) == ("hi there", 4, 9, "stop")
    [(path, headers, body)] = server.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer s3cret"
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "q"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "seed": 3,
        "stop": ["\n"],
        "top_k": 5,
    }


def test_no_key_sends_none(server, monkeypatch):
    monkeypatch.delenv("TEST_KEY", raising=False)
    model(server).sample("q")
    assert "Authorization" not in server.asked[0][1]


def test_several_at_once_share_the_usage(server):
    server.reply = lambda body: (
        200,
        {},
        told("aa", "bbbbbb", usage={"completion_tokens": 8, "prompt_tokens": 9}),
    )
    made = model(server).sample("q", 2)
    assert server.bodies[0]["n"] == 2
    assert [(one.text, one.tokens) for one in made] == [("aa", 2), ("bbbbbb", 6)]


@pytest.mark.parametrize("how", ["refuses", "gives one"])
def test_an_endpoint_without_n_is_asked_once_for_each(server, how):
    def reply(body):
        if how == "refuses" and "n" in body:
            return 400, {}, {"error": {"message": "n is not supported"}}
        return 200, {}, told(f"seed {body['seed']}")

    server.reply = reply
    asked = model(server)
    made = asked.sample("q", 3, seed=5)
    assert [one.text for one in made] == ["seed 5", "seed 6", "seed 7"]
    count = len(server.asked)
    asked.sample("q", 3)
    assert len(server.asked) == count + 3  # it is not tried again
    assert all("n" not in body for body in server.bodies[1:])


def test_passing_failures_are_tried_again(server):
    replies = [
        (429, {"Retry-After": "0"}, {"error": "slow down"}),
        (503, {}, b"busy"),
        (0, {}, b""),
        (200, {}, told("at last")),
    ]
    server.reply = lambda body: replies.pop(0)
    assert model(server).sample("q")[0].text == "at last"
    assert len(server.asked) == 4


def test_pauses_double_or_are_those_asked_for(server, monkeypatch):
    import pluribus.agents._http as http

    pauses = []
    monkeypatch.setattr(http.time, "sleep", pauses.append)
    replies = [
        (500, {}, b""),
        (500, {}, b""),
        (429, {"Retry-After": "7"}, b""),
        (429, {"Retry-After": "soon"}, b""),
        (429, {"Retry-After": "999999"}, b""),
        (200, {}, told("x")),
    ]
    server.reply = lambda body: replies.pop(0)
    model(server, backoff=1.0, tries=6).sample("q")
    assert pauses == [1.0, 2.0, 7.0, 8.0, 60.0]


def test_it_gives_up_and_says_why(server):
    server.reply = lambda body: (503, {}, {"error": {"message": "loading\nmodel"}})
    with pytest.raises(NetworkError, match=r"no answer after 2 tries \(status 503: loading model"):
        model(server, tries=2).sample("q")
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "status 401: no.*is the right key"),
        (404, "status 404: no.*ends in /v1"),
        (400, "status 400: no$"),
    ],
)
def test_other_refusals_are_final(server, status, said):
    server.reply = lambda body: (status, {}, {"error": {"message": "no"}})
    with pytest.raises(NetworkError, match=said):
        model(server).sample("q")
    assert len(server.asked) == 1


def test_a_key_is_never_told(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "s3cret")
    server.reply = lambda body: (401, {}, {"error": {"message": "no"}})
    asked = model(server)
    with pytest.raises(NetworkError) as error:
        asked.sample("q")
    assert "s3cret" not in str(error.value) + repr(asked)


def test_a_redirection_is_not_followed(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "s3cret")
    server.reply = lambda body: (302, {"Location": server.url + "/elsewhere"}, b"")
    with pytest.raises(NetworkError, match="points elsewhere"):
        model(server).sample("q")
    assert len(server.asked) == 1


def test_a_key_that_is_none(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", " s3cret\n")
    model(server).sample("q")
    assert server.asked[0][1]["Authorization"] == "Bearer s3cret"
    monkeypatch.setenv("TEST_KEY", "s3c\nret")
    with pytest.raises(InputError, match="characters that no header can") as told_of:
        model(server)
    assert "s3c" not in str(told_of.value)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"<html>", "not JSON.*ends in /v1"),
        ([], "has no choices"),
        ({"choices": []}, "has no choices"),
        ({"choices": [{"x": 1}]}, "a choice has no text"),
    ],
)
def test_what_is_no_answer(server, reply, said):
    server.reply = lambda body: (200, {}, reply)
    with pytest.raises(FormatError, match=said):
        model(server).sample("q")


def test_nobody_listens():
    server = Server()
    url = server.url
    server.close()
    with pytest.raises(NetworkError, match="is it running"):
        OpenAICompatible(url, "m", tries=2, backoff=0).sample("q")


def test_no_answer_in_time(server):
    gate = threading.Event()

    def reply(body):
        gate.wait(30)
        return 200, {}, told("late")

    server.reply = reply
    with pytest.raises(NetworkError, match="timed out"):
        model(server, timeout=0.05, tries=1).sample("q")
    gate.set()


# -- ends and prefixes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "stop", "finish", "at"),
    [
        ({"finish_reason": "length"}, ("|",), "length", None),
        ({}, (), "end", None),
        ({}, ("|",), "stop", None),  # it may have ended by itself: nobody says
        ({"stop_reason": None}, ("|",), "end", None),
        ({"stop_reason": "|"}, ("|",), "stop", "|"),
        ({"stop_reason": 2}, ("|",), "end", None),  # the number of an end token
    ],
)
def test_why_it_ended(server, more, stop, finish, at):
    server.reply = lambda body: (200, {}, told("x", **more))
    [made] = model(server).sample("q", stop=stop)
    assert (made.finish, made.stopped_at) == (finish, at)


def test_a_stop_text_that_was_kept_is_cut(server):
    server.reply = lambda body: (200, {}, told("a|b"))
    [made] = model(server).sample("q", stop=("|",))
    assert (made.text, made.finish, made.stopped_at) == ("a", "stop", "|")


def test_an_empty_answer_is_one(server):
    server.reply = lambda body: (200, {}, told(None))
    assert model(server).sample("q")[0].text == ""


def test_going_on_from_a_prefix(server):
    user = {"role": "user", "content": "q"}
    begun = {"role": "assistant", "content": "so"}
    model(server, continuation="continue_final_message").sample("q", prefix="so")
    assert server.bodies[-1]["messages"] == [user, begun]
    assert server.bodies[-1]["continue_final_message"] is True
    assert server.bodies[-1]["add_generation_prompt"] is False
    model(server, continuation="prefix").sample("q", prefix="so")
    assert server.bodies[-1]["messages"] == [user, {**begun, "prefix": True}]
    asked = model(server)
    assert not asked.continues
    with pytest.raises(InputError, match="not known to go on"):
        asked.sample("q", prefix="so")


def test_plain_completions(server):
    choice = {"text": " moon", "finish_reason": "length", "logprobs": {"token_logprobs": [-0.5]}}
    server.reply = lambda body: (200, {}, {"choices": [choice]})
    asked = model(server, api="completions", log_probs=True)
    [made] = asked.sample("The", prefix=" big")
    assert asked.continues
    assert server.asked[0][0] == "/v1/completions"
    assert server.bodies[0]["prompt"] == "The big"
    assert server.bodies[0]["logprobs"] == 0
    assert (made.text, made.tokens, made.log_probs) == (" moon", 1, (-0.5,))


def test_log_probs_of_a_chat(server):
    told_of = {"content": [{"token": "x", "logprob": -0.25}, {"token": "y", "logprob": -1}]}
    server.reply = lambda body: (200, {}, told("xy", logprobs=told_of))
    [made] = model(server, log_probs=True).sample("q")
    assert made.log_probs == (-0.25, -1.0)
    assert server.bodies[0]["logprobs"] is True


@pytest.mark.parametrize(
    ("url", "settings", "said"),
    [
        ("localhost:8000", {}, "no address of an endpoint"),
        ("file:///etc/passwd", {}, "no address of an endpoint"),
        ("http://x/v1", {"tries": 0}, "tries is 0"),
        ("http://x/v1", {"timeout": 0}, "timeout 0"),
    ],
)
def test_bad_settings(url, settings, said):
    with pytest.raises(InputError, match=said):
        OpenAICompatible(url, "m", **settings)
