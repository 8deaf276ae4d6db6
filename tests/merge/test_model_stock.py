import numpy as np

from pluribus.merge.model_stock import ModelStock

from .conftest import merged


def slow(base, experts):
    """Equation 5 with the cosine of each pair."""
    deltas = [(expert - base).ravel() for expert in experts]
    cosines = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for i, a in enumerate(deltas)
        for b in deltas[i + 1 :]
    ]
    cos, n = np.mean(cosines), len(experts)
    t = n * cos / (1 + (n - 1) * cos)
    return t * np.mean(experts, axis=0) + (1 - t) * base


def test_right_angles_stay_at_the_base_and_equal_updates_go_all_the_way():
    np.testing.assert_allclose(merged(ModelStock(), [1, 1], [2, 1], [1, 2]), [1, 1], atol=1e-7)
    np.testing.assert_allclose(merged(ModelStock(), [1, 1], [2, 3], [2, 3]), [2, 3], atol=1e-6)


def test_sixty_degrees_by_hand():
    # cos = 1/2, two experts: t = (2 * 1/2) / (1 + 1/2) = 2/3 of the way to the average
    out = merged(ModelStock(), [0, 0], [1, 0], [0.5, np.sqrt(0.75)])
    np.testing.assert_allclose(out, np.array([0.75, np.sqrt(0.75) / 2]) * 2 / 3, rtol=1e-6)


def test_equals_the_slow_form():
    rng = np.random.default_rng(10)
    base, shared = rng.normal(size=(2, 4, 7))
    experts = [base + shared + rng.normal(size=(4, 7)) for _ in range(4)]
    np.testing.assert_allclose(merged(ModelStock(), base, *experts), slow(base, experts), atol=1e-6)
    rows = [slow(base[i], [e[i] for e in experts]) for i in range(4)]
    out = merged(ModelStock(filter_wise=True), base, *experts)
    np.testing.assert_allclose(out, rows, atol=2e-6)


def test_opposed_updates_leave_the_base():
    for filter_wise in (False, True):
        out = merged(ModelStock(filter_wise=filter_wise), [[1, 1]], [[2, 3]], [[0, -1]])
        np.testing.assert_array_equal(out, [[1, 1]])


def test_short_updates_count_as_less_alike():
    """As in mergekit: the norms' product 1e-8 counts as 1e-6, so c = 0.01 for equal updates."""
    out = merged(ModelStock(), [0, 0], [1e-4, 0], [1e-4, 0], dtype=np.float64)
    np.testing.assert_allclose(out, [1e-4 * 0.02 / 1.01, 0], rtol=1e-9)
