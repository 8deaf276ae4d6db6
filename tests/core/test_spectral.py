import numpy as np
import pytest
import torch

from pluribus.core.merger import At
from pluribus.core.spectral import added, averaged, is_matrix, polar, svd, task_matrices


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def test_svd_rebuilds_a_matrix_and_drops_its_null_space(rng):
    matrix = torch.randn(6, 2, generator=rng).double() @ torch.randn(2, 5, generator=rng).double()
    u, s, vh = svd(matrix)
    assert s.shape == (2,)
    torch.testing.assert_close((u * s) @ vh, matrix)


def test_svd_of_zeros_is_empty():
    u, s, vh = svd(torch.zeros(3, 4, dtype=torch.float64))
    assert (u.shape, s.shape, vh.shape) == ((3, 0), (0,), (0, 4))


def test_polar_is_the_orthonormal_factor_of_least_distance(rng):
    matrix = torch.randn(7, 4, generator=rng).double()
    q = polar(matrix)
    torch.testing.assert_close(q.T @ q, torch.eye(4, dtype=torch.float64))
    other = torch.linalg.qr(torch.randn(7, 4, generator=rng).double()).Q
    assert (matrix - q).norm() < (matrix - other).norm()


def test_polar_of_a_doubled_column_shares_it():
    column = torch.tensor([[3.0], [4.0]], dtype=torch.float64)
    expected = torch.tensor([[0.6, 0.6], [0.8, 0.8]], dtype=torch.float64) / 2**0.5
    torch.testing.assert_close(polar(torch.cat([column, column], 1)), expected)


def test_further_axes_join_the_columns_and_come_back():
    base = np.zeros((2, 3, 4), np.float32)
    experts = np.arange(48, dtype=np.float32).reshape(2, 2, 3, 4)
    tau = task_matrices(base, experts)
    assert tau.shape == (2, 2, 12)
    assert tau.dtype == torch.float64
    np.testing.assert_array_equal(added(base, tau[1]), experts[1])
    assert added(base, tau[1]).dtype == np.float32


def test_averaged_keeps_the_shape_of_a_scalar():
    base, experts = np.array(1, np.float32), np.array([2, 4], np.float32)
    merged = averaged(base, experts, 0.5)
    assert merged.shape == ()
    assert merged == 2.0


@pytest.mark.parametrize(
    ("shape", "name", "expected"),
    [((2, 2), "w", True), ((2,), "w", False), ((0, 2), "w", False), ((2, 2), "lm_head", False)],
)
def test_is_matrix(shape, name, expected):
    assert is_matrix(np.zeros(shape, np.float32), At(name), ("head",)) is expected
