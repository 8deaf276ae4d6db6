"""Workers and strategies as members: asked by OpenAI's client, compared with what they call."""

import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from composed_help import ASK, ROOM, WORDS, chat, raw, running, samples, steps, until, workers
from server_help import tiny, trio
from serving import background, httpx, openai

from pluribus.decode import DynamicFusion, Fused
from pluribus.decode.hogwild import HogwildEngine, Sampling
from pluribus.decode.scaling.answers import final
from pluribus.serve import Limits, Served
from pluribus.serve.composed import Scaled
from pluribus.serve.recipes import Scale


@pytest.fixture(scope="module")
def members():
    plain = Served("plain", tiny(3, positions=ROOM), WORDS)
    plain.engine.ends = ()
    fused = Served("fused", Fused(trio(positions=ROOM), DynamicFusion()), WORDS)
    made = {"plain": plain, "fused": fused, "together": workers()}
    for name, recipe in {
        "voted": {"strategy": "self_consistency(n=5)"},
        "best": {"strategy": {"kind": "best_of_n", "n": 3}, "verifier": "majority"},
        "beams": {"strategy": "beam_search(n=4, width=2)", "verifier": "majority"},
        "forced": {"strategy": "budget_forcing(thinking=8, answer_tokens=4)"},
        "cheap": {"strategy": "self_consistency(n=5)", "budget_tokens": 21},
    }.items():
        made[name] = Scaled(name, plain, Scale(scale="plain", **recipe))
    made["mixed"] = Scaled("mixed", fused, Scale(scale="fused", strategy="sample(n=2)"))
    return made


@pytest.fixture(scope="module")
def url(members):
    with background(members, Limits(max_new_tokens=3000)) as found:
        yield found


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=60) as made:
        yield made


# -- workers ---------------------------------------------------------------------------------------


def directly(problem, steps, seed=7, finisher=16, **sampling):
    engine = HogwildEngine(tiny(3, positions=ROOM), WORDS, workers=2, answer_tokens=finisher)
    told = {name: "" for name in engine.names}

    def add(worker, text):
        told[engine.names[worker]] += text

    out = engine.run(problem, steps, sampling=Sampling(**sampling), seed=seed, on_token=add)
    return out, told


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_workers_answer_as_the_engine_does(client, temperature):
    out, told = directly(ASK[0]["content"], 12, finisher=12, temperature=temperature)
    assert out.answered_by == "finisher"
    got = chat(client, "together", temperature=temperature)
    [choice] = got.choices
    assert choice.message.content == out.answer
    assert choice.finish_reason == "stop"
    assert choice.message.workers == told
    assert choice.message.reasoning_content == "\n\n".join(told.values())
    assert got.usage.completion_tokens == out.tokens + out.finisher_tokens
    assert out.tokens == 24
    assert 0 < out.finisher_tokens <= 12
    assert got.usage.completion_tokens_details.reasoning_tokens == 24
    asked = HogwildEngine(tiny(3, positions=ROOM), WORDS).prompt(ASK[0]["content"])
    assert got.usage.prompt_tokens == len(asked)


def test_workers_are_streamed(client):
    out, told = directly(ASK[0]["content"], 12, finisher=12)
    seen, text = dict.fromkeys(told, ""), ""
    options = {"include_usage": True}
    *chunks, last = chat(client, "together", temperature=0, stream=True, stream_options=options)
    for chunk in chunks:
        delta = chunk.choices[0].delta
        text += delta.content or ""
        if "worker" in delta.model_extra:
            assert not text  # the answer comes last
            seen[delta.worker] += delta.reasoning_content
    assert (seen, text) == (told, out.answer)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage.completion_tokens == out.tokens + out.finisher_tokens


