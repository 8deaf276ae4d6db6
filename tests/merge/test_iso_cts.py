import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.engine.reference import merge_arrays
from pluribus.merge.iso_c import IsoC
from pluribus.merge.iso_cts import IsoCts


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


def slow(base, experts, common):
    """Algorithm 2, direction by direction, for matrices of full rank."""
    taus = [e.astype(np.float64) - base for e in experts]
    m, t = min(base.shape), len(taus)
    specific = round((m - int(m * common)) / t)
    k = m - specific * t
    u, s, vh = np.linalg.svd(sum(taus), full_matrices=False)
    left, strength, right = [], [], []
    for tau in taus:
        rest = tau.copy()
        for i in range(k):
            rest -= np.outer(u[:, i], u[:, i] @ tau)
        ut, st, vt = np.linalg.svd(rest, full_matrices=False)
        for j in range(specific):
            left.append(ut[:, j])
            strength.append(st[j])
            right.append(vt[j])
    left += [u[:, i] for i in range(k)]
    strength += [s[i] for i in range(k)]
    right += [vh[i] for i in range(k)]
    return base + np.mean(strength) * orthonormal(np.stack(left, 1)) @ orthonormal(np.stack(right))


@pytest.mark.parametrize("shape", [(12, 17), (17, 12), (13, 13)])
@pytest.mark.parametrize("common", [0.0, 0.3, 0.8])
def test_agrees_with_the_algorithm(shape, common):
    base, experts = models(shape)
    out = merge_arrays(IsoCts(common=common), base, experts)["w"]
    expected = slow(base["w"], [e["w"] for e in experts], common)
    np.testing.assert_allclose(out, expected, atol=3e-6)
    assert out.dtype == np.float32


def test_all_common_is_iso_c():
    base, experts = models((6, 9))
    np.testing.assert_allclose(
        merge_arrays(IsoCts(common=1.0), base, experts)["w"],
        merge_arrays(IsoC(), base, experts)["w"],
        atol=1e-6,
    )


def test_keeps_a_direction_that_the_sum_cancels():
    # Both use rows 0, 1; row 2 is +-1 and cancels in the sum, so Iso-C loses it.
    base = {"w": np.zeros((4, 6), np.float32)}
    one, two = np.zeros((4, 6), np.float32), np.zeros((4, 6), np.float32)
    one[0, 0] = two[0, 0] = 5
    one[1, 1] = two[1, 1] = 4
    one[2, 2], two[3, 3] = 1, 1
    experts = [{"w": one}, {"w": two}]
    out = merge_arrays(IsoCts(common=0.5), base, experts)["w"]
    mean = (10 + 8 + 1 + 1) / 4
    np.testing.assert_allclose(out[:4, :4], np.diag([mean] * 4), atol=1e-5)


def test_low_rank_experts_do_not_invent_directions():
    base = {"w": np.zeros((8, 8), np.float32)}
    one, two = np.zeros((8, 8), np.float32), np.zeros((8, 8), np.float32)
    one[0, 0], two[1, 1] = 2, 4
    out = merge_arrays(IsoCts(), base, [{"w": one}, {"w": two}])["w"]
    np.testing.assert_allclose(out, np.diag([3.0, 3.0] + [0.0] * 6), atol=1e-6)


def test_more_experts_than_directions():
    base, experts = models((2, 5), count=4)
    out = merge_arrays(IsoCts(common=0.0), base, experts)["w"]
    assert np.isfinite(out).all()


@pytest.mark.parametrize("shape", [(7,), (), (0, 3)])
def test_other_tensors_are_averaged(shape):
    base, experts = models(shape)
    expected = base["w"] + np.mean([e["w"] - base["w"] for e in experts], axis=0)
    np.testing.assert_allclose(merge_arrays(IsoCts(), base, experts)["w"], expected, atol=1e-6)


def test_equal_experts_give_the_base_to_the_bit():
    base, _ = models((4, 5))
    np.testing.assert_array_equal(merge_arrays(IsoCts(), base, [base, base])["w"], base["w"])


def test_common_out_of_range():
    with pytest.raises(InputError, match=r"iso_cts: common = 1\.2"):
        IsoCts(common=1.2)
