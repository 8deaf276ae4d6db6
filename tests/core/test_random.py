import numpy as np
import pytest
import torch

from pluribus.core.merger import At
from pluribus.core.random import key, uniform

N = 100_000


def draw(start=0, stop=N, *, seed=0, name="x", stream=0, like=None):
    at = At(name, (N,), start, stop, seed=seed)
    return uniform(at, stream, np.zeros(0, np.float32) if like is None else like)


def splitmix(state, count):
    """The published generator, in whole numbers."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        out.append(z ^ (z >> 31))
    return out


def test_the_published_sequence():
    """Reference values of splitmix64 with seed 1234567, as in Rosetta Code and the Java library."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert splitmix(1234567, 3) == expected
    ours = draw(0, 50, seed=7, name="w", stream="s")
    expected = [(z >> 40) * 2.0**-24 for z in splitmix(key(7, "w", "s"), 50)]
    np.testing.assert_array_equal(ours, np.array(expected, np.float32))


@pytest.mark.parametrize("size", [1, 7, 1000, 33_333])
def test_blocks_may_be_cut_anywhere(size):
    parts = [draw(start, min(start + size, 5000)) for start in range(0, 5000, size)]
    np.testing.assert_array_equal(np.concatenate(parts), draw(0, 5000))


def test_torch_draws_the_same_bits():
    for seed in (0, 1, 2**40):
        ours = draw(123, 9999, seed=seed, like=torch.zeros(0))
        assert ours.dtype == torch.float32
        np.testing.assert_array_equal(ours.numpy(), draw(123, 9999, seed=seed))


def test_far_elements_of_large_tensors():
    start = 2**40
    at = At("x", (2**41,), start, start + 10)
    np.testing.assert_array_equal(
        uniform(at, 0, np.zeros(0)), uniform(at, 0, torch.zeros(0)).numpy()
    )


def test_uniform_in_the_unit_interval():
    x = draw().astype(np.float64)
    assert x.min() >= 0
    assert x.max() < 1
    assert x.mean() == pytest.approx(0.5, abs=0.005)
    assert x.var() == pytest.approx(1 / 12, abs=0.002)
    counts = np.histogram(x, 50, (0, 1))[0]
    chi = ((counts - N / 50) ** 2 / (N / 50)).sum()
    assert chi < 49 + 5 * np.sqrt(2 * 49)
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.015


def test_seeds_names_and_streams_are_independent():
    streams = [
        draw(),
        draw(seed=1),
        draw(name="y"),
        draw(stream=1),
        draw(stream="0/1"),
        draw(name="x\0", stream=0),
    ]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.02


def test_an_empty_block():
    assert draw(5, 5).shape == (0,)
