"""Continuous batching: whatever runs beside an answer, it is the one that it is alone."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from server_help import Told, greedy, rows, tiny, tokenizer, trio  # type: ignore[import-not-found]

from pluribus.decode import DynamicFusion, Fused
from pluribus.route import LowRank, Routed
from pluribus.serve import runner as runners
from pluribus.serve.engine import Engine

WORDS = tokenizer()


@pytest.fixture
def engine():
    made = []

    def start(model, rows=16, ends=(0,)):
        made.append(Engine(model, WORDS, ends, rows))
        return made[-1]

    yield start
    for one in made:
        one.close()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=330, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
        )
    ).eval()


def mistral():
    """Whose layers see eight tokens back."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=330,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=8,
            initializer_range=0.3,
        )
    ).eval()


def routed():
    base = tiny(1)
    rng = torch.Generator().manual_seed(2)
    parts = {}
    for name in ("a", "b", "c"):
        parts[name] = {
            f"model.layers.{i}.self_attn.{which}.weight": LowRank(
                torch.randn(2, 32, generator=rng), 0.5 * torch.randn(wide, 2, generator=rng)
            )
            for i in range(2)
            for which, wide in (("q_proj", 32), ("v_proj", 16))
        }

    class Router:
        names = ("a", "b", "c")

        def __call__(self, x):
            return torch.nn.functional.one_hot(x.argmax(1) % 3, 3).float()

    made = Routed(base, parts, features="hidden")
    made.set_router(Router())
    return made


@pytest.mark.parametrize("make", [lambda: tiny(3), gpt2, mistral], ids=["llama", "gpt2", "mistral"])
def test_greedy_answers_are_those_alone(engine, make):
    model = make()
    found = engine(model, rows=4)  # fewer than are asked for: they join as others leave
    assert found.batches
    prompts = rows([3, 11, 1, 24, 7, 2, 17, 9])
    told = [Told(ids, 4 + 5 * (i % 4)) for i, ids in enumerate(prompts)]
    for one in told:
        found.submit(one.ask)
    for one, ids in zip(told, prompts, strict=True):
        expected = greedy(model, ids, one.ask.sampling.max_tokens)
        assert one.all().ids == expected
        text = [token for token in expected if token != 0]
        assert one.text == WORDS.decode(text, skip_special_tokens=True)
        assert one.done.reason == ("stop" if expected[-1] == 0 else "length")
        assert one.done.written == len(expected)


def test_a_composites_rows_are_routed_each(engine):
    model = routed()
    found = engine(model)
    assert found.batches
    prompts = rows([5, 9, 3, 12, 7, 6])
    weights = [model.route(input_ids=torch.tensor([ids])) for ids in prompts]
    assert len({int(row.argmax()) for row in weights}) > 1
    told = [Told(ids, 7) for ids in prompts]
    other = "abc"[(int(weights[0].argmax()) + 1) % 3]
    told.append(Told(prompts[0], 7, part=other))
    for one in told:
        found.submit(one.ask)
    for one in told:
        one.all()  # a composite is for one thread at a time
    for one, ids, row in zip(told, prompts, weights, strict=False):
        given = torch.tensor([ids])
        out = model.generate(given, weights=row, max_new_tokens=7, do_sample=False)
        assert one.ids == out[0, len(ids) :].tolist()
    out = model.generate(
        torch.tensor(prompts[:1]), weights=other, max_new_tokens=7, do_sample=False
    )
    assert told[-1].ids == out[0, len(prompts[0]) :].tolist()
    assert told[-1].ids != told[0].ids


def test_chance_is_the_requests_own(engine):
    found = engine(tiny(3))
    [ids] = rows([6])
    settings = {"temperature": 1.0, "top_p": 0.9, "seed": 5, "most": 12}
    alone = Told(ids, **settings)
    found.submit(alone.ask)
    alone.all()
    crowd = [Told(other, 20, temperature=1.0) for other in rows([4, 9, 15], seed=1)]
    again, other = Told(ids, **settings), Told(ids, **{**settings, "seed": 6})
    for one in (*crowd, again, other):
        found.submit(one.ask)
    assert again.all().ids == alone.ids != other.all().ids


