"""A local model: a tiny random Llama, plain and fused, against `generate` itself."""

import inspect
import sys
from pathlib import Path

import pytest
import torch

from pluribus.agents import LocalModel
from pluribus.core import beginning
from pluribus.core.chance import drawn
from pluribus.core.errors import InputError, MissingError
from pluribus.decode import Fused, StaticFusion
from pluribus.decode.scaling import BeamSearch, Budget
from pluribus.decode.stack import Opened
from pluribus.route import LowRank, Routed

sys.path.insert(0, str(Path(__file__).parents[1] / "decode"))  # tests have no package
from members import moved, tiny, tokenizer, trio  # type: ignore[import-not-found]

PROMPT = "Review: a fine film"
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if not loop.last or message['role'] != 'assistant' %}</>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def opened():
    return Opened(tiny(0, positions=128), tokenizer())


@pytest.fixture(scope="module")
def model(opened):
    return LocalModel(opened)


class Halves:
    """Routes by which side of its middle a feature is on."""

    names = ("one", "two")
    middle = 0.0

    def __call__(self, features):
        self.seen = features[:, 0]
        first = (features[:, 0] > self.middle).float()
        return torch.stack((first, 1 - first), 1)


class Long:
    """Judges steps by their length."""

    def score(self, problem, candidate):
        return [min(1.0, len(step) / 50) for step in candidate]


def shapes_read(model, monkeypatch):
    """Return a list that gets the shape of the ids of every pass."""
    read = []
    forward = type(model).forward

    def counted(self, input_ids=None, **given):
        read.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **given)

    counted.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(model), "forward", counted)
    return read


def greedy(opened, text, count):
    ids = opened.tokenizer(text, return_tensors="pt")["input_ids"]
    made = opened.model.generate(ids, max_new_tokens=count, do_sample=False)
    return made[0, ids.shape[1] :].tolist()


def test_greedy_is_generates(opened, model):
    ids = greedy(opened, PROMPT, 12)
    [made] = model.sample(PROMPT, temperature=0, max_tokens=12)
    kept = ids[:-1] if ids[-1] == 0 else ids
    assert made.text == opened.tokenizer.decode(kept, skip_special_tokens=True)
    assert made.tokens == len(ids)
    assert made.finish == ("end" if ids[-1] == 0 else "length")
    assert made.prompt_tokens == len(opened.tokenizer(PROMPT)["input_ids"])


@pytest.mark.parametrize("kind", ["plain", "fused"])
@pytest.mark.parametrize("batch", [5, 2])
def test_a_prompt_is_read_once(kind, batch, opened, monkeypatch):
    """One row reads it, and the samples are those of so many rows that read it themselves."""
    if kind == "fused":
        opened = Opened(Fused(trio(), StaticFusion()), opened.tokenizer)
    model = LocalModel(opened, batch=batch)
    asked = {"n": 5, "temperature": 0.9, "max_tokens": 8, "seed": 4}
    with monkeypatch.context() as apart:
        apart.setattr(LocalModel, "_read", lambda *_: None)
        wanted = model.sample(PROMPT, **asked)
    read = shapes_read(opened.model, monkeypatch)
    assert model.sample(PROMPT, **asked) == wanted
    assert len({one.text for one in wanted}) > 1
    length = len(opened.tokenizer(PROMPT)["input_ids"])
    assert [shape for shape in read if shape[1] > 1] == [(1, length - 1)]


PROMPTS = [PROMPT, "Say: no", PROMPT, "A longer review that begins otherwise: a film", PROMPT]
SEEDS = [1, 2, 3, 4, 1]
MANY = {"temperature": 0.9, "max_tokens": 8}


def by_hand(opened, prompt, seed, count, temperature=0.9, top_p=1.0):
    """One row, token by token, each by a whole pass."""
    ids = opened.tokenizer(prompt)["input_ids"]
    length, stream = len(ids), torch.Generator().manual_seed(seed)
    for _ in range(count):
        with torch.inference_mode():
            logits = opened.model(torch.tensor([ids])).logits[:, -1]
        u = torch.rand(1, generator=stream, dtype=torch.float64)
        ids.append(int(drawn(logits, u, temperature, top_p)))
        if ids[-1] == 0:
            break
    return ids[length:]


