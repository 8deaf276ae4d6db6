import json

import numpy as np
import pytest
import torch

from pluribus.adapters import merge_adapters
from pluribus.core.errors import InputError, MismatchError, OutputError
from pluribus.core.lowrank import Factors, adapter, save_adapter
from pluribus.core.weights import Weights
from pluribus.engine.reference import merge_arrays
from pluribus.merge.dare_linear import DareLinear
from pluribus.merge.knots import Knots
from pluribus.merge.ties import Ties

SHAPES = {"m.q.weight": (12, 10), "m.v.weight": (8, 10), "m.o.weight": (10, 12)}


def saved(folder, seed, ranks, scale=0.5, base="some/base", **config):
    """Write an adapter with known factors; return its deltas in float64."""
    rng = np.random.default_rng(seed)
    factors, deltas = {}, {}
    for name, rank in ranks.items():
        rows, cols = SHAPES[name]
        a = rng.standard_normal((rank, cols)).astype(np.float32)
        b = rng.standard_normal((rows, rank)).astype(np.float32)
        pair = Weights.of({"a": a, "b": b})
        factors[name] = Factors(pair.source("a"), pair.source("b"), scale)
        deltas[name] = scale * b.astype(np.float64) @ a
    save_adapter(folder, factors, base_model=base, config=config)
    return deltas


def read(folder):
    found = adapter(folder)
    return {
        name: f.scale
        * f.b.floats().reshape(-1, f.rank).astype(np.float64)
        @ f.a.floats().reshape(f.rank, -1)
        for name, f in found.factors.items()
    }


@pytest.fixture
def two(tmp_path):
    """Two adapters of different rank, each with a module that the other lacks."""
    one = saved(tmp_path / "one", 1, {"m.q.weight": 2, "m.v.weight": 2}, scale=0.5)
    other = saved(tmp_path / "two", 2, {"m.q.weight": 3, "m.o.weight": 1}, scale=-2.0)
    return [tmp_path / "one", tmp_path / "two"], [one, other]


def test_cat_is_exact_and_adds_ranks(tmp_path, two):
    folders, (one, other) = two
    report = merge_adapters(folders, tmp_path / "out", weights=[0.7, -0.3], mode="cat")
    merged = read(tmp_path / "out")
    np.testing.assert_allclose(
        merged["m.q.weight"], 0.7 * one["m.q.weight"] - 0.3 * other["m.q.weight"], atol=1e-5
    )
    np.testing.assert_allclose(merged["m.v.weight"], 0.7 * one["m.v.weight"], atol=1e-6)
    np.testing.assert_allclose(merged["m.o.weight"], -0.3 * other["m.o.weight"], atol=1e-6)
    assert [m.rank for m in report.modules] == [5, 2, 1]
    assert report.kept == 1.0