@pytest.mark.parametrize("fused", [False, True])
def test_log_probabilities_are_the_models(engine, fused):
    model = Fused(trio(), DynamicFusion()) if fused else tiny(3)
    found = engine(model)
    assert found.batches
    [ids] = rows([7])
    told = Told(ids, 5, log_probs=3, echo=True)
    found.submit(told.ask)
    told.all()
    whole = torch.tensor([ids + told.ids])
    with torch.no_grad():
        expected = model(whole).logits[0].float().log_softmax(-1)
    assert told.ids == greedy(model, ids, 5)
    for at, one in enumerate([*told.prompt, *told.tokens]):
        assert one.token == whole[0, at + 1]
        assert one.log_prob == pytest.approx(float(expected[at, one.token]), abs=1e-4)
        top = expected[at].topk(3)
        assert [token for token, _ in one.top] == top.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_a_long_prompt_is_read_in_pieces(engine, monkeypatch):
    from pluribus.serve import batch
    from pluribus.serve import engine as engines

    monkeypatch.setattr(batch, "CHUNK", 16)
    monkeypatch.setattr(engines, "CHUNK", 16)
    model = tiny(3)
    found = engine(model)
    long, short = rows([75, 5])
    first = Told(short, 30)
    found.submit(first.ask)
    first.next()
    second = Told(long, 6, echo=True, log_probs=1)
    found.submit(second.ask)
    assert second.all().ids == greedy(model, long, 6)
    assert first.all().ids == greedy(model, short, 30)
    assert len(second.prompt) == 74
    with torch.no_grad():
        whole = model(torch.tensor([long])).logits[0].log_softmax(-1)
    assert [one.log_prob for one in second.prompt] == pytest.approx(
        [float(whole[i, long[i + 1]]) for i in range(74)], abs=1e-4
    )


@pytest.mark.parametrize("fused", [False, True])
def test_who_leaves_is_dropped(engine, fused):
    model = Fused(trio(), DynamicFusion()) if fused else tiny(3)
    found = engine(model, rows=1, ends=())
    first, second, third = (Told(ids, 400) for ids in rows([5, 6, 7]))
    third.ask.sampling.__dict__["max_tokens"] = 3
    for one in (first, second, third):
        found.submit(one.ask)
    first.next()
    second.ask.cancel()  # while it waits
    first.ask.cancel()  # while it writes
    assert first.all().done.reason == "cancelled"
    assert 0 < first.done.written < 400
    assert second.all().done == type(second.done)("cancelled", 0)
    assert third.all().ids == greedy(model, third.ask.ids, 3, ends=())


def test_stop_texts_end_an_answer(engine):
    model = tiny(3)
    for fused in (False, True):
        model = Fused(trio(), DynamicFusion()) if fused else model
        found = engine(model, ends=())
        [ids] = rows([6], seed=4)
        plain = Told(ids, 24)
        found.submit(plain.ask)
        plain.all()
        middle = plain.text[len(plain.text) // 2 :][:3]
        told = Told(ids, 24, stop=("never that", middle))
        found.submit(told.ask)
        told.all()
        assert told.done.reason == "stop"
        assert told.text == plain.text[: plain.text.find(middle)]
        assert told.done.written < 24
        shown = WORDS.decode(told.ids)
        assert plain.ids[: len(told.ids)] == told.ids
        assert len(told.text) <= len(shown)


def test_a_model_that_dies_tells_its_clients_and_goes_on(engine, caplog):
    model = tiny(3)
    found = engine(model)
    prompts = rows([5, 8, 6])
    told = [Told(ids, 60) for ids in prompts]
    forward, calls = model.model.forward, []

    def broken(*args, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        if calls[-1] == 2:
            raise RuntimeError("a device is gone")
        return forward(*args, **kwargs)

    model.model.forward = broken
    for one in told[:2]:
        found.submit(one.ask)
    for one in told[:2]:
        with pytest.raises(RuntimeError, match="a device is gone"):
            one.all()
    model.model.forward = forward
    found.submit(told[2].ask)
    assert told[2].all().ids == greedy(model, prompts[2], 60)
    assert "a batch of 2 answers failed" in caplog.text


def test_models_that_cannot_be_batched_are_found_out(monkeypatch):
    class Odd(type(tiny(1))):
        """Rows look at each other."""

        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **others):
            out = super().forward(input_ids, attention_mask, position_ids, **others)
            out.logits = out.logits + out.logits.mean(0, keepdim=True)
            return out

    torch.manual_seed(0)
    odd = Odd(tiny(1).config).eval()
    assert runners.runner_of(odd) is None
    assert runners.runner_of(tiny(1)) is not None
    assert runners.runner_of(Fused(trio(), DynamicFusion())) is not None
    assert runners.runner_of(Fused({**trio(), "expert": odd}, DynamicFusion())) is None
    assert runners.runner_of(torch.nn.Linear(2, 2)) is None


def test_closing_answers_everybody(engine):
    found = engine(tiny(3), rows=1, ends=())
    first, second = (Told(ids, 400) for ids in rows([5, 6]))
    found.submit(first.ask)
    found.submit(second.ask)
    first.next()
    found.close()
    assert first.all().done.reason == second.all().done.reason == "cancelled"
    with pytest.raises(RuntimeError, match="closed"):
        found.submit(Told([5]).ask)
    with pytest.raises(RuntimeError, match="closed"):
        found.call(lambda: 1)


def test_calls_run_between_tokens(engine):
    found = engine(tiny(3))
    assert found.call(lambda: 6 * 7).result(60) == 42
    with pytest.raises(ZeroDivisionError):
        found.call(lambda: 1 / 0).result(60)
    one = Told([5, 6, 7], 3)
    found.submit(one.ask)
    assert len(one.all().ids) == 3