@pytest.mark.parametrize("batch", [8, 2])
@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_rows_of_several_prompts_are_drawn_each_by_itself(opened, batch, top_p):
    made = LocalModel(opened, batch=batch).sample_many(PROMPTS, SEEDS, top_p=top_p, **MANY)
    for prompt, seed, one in zip(PROMPTS, SEEDS, made, strict=True):
        ids = by_hand(opened, prompt, seed, 8, top_p=top_p)
        kept = ids[:-1] if ids[-1] == 0 else ids
        assert one.text == opened.tokenizer.decode(kept, skip_special_tokens=True)
        assert one.tokens == len(ids)
        assert one.finish == ("end" if ids[-1] == 0 else "length")
        assert one.prompt_tokens == len(opened.tokenizer(prompt)["input_ids"])
    assert made[0] == made[4]  # the same prompt and seed
    assert made[0] != made[2]


def test_cold_rows_are_greedy(opened, model):
    made = model.sample_many(PROMPTS, SEEDS, temperature=0, max_tokens=6)
    for prompt, one in zip(PROMPTS, made, strict=True):
        assert [one] == model.sample(prompt, temperature=0, max_tokens=6)


def test_each_prompt_is_read_once_and_what_all_begin_with_too(opened, monkeypatch):
    shots = "Review: a dull film\nSay: no\nReview: a fine film\nSay: yes\n"
    prompts = [shots + one for one in ("Review: odd", "Review: a bore", "Review: odd")]
    model = LocalModel(opened)
    with monkeypatch.context() as apart:
        apart.setattr("pluribus.core.beginning.LEAST", 1 << 30)
        wanted = model.sample_many(prompts, [1, 2, 3], **MANY)
    read = shapes_read(opened.model, monkeypatch)
    assert model.sample_many(prompts, [1, 2, 3], **MANY) == wanted
    rows = [opened.tokenizer(one)["input_ids"] for one in prompts]
    shared = beginning.common(rows)
    assert shared > 16
    longest = max(map(len, rows)) - shared
    assert [shape for shape in read if shape[1] > 1] == [(1, shared), (2, longest - 1)]
    assert next(shape for shape in read if shape[1] == 1) == (3, 1)


@pytest.mark.parametrize("kind", ["fused", "routed"])
def test_rows_of_composed_models(kind, opened):
    if kind == "fused":
        composed = Opened(Fused(trio(), StaticFusion()), opened.tokenizer)
    else:
        net, name = tiny(0, positions=128), "model.layers.0.mlp.up_proj.weight"
        rng = torch.Generator().manual_seed(0)
        out, into = dict(net.named_parameters())[name].shape
        part = {
            name: LowRank(torch.randn(2, into, generator=rng), torch.randn(out, 2, generator=rng))
        }
        router = Halves()
        routed = Routed(net, {"one": part, "two": {}}, router, features="hidden")
        composed = Opened(routed, opened.tokenizer)
        ids = [opened.tokenizer(one, return_tensors="pt")["input_ids"] for one in PROMPTS]
        features = []
        for one in ids:
            routed.route(one)
            features.append(float(router.seen))
        router.middle = (min(features) + max(features)) / 2
        assert len({int(routed.route(one).argmax()) for one in ids}) == 2
    model = LocalModel(composed)
    together = model.sample_many(PROMPTS, SEEDS, **MANY)
    for prompt, seed, one in zip(PROMPTS, SEEDS, together, strict=True):
        assert [one] == model.sample_many([prompt], [seed], **MANY)


def test_stops_and_log_probs_of_rows(opened):
    model = LocalModel(opened, log_probs=True)
    whole = model.sample_many(PROMPTS, SEEDS, temperature=0.9, max_tokens=20)
    stop = next(c for c in "aeiou" if 1 <= sum(c in one.text for one in whole) < len(whole))
    made = model.sample_many(PROMPTS, SEEDS, temperature=0.9, max_tokens=20, stop=(stop,))
    for one, before in zip(made, whole, strict=True):
        assert one.text == before.text.split(stop)[0]
        assert (one.finish == "stop") == (stop in before.text)
        assert one.log_probs == pytest.approx(before.log_probs[: one.tokens], abs=1e-4)
    words = opened.tokenizer
    ids = by_hand(opened, PROMPTS[1], SEEDS[1], 20)
    start = words(PROMPTS[1])["input_ids"]
    logits = opened.model(torch.tensor([start + ids])).logits[0].log_softmax(-1)
    own = [float(logits[len(start) - 1 + i, token].detach()) for i, token in enumerate(ids)]
    assert whole[1].log_probs == pytest.approx(own, abs=1e-4)


