"""What a pass keeps and sets, and the fast engine beside the plain one, on three layouts."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package

import head_models  # type: ignore[import-not-found]
import torch

from pluribus.inspect.circuits import (
    HeadModel,
    activation_patch,
    attribution,
    path_patch,
    screened,
)
from pluribus.inspect.circuits.patching import top

KINDS = list(head_models.KINDS)
close = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module", params=KINDS)
def heads(request):
    return HeadModel(head_models.KINDS[request.param]())


def test_the_cache_is_what_the_model_says(heads):
    """Logits, attention and the residual stream are those of transformers' own eager pass."""
    prompts = head_models.drawn()
    kept = heads.run(prompts.clean, prompts.ends)
    model = heads.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for row, end in enumerate(prompts.ends.tolist()):
            ids = prompts.clean[row : row + 1, : end + 1]
            said = model(ids, output_attentions=True, output_hidden_states=True)
            torch.testing.assert_close(kept.logits[row], said.logits[0, -1], **close)
            for layer in range(heads.layers):
                pattern = kept.pattern[layer][row, :, : end + 1, : end + 1]
                torch.testing.assert_close(pattern, said.attentions[layer][0], **close)
                resid = kept.resid[layer][row, : end + 1]
                torch.testing.assert_close(resid, said.hidden_states[layer][0], **close)
    model.set_attn_implementation(before)
    # what a block adds is W_O z and the part behind attention
    for layer, block in enumerate(heads.blocks):
        added = block.out(kept.z[layer].flatten(2)) + kept.mlp[layer]
        torch.testing.assert_close(kept.resid[layer] + added, kept.resid[layer + 1], **close)


def test_the_model_attends_as_before(heads):
    before = heads.model.config._attn_implementation
    assert before == "sdpa"
    heads.run(torch.ones(1, 3, dtype=torch.long))
    assert heads.model.config._attn_implementation == before


def test_setting_what_was_there_changes_nothing(heads):
    prompts = head_models.drawn()
    rows = torch.arange(len(prompts))
    at = prompts.position("here")
    clean = heads.run(prompts.clean, prompts.ends)
    sets = {
        "z": {(1, 2): clean.z[1][rows, at, 2], (2, 0): clean.z[2][:, :, 0]},
        "q": {(2, 1): clean.q[2][rows, 1, at]},
        "k": {(1, 1): clean.k[1][rows, 1, at]},
        "v": {(1, 0): clean.v[1][rows, 0, at]},
        "pattern": {(2, 3): clean.pattern[2][rows, 3, at]},
    }
    same = heads.patched(clean, **sets, freeze=True, freeze_mlps=True, position=at)
    torch.testing.assert_close(same.logits, clean.logits, **close)
    other = heads.patched(clean, z={(1, 2): 1 + clean.z[1][rows, at, 2]}, position=at)
    assert (other.logits - clean.logits).abs().max() > 1e-2


@pytest.mark.parametrize("freeze_mlps", [False, True])
def test_paths_to_the_logits(heads, freeze_mlps):
    prompts = head_models.drawn()
    given = {"freeze_mlps": freeze_mlps, "allow_small_gap": True}
    fast = path_patch(heads, prompts, **given)
    plain = path_patch(heads, prompts, engine="plain", **given)
    torch.testing.assert_close(fast.differences, plain.differences, **close)
    assert fast.values.shape == (3, 4)
    assert fast.values.abs().max() > 1e-2


@pytest.mark.parametrize(
    ("receivers", "position", "freeze_mlps"),
    [
        ([(2, 0, "q"), (2, 3, "q"), (1, 1, "q")], "END", False),
        ([(2, 0, "q"), (2, 1, "k"), (2, 2, "v")], "END", False),
        ([(2, 1, "v"), (1, 0, "v")], "here", False),
        ([(2, 1, "v"), (1, 0, "v")], "here", True),
        ([(1, 0, "k")], "here", False),
        ([(2, 3, "q"), (1, 3, "k")], "here+1", True),
    ],
)
def test_paths_to_heads(heads, receivers, position, freeze_mlps):
    prompts = head_models.drawn(names=("here",))
    prompts.places["here"].clamp_(max=prompts.ends - 1)
    given = {"position": position, "freeze_mlps": freeze_mlps, "allow_small_gap": True}
    fast = path_patch(heads, prompts, receivers, **given)
    plain = path_patch(heads, prompts, receivers, engine="plain", **given)
    torch.testing.assert_close(fast.differences, plain.differences, equal_nan=True, **close)
    lowest = min(layer for layer, _, _ in receivers)
    assert fast.values[lowest + 1 :].isnan().all()
    moved = (fast.differences - fast.clean)[:lowest]
    assert moved.abs().max() > 1e-4
    if all(layer == lowest for layer, _, _ in receivers):  # none is reached from its own layer
        known = ~fast.values[lowest].isnan()
        torch.testing.assert_close(fast.values[lowest][known], torch.zeros(int(known.sum())))


