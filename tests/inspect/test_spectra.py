import numpy as np
import pytest

from pluribus.core.errors import InputError, NonFiniteError
from pluribus.core.pool import Pool
from pluribus.inspect import inspect
from pluribus.inspect import spectra as module
from pluribus.inspect.spectra import effective_rank, spectra

SHAPES = {"layers.0.w": (40, 24), "layers.1.w": (24, 40), "conv.w": (12, 5, 3, 3), "bias": (40,)}


def pool_of(seed=0, experts=2, dtype=np.float32):
    rng = np.random.default_rng(seed)
    base = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    models = [base]
    for _ in range(experts):
        models.append({n: v + 0.1 * rng.standard_normal(v.shape) for n, v in base.items()})
    models = [{n: v.astype(dtype) for n, v in model.items()} for model in models]
    return Pool(models[0], {f"e{i}": model for i, model in enumerate(models[1:])}), models


@pytest.mark.parametrize("block", [1 << 20, 100])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_scipys_angles_and_the_svd(block, dtype, monkeypatch):
    angles = pytest.importorskip("scipy.linalg").subspace_angles
    monkeypatch.setattr(module, "BLOCK", block)
    pool, models = pool_of(dtype=dtype)
    found = spectra(pool, rank=5, threads=2)
    assert list(found.matrices) == ["layers.0.w", "layers.1.w", "conv.w"]
    for name, one in found.matrices.items():
        taus = [
            (m[name].astype(np.float64) - models[0][name].astype(np.float64)).reshape(
                SHAPES[name][0], -1
            )
            for m in models[1:]
        ]
        taus = [tau if tau.shape[0] <= tau.shape[1] else tau.T for tau in taus]  # shorter side left
        parts = [np.linalg.svd(tau, full_matrices=False) for tau in taus]
        for i, (_, values, _) in enumerate(parts):
            np.testing.assert_allclose(one.values[i], values, rtol=1e-5)
            share = values / values.sum()
            by_hand = np.exp(-(share * np.log(share)).sum())
            assert one.effective_rank[i] == pytest.approx(by_hand, rel=1e-5)
            assert one.stable_rank[i] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-5)
        expected = np.sort(angles(parts[0][0][:, :5], parts[1][0][:, :5]))
        np.testing.assert_allclose(one.angles(0, 1), expected, atol=1e-4)
        assert one.overlap[0, 1] == pytest.approx((np.cos(expected) ** 2).mean(), abs=1e-5)
        assert one.chance == 5 / min(one.shape)


def test_planted_subspaces():
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((30, 6)))[0]
    v = rng.standard_normal((6, 50))
    base = np.zeros((30, 50))
    one, other = u[:, :3] @ v[:3], u[:, 1:4] @ v[1:4]  # two of three directions are common
    apart = u[:, 3:] @ v[3:]
    found = spectra(
        Pool({"w": base}, {"a": {"w": one}, "b": {"w": other}, "c": {"w": apart}}), rank=3
    ).matrices["w"]
    assert found.overlap[0, 1] == pytest.approx(2 / 3)
    assert found.overlap[0, 2] == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(found.angles(0, 1), [0, 0, np.pi / 2], atol=1e-6)
    assert (found.values[:, 3:] == 0).all()  # of rank three, exactly


def test_energy_chooses_how_many_directions():
    diagonal = np.diag([4.0, 2.0, 1.0, 0.0])  # squares 16, 4, 1 of 21
    for energy, count in ((0.5, 1), (16 / 21, 1), (0.77, 2), (0.96, 3), (1.0, 3)):
        found = spectra(
            Pool({"w": np.zeros((4, 4))}, {"a": {"w": diagonal}}), rank=None, energy=energy
        )
        assert found.matrices["w"].ranks.tolist() == [count]


def test_effective_rank_by_hand():
    assert effective_rank(np.array([1.0, 1.0, 1.0, 0.0])) == pytest.approx(3)
    assert effective_rank(np.array([2.0, 0.0])) == pytest.approx(1)
    # p = (3/4, 1/4): entropy 0.5623
    assert effective_rank(np.array([3.0, 1.0])) == pytest.approx(np.exp(0.562335), rel=1e-5)
    assert np.isnan(effective_rank(np.zeros(3)))


def test_a_task_vector_of_zero_has_no_subspace():
    _pool, models = pool_of()
    still = Pool(models[0], {"still": models[0], "moved": models[1]})
    one = spectra(still).matrices["layers.0.w"]
    assert one.ranks.tolist() == [0, 16]
    assert np.isnan(one.effective_rank[0])
    assert np.isnan(one.stable_rank[0])
    assert np.isnan(one.overlap[0, 1])
    with pytest.raises(InputError, match="one of them is zero"):
        one.angles(0, 1)


def test_the_report_shows_spectra():
    pool, _ = pool_of()
    found = inspect(pool, rank=4)
    assert found.spectra is not None
    text, page = found.table(), found.html()
    value = f"{found.spectra.mean(['conv.w'], 'effective_rank')[0]:.1f}"
    assert "effective rank" in text
    assert value in text
    assert value in page
    told = found.to_dict()["spectra"]["matrices"]["conv.w"]
    assert told["shape"] == [12, 45]
    assert len(told["angles"]["e0 – e1"]) == 4


def test_refusals():
    pool, models = pool_of()
    for given, said in (
        ({"rank": 0}, "at least 1"),
        ({"rank": None}, "rank or energy"),
        ({"rank": 2, "energy": 0.5}, "rank or energy"),
        ({"rank": None, "energy": 0.0}, "share of the squared norm"),
        ({"memory": 1000}, r"layers\.0\.w.* needs"),
    ):
        with pytest.raises(InputError, match=said):
            spectra(pool, **given)
    with pytest.raises(InputError, match="give the base"):
        spectra(Pool(None, {"a": models[0]}))
    models[1]["conv.w"][0, 0, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match=r"conv\.w.* of e0"):
        spectra(pool)
