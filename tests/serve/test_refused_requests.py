"""What the server refuses: the right status, and an error in OpenAI's shape that says why."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from server_help import tiny, tokenizer  # type: ignore[import-not-found]
from serving import httpx, openai  # type: ignore[import-not-found]

from pluribus.serve import Limits, Served, background

LIMITS = Limits(max_new_tokens=450, max_prompt_tokens=200, max_body_bytes=20_000, max_choices=40)


@pytest.fixture(scope="module")
def url():
    with background({"plain": Served("plain", tiny(3), tokenizer())}, LIMITS) as found:
        yield found


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


CHAT = {"model": "plain", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
TEXT = {"model": "plain", "prompt": "a", "max_tokens": 1}


@pytest.mark.parametrize(
    ("path", "change", "status", "said"),
    [
        ("completions", {"model": "plane"}, 404, "Did you mean 'plain'"),
        ("completions", {"model": "../../etc/passwd"}, 404, "there is no model"),
        ("completions", {"model": "plain\x00"}, 404, r"no model 'plain\\x00' here"),
        ("completions", {"model": "plain/../plain"}, 404, "no model"),
        ("completions", {"model": "x" * 15_000}, 404, "no model 'x{100}' here"),
        ("completions", {"model": 3}, 400, "model: "),
        ("completions", {"model": None}, 400, "model"),
        ("completions", {"temperature": 3}, 400, "temperature: .*less than or equal to 2"),
        ("completions", {"temperature": "1"}, 400, "temperature: .*valid number"),
        ("completions", {"temperature": True}, 400, "temperature: .*valid number"),
        ("completions", {"top_p": -1}, 400, "top_p"),
        ("completions", {"n": 0}, 400, "n: "),
        ("completions", {"n": 41}, 400, "41 answers are asked for"),
        ("completions", {"seed": 1 << 80}, 400, "seed"),
        ("completions", {"best_of": 4}, 400, "best_of"),
        ("completions", {"stop": ["a", 3]}, 400, "stop: expected a text or a list"),
        ("completions", {"stop": ""}, 400, "empty stop text"),
        ("completions", {"stop": ["x"] * 17}, 400, "at most 16"),
        ("completions", {"prompt": []}, 400, "prompt: is empty"),
        ("completions", {"prompt": ""}, 400, "no tokens of an empty text"),
        ("completions", {"prompt": [1.5]}, 400, "prompt: expected a text"),
        ("completions", {"prompt": [True]}, 400, "prompt: expected a text"),
        ("completions", {"prompt": [[5], []]}, 400, "list without token ids"),
        ("completions", {"prompt": [330]}, 400, "330 is no token: ids are 0 to 329"),
        ("completions", {"prompt": [-1]}, 400, "-1 is no token"),
        ("completions", {"prompt": [5] * 201}, 400, "has 201 tokens; 'plain' takes 200"),
        ("completions", {"prompt": [5] * 100, "max_tokens": 450}, 400, "more than the 512 that"),
        ("completions", {"max_tokens": 451}, 400, "at most 450"),
        ("completions", {"max_tokens": -1}, 400, "max_tokens"),
        ("completions", {"logprobs": 21}, 400, "logprobs"),
        ("completions", {"frequency_penalty": 1}, 400, "frequency_penalty is not supported"),
        ("completions", {"logit_bias": {"5": 1}}, 400, "logit_bias is not supported"),
        ("completions", {"temprature": 1}, 400, "unknown parameter 'temprature'.*'temperature'"),
        ("chat/completions", {"messages": []}, 400, "messages: .*at least 1"),
        ("chat/completions", {"messages": "a"}, 400, "messages: "),
        ("chat/completions", {"messages": [{"role": "x", "content": "a"}]}, 400, "0.role"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0.content is miss"),
        ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, 400, "expected a te"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "only parts of type 'text'",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": None}]},
            400,
            "messages.0.content: expected a text",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
            400,
            "messages.0.tool_calls is not supported",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a", "contnt": "b"}]},
            400,
            "unknown parameter 'messages.0.contnt'.*'content'",
        ),
        ("chat/completions", {"stream_options": {"usage": True}}, 400, "stream_options.usage"),
        ("chat/completions", {"use_beam_search": 0}, 400, "use_beam_search is not supported"),
        ("completions", {"frequency_penalty": False}, 400, "frequency_penalty is not supported"),
        ("completions", {"best_of": 1, "n": 2}, 400, "best_of"),
        ("embeddings", {"model": "plain", "input": ["a"] * 2049}, 400, "at most 2048 are taken"),
        ("embeddings", {"model": "plain", "input": [[330]]}, 400, "330 is no token"),
        ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
        ("chat/completions", {"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, 400, "not supported"),
        ("embeddings", {"model": "plain", "input": {}}, 400, "input: expected a text"),
        ("nothing", {}, 404, "Not Found"),
    ],
)
def test_what_is_refused(url, path, change, status, said):
    start = {"chat/completions": CHAT, "completions": TEXT}.get(path, {})
    got = httpx.post(f"{url}/{path}", json={**start, **change})
    assert got.status_code == status
    error = got.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.search(said, error["message"])


def test_harmless_parameters_are_taken(client):
    got = client.chat.completions.create(
        **CHAT,
        user="me",
        metadata={"a": "b"},
        store=False,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        extra_body={
            "use_beam_search": False,
            "top_k": -1,
            "repetition_penalty": 1.0,
            "suffix": None,
        },
    )
    assert got.usage.completion_tokens == 1


def test_an_answer_that_is_sent_back(client):
    """Whole, as clients do with what they got; one that said nothing too."""
    own = {"role": "assistant", "content": None, "refusal": None, "tool_calls": []}
    told = {"role": "assistant", "content": "b", "reasoning_content": "c", "workers": {"A": "c"}}
    said = [*CHAT["messages"], told, *CHAT["messages"], own]
    got = client.chat.completions.create(**{**CHAT, "messages": said})
    assert got.usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "JSON array"),
        (b"\xff\xfe", 400, "not JSON|not Unicode"),
        (b'{"model": "\\ud800"}', 400, "not Unicode"),
        (b"[" * 15000, 400, "nested too deeply|not JSON"),
        (b'{"model": "plain", "prompt": "a", "temperature": NaN}', 400, "not JSON"),
        (b'{"model": "plain", "prompt": "a", "metadata": {"a": 1e999}}', 400, "not JSON"),
        (b" " * 20_001, 413, "larger than 20000 bytes"),
    ],
)
def test_bodies_that_are_none(url, body, status, said):
    got = httpx.post(
        f"{url}/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert got.status_code == status
    assert re.search(said, got.json()["error"]["message"])


def test_a_body_that_hides_its_size_and_one_that_is_no_json(url):
    def parts():
        for _ in range(30):
            yield b" " * 1000

    kind = {"Content-Type": "application/json"}
    assert httpx.post(f"{url}/completions", content=parts(), headers=kind).status_code == 413
    got = httpx.post(f"{url}/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert got.status_code == 415
    assert httpx.get(f"{url}/completions").status_code == 405
