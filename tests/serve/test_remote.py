"""Members that are somebody else's: another server of ours, and ones that misbehave."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from server_help import tiny, tokenizer  # type: ignore[import-not-found]
from serving import answering, httpx, openai  # type: ignore[import-not-found]

from pluribus.core.errors import MissingError
from pluribus.serve import Served, background
from pluribus.serve.config import Endpoint
from pluribus.serve.remote import Remote


@contextmanager
def passing(url, **changes):
    """A client of a server whose model `far` is behind `url`."""
    member = Endpoint(endpoint=url, **{"model": "inner", **changes})
    with (
        background({"far": Remote("far", member)}) as found,
        openai.OpenAI(base_url=found, api_key="-", max_retries=0, timeout=30) as client,
    ):
        yield client


def test_answers_are_passed_on(monkeypatch):
    monkeypatch.setenv("FAR_KEY", "a-key")
    inner = Served("inner", tiny(3), tokenizer())
    said = {"messages": [{"role": "user", "content": "a"}], "temperature": 0, "max_tokens": 9}
    with (
        background({"inner": inner}, keys=("a-key",)) as url,
        openai.OpenAI(base_url=url, api_key="a-key") as direct,
        passing(url, key_env="FAR_KEY") as client,
    ):
        expected = direct.chat.completions.create(model="inner", logprobs=True, **said)
        got = client.chat.completions.create(model="far", logprobs=True, **said)
        assert got.model == "far"
        assert got.choices == expected.choices
        assert got.usage == expected.usage
        pieces = list(client.chat.completions.create(model="far", stream=True, **said))
        assert {piece.model for piece in pieces} == {"far"}
        assert len(pieces) > 3
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert text == expected.choices[0].message.content
        echo = {"prompt": "a b", "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
        assert (
            client.completions.create(model="far", **echo).choices
            == direct.completions.create(model="inner", **echo).choices
        )
        one, other = (
            c.embeddings.create(model=m, input="a").data[0].embedding
            for c, m in ((client, "far"), (direct, "inner"))
        )
        assert one == other
        with pytest.raises(openai.BadRequestError, match=r"'far' says: .*than the 512 that"):
            client.completions.create(model="far", prompt="a", max_tokens=4000)
        for asked, said in (
            ({"max_tokens": 4097}, "at most 4096 tokens"),
            ({"n": 129}, "at most 128 are written"),
        ):
            with pytest.raises(openai.BadRequestError, match=said) as told:  # ours, before theirs
                client.completions.create(model="far", prompt="a", **asked)
            assert "says" not in str(told.value)
        [card] = client.models.list()
        assert card.owned_by == "127.0.0.1"  # not the address, which may hold more


def test_what_is_sent():
    body = json.dumps({"model": "x", "choices": [], "object": "text_completion"}).encode()
    with answering(200, body) as (url, seen), passing(url) as client:
        client.completions.create(model="far", prompt="a", user="me", extra_body={"min_p": 0})
    [(path, sent, headers)] = seen
    assert path == "/v1/completions"
    assert sent == {"model": "inner", "prompt": "a", "user": "me", "min_p": 0}
    assert "Authorization" not in headers


@pytest.mark.parametrize(
    ("status", "body", "got", "said"),
    [
        (429, b'{"error": {"message": "slow down"}}', 429, "says: slow down"),
        (401, b'{"error": {"message": "bad key"}}', 502, "does not take the server's key"),
        (500, b"<html>", 502, "says: status 500"),
        (404, b'{"error": {"message": "no such model"}}', 404, "no such model"),
        (400, b'{"error": "not loaded"}', 400, "says: not loaded"),
        (422, b'{"detail": "too long"}', 422, "says: too long"),
        (400, b'{"error": {"message": {"a": 1}, "code": 7}}', 400, "says: {'a': 1}"),
        (400, b"null", 400, "says: status 400"),
        (200, b"<html>", 502, "no JSON object"),
        (200, b'{"error": {"message": "later"}}', 502, "failed: later"),
    ],
)
def test_endpoints_that_refuse_or_fail(status, body, got, said):
    with answering(status, body, [("Retry-After", "7")]) as (url, _), passing(url) as client:
        with pytest.raises(openai.APIStatusError, match=said) as told:
            client.completions.create(model="far", prompt="a")
        assert told.value.status_code == got
        assert (told.value.response.headers.get("retry-after") == "7") == (status == 429)
        if status != 200:
            with pytest.raises(openai.APIStatusError, match=said) as told:
                client.completions.create(model="far", prompt="a", stream=True)
            assert told.value.status_code == got


def test_an_endpoint_that_breaks_off():
    half = b'data: {"model": "x", "choices": [{"index": 0, "text": "ab"}]}\n\n'
    long = [("Content-Length", "1000")]  # and the connection is closed before
    for headers in ((), long):
        with answering(200, half, headers) as (url, _), passing(url) as client:
            stream = iter(client.completions.create(model="far", prompt="a", stream=True))
            assert next(stream).choices[0].text == "ab"
            with pytest.raises(openai.APIError, match="broke off in the middle"):
                next(stream)
            text = httpx.get(f"{str(client.base_url)[:-4]}/metrics").text
            assert 'pluribus_broken_total{model="far"} 1.0' in text


def test_endpoints_that_are_not_there(monkeypatch):
    with passing("http://127.0.0.1:1/v1") as client:
        with pytest.raises(openai.APIStatusError, match="cannot be reached") as told:
            client.completions.create(model="far", prompt="a")
        assert told.value.status_code == 503
    monkeypatch.delenv("FAR_KEY", raising=False)
    with pytest.raises(MissingError, match="FAR_KEY is not set"):
        Remote("far", Endpoint(endpoint="http://x/v1", model="m", key_env="FAR_KEY"))
