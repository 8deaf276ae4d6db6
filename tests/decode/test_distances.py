"""Compiled passes over a vocabulary beside their readable form, in float32 and in float64."""

import os
import warnings

import numpy as np
import pytest
import torch

from pluribus.decode.fusers import _distances
from pluribus.decode.fusers._distances import distances, straight
from pluribus.decode.fusers._logits import normalised
from pluribus.decode.fusers._search import _evenly
from pluribus.kernels import tilted

ROWS = 5
ROLES = ("large", "base", "tuned", "other")


def drawn(size: int, spread: float = 0.4, offset: float = 30.0):
    """Logits of four models over `size` tokens: a large one, a base, and two near it."""
    rng = torch.Generator().manual_seed(size)
    large, base, one, two = torch.randn(4, ROWS, size, generator=rng)
    moved = (base * 3, base * 3 + spread * one, base * 3 - spread * two)
    return {"large": large * 4 + offset, **dict(zip(ROLES[1:], moved, strict=True))}


def wide(logits):
    return {role: x.double() for role, x in logits.items()}


def readable(logits):
    known, kept = normalised(logits)
    return distances(known["large"], known["base"], [known["tuned"], known["other"]], kept)


def compiled(logits):
    return straight(logits["large"], logits["base"], [logits["tuned"], logits["other"]])


@pytest.mark.parametrize("size", [1, 7, 1024, 1025, 5000])
def test_exponentials(size):
    x = torch.linspace(-86.9, 88.0, size).numpy()
    out = np.empty_like(x)
    tilted.exponentials(x, out) if size <= 1024 else [
        tilted.exponentials(x[low : low + 1024], out[low : low + 1024])
        for low in range(0, size, 1024)
    ]
    np.testing.assert_allclose(out, np.exp(x.astype(np.float64)), rtol=3e-7)


def test_exponentials_far_out():
    x = np.array([-np.inf, -1e9, -88.0, 0.0], np.float32)
    out = np.empty_like(x)
    tilted.exponentials(x, out)
    assert out.tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("size", [2, 1023, 3000])
@pytest.mark.parametrize("threads", [1, 2, 9])
def test_all_numbers_beside_float64(size, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    logits = drawn(size)
    found, wanted = compiled(logits), readable(wide(logits))
    assert found is not None
    for name in ("large", "p", "deltas", "means", "there", "back"):
        own, true = getattr(found, name), getattr(wanted, name)
        torch.testing.assert_close(own.double(), true, rtol=1e-4, atol=2e-5, msg=name)
    assert found.lowest == pytest.approx(wanted.lowest, rel=1e-5)
    assert found.longest == pytest.approx(wanted.longest, rel=1e-4)
    places = torch.linspace(0.1, 1.9, 19)[:, None] * torch.linspace(0.2, 1.0, ROWS)
    for t in range(2):
        for own, true in zip(found.along(t, places), wanted.along(t, places.double()), strict=True):
            torch.testing.assert_close(own.double(), true, rtol=1e-4, atol=5e-5)


def test_along_is_each_place_by_itself():
    known = readable(wide(drawn(700)))
    places = torch.linspace(-1.0, 2.0, 7).double()[:, None].expand(-1, ROWS)
    one, other = known.along(1, places)
    for number, c in enumerate(places):
        moved = known.moved(c[:, None] * known.deltas[1], c * known.means[1])
        torch.testing.assert_close(one[number], moved[0], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(other[number], moved[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("spread", [0.05, 0.4, 3.0])
def test_close_places_follow_from_moments(spread):
    """Each place by itself, in float64, is what the series of the middle's moments gives."""
    logits = drawn(900, spread=spread)
    known, fast = readable(wide(logits)), compiled(logits)
    assert fast is not None
    first = torch.linspace(0.1, 1.7, ROWS)
    places = first + torch.linspace(0.0, 0.2, 33)[:, None]
    alone = [known.moved(c[:, None] * known.deltas[1], c * known.means[1]) for c in places.double()]
    wanted = [torch.stack(column) for column in zip(*alone, strict=True)]
    slow, quick = known.around(1, places.double()), fast.around(1, places)
    assert slow is not None
    assert quick is not None
    for own, found, true in zip(slow, quick, wanted, strict=True):
        torch.testing.assert_close(own, true, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(found.double(), true, rtol=2e-4, atol=5e-5 * max(1, spread**2))


def test_a_series_that_would_be_long_is_none():
    known = readable(wide(drawn(500, spread=8.0)))
    places = torch.linspace(0.0, 1.0, 9).double()[:, None].expand(-1, ROWS)
    assert known.around(0, places) is None


def test_brackets_agree_with_and_without_the_series(monkeypatch):
    from pluribus.decode.fusers.logits_fusion import DynamicFusion

    logits = drawn(3000)
    quick = DynamicFusion(mode="bracket")(logits)
    monkeypatch.setattr(_distances.Distances, "around", lambda *_: None)
    slow = DynamicFusion(mode="bracket")(logits)
    for role in ("tuned", "other"):
        torch.testing.assert_close(quick.weights[role], slow.weights[role], rtol=0, atol=2e-3)
    torch.testing.assert_close(quick.info["loss"], slow.info["loss"], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(quick.log_probs, slow.log_probs, rtol=0, atol=2e-2)


def test_one_place_and_a_range_without_width():
    known = compiled(drawn(300))
    assert known is not None
    single = known.along(0, torch.full((1, ROWS), 0.7))
    equal = known.along(0, torch.full((4, ROWS), 0.7))
    for one, four in zip(single, equal, strict=True):
        torch.testing.assert_close(four, one.expand(4, -1), rtol=1e-5, atol=1e-6)


def test_what_leaves_the_range_is_not_multiplied(monkeypatch):
    logits = drawn(500, spread=60.0)
    found, wanted = compiled(logits), readable(wide(logits))
    assert found is not None
    monkeypatch.setattr(_distances, "_compiled_sums", None)  # must not be called
    places = torch.linspace(0.0, 2.0, 5)[:, None].expand(-1, ROWS)
    for own, true in zip(found.along(0, places), wanted.along(0, places.double()), strict=True):
        torch.testing.assert_close(own.double(), true, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(role, value):
    logits = drawn(2000)
    logits[role][3, 1500] = value
    assert compiled(logits) is None


def test_other_types_and_gradients_go_the_readable_way():
    assert compiled(wide(drawn(50))) is None
    logits = drawn(50)
    logits["tuned"].requires_grad_()
    assert compiled(logits) is None


def test_even_runs():
    cs = np.array([-0.2, -0.1, 0.1, 0.2, 0.3, 0.7])
    assert [run.tolist() for run in _evenly(cs)] == [[-0.2, -0.1], [0.1, 0.2, 0.3], [0.7]]
    assert [run.tolist() for run in _evenly(cs[:1])] == [[-0.2]]
    grid = np.round(0.1 * np.arange(1, 21), 12)
    assert len(_evenly(grid)) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_process_has_helpers_of_its_own():
    p = np.full((4, 2000), 1 / 2000, np.float32)
    ones = np.ones(4, np.float32)
    wanted = tilted.sums(p, p, ones, ones, 3, threads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads about
        child = os.fork()
    if not child:  # pragma: no cover
        same = np.array_equal(tilted.sums(p, p, ones, ones, 3, threads=2), wanted)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
