"""The server, asked by OpenAI's own client: what it answers is what the models write."""

import json
import re
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from server_help import greedy, moved, rows, tiny, tokenizer, trio  # type: ignore[import-not-found]
from serving import httpx, openai  # type: ignore[import-not-found]

from pluribus.decode import EFT, DynamicFusion, Fused
from pluribus.serve import Limits, Served, background
from pluribus.serve.prompts import PLAIN_STOP, plain

WORDS = tokenizer()
PLAIN = tiny(3)
FUSED = Fused(trio(), DynamicFusion(), dict.fromkeys(("large", "base", "expert"), WORDS))
LIMITS = Limits(max_new_tokens=450, max_prompt_tokens=200, max_body_bytes=20_000, max_choices=40)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)


def chatty():
    words = tokenizer()
    words.chat_template = TEMPLATE
    return words


@pytest.fixture(scope="module")
def url():
    first, expert = tiny(1), None
    expert = moved(first, 2)
    own = Fused(
        {"ref": tiny(0), "tuned": expert, "base": first},
        EFT(),
        {"ref": WORDS, "tuned": chatty(), "base": WORDS},
    )
    own.set_prompts({"tuned": "chat", "ref": "Q: {prompt}\nA:"})
    members = {
        "plain": Served("plain", PLAIN, WORDS, rows=8),
        "fused": Served("fused", FUSED, WORDS),
        "chatty": Served("chatty", tiny(4), chatty()),
        "own": Served("own", own, WORDS),
        "a/b": Served("a/b", PLAIN, WORDS),
    }
    with background(members, LIMITS) as found:
        yield found


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def expected(model, text, most, stop=None):
    ids = WORDS(text)["input_ids"] if isinstance(text, str) else text
    found = greedy(model, ids, most)
    shown = WORDS.decode([i for i in found if i != 0], skip_special_tokens=True)
    return found, shown if stop is None else shown.partition(stop)[0]


# -- what is answered ------------------------------------------------------------------------------


def test_models(client, url):
    listed = [one.id for one in client.models.list()]
    assert listed == ["plain", "fused", "chatty", "own", "a/b"]
    assert client.models.retrieve("a/b").id == "a/b"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'plain'"):
        client.models.retrieve("plane")
    for trick in ("../../etc/passwd", "%2e%2e%2f%2e%2e", "plain/..%2ffused", "\x00"):
        got = httpx.get(f"{url}/models/{trick.replace(chr(0), '%00')}")
        assert got.status_code == 404
        assert got.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("name", ["plain", "fused"])
def test_completions(client, name):
    model = {"plain": PLAIN, "fused": FUSED}[name]
    prompt = "Review: a fine film"
    found, text = expected(model, prompt, 12)
    got = client.completions.create(model=name, prompt=prompt, max_tokens=12, temperature=0)
    [choice] = got.choices
    assert choice.text == text
    assert choice.finish_reason == ("stop" if found[-1] == 0 else "length")
    assert choice.logprobs is None
    assert got.model == name
    assert got.object == "text_completion"
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (
        len(WORDS(prompt)["input_ids"]),
        len(found),
    )
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    short = client.completions.create(model=name, prompt=prompt, temperature=0)
    assert short.usage.completion_tokens == min(16, len(expected(model, prompt, 16)[0]))


def test_chat_by_the_plain_form(client):
    said = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}],
        },
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "How far?"},
    ]
    text = plain([{**m, "content": "Hi!" if i == 1 else m["content"]} for i, m in enumerate(said)])
    assert text == "System: Be brief.\n\nUser: Hi!\nAssistant: Hello\nUser: How far?\nAssistant:"
    got = client.chat.completions.create(
        model="plain", messages=said, max_completion_tokens=10, temperature=0
    )
    assert got.choices[0].message.content == expected(PLAIN, text, 10, PLAIN_STOP)[1]
    assert got.choices[0].message.role == "assistant"
    assert got.object == "chat.completion"


def test_chat_by_the_tokenizers_template(client):
    said = [{"role": "developer", "content": "S"}, {"role": "user", "content": "U"}]
    got = client.chat.completions.create(
        model="chatty", messages=said, max_tokens=10, temperature=0
    )
    text = "<system>S<user>U<assistant>"
    assert got.choices[0].message.content == expected(tiny(4), text, 10)[1]
    with pytest.raises(openai.BadRequestError, match="system comes first"):
        client.chat.completions.create(model="chatty", messages=said[::-1])