def test_workers_without_an_answer_show_their_work(client):
    with (
        background({"together": workers(answer_tokens=0)}) as url,
        openai.OpenAI(base_url=url, api_key="-", max_retries=0) as own,
    ):
        out, _ = directly(ASK[0]["content"], 6, finisher=0)
        given = {"model": "together", "messages": ASK, "temperature": 0}
        [choice] = own.chat.completions.create(**given).choices  # as many steps as the file says
        assert choice.message.content == out.text
        assert choice.finish_reason == "length"
        stop = out.text[20:23]
        [choice] = own.chat.completions.create(**given, stop=stop).choices
        assert choice.message.content == out.text[: out.text.find(stop)]
        assert choice.finish_reason == "stop"
    got = client.completions.create(
        model="together", prompt=ASK[0]["content"], max_tokens=12, temperature=0
    )
    assert got.choices[0].text == directly(ASK[0]["content"], 12, finisher=12)[0].answer


# -- strategies ------------------------------------------------------------------------------------


def test_a_vote_is_that_of_the_samples(client):
    drawn = samples(client, 5)
    texts = [one.message.content for one in drawn.choices]
    answers = [final(text) for text in texts]
    counts = Counter(one for one in answers if one is not None)
    most = max(counts.values())
    winner = next(one for one in answers if one is not None and counts[one] == most)
    got = chat(client, "voted")
    assert final(got.choices[0].message.content) == winner
    assert got.choices[0].message.content in texts
    assert got.usage.completion_tokens == drawn.usage.completion_tokens  # all, not one
    shown = got.usage.completion_tokens - got.usage.completion_tokens_details.reasoning_tokens
    assert 0 < shown <= 12
    assert got.usage.prompt_tokens == drawn.usage.prompt_tokens
    pieces = list(chat(client, "voted", stream=True))
    text = "".join(one.choices[0].delta.content or "" for one in pieces)
    assert text == got.choices[0].message.content
    two = chat(client, "voted", n=2)
    assert two.choices[0].message.content == text
    assert two.usage.completion_tokens > got.usage.completion_tokens


def test_best_of_n_counts_what_its_verifier_draws(client):
    drawn = samples(client, 3)
    got = chat(client, "best")
    assert got.choices[0].message.content in [one.message.content for one in drawn.choices]
    judged = got.usage.completion_tokens - drawn.usage.completion_tokens
    assert judged == 8 * 12  # the verifier's samples, each as long as asked for


def test_strategies_that_go_on_from_what_was_written(client):
    for name in ("beams", "forced"):
        first = chat(client, name, temperature=0)
        assert first.choices[0].message.content
        assert first.usage.completion_tokens > 0
        again = chat(client, name, temperature=0, seed=None)
        other = chat(client, name, temperature=0, seed=None)  # the file's seed: always the same
        assert again.choices[0].message.content == other.choices[0].message.content


def test_a_budget_is_a_limit(client):
    got = chat(client, "cheap")
    assert got.usage.completion_tokens <= 21
    with pytest.raises(openai.BadRequestError, match="leaves room for 0 new ones"):
        chat(client, "voted", messages=[{"role": "user", "content": "far " * 4000}])


def test_stop_texts_and_fused_members(client):
    text = chat(client, "mixed", max_tokens=20).choices[0].message.content
    alone = samples(client, 2, "fused", max_tokens=20).choices[0].message.content
    assert text == alone
    stop = next(text[i : i + 2] for i in range(2, 18) if "\ufffd" not in text[i : i + 2])
    got = chat(client, "mixed", max_tokens=20, stop=stop).choices[0]
    assert (got.message.content, got.finish_reason) == (text[: text.find(stop)], "stop")
    raw = client.completions.create(model="mixed", prompt="a fine", max_tokens=9, seed=3)
    own = client.completions.create(
        model="fused", prompt="a fine", max_tokens=9, seed=3, temperature=0.8
    )
    assert raw.choices[0].text == own.choices[0].text