def test_svd_is_the_best_approximation_of_its_rank(tmp_path, two):
    folders, (one, other) = two
    report = merge_adapters(folders, tmp_path / "out", weights=[1.0, 1.0], rank=2)
    exact = one["m.q.weight"] + other["m.q.weight"]
    u, s, vh = np.linalg.svd(exact)
    merged = read(tmp_path / "out")["m.q.weight"]
    np.testing.assert_allclose(merged, (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5)
    q = report["m.q.weight"]
    assert q.rank == 2
    assert q.kept == pytest.approx((s[:2] ** 2).sum() / (s**2).sum(), rel=1e-9)
    assert q.energy == pytest.approx((s**2).sum(), rel=1e-9)
    assert report["m.o.weight"].rank == 1  # no more than there is
    assert report["m.v.weight"].kept == pytest.approx(1.0)


def test_svd_with_enough_rank_is_exact(tmp_path, two):
    folders, (one, other) = two
    merge_adapters(folders, tmp_path / "out", weights=[1.0, 1.0], rank=5)
    exact = one["m.q.weight"] + other["m.q.weight"]
    np.testing.assert_allclose(read(tmp_path / "out")["m.q.weight"], exact, atol=1e-5)


def test_without_weights_updates_are_averaged(tmp_path, two):
    folders, (one, _) = two
    merge_adapters(folders, tmp_path / "out", mode="cat")
    np.testing.assert_allclose(
        read(tmp_path / "out")["m.v.weight"], one["m.v.weight"] / 2, atol=1e-6
    )


def test_energy_takes_the_fewest_directions(tmp_path, two):
    folders, (one, other) = two
    report = merge_adapters(folders, tmp_path / "out", weights=[1.0, 1.0], energy=0.9)
    s = np.linalg.svd(one["m.q.weight"] + other["m.q.weight"], compute_uv=False)
    shares = np.cumsum(s**2) / (s**2).sum()
    assert report["m.q.weight"].rank == 1 + int((shares < 0.9).sum())
    assert all(m.kept >= 0.9 for m in report.modules)


def test_linear_mode_sums_the_factors(tmp_path):
    saved(tmp_path / "one", 1, {"m.q.weight": 2}, scale=0.5)
    saved(tmp_path / "two", 2, {"m.q.weight": 2}, scale=2.0)
    report = merge_adapters(
        [tmp_path / "one", tmp_path / "two"], tmp_path / "out", weights=[0.5, 0.25], mode="linear"
    )
    one, two = (adapter(tmp_path / n).factors["m.q.weight"] for n in ("one", "two"))
    root = [np.sqrt(0.5 * 0.5), np.sqrt(0.25 * 2.0)]
    a = root[0] * one.a.floats().reshape(2, -1) + root[1] * two.a.floats().reshape(2, -1)
    b = root[0] * one.b.floats().reshape(-1, 2) + root[1] * two.b.floats().reshape(-1, 2)
    np.testing.assert_allclose(read(tmp_path / "out")["m.q.weight"], b @ a, atol=1e-5)
    assert report["m.q.weight"].kept < 1  # the cross terms


@pytest.mark.parametrize(
    "method", [Ties(density=0.5), DareLinear(density=0.5), Knots(inner=Ties(density=0.4))]
)
def test_other_methods_see_one_modules_deltas(tmp_path, two, method):
    folders, deltas = two
    report = merge_adapters(folders, tmp_path / "out", method, rank=12, seed=3)
    merged = read(tmp_path / "out")
    for name, shape in SHAPES.items():
        zero = np.zeros(shape, np.float32)
        parts = [{name: d.get(name, zero).astype(np.float32)} for d in deltas]
        expected = merge_arrays(method, {name: zero}, parts, seed=3)[name]
        np.testing.assert_allclose(merged[name], expected, atol=1e-4)
        assert report[name].kept == pytest.approx(1.0, abs=1e-6)


def test_a_method_by_name_and_a_small_rank(tmp_path, two):
    folders, _ = two
    report = merge_adapters(folders, tmp_path / "out", "ties")
    assert report["m.q.weight"].rank == 3
    assert 0 < report["m.q.weight"].kept < 1


def test_task_arithmetic_stays_factored(tmp_path, two, monkeypatch):
    from pluribus.adapters import combine
    from pluribus.merge.task_arithmetic import TaskArithmetic

    monkeypatch.setattr(combine, "_factored", None)
    folders, (one, other) = two
    merge_adapters(folders, tmp_path / "out", TaskArithmetic(weight=(1.0, 0.5), scale=0.4), rank=5)
    np.testing.assert_allclose(
        read(tmp_path / "out")["m.q.weight"],
        0.4 * one["m.q.weight"] + 0.2 * other["m.q.weight"],
        atol=1e-5,
    )


def test_updates_that_cancel_leave_the_module_out(tmp_path):
    for name in ("one", "two"):
        saved(tmp_path / name, 1, {"m.q.weight": 2, "m.v.weight": 1})
    saved(tmp_path / "three", 5, {"m.v.weight": 1})
    report = merge_adapters(
        [tmp_path / n for n in ("one", "two", "three")], tmp_path / "out", weights=[1.0, -1.0, 1.0]
    )
    assert report["m.q.weight"].action == "unchanged"
    assert list(read(tmp_path / "out")) == ["m.v.weight"]


def test_kernels_keep_their_axes(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        a = rng.standard_normal((2, 3, 2, 2)).astype(np.float32)
        b = rng.standard_normal((5, 2, 1, 1)).astype(np.float32)
        save_adapter(tmp_path / name, {"conv.weight": (a, b)}, base_model="x")
    merge_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "out", mode="cat")
    found = adapter(tmp_path / "out").factors["conv.weight"]
    assert found.a.spec.shape == (4, 3, 2, 2)
    assert found.b.spec.shape == (5, 4, 1, 1)


def test_configuration_is_carried(tmp_path):
    saved(tmp_path / "one", 1, {"m.q.weight": 2}, task_type="SEQ_CLS")
    merge_adapters([tmp_path / "one"], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["base_model_name_or_path"] == "some/base"
    assert config["r"] == 2


def test_different_bases(tmp_path, two):
    folders, _ = two
    saved(tmp_path / "three", 3, {"m.q.weight": 2}, base="other/base")
    with pytest.raises(MismatchError, match="some/base, other/base"):
        merge_adapters([*folders, tmp_path / "three"], tmp_path / "out")
    merge_adapters([*folders, tmp_path / "three"], tmp_path / "out", base_model="some/base")


def test_different_shapes(tmp_path):
    saved(tmp_path / "one", 1, {"m.q.weight": 2})
    save_adapter(
        tmp_path / "two",
        {"m.q.weight": (np.ones((1, 9), np.float32), np.ones((12, 1), np.float32))},
        base_model="some/base",
    )
    with pytest.raises(MismatchError, match=r"'m\.q\.weight' is \[12, 10\] in .*\[12, 9\]"):
        merge_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "1 weights were given for 2 adapters"),
        ({"method": "ties", "weights": [1.0, 1.0]}, 'weights go with method="linear"'),
        ({"method": "ties", "mode": "cat"}, "needs a linear method"),
        ({"mode": "linear"}, r"has ranks \[2, 3\]"),
        ({"method": "fisher"}, "needs 'fisher'"),
        ({"rank": 0}, "rank = 0"),
        ({"energy": 1.5}, r"energy = 1\.5"),
    ],
)
def test_bad_options(tmp_path, two, options, message):
    with pytest.raises(InputError, match=message):
        merge_adapters(two[0], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(tmp_path, two):
    folders, _ = two
    merge_adapters(folders, tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        merge_adapters(folders, tmp_path / "out")
    merge_adapters(folders, tmp_path / "out", overwrite=True)
    (tmp_path / "mine").mkdir()
    with pytest.raises(OutputError, match="is not an adapter"):
        merge_adapters(folders, tmp_path / "mine", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "one", "out", "two"]


def test_saved_modules_are_carried_if_equal(tmp_path):
    from pluribus.adapters.extract import add_saved

    norm = Weights.of({"m.norm.weight": np.arange(4, dtype=np.float32)})
    settings = {"modules_to_save": ["m.norm"], "bias": "none"}
    for seed, name in enumerate(("one", "two")):
        saved(tmp_path / name, seed, {"m.q.weight": 2})
        add_saved(tmp_path / name, {n: norm.source(n) for n in norm}, settings, [])
    folders = [tmp_path / "one", tmp_path / "two"]
    merge_adapters(folders, tmp_path / "out")
    out = adapter(tmp_path / "out")
    np.testing.assert_array_equal(out.replaced["m.norm.weight"].floats(), np.arange(4))
    assert out.config["modules_to_save"] == ["m.norm"]
    other = Weights.of({"m.norm.weight": np.ones(4, np.float32)})
    saved(tmp_path / "three", 3, {"m.q.weight": 2})
    add_saved(tmp_path / "three", {n: other.source(n) for n in other}, settings, [])
    with pytest.raises(InputError, match="saved whole and differs"):
        merge_adapters([*folders, tmp_path / "three"], tmp_path / "bad")


@pytest.mark.filterwarnings("ignore")
def test_peft_gives_the_same_as_its_own_merge(tmp_path):
    peft = pytest.importorskip("peft")
    base = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "1"], init_lora_weights=False)
    model = peft.get_peft_model(base, config, adapter_name="one")
    model.add_adapter("two", config)
    model.save_pretrained(tmp_path / "peft")
    folders = [tmp_path / "peft" / n for n in ("one", "two")]
    x = torch.randn(5, 6)
    for mode in ("cat", "svd", "linear"):
        model.add_weighted_adapter(
            ["one", "two"], [0.7, 0.4], mode, combination_type=mode, svd_rank=2
        )
        model.set_adapter(mode)
        expected = model(x)
        merge_adapters(folders, tmp_path / mode, weights=[0.7, 0.4], mode=mode)
        model.load_adapter(tmp_path / mode, f"ours_{mode}")
        model.set_adapter(f"ours_{mode}")
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
