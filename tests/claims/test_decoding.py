"""The claims `eft` and `logits-fusion` at toy size: their figures are what they are said to be."""

import math
import sys
from pathlib import Path

import pytest
import torch

from pluribus.claims import Outcome, _bytes, eft, logits_fusion
from pluribus.claims.eft import apart  # itself, not what the toy bed has for it
from pluribus.core.errors import MissingError
from pluribus.decode import Fused, StaticFusion, speculative, upscale
from pluribus.tasks import sets

sys.path.insert(0, str(Path(__file__).parents[1] / "decode"))  # tests have no package
from members import moved, tiny  # type: ignore[import-not-found]

MODULE = '"""Says {word}."""\n\n\ndef {word}():\n    """Return {word}."""\n    return "{word}"\n'
TOY = {
    "LENGTH": 24,
    "BATCH": 8,
    "SIZES": {"small": (16, 1), "large": (32, 2)},
    "STEPS": {"small": 60, "large": 60},
    "TUNED_STEPS": 25,
    "WINDOWS": 12,
}


def records(name):
    """Dialogues like those of the set: one speaker asks for the family's thing, the other nods."""
    assert name == "star_dialogues"
    rows = []
    for families in _bytes.FAMILIES.values():
        for family in families:
            for number in range(12):
                split = "test" if number > 8 else "train"
                turns = [
                    ["user", f"my {family} number {number}"],
                    ["query", family, []],
                    ["wizard", f"your {family} is ready", "done"],
                ]
                rows.append({"tasks": [f"{family}_book"], "turns": turns, "split": split})
    rows.append({"tasks": ["bank_balance", "weather"], "turns": [["user", "no"]], "split": "test"})
    return rows


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Every constant of the bed at toy size, a library of 20 files, and nothing kept after."""
    library = tmp_path_factory.mktemp("library")
    for number in range(20):
        text = MODULE.format(word=f"word_{number}")
        (library / f"{number:02}.py").write_text(text, "utf-8")
    for name in ("test", "config-3.x"):
        (library / name).mkdir()
        (library / name / "left_out.py").write_text("LEFT_OUT = 1\n", "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "records", records)
        patch.setattr(_bytes.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
        for name, value in TOY.items():
            patch.setattr(_bytes, name, value)
        for name, value in {"PROMPTS": 1, "PROMPT": 8, "NEW": 8}.items():
            patch.setattr(eft, name, value)
        patch.setattr(eft, "apart", lambda fused, prompt: 2.5e-7 * len(prompt))
        _bytes.streams.cache_clear()
        _bytes.bed.cache_clear()
        yield library
    _bytes.streams.cache_clear()
    _bytes.bed.cache_clear()


@pytest.fixture(scope="module")
def emulated(toy):
    return dict(eft.measure(0))


@pytest.fixture(scope="module")
def fused(toy, emulated):
    bed = _bytes.bed(0, None)
    small = bed.tuned("small", "dialogues")
    found = dict(logits_fusion.measure(0))
    assert _bytes.bed(0, None) is bed  # one bed serves both claims,
    assert bed.tuned("small", "dialogues") is small  # and trains a model once
    return found


def text(domain, split):
    return bytes(_bytes.streams()[domain, split].tolist()).decode()


def test_texts(toy):
    first = "user: my bank number 0\nwizard: your bank is ready\n\n"
    assert text("X", "train").startswith(first)
    assert text("Z", "test").startswith("user: my doctor number 9\n")
    assert "user: no" not in text("X", "test")  # several tasks in one
    for split in ("train", "test"):
        assert text("dialogues", split) == "".join(text(name, split) for name in "XYZ")
    held_out = [MODULE.format(word=f"word_{number}") for number in (0, 10)]
    assert text("source", "test") == "\n\n".join(held_out)
    docs = text("docstrings", "test").split("\n\n")
    assert docs == ["Says word_0.", "Return word_0.", "Says word_10.", "Return word_10."]
    assert text("source", "train").count("def word_") == 18
    assert "LEFT_OUT" not in text("source", "train")


def test_a_python_without_sources(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(_bytes.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(MissingError, match="holds 0 files of Python's own library"):
        _bytes._library()


def test_told_one_byte_at_a_time(toy):
    bed = _bytes.bed(0, None)
    model, windows = bed.base("large"), bed.windows("X")[:3]
    right, bits = 0, 0.0
    for row in windows:
        for at in range(1, len(row)):
            with torch.no_grad():
                scores = model(input_ids=row[None, :at]).logits[0, -1]
            right += int(scores.argmax()) == int(row[at])
            bits -= float(scores.log_softmax(0)[row[at]]) / math.log(2)
    found = _bytes.told(model, windows, rows=2)
    assert found.accuracy == pytest.approx(100 * right / (3 * 24))
    assert found.bits == pytest.approx(100 * bits / (3 * 24), rel=1e-4)
    assert found.weights == {}


def test_windows_are_spread_over_the_test_text(toy):
    windows = _bytes.bed(0, None).windows("Z")
    assert windows.shape == (12, 25)
    whole = text("Z", "test")
    assert bytes(windows[0].tolist()).decode() == whole[:25]
    last = len(whole) // 25 * 25
    assert bytes(windows[-1].tolist()).decode() == whole[last - 25 : last]


def test_figures_of_eft(emulated):
    assert emulated["dialogues/large tuned/bits"] < emulated["dialogues/large base/bits"]
    for domain, end in (("dialogues", "1"), ("source", "0")):
        up = emulated[f"{domain}/up-scaled/bits"]
        assert emulated[f"{domain}/dial {end}/bits"] == pytest.approx(up, rel=1e-5)
        base, tuned = (emulated[f"{domain}/large {which}/bits"] for which in ("base", "tuned"))
        recovered = 100 * (base - up) / (base - tuned)
        assert emulated[f"{domain} recovered"] == pytest.approx(recovered)
        turned = [emulated[f"{domain}/dial {share:g}/bits"] for share in eft.DIAL]
        turned = turned if end == "1" else turned[::-1]
        rise = max(turned[i + 1] - turned[i] for i in range(4))
        assert emulated[f"{domain} dial's largest rise"] == pytest.approx(rise)
        assert 0 <= emulated[f"{domain} accepted"] <= 100
        assert 100 / 17 < emulated[f"{domain} large forwards"] <= 100
        assert emulated[f"{domain} speculation off by"] == pytest.approx(2)  # of 8 bytes


def test_figures_of_logits_fusion(fused):
    bed = _bytes.bed(0, None)
    windows = bed.windows("X")
    with torch.no_grad():
        large, base, x, y = (
            model(input_ids=windows[:, :-1]).logits.log_softmax(-1)
            for model in (
                bed.base("large"),
                bed.base("small"),
                bed.tuned("small", "X"),
                bed.tuned("small", "Y"),
            )
        )
    for alpha in (1.0, 0.5):
        expected = (large + alpha * (x - base) + alpha * (y - base)).argmax(-1) == windows[:, 1:]
        got = fused[f"X/static {alpha:g}/accuracy"]
        assert got == pytest.approx(100 * float(expected.double().mean()), abs=0.4)  # a tie or so
    for domain in ("X", "Y"):
        fixed = [fused[f"{domain}/own, {alpha:g}/accuracy"] for alpha in logits_fusion.FIXED]
        assert fused[f"{domain} best fixed weight"] == max(fixed)
        assert fused[f"{domain} worst fixed weight"] == min(fixed)
    weights = [fused[f"Z weight of {role}"] for role in ("X", "Y")]
    assert 0 < sum(weights) <= 2
    assert min(weights) >= 0
    gap = fused["Z/large tuned/accuracy"] - fused["Z/large base/accuracy"]
    gained = fused["Z/dynamic/accuracy"] - fused["Z/large base/accuracy"]
    assert fused["Z share of the gap"] == pytest.approx(100 * gained / gap)


def test_the_selected_weights_are_the_fusers(toy, fused):
    bed = _bytes.bed(0, None)
    both = logits_fusion._fused(bed, ("X", "Y"))
    windows = bed.windows("Y")
    found = both(input_ids=windows[:, :-1], use_cache=False).weights
    for role in ("X", "Y"):
        assert fused[f"Y weight of {role}"] == pytest.approx(float(found[role].mean()), rel=1e-5)


@pytest.mark.parametrize("claim", [eft, logits_fusion])
def test_every_check_names_a_figure(claim, emulated, fused):
    figures = emulated if claim is eft else fused
    told = Outcome(claim.CLAIM, (0,), {name: [v] for name, v in figures.items()}, 1.0).to_dict()
    assert len(told["checks"]) == len(claim.CLAIM.checks)
    assert all(math.isfinite(check["measured"]) for check in told["checks"])


@pytest.fixture
def small():
    """A fused model over 12 tokens, whose tuned role drafts what the fusion often refuses."""
    base = tiny(1, vocabulary=12)
    return upscale(tiny(0, vocabulary=12, layers=3), moved(base, 2, by=0.3), base)


def test_speculation_is_exact_and_the_measure_would_see_if_not(small, monkeypatch):
    prompt = torch.tensor([3, 7, 5])
    assert apart(small, prompt) < 1e-6
    monkeypatch.setattr(speculative, "residual", lambda p, q: p)
    assert apart(small, prompt) > 1e-2


def test_told_counts_weights(toy):
    models = {"large": tiny(0, 256), "base": tiny(1, 256), "a": tiny(2, 256), "b": tiny(3, 256)}
    fusion = Fused(models, StaticFusion(alpha={"a": 0.25, "b": 1.5}))
    ids = torch.randint(256, (5, 9), generator=torch.Generator().manual_seed(0))
    assert _bytes.told(fusion, ids, rows=2).weights == {"a": 0.25, "b": 1.5}