def test_members_with_prompts_of_their_own(client):
    """The tuned one reads its chat template, the large one a question, the base the text."""
    first = tiny(1)
    tokens = {"ref": WORDS, "tuned": chatty(), "base": WORDS}
    model = Fused({"ref": tiny(0), "tuned": moved(first, 2), "base": first}, EFT(), tokens)
    model.set_prompts({"tuned": "chat", "ref": "Q: {prompt}\nA:"})
    out = model.generate(**model.encode("a fine film"), max_new_tokens=8, do_sample=False)
    start = len(WORDS("a fine film")["input_ids"])
    got = client.completions.create(model="own", prompt="a fine film", max_tokens=8, temperature=0)
    assert got.choices[0].text == WORDS.decode(out[0, start:], skip_special_tokens=True)
    given = {
        role: {"input_ids": torch.tensor([words(text, add_special_tokens=False)["input_ids"]])}
        for role, words, text in (
            ("tuned", chatty(), "<user>film<assistant>"),
            ("ref", WORDS, "Q: film\nA:"),
        )
    }
    common = torch.tensor([WORDS("User: film\nAssistant:")["input_ids"]])
    out = model.generate(common, member_inputs=given, max_new_tokens=8, do_sample=False)
    got = client.chat.completions.create(
        model="own", messages=[{"role": "user", "content": "film"}], max_tokens=8, temperature=0
    )
    written = WORDS.decode(out[0, common.shape[1] :], skip_special_tokens=True)
    assert got.choices[0].message.content == written.partition(PLAIN_STOP)[0]
    with pytest.raises(openai.BadRequestError, match="give text, not ids"):
        client.completions.create(model="own", prompt=[5, 6])
    with pytest.raises(openai.BadRequestError, match="leave echo or logprobs out"):
        client.completions.create(model="own", prompt="a", echo=True, logprobs=1)