def test_rows_near_the_end_of_the_context_write_what_they_may(opened):
    model = LocalModel(opened)
    long = "a fine film " * 60
    words = opened.tokenizer
    ids = words(long)["input_ids"][:122]
    prompts = [PROMPT, words.decode(ids[:120]), words.decode(ids)]
    lengths = [len(words(one)["input_ids"]) for one in prompts]
    assert all(100 < length < 128 for length in lengths[1:])
    made = model.sample_many(prompts, [1, 2, 3], temperature=0.9, max_tokens=30)
    for i, one in enumerate(made):
        assert [one] == model.sample_many([prompts[i]], [i + 1], temperature=0.9, max_tokens=30)
        assert one.tokens <= 128 - lengths[i]
    assert made[0].tokens == 30 or made[0].finish == "end"
    with pytest.raises(InputError, match="the model takes 128"):
        model.sample_many([PROMPT, long], [1, 2])


def test_what_rows_are_refused(model):
    assert model.sample_many([], []) == []
    with pytest.raises(InputError, match="2 prompts and 1 seeds"):
        model.sample_many([PROMPT, PROMPT], [1])
    with pytest.raises(InputError, match="no tokens"):
        model.sample_many([PROMPT, ""], [1, 2])
    with pytest.raises(InputError, match="temperature is -1"):
        model.sample_many([PROMPT], [1], temperature=-1)