@pytest.mark.parametrize("name", ["voted", "together"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logprobs": True}, "no log-probabilities"),
        ({"max_tokens": 4000}, "at most 3000"),
        ({"max_completion_tokens": 3001}, "max_completion_tokens is 3001"),
        ({"n": 200}, "at most 128"),
        ({"extra_body": {"ignore_eos": True}}, "ignore_eos"),
        ({"top_logprobs": 1}, "top_logprobs needs logprobs"),
    ],
)
def test_what_they_refuse(client, name, change, said):
    with pytest.raises(openai.BadRequestError, match=said):
        chat(client, name, **change)


def test_what_they_refuse_of_texts(client):
    for name in ("voted", "together"):
        for change, said in (
            ({"prompt": [5, 6]}, "give a text, not ids"),
            ({"echo": True}, "does not echo"),
            ({"max_tokens": 0}, "scores no texts"),
            ({"logprobs": 0}, "no log-probabilities"),
        ):
            with pytest.raises(openai.BadRequestError, match=said):
                client.completions.create(**{"model": name, "prompt": "a", **change})
        with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
            client.embeddings.create(model=name, input="a")
    with pytest.raises(openai.BadRequestError, match="the problem is empty"):
        chat(client, "together", messages=[{"role": "user", "content": " "}])


# -- leaving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "who"), [("voted", "plain"), ("together", "together")])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_work(url, name, who, stream):
    """Thousands of tokens were asked for; few are drawn."""
    before = steps(url, who)
    with raw(url, {"model": name, "messages": ASK, "max_tokens": 1500, "stream": stream}):
        until(lambda: sum(running(url, name)) == 1)
        until(lambda: steps(url, who) > before)
    until(lambda: sum(running(url, name, "plain")) == 0)
    until(lambda: httpx.get(f"{url[:-3]}/health").json()["requests"] == 0)
    assert steps(url, who) - before < 1500


def test_closing_cuts_off_what_thinks():
    before = set(threading.enumerate())
    plain = Served("plain", tiny(3, positions=ROOM), WORDS)
    plain.engine.ends = ()
    voted = Scaled("voted", plain, Scale(scale="plain", strategy="self_consistency(n=3)"))
    made = {"plain": plain, "voted": voted, "together": workers(max_steps=3000)}
    got = {}
    with background(made, Limits(max_new_tokens=3000)) as url:

        def ask(name):
            body = {"model": name, "messages": ASK, "max_tokens": 1500}
            got[name] = httpx.post(f"{url}/chat/completions", json=body, timeout=60)

        threads = [threading.Thread(target=ask, args=(name,)) for name in ("voted", "together")]
        for one in threads:
            one.start()
        until(lambda: running(url, "voted", "together") == [1, 1])
    for one in threads:
        one.join()
    for answer in got.values():
        assert answer.status_code == 503
        assert "the server is stopping" in answer.json()["error"]["message"]
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("fault", "name"), [(RuntimeError, "RuntimeError"), (KeyboardInterrupt, "KeyboardInterrupt")]
)
def test_models_that_fail_below_are_told(caplog, fault, name):
    """Whatever they raise: nobody waits for ever, also when the model's thread died of it."""
    model = tiny(3, positions=ROOM)
    plain = Served("plain", model, WORDS)
    voted = Scaled("voted", plain, Scale(scale="plain", strategy="self_consistency(n=3)"))
    together = workers()

    def fail(*args, **kwargs):
        raise fault("a secret path")

    model.model.forward = fail
    made = {"plain": plain, "voted": voted}
    if fault is RuntimeError:
        together.workers.reader.model.model.forward = fail
        made["together"] = together
    with background(made) as url:
        for who in [one for one in made if one != "plain"]:
            body = {"model": who, "messages": ASK, "max_tokens": 4}
            got = httpx.post(f"{url}/chat/completions", json=body, timeout=60)
            assert got.status_code == 500
            assert got.json()["error"]["message"] == f"the model failed: {name}"
        if fault is KeyboardInterrupt:
            until(lambda: httpx.get(f"{url[:-3]}/health").status_code == 503)
            got = httpx.post(f"{url}/chat/completions", json=body, timeout=60)
            assert got.status_code == 503
            assert "'plain' has stopped" in got.json()["error"]["message"]
    together.close()