@pytest.mark.parametrize("name", ["plain", "fused"])
def test_streams_are_the_whole_in_pieces(client, name):
    said = [{"role": "user", "content": "How far is it ?"}]
    whole = client.chat.completions.create(
        model=name, messages=said, max_tokens=20, temperature=0, logprobs=True, top_logprobs=2
    )
    chunks = list(
        client.chat.completions.create(
            model=name,
            messages=said,
            max_tokens=20,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *told, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(chunk.usage is None for chunk in told)
    assert told[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in told)
    assert text == whole.choices[0].message.content
    assert told[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert {chunk.choices[0].finish_reason for chunk in told[:-1]} == {None}
    probs = [one for c in told if c.choices[0].logprobs for one in c.choices[0].logprobs.content]
    assert probs == whole.choices[0].logprobs.content
    assert len({chunk.id for chunk in chunks}) == 1
    pieces = client.completions.create(
        model=name, prompt="a fine", max_tokens=9, temperature=0, stream=True
    )
    found = "".join(chunk.choices[0].text for chunk in pieces)
    model = {"plain": PLAIN, "fused": FUSED}[name]
    assert found == expected(model, "a fine", 9)[1]


def test_the_wire_is_server_sent_events(url):
    body = {"model": "plain", "prompt": "a", "max_tokens": 3, "temperature": 0, "stream": True}
    got = httpx.post(f"{url}/completions", json=body)
    assert got.headers["content-type"].startswith("text/event-stream")
    lines = got.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(line.removeprefix("data: "))["id"] for line in lines[:-2])


def test_log_probabilities_of_both_protocols(client):
    prompt = "Review: a fine"
    ids = WORDS(prompt)["input_ids"]
    got = client.completions.create(
        model="plain", prompt=ids, max_tokens=1, temperature=0, echo=True, logprobs=2
    ).choices[0]
    with torch.no_grad():
        table = PLAIN(torch.tensor([ids])).logits[0].log_softmax(-1)
    told = got.logprobs
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    assert told.token_logprobs[1:-1] == pytest.approx(
        [float(table[i, ids[i + 1]]) for i in range(len(ids) - 1)], abs=1e-4
    )
    assert told.token_logprobs[-1] == pytest.approx(float(table[-1].max()), abs=1e-4)
    for i, top in enumerate(told.top_logprobs[1:]):
        assert max(top.values()) == pytest.approx(float(table[i].max()), abs=1e-4)
        assert top[told.tokens[i + 1]] == told.token_logprobs[i + 1]
        assert 2 <= len(top) <= 3
    assert "".join(told.tokens[:-1]) == prompt
    assert got.text.startswith(prompt)
    assert told.text_offset[: len(ids)] == [len(WORDS.decode(ids[:i])) for i in range(len(ids))]
    only = client.completions.create(
        model="plain", prompt=prompt, max_tokens=0, echo=True, logprobs=0
    ).choices[0]
    assert only.text == prompt
    assert only.finish_reason == "length"
    assert only.logprobs.token_logprobs == told.token_logprobs[:-1]
    said = [{"role": "user", "content": "film"}]
    chat = client.chat.completions.create(
        model="plain", messages=said, max_tokens=3, temperature=0, logprobs=True, top_logprobs=4
    ).choices[0]
    start = WORDS(plain(said))["input_ids"]
    found = greedy(PLAIN, start, 3)
    with torch.no_grad():
        table = PLAIN(torch.tensor([start + found])).logits[0].log_softmax(-1)
    for i, one in enumerate(chat.logprobs.content):
        at = len(start) - 1 + i
        assert one.logprob == pytest.approx(float(table[at, found[i]]), abs=1e-4)
        top = table[at].topk(4)
        assert [t.logprob for t in one.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)
    text = b"".join(bytes(one.bytes) for one in chat.logprobs.content).decode(errors="replace")
    assert text == chat.message.content


def test_lm_evaluation_harness_reads_the_log_likelihoods(client):
    """What its `local-completions` sends, and how it reads the answer."""
    context, rest = rows([6, 4])
    best = greedy(PLAIN, context, 4, ends=())
    got = client.completions.create(
        model="plain",
        prompt=[context + rest, context + best],
        max_tokens=1,
        logprobs=1,
        echo=True,
        temperature=0,
        seed=1234,
    )
    table = PLAIN(torch.tensor([context + rest])).logits[0].detach().log_softmax(-1)
    likelihoods, greedies = [], []
    for choice in sorted(got.choices, key=lambda one: one.index):
        probs = choice.logprobs.token_logprobs[6:-1]
        tops = choice.logprobs.top_logprobs[6:-1]
        likelihoods.append(sum(probs))
        greedies.append(all(p == max(top.values()) for p, top in zip(probs, tops, strict=True)))
    assert likelihoods[0] == pytest.approx(
        sum(float(table[5 + i, rest[i]]) for i in range(4)), abs=1e-3
    )
    assert greedies == [False, True]


def test_stop_texts(client):
    prompt = "Question: How"
    _, text = expected(PLAIN, prompt, 30)
    middle = next(text[i : i + 3] for i in range(8, 20) if "\ufffd" not in text[i : i + 3])
    shown = text[: text.find(middle)]
    for stop in (middle, ["never", middle]):
        got = client.completions.create(
            model="plain", prompt=prompt, max_tokens=30, temperature=0, stop=stop
        ).choices[0]
        assert (got.text, got.finish_reason) == (shown, "stop")
    pieces = client.completions.create(
        model="plain", prompt=prompt, max_tokens=30, temperature=0, stop=middle, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in pieces) == shown


def test_choices_and_chance(client):
    def ask(**changes):
        given = {"model": "plain", "prompt": ["a fine", "film"], "max_tokens": 8, "seed": 3, "n": 3}
        got = client.completions.create(**{**given, **changes})
        assert [one.index for one in got.choices] == list(range(6))
        return [one.text for one in got.choices]

    first = ask()
    assert first == ask() != ask(seed=4)
    assert len(set(first)) > 3
    cold = ask(temperature=0)
    assert cold == [expected(PLAIN, p, 8)[1] for p in ("a fine", "film") for _ in range(3)]
    streamed = [""] * 6
    for chunk in client.completions.create(
        model="plain", prompt=["a fine", "film"], max_tokens=8, seed=3, n=3, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == first
    assert ask(top_p=0.0) == cold


def test_embeddings(client):
    texts = ["a fine film", "no"]
    got = client.embeddings.create(model="plain", input=texts)
    for one, text in zip(got.data, texts, strict=True):
        ids = torch.tensor([WORDS(text)["input_ids"]])
        with torch.no_grad():
            states = PLAIN(ids, output_hidden_states=True).hidden_states[-1][0]
        vector = torch.nn.functional.normalize(states.mean(0), dim=0)
        torch.testing.assert_close(torch.tensor(one.embedding), vector, atol=1e-5, rtol=1e-5)
    assert got.usage.prompt_tokens == sum(len(WORDS(text)["input_ids"]) for text in texts)
    floats = client.embeddings.create(model="plain", input=texts[0], encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(got.data[0].embedding, abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model="fused", input="a")
    with pytest.raises(openai.BadRequestError, match="have 32 dimensions"):
        client.embeddings.create(model="plain", input="a", dimensions=8)


def test_many_at_once_get_what_they_get_alone(client):
    lengths = [3 + 2 * i for i in range(16)]
    prompts = rows(lengths, seed=9)
    answers: list = [None] * len(prompts)
    start = threading.Barrier(len(prompts))

    def ask(i):
        start.wait()
        got = client.completions.create(
            model="plain", prompt=prompts[i], max_tokens=6 + i, temperature=0, logprobs=0
        )
        answers[i] = got.choices[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for i, (ids, answer) in enumerate(zip(prompts, answers, strict=True)):
        found, text = expected(PLAIN, ids, 6 + i)
        assert answer.text == text
        assert len(answer.logprobs.tokens) == len(found)


# -- leaving, keys, limits -------------------------------------------------------------------------

TEXT = {"model": "plain", "prompt": "a", "max_tokens": 1}


def until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def health(url):
    return httpx.get(f"{url[:-3]}/health").json()


@pytest.mark.parametrize("name", ["plain", "fused"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(url, name, stream):
    """The answer would take hundreds of tokens; the row is free long before them."""
    host, port = url.split("/")[2].split(":")
    body = json.dumps(
        {"model": name, "prompt": "a", "max_tokens": 450, "stream": stream, "ignore_eos": True}
    ).encode()
    before = counted(url, name)
    with socket.create_connection((host, int(port))) as raw:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        raw.sendall(head.encode() + body)
        until(lambda: health(url)["models"][name]["running"] == 1)
    until(lambda: health(url)["models"][name]["running"] == 0)
    until(lambda: health(url)["requests"] == 0)
    assert counted(url, name) - before < 450


def counted(url, name):
    text = httpx.get(f"{url[:-3]}/metrics").text
    lines = [
        x for x in text.splitlines() if x.startswith(f'pluribus_steps_total{{model="{name}"}}')
    ]
    return float(lines[0].split()[-1])


def test_keys():
    members = {"plain": Served("plain", PLAIN, WORDS)}
    with background(members, keys=("first-key", "zweiter-schlüssel")) as url:
        for path in ("models", "models/plain"):
            for header in (
                {},
                {"Authorization": "Bearer first-ke"},
                {"Authorization": "first-key"},
            ):
                got = httpx.get(f"{url}/{path}", headers=header)
                assert got.status_code == 401
                assert got.json()["error"]["code"] == "invalid_api_key"
                assert "first-key" not in got.text
        assert httpx.post(f"{url}/completions", json=TEXT).status_code == 401
        assert httpx.get(f"{url[:-3]}/metrics").status_code == 401
        assert httpx.get(f"{url[:-3]}/health").status_code == 200
        with openai.OpenAI(base_url=url, api_key="first-key", max_retries=0) as made:
            assert made.completions.create(**TEXT).choices[0].finish_reason
        with (
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as made,
            pytest.raises(openai.AuthenticationError),
        ):
            made.models.list()


def test_too_many_requests_and_metrics():
    members = {"plain": Served("plain", PLAIN, WORDS, rows=1)}
    with (
        background(members, Limits(max_concurrent=2)) as url,
        openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client,
    ):
        long = {**TEXT, "max_tokens": 450, "stream": True, "extra_body": {"ignore_eos": True}}
        held = [client.completions.create(**long) for _ in range(2)]
        next(iter(held[0]))
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(**TEXT)
        assert refused.value.response.headers["retry-after"] == "1"
        for one in held:
            one.close()
        until(lambda: health(url)["requests"] == 0)
        assert client.completions.create(**TEXT).usage.completion_tokens == 1
        text = httpx.get(f"{url[:-3]}/metrics").text
        for line in (
            'pluribus_requests_total{endpoint="completions",model="unknown",status="429"} 1.0',
            'pluribus_requests_total{endpoint="completions",model="plain",status="200"} 3.0',
            'pluribus_cancelled_total{model="plain"} 2.0',
            'pluribus_running{model="plain"} 0.0',
        ):
            assert line in text
        assert 'pluribus_step_seconds_bucket{le="+Inf",model="plain"}' in text
        assert "pluribus_first_token_seconds_count" in text


def test_a_model_that_raises_is_told(caplog):
    broken = tiny(5)
    one = Served("broken", broken, WORDS)

    def fail(*args, **kwargs):
        raise RuntimeError("a secret path")

    broken.model.forward = fail
    with (
        background({"broken": one}) as url,
        openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError, match="RuntimeError") as told:
            client.completions.create(model="broken", prompt="a")
        assert "secret" not in str(told.value)
        with pytest.raises(openai.APIError, match="the model failed"):
            list(client.completions.create(model="broken", prompt="a", stream=True))
        assert health(url)["requests"] == 0
        assert 'pluribus_broken_total{model="broken"} 1.0' in httpx.get(f"{url[:-3]}/metrics").text


def test_the_description_of_the_interface(url):
    told = httpx.get(f"{url[:-3]}/openapi.json").json()
    assert "/v1/chat/completions" in told["paths"]
    body = told["paths"]["/v1/completions"]["post"]["requestBody"]
    name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    schema = told["components"]["schemas"][name]
    assert {"model", "prompt", "logprobs", "echo"} <= set(schema["properties"])
    text = json.dumps(told)
    for part in set(re.findall(r"#/components/schemas/(\w+)", text)):
        assert part in told["components"]["schemas"]
