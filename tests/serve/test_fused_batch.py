"""Fused models in the batch: whatever runs beside an answer, it is the one that it is alone."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from server_help import Told, greedy, moved, rows, tiny, tokenizer, trio

from pluribus.decode import EFT, DynamicFusion, Fused
from pluribus.serve import engine as engines
from pluribus.serve import prompts
from pluribus.serve import runner as runners
from pluribus.serve.engine import Engine

WORDS = tokenizer()
TEXTS = ["a fine film", "no", "Question: How far is it ?", "Review: a dull and tired film"]


@pytest.fixture
def engine():
    made = []

    def start(model, rows=16, ends=(0,)):
        made.append(Engine(model, WORDS, ends, rows))
        return made[-1]

    yield start
    for one in made:
        one.close()


def own():
    """One module in two roles, with a prompt of its own in one of them."""
    first = tiny(1)
    words = dict.fromkeys(("ref", "tuned", "base"), WORDS)
    made = Fused({"ref": tiny(0), "tuned": moved(first, 2), "base": first}, EFT(), words)
    made.set_prompts({"tuned": "Question: {prompt}\nAnswer:", "ref": "{prompt}!"})
    return made


@pytest.mark.parametrize("make", [lambda: Fused(trio(), DynamicFusion()), own], ids=["one", "own"])
def test_batched_answers_are_those_alone(engine, make):
    """Greedy, token for token; log-probabilities closely; also against a pass over everything."""
    model = make()
    found = engine(model, rows=3)  # fewer than are asked for: they join as others leave
    assert found.batches
    read = [prompts.of_text(model, WORDS, text) for text in TEXTS]
    assert bool(read[0].inputs) == bool(model.prompts)

    def ask(i, most):
        return Told(read[i].ids, most, inputs=read[i].inputs, log_probs=2)

    alone = []
    for i in range(len(TEXTS)):
        alone.append(ask(i, 6 + 5 * i))
        found.submit(alone[-1].ask)
        alone[-1].all()
    together = [ask(i, 6 + 5 * i) for i in range(len(TEXTS))]
    for one in together:
        found.submit(one.ask)
    for one, other, text in zip(together, alone, TEXTS, strict=True):
        one.all()
        assert one.ids == other.ids
        assert one.text == other.text
        assert [t.log_prob for t in one.tokens] == pytest.approx(
            [t.log_prob for t in other.tokens], abs=1e-4
        )
        with torch.no_grad():
            given = model.encode(text) if model.prompts else None
            if given is None:
                assert one.ids == greedy(model, WORDS(text)["input_ids"], len(one.ids))
                continue
            out = model.generate(**given, max_new_tokens=len(one.ids), do_sample=False)
            assert one.ids == out[0, given["input_ids"].shape[1] :].tolist()


def test_long_own_prompts_are_read_in_pieces(engine, monkeypatch):
    monkeypatch.setattr(runners, "CHUNK", 7)
    monkeypatch.setattr(engines, "CHUNK", 7)
    monkeypatch.setattr("pluribus.serve.batch.CHUNK", 7)
    model = own()
    found = engine(model)
    text = "far and wide " * 6
    read = prompts.of_text(model, WORDS, text)
    sizes = {role: one["input_ids"].shape[1] for role, one in read.inputs["member_inputs"].items()}
    assert len({len(read.ids), *sizes.values()}) == 3
    beside = Told(rows([5])[0], 40)
    beside.ask.inputs = prompts.of_text(model, WORDS, "no").inputs
    beside.ask.ids = prompts.of_text(model, WORDS, "no").ids
    found.submit(beside.ask)
    told = Told(read.ids, 9, inputs=read.inputs)
    found.submit(told.ask)
    given = model.encode(text)
    out = model.generate(**given, max_new_tokens=9, do_sample=False)
    assert told.all().ids == out[0, len(read.ids) :].tolist()
    beside.all()


def test_one_module_in_two_roles_runs_once(engine):
    shared = tiny(1)
    model = Fused({"large": tiny(0), "base": shared, "expert": shared}, DynamicFusion())
    calls = []
    forward = shared.model.forward
    shared.model.forward = lambda *a, **k: calls.append(1) or forward(*a, **k)
    found = engine(model)
    told = Told(rows([6])[0], 5)
    calls.clear()
    found.submit(told.ask)
    written = len(told.all().ids)
    assert len(calls) == written  # the prompt's pass gives the first
    assert told.ids == greedy(model, told.ask.ids, 5)


def test_a_recurrent_member_keeps_it_alone(engine):
    """Its state cannot be padded; answers are the same, one after another."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=330, hidden_size=16, num_hidden_layers=1, state_size=4, eos_token_id=0
    )
    model = Fused({**trio(), "expert": MambaForCausalLM(config).eval()}, DynamicFusion())
    found = engine(model)
    assert not found.batches
    prompts_given = rows([5, 8])
    told = [Told(ids, 5) for ids in prompts_given]
    for one in told:
        found.submit(one.ask)
    for one, ids in zip(told, prompts_given, strict=True):
        assert one.all().ids == greedy(model, ids, 5)
