"""Rows that are drawn: their values by the formula, their distribution, what they depend on."""

import math

import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.core.random import key
from pluribus.kernels.draws import number
from pluribus.surgery import settings
from pluribus.tokenizer import VocabIn
from pluribus.tokenizer.surgery import Surgery, rows_for
from pluribus.tokenizer.surgery_draw import normal, spread
from pluribus.tokenizer.surgery_match import Lexicon, match

NOTHING = np.empty((0, 0), np.float32)


def z(ids, width, name="e", stream="row", seed=0):
    return normal(np.array(ids), width, name=name, stream=stream, seed=seed)


def surgery(own, names, new, how, name="e", **more):
    """Rows of a model with one-letter tokens for a donor that has `new` beside them."""
    sides = (names, [*names, *new])
    model, donor = (
        Lexicon(VocabIn("m", {t: i for i, t in enumerate(s)}, len(s)), {}) for s in sides
    )
    return rows_for(name, np.asarray(own, np.float32), NOTHING, match(model, donor), how, **more)


def test_a_number_by_the_formula():
    """Element 2 of row 5 in a matrix of width 3 is number 17 of both streams."""
    u, v = (
        number(np.uint64(key(7, "e", f"row/{part}")), np.uint64(17)) / 2**24
        for part in ("radius", "angle")
    )
    wanted = math.sqrt(-2 * math.log(1 - u)) * math.cos(2 * math.pi * v)
    assert z([5], 3, seed=7)[0, 2] == pytest.approx(wanted, abs=1e-5)


def test_rows_do_not_depend_on_what_else_is_drawn():
    whole = z(range(9), 4)
    np.testing.assert_array_equal(z([7, 2], 4), whole[[7, 2]])
    for other in ({"seed": 1}, {"name": "head"}, {"stream": "noise"}):
        assert not np.isclose(z(range(9), 4, **other), whole).any()


def test_rows_are_standard_normal():
    values = np.sort(z(range(200), 200).ravel().astype(np.float64))
    exact = 0.5 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in values]))
    places = (np.arange(len(values)) + 0.5) / len(values)
    assert np.abs(exact - places).max() < 1.63 / math.sqrt(len(values))  # Kolmogorov, 1 %


def test_covariance_divides_by_the_number_of_rows():
    mean, root = spread(np.array([[1, 0], [3, 0], [1, 4], [3, 4]], np.float32))
    np.testing.assert_allclose(mean, [2, 2])
    np.testing.assert_allclose(root, [[1, 0], [0, 2]], atol=1e-12)


@pytest.mark.parametrize("rows", [3, 5000])  # a singular covariance, and more than one block
def test_the_root_is_one_of_the_covariance(rows):
    values = np.random.default_rng(0).standard_normal((rows, 6)).astype(np.float32)
    _, root = spread(values)
    np.testing.assert_allclose(root @ root.T, np.cov(values.T, bias=True), atol=1e-6)


def test_constant_rows_spread_nowhere():
    mean, root = spread(np.full((4, 3), 7, np.float32))
    np.testing.assert_array_equal(mean, [7, 7, 7])
    np.testing.assert_array_equal(root, np.zeros((3, 3)))


def test_randn_rows():
    own = [[1, 2], [3, 4]]
    rows, report = surgery(own, "ab", "xyz", Surgery(method="randn", seed=3))
    np.testing.assert_array_equal(rows[:2], own)
    np.testing.assert_array_equal(rows[2:], z([2, 3, 4], 2, seed=3))
    assert (report.copied, report.approximated, report.worst_error) == (2, 3, None)


def test_john_hewitt_rows_by_hand():
    own = [[1, 0], [3, 0], [1, 4], [3, 4]]  # mean (2, 2), deviations 1 and 2, uncorrelated
    rows, _ = surgery(own, "abcd", "xy", Surgery(method="john_hewitt"))
    np.testing.assert_array_equal(rows[:4], own)
    np.testing.assert_allclose(rows[4:], 2 + z([4, 5], 2) * [1, 2], rtol=1e-6)


def test_john_hewitt_rows_stay_in_the_span_of_the_others():
    """Rows on the line (1, 1) + t (3, 4) give new ones on it, at other places."""
    own = np.array([1, 1]) + np.array([[0], [1], [-2], [5]]) * np.array([3, 4])
    rows, _ = surgery(own, "abcd", "xyz", Surgery(method="john_hewitt"))
    along = (rows[4:] - 1) / [3, 4]
    np.testing.assert_allclose(along[:, 0], along[:, 1], atol=1e-5)
    assert along[:, 0].std() > 0.1


@pytest.mark.parametrize("method", ["randn", "john_hewitt"])
def test_many_rows_come_in_batches(method, monkeypatch):
    letters = [chr(0x4E00 + i) for i in range(1300)]
    own = np.random.default_rng(1).standard_normal((20, 3))
    seen = []
    rows, _ = surgery(
        own, letters[:20], letters[20:], Surgery(method=method),
        on_rows=lambda *told: seen.append(told),
    )  # fmt: skip
    assert seen == [(1024, 1280), (1280, 1280)]
    mean, root = spread(own) if method == "john_hewitt" else (0, np.eye(3))
    np.testing.assert_allclose(rows[20:], mean + z(range(20, 1300), 3) @ root.T, atol=1e-5)


def test_noise_is_added_to_new_rows_and_then_scaled():
    own = [[1, 2], [3, 6]]
    how = Surgery(method="mean", noise=0.5, scale=2, seed=4)
    rows, _ = surgery(own, "ab", "xy", how)
    np.testing.assert_array_equal(rows[:2], own)
    noise = z([2, 3], 2, stream="noise", seed=4)
    np.testing.assert_allclose(rows[2:], 2 * (np.array([2, 4]) + 0.5 * noise), rtol=1e-6)


def test_randn_and_its_noise_are_independent():
    rows, _ = surgery([[0, 0]], "a", "xy", Surgery(method="randn", noise=1))
    np.testing.assert_allclose(rows[1:], z([1, 2], 2) + z([1, 2], 2, stream="noise"), rtol=1e-6)


@pytest.mark.parametrize("bad", [{"noise": -1}, {"noise": math.nan}, {"scale": math.inf}])
def test_settings_out_of_range(bad):
    (name,) = bad
    with pytest.raises(InputError, match=f"^{name} = "):
        settings(**bad)
