"""The claim `moe` at toy size: its figures are what they are said to be."""

import math

import pytest
import torch

from pluribus.claims import Outcome, moe
from pluribus.tasks import sets

WORDS = {
    "gsm8k": "one two three four five six seven eight nine ten",
    "mr": "a fine dull film funny tired actor scene plot end",
    "ag_news": "market team wins falls shares match space oil game minister",
}


def records(name):
    """Rows like those of a set: random words of its own."""
    rng = torch.Generator().manual_seed(len(name))
    rows = []
    for split, count in (("train", 46), ("test", 12)):
        for _ in range(count):
            order = torch.randint(10, (12,), generator=rng).tolist()
            text = " ".join(WORDS[name].split()[i] for i in order)
            told = (
                {"question": text, "answer": "so <<1+1=2>>two"}
                if name == "gsm8k"
                else {"text": text}
            )
            rows.append({**told, "split": split})
    return rows


@pytest.fixture(scope="module")
def figures():
    patch = pytest.MonkeyPatch()
    patch.setattr(sets, "records", records)
    for name, value in {
        "ROWS": {"train": 40, "val": 6, "test": 12},
        "WIDTH": 32,
        "INNER": 48,
        "LAYERS": 2,
        "TOKENS": 400,
        "BASE_STEPS": 30,
        "EXPERT_STEPS": 12,
        "GATE_STEPS": 2,
        "GATE_TEXTS": 20,
        "GATES": ("random", "hidden", "trained", "trained_steps"),
        "GRID": (0.5, 1.0),
    }.items():
        patch.setattr(moe, name, value)
    with patch.context():
        found = dict(moe.measure(0))
    patch.undo()
    return found


def test_figures_are_means_over_domains(figures):
    for name in ("base", "own expert", "average", "moe trained top 1", "moe random top 2"):
        each = [figures[f"{name} {domain}"] for domain in moe.DOMAINS]
        assert figures[name] == pytest.approx(math.prod(each) ** (1 / 3))
    for domain in moe.DOMAINS:
        assert figures[f"own expert {domain}"] == figures[f"expert {domain} {domain}"]
    assert figures["task arithmetic scale"] in (0.5, 1.0)
    assert all(math.isfinite(value) for value in figures.values())


def test_learning_shows(figures):
    assert figures["base"] < 400
    assert figures["own expert"] < figures["base"]
    weight = "weight of the own expert"
    assert figures[f"moe trained top 1 {weight}"] > 90  # no word is in two domains
    assert abs(figures["moe trained top 1"] / figures["own expert"] - 1) < 0.02


def test_every_check_names_a_figure(figures):
    for check in moe.CLAIM.checks:
        left, right = check.left, check.right
        for name in (left, right or left):
            stem = name.split(" top ")[0]
            assert name in figures or stem in {f"moe {m}" for m in ("cheap_embed", "hidden_avg")}
    told = {name: [value] for name, value in figures.items()}
    told |= {f"moe {m} top {k}": [9.0] for m in ("cheap_embed", "hidden_avg") for k in (1, 2)}
    assert Outcome(moe.CLAIM, (0,), told, 1.0).verdict in ("holds", "fails", "measured")


def test_losses_leave_out_what_is_padding():
    torch.manual_seed(0)
    model = moe.model(50, 0).eval()
    ids = torch.tensor([[0, 5, 6, 0], [0, 7, 0, -1]])
    found = moe.losses(model, ids).detach()
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([[0, 7, 0]])).logits[0].log_softmax(1)
    assert found.shape == (5,)
    assert float(found[3]) == pytest.approx(-float(alone[0, 7]), abs=1e-5)
    assert float(found[4]) == pytest.approx(-float(alone[1, 0]), abs=1e-5)


def test_answers_without_calculator_marks(monkeypatch):
    monkeypatch.setattr(sets, "records", records)
    monkeypatch.setattr(moe, "ROWS", {"train": 40, "val": 6, "test": 12})
    parts = {split: moe.texts("gsm8k", split) for split in ("train", "val", "test")}
    assert [len(found) for found in parts.values()] == [40, 6, 12]
    assert parts["train"][0].endswith(" so two")
    assert not set(parts["train"]) & set(parts["val"])