def test_chance_is_the_seeds_and_no_one_elses(model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (model.sample(PROMPT, 3, max_tokens=8, seed=s) for s in (1, 1, 2))
    assert one == two
    assert one != other
    assert len({made.text for made in one}) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_are_cut_to_size(opened):
    small = LocalModel(opened, batch=2)
    assert len(small.sample(PROMPT, 5, max_tokens=3)) == 5


def test_a_prefix_goes_on(opened, model):
    [first] = model.sample(PROMPT, temperature=0, max_tokens=4)
    [rest] = model.sample(PROMPT, temperature=0, max_tokens=4, prefix=" and tired")
    ids = greedy(opened, PROMPT + " and tired", 4)
    assert rest.text == opened.tokenizer.decode(ids, skip_special_tokens=True)
    assert first.text != rest.text


def test_stop_texts_end_rows_by_themselves(opened, model):
    whole = model.sample(PROMPT, 6, max_tokens=20, seed=3)
    letters = [letter for letter in "aeiou" if sum(letter in one.text for one in whole) >= 3]
    stop = letters[0]
    made = model.sample(PROMPT, 6, max_tokens=20, seed=3, stop=(stop,))
    stopped = [one for one in made if one.finish == "stop"]
    assert stopped
    for one in made:
        assert stop not in one.text
        assert (one.stopped_at == stop) == (one.finish == "stop")
    for one in stopped:
        assert one.tokens <= 20
    # the first row sees the same draws until any row has stopped, so its beginning is the same
    assert whole[0].text.startswith(made[0].text[:1])


def test_a_stopped_row_counts_tokens_up_to_the_stop(opened, model):
    ids = greedy(opened, PROMPT, 12)
    texts = [opened.tokenizer.decode(ids[:k], skip_special_tokens=True) for k in range(13)]
    place = next(k for k in range(4, 13) if texts[k] != texts[k - 1] and "\ufffd" not in texts[k])
    stop = texts[place][len(texts[place - 1]) :]
    first = next(k for k in range(1, 13) if stop in texts[k])
    [made] = model.sample(PROMPT, temperature=0, max_tokens=12, stop=(stop,))
    assert made.finish == "stop"
    assert made.tokens == first
    assert made.text == texts[first][: texts[first].index(stop)]


def test_log_probs_are_the_models_own(opened):
    [made] = LocalModel(opened, log_probs=True).sample(
        PROMPT, temperature=0.5, top_p=0.8, max_tokens=6, seed=1
    )
    words, model = opened.tokenizer, opened.model
    ids = words(PROMPT)["input_ids"]
    torch_ids = torch.tensor([ids])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        out = model.generate(
            torch_ids, max_new_tokens=6, do_sample=True, temperature=0.5, top_p=0.8, top_k=0
        )
    logits = model(out).logits[0].log_softmax(-1)
    new = out[0, len(ids) :]
    wanted = [float(logits[len(ids) - 1 + i, token].detach()) for i, token in enumerate(new)]
    assert made.log_probs == pytest.approx(wanted, abs=1e-4)
    assert made.tokens == len(new)


def test_chat_templates_and_their_continuation(opened):
    words = tokenizer()
    words.chat_template = CHAT
    chat = LocalModel(Opened(opened.model, words))
    assert chat.chat
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Why"}]
    assert chat.text(messages) == "<system>Be brief</><user>Why</><assistant>"
    begun = [*messages, {"role": "assistant", "content": "So it"}]
    continued = words.apply_chat_template(begun, continue_final_message=True, tokenize=False)
    assert chat.text(messages, "So it") == continued
    assert chat.text(messages, "So it\n\n").endswith("So it\n\n")  # the separator is not lost
    assert chat.text("Why") == "<user>Why</><assistant>"
    plain = LocalModel(Opened(opened.model, words), chat="no")
    assert plain.text(messages, "So") == "Be brief\n\nWhySo"
    [made] = chat.sample(messages, temperature=0, max_tokens=3, prefix="So it")
    ids = greedy(Opened(opened.model, words), continued, 3)
    assert made.text == words.decode(ids, skip_special_tokens=True)


def test_a_fused_model_with_prompts_of_its_own():
    words, base = tokenizer(), tiny(1)
    expert = moved(base, 2)
    models = {"large": tiny(0), "base": base, "expert": expert}
    fused = Fused(models, StaticFusion(alpha=1.0), dict.fromkeys(models, words))
    local = LocalModel(Opened(fused, words))
    inputs = fused.encode(PROMPT + " and")
    out = fused.generate(**inputs, max_new_tokens=5, do_sample=False)
    wanted = words.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    [made] = local.sample(PROMPT, temperature=0, max_tokens=5, prefix=" and")
    assert made.text == wanted
    fused.set_prompts({"expert": "Question: {prompt}\nAnswer:"})
    own = fused.encode(PROMPT)
    more = words(" and", return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = torch.cat((own["input_ids"], more), 1)
    member = torch.cat((own["member_inputs"]["expert"]["input_ids"], more), 1)
    out = fused.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        member_inputs={"expert": {"input_ids": member, "attention_mask": torch.ones_like(member)}},
        max_new_tokens=5,
        do_sample=False,
    )
    wanted = words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    made = local.sample(PROMPT, 2, temperature=0, max_tokens=5, prefix=" and")
    assert [one.text for one in made] == [wanted] * 2


def test_a_search_over_steps_runs_on_it(model):
    done = BeamSearch(n=4, width=2, rounds=4, separator="e", step_tokens=10).run(
        PROMPT, model, Long(), Budget(tokens=120)
    )
    assert done.candidates
    assert done.cost.tokens <= 120
    assert done.chosen is not None


def test_it_opens_folders(tmp_path, opened, model):
    opened.model.save_pretrained(tmp_path)
    opened.tokenizer.save_pretrained(tmp_path)
    again = LocalModel.open(tmp_path)
    assert again.sample(PROMPT, 2, max_tokens=4) == model.sample(PROMPT, 2, max_tokens=4)


def test_what_is_refused(opened, model):
    with pytest.raises(MissingError, match="no chat template"):
        LocalModel(opened, chat="yes")
    with pytest.raises(InputError, match="batch is 0"):
        LocalModel(opened, batch=0)
    with pytest.raises(InputError, match="makes no tokens"):
        model.sample("")
    with pytest.raises(InputError, match="the model takes 128"):
        model.sample("film " * 200)
    assert model.sample(PROMPT, max_tokens=100_000, seed=1)[0].tokens <= 128
    assert model.count("film") == len(opened.tokenizer("film")["input_ids"])


def test_a_prefix_that_fills_the_context_ends_an_answer(opened, model):
    prefix = " fine film" * 60
    made = model.sample(PROMPT, 2, max_tokens=8, prefix=prefix)
    assert [(one.text, one.tokens, one.finish) for one in made] == [("", 0, "length")] * 2
    with pytest.raises(InputError, match="the model takes 128"):
        model.sample(PROMPT + prefix, max_tokens=8)


def test_a_search_that_runs_into_the_context_keeps_what_it_has(model):
    """Steps that end with an e, judged by their length: none ends before the model is full."""
    search = BeamSearch(n=2, width=1, rounds=400, separator="e", step_tokens=10)
    done = search.run(PROMPT, model, Long(), Budget())
    assert done.candidates
    assert all(model.count(one.text) <= 128 for one in done.candidates)
