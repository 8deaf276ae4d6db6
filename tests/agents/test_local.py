"""A local model: a tiny random Llama, plain and fused, against `generate` itself."""

import inspect
import sys
from pathlib import Path

import pytest
import torch

from pluribus.agents import LocalModel
from pluribus.core.errors import InputError, MissingError
from pluribus.decode import Fused, StaticFusion
from pluribus.decode.scaling import BeamSearch, Budget
from pluribus.decode.stack import Opened

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


class Long:
    """Judges steps by their length."""

    def score(self, problem, candidate):
        return [min(1.0, len(step) / 50) for step in candidate]


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
    read = []
    forward = type(opened.model).forward

    def counted(self, input_ids=None, **given):
        read.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **given)

    counted.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(opened.model), "forward", counted)
    assert model.sample(PROMPT, **asked) == wanted
    assert len({one.text for one in wanted}) > 1
    length = len(opened.tokenizer(PROMPT)["input_ids"])
    assert [shape for shape in read if shape[1] > 1] == [(1, length - 1)]


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
