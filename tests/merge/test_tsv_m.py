import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.engine.reference import merge_arrays
from pluribus.merge.tsv_m import TsvM


def models(shape, count=3, seed=0):
    rng = np.random.default_rng(seed)
    base = np.asarray(rng.standard_normal(shape), np.float32)
    return {"w": base}, [
        {"w": np.asarray(base + 0.1 * rng.standard_normal(shape), np.float32)} for _ in range(count)
    ]


def orthonormal(matrix):
    """Nearest matrix with orthonormal columns (or rows), by the inverse root of its Gram matrix."""
    wide = matrix.shape[0] < matrix.shape[1]
    a = matrix.T if wide else matrix
    values, vectors = np.linalg.eigh(a.T @ a)
    q = a @ (vectors / np.sqrt(values)) @ vectors.T
    return q.T if wide else q


def slow(base, experts, weights, scale):
    """Algorithm 1 by numpy, for matrices of full rank."""
    k = min(base.shape) // len(experts)
    left, strength, right = [], [], []
    for expert, weight in zip(experts, weights, strict=True):
        u, s, vh = np.linalg.svd(weight * (expert.astype(np.float64) - base))
        left += list(u.T[:k])
        strength += list(s[:k])
        right += list(vh[:k])
    u, vh = orthonormal(np.stack(left, 1)), orthonormal(np.stack(right))
    return base + scale * sum(s * np.outer(u[:, i], vh[i]) for i, s in enumerate(strength))


@pytest.mark.parametrize("shape", [(12, 17), (17, 12), (13, 13)])
def test_agrees_with_the_algorithm(shape):
    base, experts = models(shape)
    out = merge_arrays(TsvM(scale=0.7, weight=(1.0, 0.5, 2.0)), base, experts)["w"]
    expected = slow(base["w"], [e["w"] for e in experts], (1.0, 0.5, 2.0), 0.7)
    np.testing.assert_allclose(out, expected, atol=3e-6)
    assert out.dtype == np.float32


def test_worked_by_hand():
    # Orthogonal tasks: each keeps its one largest singular triple untouched.
    base = {"w": np.zeros((2, 2), np.float32)}
    one = np.array([[3, 0], [0, 1]], np.float32)
    two = np.array([[1, 0], [0, -5]], np.float32)
    out = merge_arrays(TsvM(), base, [{"w": one}, {"w": two}])["w"]
    np.testing.assert_allclose(out, [[3, 0], [0, -5]], atol=1e-6)


def test_equal_experts_merge_to_their_top_directions():
    base = {"w": np.zeros((4, 4), np.float32)}
    expert = {"w": np.diag([4.0, 3.0, 2.0, 1.0]).astype(np.float32)}
    out = merge_arrays(TsvM(), base, [expert, expert])["w"]
    np.testing.assert_allclose(out, np.diag([4.0, 3.0, 0.0, 0.0]), atol=1e-6)


def test_low_rank_experts_keep_their_directions_exactly():
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((8, 8)))
    one = (2 * np.outer(q[:, 0], q[1])).astype(np.float32)
    two = (3 * np.outer(q[:, 4], q[6])).astype(np.float32)
    base = {"w": np.zeros((8, 8), np.float32)}
    out = merge_arrays(TsvM(), base, [{"w": one}, {"w": two}])["w"]
    np.testing.assert_allclose(out, one + two, atol=1e-5)


def test_more_experts_than_directions():
    base, experts = models((2, 5), count=4)
    assert np.isfinite(merge_arrays(TsvM(), base, experts)["w"]).all()


@pytest.mark.parametrize("shape", [(7,), (), (0, 3)])
def test_other_tensors_are_averaged(shape):
    base, experts = models(shape)
    weights = (1.0, 2.0, 3.0)
    expected = base["w"] + np.mean(
        [w * (e["w"] - base["w"]) for w, e in zip(weights, experts, strict=True)], axis=0
    )
    out = merge_arrays(TsvM(weight=weights), base, experts)["w"]
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_experts_equal_to_the_base_give_it_to_the_bit():
    base, _ = models((4, 5))
    np.testing.assert_array_equal(merge_arrays(TsvM(), base, [base, base])["w"], base["w"])


def test_order_does_not_matter():
    base, experts = models((9, 7))
    one = merge_arrays(TsvM(), base, experts)["w"]
    other = merge_arrays(TsvM(), base, experts[::-1])["w"]
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.claim("arXiv:2412.00081: orthogonalising removes interference between tasks")
def test_output_is_nearer_to_each_task_than_the_sum():
    rng = np.random.default_rng(1)
    shared = rng.standard_normal(32)
    base = {"w": np.zeros((32, 32), np.float32)}
    experts = []
    for _ in range(4):
        left = rng.standard_normal((32, 4)) + shared[:, None]  # tasks overlap in `shared`
        experts.append({"w": (left @ rng.standard_normal((4, 32))).astype(np.float32)})
    out = merge_arrays(TsvM(), base, experts)["w"]
    total = sum(e["w"] for e in experts)

    def miss(merged):
        lost = 0.0
        for e in experts:
            right = np.linalg.svd(e["w"])[2][:4].T  # inputs the task reacts to
            lost += np.linalg.norm((merged - e["w"]) @ right) / np.linalg.norm(e["w"])
        return lost

    assert miss(out) < miss(total)


def test_wrong_number_of_weights():
    base, experts = models((3, 3))
    with pytest.raises(InputError, match="2 values were given for 3 experts"):
        merge_arrays(TsvM(weight=(1.0, 2.0)), base, experts)
