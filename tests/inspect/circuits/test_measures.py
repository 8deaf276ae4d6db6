"""Ablation and forced attention: by hand, and the form that runs one token beside the whole."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package

import head_models  # type: ignore[import-not-found]
import torch

from pluribus.core.errors import InputError
from pluribus.inspect.circuits import Endings, HeadModel, ablate, evaluate, force_attention

close = {"atol": 1e-4, "rtol": 1e-4}
SOME = [(0, 1), (2, 0), (2, 3)]
WATCH = {(0, 0): ["here"], (2, 1): ["here", "there", "END"], (2, 3): ["there"]}


@pytest.fixture(scope="module", params=list(head_models.KINDS))
def heads(request):
    return HeadModel(head_models.KINDS[request.param]())


@pytest.fixture
def prompts():
    made = head_models.drawn(rows=7, names=("here", "there"))
    for place in made.places.values():
        place.clamp_(max=made.ends - 1)
    return made


def test_scores_by_hand(heads, prompts):
    score = evaluate(heads, prompts)
    logits = heads.run(prompts.clean, prompts.ends, ()).logits
    rows = range(len(prompts))
    best = logits.argmax(1).tolist()
    assert score.accuracy == sum(best[i] == prompts.answers[i] for i in rows) / len(prompts)
    beaten = [
        bool(logits[i, prompts.answers[i]] > logits[i, prompts.alternatives[i]]) for i in rows
    ]
    assert score.among == sum(beaten) / len(prompts)
    assert 0 < sum(beaten) < len(beaten)
    expected = sum(
        float(logits[i, prompts.answers[i]] - logits[i, prompts.alternatives[i]]) for i in rows
    )
    assert score.mean_difference == pytest.approx(expected / len(prompts), abs=1e-4)


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_endings_are_whole_passes(heads, prompts, kind, monkeypatch):
    monkeypatch.setattr("pluribus.inspect.circuits.measure.PART", 3)
    monkeypatch.setattr("pluribus.inspect.circuits.endings.PART", 3)
    seen: list[tuple[str, int, int]] = []
    endings = Endings(heads, prompts, lambda *told: seen.append(told))
    assert seen == [("reading prompts", number, 3) for number in (1, 2, 3)]
    whole = ablate(heads, prompts, SOME, kind)
    last = endings.ablate(SOME, kind)
    torch.testing.assert_close(last.difference, whole.difference, **close)
    assert last.hits == whole.hits
    clean = evaluate(heads, prompts)
    torch.testing.assert_close(endings.score().difference, clean.difference, **close)
    assert (whole.difference - clean.difference).abs().max() > 1e-2


def test_what_is_ablated(heads, prompts):
    """By setting z oneself: 0, the mean over prompts, the twin's; at the end and everywhere."""
    clean = heads.run(prompts.clean, prompts.ends)
    twin = heads.run(prompts.corrupt, prompts.ends)
    rows = torch.arange(len(prompts))
    layer, head = 1, 2
    at_end = clean.z[layer][rows, prompts.ends, head]

    def difference(z):
        logits = heads.patched(clean, z={(layer, head): z}).logits
        return logits[rows, prompts.answers] - logits[rows, prompts.alternatives]

    for kind, z in (
        ("zero", torch.zeros_like(at_end)),
        ("mean", at_end.mean(0).expand_as(at_end)),
        ("resample", twin.z[layer][rows, prompts.ends, head]),
    ):
        found = ablate(heads, prompts, [(layer, head)], kind).difference
        torch.testing.assert_close(found, difference(z), **close)
    means = torch.zeros_like(clean.z[layer][:, :, head])  # by how far from the end
    for row, end in enumerate(prompts.ends.tolist()):
        for place in range(end + 1):
            back = [
                clean.z[layer][i, e - (end - place), head]
                for i, e in enumerate(prompts.ends.tolist())
                if e >= end - place
            ]
            means[row, place] = torch.stack(back).mean(0)
    for kind, z in (
        ("zero", torch.zeros_like(means)),
        ("mean", means),
        ("resample", twin.z[layer][:, :, head]),
    ):
        found = ablate(heads, prompts, [(layer, head)], kind, everywhere=True).difference
        torch.testing.assert_close(found, difference(z), **close)


def test_forced_attention(heads, prompts):
    forced, names = [(1, 0), (2, 3)], ["here", "there"]
    found = force_attention(heads, prompts, forced, names, WATCH)
    rows = torch.arange(len(prompts))
    clean = heads.run(prompts.clean, prompts.ends)
    row = torch.zeros(prompts.clean.shape)
    for i in range(len(prompts)):
        places = {int(prompts.places[name][i]) for name in names}
        for place in places:
            row[i, place] = 1 / len(places)
    expected = heads.patched(clean, pattern=dict.fromkeys(forced, row), keep=("pattern",))
    difference = (
        expected.logits[rows, prompts.answers] - expected.logits[rows, prompts.alternatives]
    )
    torch.testing.assert_close(found.difference, difference, **close)
    last = Endings(heads, prompts).force_attention(forced, names, WATCH)
    torch.testing.assert_close(last.difference, found.difference, **close)
    # a forced head looks half there (wholly where both names are one place)
    both = sum(
        1.0 if prompts.places["here"][i] == prompts.places["there"][i] else 0.5 for i in rows
    )
    assert found.attention[2, 3]["there"] == pytest.approx(both / len(prompts))
    seen = expected.pattern[2][rows, 1, prompts.ends, prompts.places["here"]].mean()
    assert found.attention[2, 1]["here"] == pytest.approx(float(seen), abs=1e-5)


def test_watched_attention(heads, prompts):
    clean = heads.run(prompts.clean, prompts.ends)
    rows = torch.arange(len(prompts))
    score = evaluate(heads, prompts, WATCH)
    for (layer, head), names in WATCH.items():
        for name in names:
            seen = clean.pattern[layer][rows, head, prompts.ends, prompts.position(name)].mean()
            assert score.attention[layer, head][name] == pytest.approx(float(seen), abs=1e-6)
    last = Endings(heads, prompts).score(WATCH)
    for head, names in WATCH.items():
        for name in names:
            expected = score.attention[head][name]
            assert last.attention[head][name] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda h, p: ablate(h, p, [(0, 4)]), "head 0.4 does not exist"),
        (lambda h, p: ablate(h, p, []), "at least one head"),
        (lambda h, p: ablate(h, p, [(0, 0)], "median"), "zero, mean, resample"),
        (lambda h, p: Endings(h, p).ablate([(0, 0)], "median"), "zero, mean, resample"),
        (lambda h, p: Endings(h, p).ablate([]), "at least one head"),
        (lambda h, p: force_attention(h, p, [(1, 0)], ["wrong1"]), "no position 'wrong1'"),
        (lambda h, p: force_attention(h, p, [(1, 0)], ["END"]), "is the end itself"),
        (lambda h, p: force_attention(h, p, [], ["here"]), "at least one head"),
        (lambda h, p: Endings(h, p).force_attention([(9, 0)], ["here"]), "head 9.0"),
        (lambda h, p: evaluate(h, p, {(0, 0): ["her"]}), "Did you mean 'here'"),
    ],
)
def test_refused(make, said, prompts):
    with pytest.raises(InputError, match=said):
        make(HeadModel(head_models.llama()), prompts)
