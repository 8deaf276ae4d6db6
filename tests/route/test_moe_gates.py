"""Gates of prompts, of chance, and learned ones; padding, scales, and what is not finite."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
import moe_models
from moe_models import dense, family, loaded, save, told

from pluribus.core.errors import InputError, NonFiniteError
from pluribus.core.weights import Weights
from pluribus.route import moe
from pluribus.route.moe import gates, train
from pluribus.route.moe.recipe import Expert, Training
from pluribus.route.recipe import tokens as batches

MATHS = [f"{i} 34 56 7 8 90 {i + 3} 12" for i in range(30)]
BANK = [f"alarm account blocked {'out of scope' * (i % 3)}" for i in range(30)]


def asked(*prompts, negative=None):
    return Expert(source_model="x", positive_prompts=list(prompts), negative_prompts=negative)


def states(model, text):
    ids = moe_models.tokenizer()(text)["input_ids"]
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    return torch.stack(out.hidden_states[:-1])[:, 0]  # (l, s, d)


@pytest.mark.parametrize("average", [False, True])
def test_states_of_prompts_one_by_one(average):
    model = dense()
    experts = [asked("12 34 56 7 8 90", "7"), asked("alarm", negative=["yes no", "maybe"])]
    found = gates.of_prompts(model, moe_models.tokenizer(), experts, average)

    def mean(texts):
        picked = [states(model, text) for text in texts]
        return sum(x.mean(1) if average else x[:, -1] for x in picked) / len(picked)

    first = mean(["12 34 56 7 8 90", "7"])
    second = mean(["alarm"]) - mean(["yes no", "maybe"])
    expected = torch.stack(
        [first / first.norm(dim=1, keepdim=True), second / second.norm(dim=1, keepdim=True)], 1
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_padding_is_in_no_mean():
    """A prompt's gate is the same whatever prompts are beside it, unlike mergekit's hidden_avg."""
    model, tokenizer = dense(), moe_models.tokenizer()
    alone = gates.of_prompts(model, tokenizer, [asked("7")], True)
    twice = gates.of_prompts(model, tokenizer, [asked("7", "7")], True)
    beside = gates.of_prompts(model, tokenizer, [asked("7"), asked("12 34 56 7 8 90 yes no")], True)
    torch.testing.assert_close(alone, twice)
    torch.testing.assert_close(alone[:, 0], beside[:, 0])


def test_embeddings_by_hand():
    table = torch.eye(330)[:, :4] * torch.tensor([1.0, 2.0, 3.0, 4.0])
    tokenizer = moe_models.tokenizer()
    first, second = tokenizer("7")["input_ids"], tokenizer("yes")["input_ids"]
    table[first[0]] = torch.tensor([3.0, 4.0, 0.0, 0.0])
    for token in second:
        table[token] = torch.tensor([0.0, 0.0, 0.0, 2.0 / len(second)])
    found = gates.of_embeddings(table, tokenizer, [asked("7"), asked("7", negative=["yes"])], 3)
    assert found.shape == (3, 2, 4)
    torch.testing.assert_close(found[2, 0], torch.tensor([0.6, 0.8, 0.0, 0.0]))
    half = 1 / math.sqrt(2)
    torch.testing.assert_close(found[0, 1], torch.tensor([0.6, 0.8, 0.0, -1.0]) * half)


def test_chance_has_the_stated_spread_and_repeats():
    drawn = gates.at_random(40, 8, 64, False, 3)
    assert torch.equal(drawn, gates.at_random(40, 8, 64, False, 3))
    assert not torch.equal(drawn, gates.at_random(40, 8, 64, False, 4))
    assert abs(float(drawn.std()) - 1) < 0.02
    even = gates.at_random(40, 8, 64, True, 3)
    assert float(even.abs().max()) <= 1 / 8
    assert abs(float(even.std()) - 1 / 8 / math.sqrt(3)) < 0.002


def test_condition_numbers_by_hand():
    rows = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 1e-3]]])
    assert gates.conditions(rows)[0] == pytest.approx(3)
    assert gates.conditions(rows)[1] == pytest.approx(2000, rel=1e-3)
    assert "1 of 2 layers" in (gates.degenerate(gates.conditions(rows)) or "")
    assert gates.degenerate([4.9]) is None
    assert gates.degenerate([math.nan]) is not None
    corners = torch.eye(3)[None] + 100  # apart but for what all share
    assert gates.conditions(corners)[0] > 100
    assert gates.conditions(corners, centred=True)[0] == pytest.approx(1, abs=1e-3)


def test_states_that_are_not_finite_are_refused(tmp_path):
    family(tmp_path)
    base = dense()
    base.model.layers[0].mlp.down_proj.weight.data[0, 0] = math.nan
    save(base, tmp_path / "llama-base")
    with pytest.raises(NonFiniteError, match=r"hidden states of the prompt '12 34 56' .* layer 1"):
        moe.assemble(moe.of(told(), folder=tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "a.txt").write_text("\n".join(MATHS))
    recipe = told(gate_mode="trained")
    for entry in recipe["experts"]:
        entry["data"] = "a.txt"
    with pytest.raises(NonFiniteError, match="feed-forward block 1"):
        moe.assemble(moe.of(recipe, folder=tmp_path), tmp_path / "out")


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(InputError, match="no token of the prompt ''"):
        gates.of_prompts(dense(), moe_models.tokenizer(), [asked("")], False)


# -- learned ---------------------------------------------------------------------------------------


def test_regression_is_at_its_minimum():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(90, 5, generator=rng) * torch.tensor([1.0, 5.0, 0.1, 1.0, 2.0])
    y = torch.tensor([0] * 60 + [1] * 20 + [2] * 10)
    x[y == 1] += 1
    w = train.regression(x, y, 3, 1e-2).double().requires_grad_(True)
    spread = x.double().square().mean(0).sqrt()
    means = [cross_entropy(x[y == t].double() @ w.T, y[y == t]) for t in range(3)]
    loss = sum(means) / 3 + 0.01 / 2 * (w * spread).square().sum()
    loss.backward()
    assert w.grad is not None
    assert float((w.grad / spread).abs().max()) < 1e-3
    with torch.no_grad():
        for step in (0.01, -0.01):
            moved = w + step * torch.randn(w.shape, generator=rng)
            other = [cross_entropy(x[y == t].double() @ moved.T, y[y == t]) for t in range(3)]
            assert sum(other) / 3 + 0.005 * (moved * spread).square().sum() > loss


def test_gates_see_what_blocks_take_in_without_padding():
    model, tokenizer, how = dense(), moe_models.tokenizer(), Training(tokens=40, max_length=8)
    texts = {"maths": MATHS[:3], "bank": BANK[:2]}
    found, labels = train._states(model, train.feed_forward(model), tokenizer, texts, how, 40)
    norm = model.model.layers[1].post_attention_layernorm
    expected = []
    for text in MATHS[:3] + BANK[:2]:  # alone, so without padding
        seen = []
        hook = norm.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[0]))
        states(model, tokenizer.decode(tokenizer(text)["input_ids"][:8]))
        hook.remove()
        expected.append(seen[0])
    torch.testing.assert_close(found[1], torch.cat(expected), rtol=1e-4, atol=1e-5)
    lengths = [len(one) for one in expected]
    assert labels.tolist() == [0] * sum(lengths[:3]) + [1] * sum(lengths[3:])


def test_layers_may_come_in_groups(monkeypatch):
    """A gigabyte of states at a time, in as many passes of the base as that takes."""
    model, tokenizer, how = dense(num_hidden_layers=3), moe_models.tokenizer(), Training(tokens=60)
    texts = {"maths": MATHS[:9], "bank": BANK[:9]}
    steps = []
    whole, report = train.classifiers(model, tokenizer, texts, texts, how)
    monkeypatch.setattr(train, "MEMORY", 1)
    apart, other = train.classifiers(
        model, tokenizer, texts, texts, how, lambda *told: steps.append(told)
    )
    torch.testing.assert_close(whole, apart, rtol=1e-4, atol=1e-4)
    assert report.accuracy == other.accuracy
    assert steps == [("gates", 1, 3), ("gates", 2, 3), ("gates", 3, 3)]


def test_balance_by_hand():
    even = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    assert float(train.balance(even, 1)) == pytest.approx(1)
    one = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    assert float(train.balance(one, 1)) == pytest.approx(2, abs=1e-3)
    assert float(train.balance(one, 2)) == pytest.approx(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    family(root)
    family(root, "qwen2")
    (root / "maths.txt").write_text("\n".join(MATHS))
    (root / "bank.txt").write_text("\n".join(BANK))
    return root


def learned(kind="llama", **changes):
    made = told(kind, gate_mode="trained", **changes)
    for entry, name in zip(made["experts"], ("maths", "bank"), strict=True):
        entry["data"] = f"{name}.txt"
        del entry["positive_prompts"]
    return made


def test_trained_gates_send_texts_to_their_experts(place, tmp_path):
    report = moe.assemble(moe.of(learned(), folder=place), tmp_path / "out")
    assert report.training is not None
    assert min(report.training.accuracy) > 0.9
    assert report.training.before is None
    assert report.warnings == []
    assert max(report.conditions) == pytest.approx(1)  # two gates, their mean apart
    texts = {"maths": MATHS[:9], "bank": BANK[:9]}
    found = moe.routes(tmp_path / "out", texts, ["maths", "bank"])
    for group, layers in enumerate(found.shares):
        for row in layers:
            assert row[group] > 0.7
            assert sum(row) == pytest.approx(1)
    # The shares are the chances of the classifier, averaged over tokens that are no padding.
    model = loaded(tmp_path / "out")
    inside, total = [], 0
    hook = model.model.layers[0].mlp.gate.register_forward_hook(
        lambda _, __, out: inside.append(out[0].softmax(1)[:, 0].sum())
    )
    for text in MATHS[:9]:
        ids = moe_models.tokenizer()(text)["input_ids"]
        total += len(ids)
        moe_models.logits(model, torch.tensor([ids]))
    hook.remove()
    assert found.shares[0][0][0] == pytest.approx(float(sum(inside)) / total, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_steps_lower_the_held_out_loss_and_move_gates_alone(kind, place, tmp_path):
    from transformers import AutoTokenizer

    shared = {"shared_experts": [{"source_model": f"{kind}-base"}]} if kind == "qwen2" else {}
    plain, how = learned(kind, **shared), {"steps": 8, "lr": 0.05, "balance": 0.01}
    if shared:
        plain["architecture"] = "qwen"
    moe.assemble(moe.of(plain, folder=place), tmp_path / "before")
    report = moe.assemble(moe.of({**plain, "train": how}, folder=place), tmp_path / "after")
    told = report.training
    assert told is not None
    assert told.before is not None
    assert told.after is not None
    assert told.after < told.before - 0.003
    assert told.after == min(loss for _, loss in told.history)
    one, other = Weights.open(tmp_path / "before"), Weights.open(tmp_path / "after")
    moved = {name for name in one.spec if not torch.equal(one[name], other[name])}
    gated = (".gate.weight", "shared_expert_gate.weight")
    assert moved == {name for name in one.spec if name.endswith(gated)}
    # What the report says is what the written mixture does.
    _, held = train.dealt({"maths": MATHS, "bank": BANK}, Training(), 0)
    tokenizer = AutoTokenizer.from_pretrained(place / f"{kind}-base")
    for folder, said in (("before", told.before), ("after", told.after)):
        model = loaded(tmp_path / folder)
        means = []
        for texts in held.values():
            losses = []
            for text in texts:
                ids = torch.tensor([tokenizer(text)["input_ids"]])
                losses.append(
                    cross_entropy(
                        moe_models.logits(model, ids)[0, :-1], ids[0, 1:], reduction="none"
                    )
                )
            means.append(float(torch.cat(losses).mean()))
        assert said == pytest.approx(sum(means) / 2, abs=1e-4)


def test_a_single_expert_a_token_learns_too(place, tmp_path):
    """Its weight is 1 whatever the gate says: gates that learn at top 1 would stand still."""
    recipe = learned(experts_per_token=1, train={"steps": 4, "lr": 0.05})
    moe.assemble(moe.of(learned(experts_per_token=1), folder=place), tmp_path / "before")
    report = moe.assemble(moe.of(recipe, folder=place), tmp_path / "after")
    assert report.training is not None
    losses = [loss for _, loss in report.training.history]
    assert len(set(losses)) > 1
    assert loaded(tmp_path / "after").config.num_experts_per_tok == 1
    assert report.training.after == min(losses)


def test_held_out_texts_are_apart():
    given = {"maths": MATHS, "bank": BANK[:2]}
    kept, held = train.dealt(given, Training(texts=20), 0)
    assert (len(kept["maths"]), len(held["maths"])) == (16, 4)
    assert not set(kept["maths"]) & set(held["maths"])
    assert (len(kept["bank"]), len(held["bank"])) == (1, 1)
    with pytest.raises(InputError, match="bank has 1 text"):
        train.dealt({"bank": BANK[:1]}, Training(), 0)
    batch = next(batches(["a"], moe_models.tokenizer(), 4))
    with pytest.raises(InputError, match="one token each"):
        train.mean_loss(dense(), moe_models.tokenizer(), {"x": ["a"]}, Training())
    assert batch["input_ids"].shape == (1, 1)
