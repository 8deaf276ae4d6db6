"""Choosing by likelihood, against one forward pass a choice."""

import sys
from pathlib import Path

import pytest
import torch

from pluribus.agents import LocalModel, Scripted
from pluribus.agents.thinking import CoTProbe, Likelihood, Task
from pluribus.core.errors import InputError
from pluribus.decode.scaling import Budget
from pluribus.decode.scaling.interface import Problem
from pluribus.decode.stack import Opened

sys.path.insert(0, str(Path(__file__).parents[2] / "decode"))  # tests have no package
from members import tiny, tokenizer  # type: ignore[import-not-found]

CHOICES = ("good", "bad", "a fine film")


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return LocalModel(Opened(tiny(0), tokenizer()))


def slow(model, text, choices):
    """The choice with the largest mean log-probability of its tokens, each read alone."""
    found = []
    start = len(model.tokenizer(text)["input_ids"])
    for one in choices:
        ids = torch.tensor([model.tokenizer(f"{text} {one}")["input_ids"]])
        with torch.no_grad():
            logs = model.model(ids).logits[0].log_softmax(-1)
        own = range(start, ids.shape[1])
        found.append(sum(float(logs[k - 1, ids[0, k]]) for k in own) / len(own))
    return choices[found.index(max(found))]


def test_the_likeliest_answer(model):
    mode, seen = Likelihood(choices=CHOICES), set()
    for i in range(12):
        attempt = mode.run(Problem(question=f"Review: {i} stars"), model)
        assert attempt.answer == slow(model, f"Review: {i} stars\n\nAnswer:", CHOICES)
        assert attempt.tokens == model.count(f" {attempt.answer}")
        seen.add(attempt.answer)
    assert len(seen) > 1


def test_after_a_thought(model):
    mode = Likelihood(choices=CHOICES, thinking=5)
    attempt = mode.run(Problem(question="Review: 3"), model)
    [made] = model.sample("Review: 3\n\n", temperature=0, max_tokens=5, prefix="Let me think:")
    told = f"Review: 3\n\nLet me think:{made.text}\nAnswer:"
    assert attempt.answer == slow(model, told, CHOICES)
    assert attempt.tokens == made.tokens + model.count(f" {attempt.answer}")
    longest = max(model.count(f" {one}") for one in CHOICES)
    short = mode.run(Problem(question="Review: 3"), model, Budget(tokens=longest + 2))
    assert short.tokens == 2 + model.count(f" {short.answer}")
    none = mode.run(Problem(question="Review: 3"), model, Budget(tokens=longest))
    assert none == Likelihood(choices=CHOICES).run(Problem(question="Review: 3"), model)
    assert attempt.tokens <= mode.most_tokens == 5 + 2 + len(" a fine film")


def test_it_is_measured_like_other_modes(model):
    problems = [
        Problem(question=f"Review: {i}", answer=("good", "bad")[i % 2], id=str(i))
        for i in range(24)
    ]
    modes = [Likelihood(choices=CHOICES), Likelihood(choices=CHOICES, thinking=4)]
    effect = CoTProbe(model, modes, price=0.001).measure(Task.of("reviews", problems))
    assert [arm.mode for arm in effect.arms] == ["direct", "cot"]
    assert all(arm.unparsed == 0 for arm in effect.arms)
    assert effect.cost > 0


def test_refused(model):
    with pytest.raises(InputError, match="not of a Scripted"):
        Likelihood(choices=CHOICES).run(Problem(question="q"), Scripted([]))
    with pytest.raises(InputError, match="the choices are good;"):
        Likelihood(choices=("good",))
    with pytest.raises(InputError, match="thinking is -1"):
        Likelihood(choices=CHOICES, thinking=-1)