@pytest.mark.parametrize("position", ["END", "here"])
def test_paths_with_others_frozen(heads, position):
    prompts = head_models.drawn()
    receivers = [(1, 1, "q"), (2, 3, "q")]
    given = {"position": position, "freeze_others": True, "allow_small_gap": True}
    fast = path_patch(heads, prompts, receivers, **given)
    plain = path_patch(heads, prompts, receivers, engine="plain", **given)
    torch.testing.assert_close(fast.differences, plain.differences, equal_nan=True, **close)
    free = path_patch(heads, prompts, receivers, position=position, allow_small_gap=True)
    apart = (free.differences - fast.differences).abs().nan_to_num(0).max()
    assert (apart > 1e-3) == (position == "END")  # the last layer moves its own position alone


@pytest.mark.parametrize("position", ["END", "here"])
def test_activations(heads, position):
    prompts = head_models.drawn()
    given = {"position": position, "allow_small_gap": True}
    fast = activation_patch(heads, prompts, **given)
    plain = activation_patch(heads, prompts, engine="plain", **given)
    torch.testing.assert_close(fast.differences, plain.differences, **close)


def test_small_batches_give_the_same(heads, monkeypatch):
    """A few rows at once, so that layers do not go together, and few prompts at once."""
    prompts = head_models.drawn()
    receivers = [(2, 1, "q"), (2, 1, "v")]
    whole = [
        path_patch(heads, prompts, allow_small_gap=True),
        path_patch(heads, prompts, receivers, allow_small_gap=True),
        activation_patch(heads, prompts, allow_small_gap=True),
    ]
    monkeypatch.setattr("pluribus.inspect.circuits.fast.ROWS", 1)
    monkeypatch.setattr("pluribus.inspect.circuits.patching.PART", 2)
    parts = [
        path_patch(heads, prompts, allow_small_gap=True),
        path_patch(heads, prompts, receivers, allow_small_gap=True),
        activation_patch(heads, prompts, allow_small_gap=True),
    ]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.differences, other.differences, equal_nan=True, **close)


def test_chosen_senders(heads):
    prompts = head_models.drawn()
    every = path_patch(heads, prompts, allow_small_gap=True)
    some = path_patch(heads, prompts, senders=[(2, 1), (0, 3)], allow_small_gap=True)
    for layer, head in ((2, 1), (0, 3)):
        expected = every.differences[layer, head]
        torch.testing.assert_close(some.differences[layer, head], expected, **close)
    assert int((~some.values.isnan()).sum()) == 2
    found = screened(heads, prompts, share=0.25, allow_small_gap=True)
    guess = attribution(heads, prompts, allow_small_gap=True)
    kept = {tuple(place) for place in (~found.values.isnan()).nonzero().tolist()}
    assert kept == set(top(guess.values, 0.25))
    assert len(kept) == 3


@pytest.mark.parametrize("freeze_mlps", [False, True])
def test_attribution_is_the_limit_of_small_differences(heads, freeze_mlps):
    """Sending 0.01 of the way from clean to corrupted moves D by 0.01 of what is attributed."""
    from pluribus.inspect.circuits.prompts import logit_difference

    prompts = head_models.drawn()
    guess = attribution(heads, prompts, freeze_mlps=freeze_mlps, allow_small_gap=True)
    clean = heads.run(prompts.clean, prompts.ends, ("z", "mlp"))
    corrupt = heads.run(prompts.corrupt, prompts.ends, ("z",))
    rows = torch.arange(len(prompts))
    expected, found = [], []
    for layer in range(heads.layers):
        for head in range(heads.heads):
            own, twin = (run.z[layer][rows, prompts.ends, head] for run in (clean, corrupt))
            sent = heads.patched(
                clean,
                z={(layer, head): own + 0.01 * (twin - own)},
                freeze=True,
                freeze_mlps=freeze_mlps,
            )
            moved = (logit_difference(sent.logits, prompts) - guess.clean).mean()
            found.append(100 * float(moved))
            expected.append(float((guess.differences[layer, head] - guess.clean).mean()))
    large = max(map(abs, expected))
    checked = [(a, b) for a, b in zip(expected, found, strict=True) if abs(a) > 0.1 * large]
    assert len(checked) > 2
    for a, b in checked:
        assert b / a == pytest.approx(1, abs=0.02)


def test_effects_are_ratios_of_means():
    from pluribus.inspect.circuits import Effects

    made = Effects(
        torch.tensor([[[3.0, -1.0], [5.0, 3.0]]]),
        torch.tensor([4.0, 2.0]),
        torch.tensor([-6.0, 0.0]),
    )
    # means: clean 3, corrupted -3, patched 1 and 4
    torch.testing.assert_close(made.values, torch.tensor([[1 / 3, -1 / 6]]))
    torch.testing.assert_close(made.over(torch.tensor([0, 0])), torch.tensor([[0.1, -0.1]]))
    assert top(made.values, 0.5) == [(0, 0)]
    assert top(torch.tensor([[0.1, float("nan")], [-0.4, 0.2]]), 1.0) == [(1, 0), (1, 1), (0, 0)]
