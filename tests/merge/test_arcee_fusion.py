import numpy as np

from pluribus.merge.arcee_fusion import ArceeFusion

from .conftest import merged


def slow(base, expert):
    """Softmax, divergence and quartiles by sorting, in float64."""

    def softmax(row):
        return np.exp(row) / np.exp(row).sum()

    scores = np.empty_like(base)
    for i, (b, x) in enumerate(zip(base, expert, strict=True)):
        p, q = softmax(x) + 1e-8, softmax(b) + 1e-8
        scores[i] = abs(x - b) * (p * np.log(p / q)).sum()
    ordered = np.sort(scores.ravel())
    low, mid, high = (ordered[int(q * (ordered.size - 1))] for q in (0.25, 0.5, 0.75))
    return np.where(scores >= mid + 1.5 * (high - low), expert, base)


def test_worked_by_hand():
    # two rows, the first untouched: scores 0 there; in the second the sizes are 1, 1, 1, 8
    base = np.zeros((2, 4))
    expert = np.array([[0, 0, 0, 0], [1, 1, 1, 8]])
    # sorted scores 0 0 0 0 k k k 8k: quartiles at places 1, 3, 5 are 0, 0, k; the cut is 1.5 k
    np.testing.assert_array_equal(merged(ArceeFusion(), base, expert), [[0] * 4, [0, 0, 0, 8]])


def test_equals_the_slow_form():
    rng = np.random.default_rng(11)
    base = rng.normal(size=(12, 17))
    expert = base + rng.standard_t(2, size=(12, 17)) * 0.1
    out = merged(ArceeFusion(), base, expert, dtype=np.float64)
    expected = slow(base, expert)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    assert 0 < (expected != base).mean() < 0.4


def test_a_tensor_of_single_elements_is_taken_whole():
    np.testing.assert_allclose(merged(ArceeFusion(), [[1], [2]], [[3], [2.5]]), [[3], [2.5]], 1e-6)


def test_nothing_changed_changes_nothing():
    x = np.random.default_rng(12).normal(size=(3, 5)).astype(np.float32)
    np.testing.assert_array_equal(merged(ArceeFusion(), x, x), x)
