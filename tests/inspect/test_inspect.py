import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pluribus.core import order
from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.core.method import method_of
from pluribus.core.pool import Pool
from pluribus.core.weights import Weights
from pluribus.engine import blocks, plan, run
from pluribus.inspect import Inspection, Tally, inspect
from pluribus.inspect.advice import Advice, advise

SHAPES = {
    "model.embed.weight": (61, 40),
    "model.layers.0.up.weight": (70, 33),
    "model.layers.0.scale": (),
    "model.layers.1.up.weight": (70, 33),
    "model.layers.1.empty": (0, 3),
    "model.norm.weight": (5,),
    "lm_head.weight": (61, 40),
}


def drawn(seed, experts, dtype=np.float32, coarse=0.0, still=0.0):
    """A base and experts; `coarse` rounds differences to a grid, `still` leaves a share as is."""
    rng = np.random.default_rng(seed)
    base = {n: np.asarray(rng.standard_normal(s), np.float32) for n, s in SHAPES.items()}
    if coarse:
        base = {n: np.round(v / coarse) * np.float32(coarse) for n, v in base.items()}
    out = [base]
    for _ in range(experts):
        expert = {}
        for name, values in base.items():
            step = np.asarray(rng.standard_normal(values.shape) * 0.1, np.float32)
            if coarse:
                step = np.round(step / coarse) * np.float32(coarse)
            expert[name] = values + step * (rng.random(values.shape) >= still)
        out.append(expert)
    return [{n: np.asarray(v).astype(dtype) for n, v in model.items()} for model in out]


def pool_of(models):
    base, *experts = models
    return Pool(base, {f"e{i}": expert for i, expert in enumerate(experts)})


def dense(base, experts, density=0.2, lam=0.4):
    """The slow obvious version for one tensor: whole arrays, Python loops over experts."""
    wide = np.float64 if base.dtype == np.float64 else np.float32
    b = base.astype(wide).reshape(-1)
    tau = np.stack([e.astype(wide).reshape(-1) - b for e in experts])
    t, n = tau.shape
    total = tau[0].copy()
    for row in tau[1:]:
        total += row
    kept = np.zeros((t, n), bool)
    for i, row in enumerate(tau):
        order = np.argsort(-abs(row), kind="stable")
        kept[i, order[: max(int(density * n), 1) if n else 0]] = True
    top = np.where(kept, tau, 0)
    masks = abs(tau) > wide(lam) * abs(total - tau)
    count = masks.sum(0)
    exact = tau.astype(np.float64)

    def signs(x):
        both = (x[:, None] != 0) & (x[None] != 0)
        opposed = both & (np.sign(x[:, None]) != np.sign(x[None]))
        used = (x != 0).sum(0)
        clash = ((x > 0).any(0) & (x < 0).any(0)).sum()
        return (
            (x != 0).sum(1),
            both.sum(2),
            opposed.sum(2),
            [(used > 0).sum(), (used > 1).sum()],
            clash,
        )

    changed, both, opposed, changed_by, clashing = signs(tau)
    kept_n, kept_both, kept_opposed, kept_by, kept_clashing = signs(top)
    return {
        "size": n,
        "base_square": (b.astype(np.float64) ** 2).sum(),
        "gram": exact @ exact.T,
        "absolute": abs(exact).sum(1),
        "changed": changed,
        "both": both,
        "opposed": opposed,
        "changed_by": changed_by,
        "clashing": clashing,
        "masks": masks.sum(1),
        "masked_by": [(count > 0).sum(), (count > 1).sum(), (count == t).sum()] if n else [0] * 3,
        "kept": kept_n,
        "kept_square": (top.astype(np.float64) ** 2).sum(1),
        "kept_both": kept_both,
        "kept_opposed": kept_opposed,
        "kept_by": kept_by,
        "kept_clashing": kept_clashing,
    }


def agrees(tally, expected):
    for key, value in expected.items():
        found = getattr(tally, key)
        if key in ("base_square", "gram", "absolute", "kept_square"):
            np.testing.assert_allclose(found, value, rtol=1e-10, atol=1e-9, err_msg=key)
        else:
            np.testing.assert_array_equal(found, value, err_msg=key)


@pytest.fixture
def small_blocks(monkeypatch):
    for module in (plan, blocks, run):
        monkeypatch.setattr(module, "SPAN", 2)
    monkeypatch.setattr(plan, "BLOCK", 100)
    monkeypatch.setattr(order, "SMALL", 150)


KINDS = {
    "float32": {},
    "ties": {"coarse": 0.0625},
    "sparse": {"still": 0.95, "coarse": 0.03125},
    "bfloat16": {"dtype": ml_dtypes.bfloat16},
    "float64": {"dtype": np.float64},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_equals_the_dense_version(kind, experts):
    models = drawn(experts, experts, **KINDS[kind])
    found = inspect(pool_of(models), threads=2)
    assert list(found.tensors) == list(SHAPES)
    for name, tally in found.tensors.items():
        agrees(tally, dense(models[0][name], [m[name] for m in models[1:]]))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_threads_change_no_count(kind, small_blocks):
    models = drawn(3, 3, **KINDS[kind])
    for threads in (1, 3):
        found = inspect(pool_of(models), density=0.37, mask_lambda=0.8, threads=threads)
        for name, tally in found.tensors.items():
            agrees(tally, dense(models[0][name], [m[name] for m in models[1:]], 0.37, 0.8))


def test_files_equal_arrays_and_every_byte_is_read_twice(tmp_path, small_blocks):
    models = drawn(5, 2, dtype=ml_dtypes.bfloat16)
    for i, model in enumerate(models):
        Weights.of({n: v for n, v in model.items()}).save(tmp_path / f"{i}.safetensors")
    steps = []
    pool = Pool(
        tmp_path / "0.safetensors", [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    )
    found = inspect(pool, on_progress=lambda now: steps.append((now.done, now.total)))
    assert figures(found) == figures(inspect(pool_of(models)))
    assert found.bytes_read >= 2 * sum(model.nbytes for model in pool.models)
    assert steps[-1] == (found.bytes_read, found.bytes_read)


def figures(found: Inspection):
    told = found.to_dict()
    return {key: told[key] for key in ("model", "layers", "tensors")}


def test_one_block_by_hand():
    base = {"w": np.zeros(10, np.float32)}
    one = {"w": np.array([4, 3, 0, 0, 0, 0, 0, 0, 0, 1], np.float32)}
    two = {"w": np.array([0, -3, 4, 0, 0, 0, 0, 0, 0, 2], np.float32)}
    whole = inspect(pool_of([base, one, two])).model
    np.testing.assert_allclose(whole.norm, [26**0.5, 29**0.5])
    np.testing.assert_allclose(whole.cosine, [[1, -7 / 754**0.5], [-7 / 754**0.5, 1]])
    np.testing.assert_allclose(whole.unchanged, [0.7, 0.7])
    np.testing.assert_allclose(whole.density, [64 / 260, 81 / 290])
    assert whole.conflict[0, 1] == 1 / 2  # both change 1 and 9, and oppose each other at 1
    assert whole.clash == 1 / 2
    # Supports {0, 1} and {1, 2}: one of three coordinates is common, and contested.
    assert whole.overlap[0, 1] == pytest.approx(1 / 3)
    assert whole.kept_conflict[0, 1] == 1
    assert whole.kept_clash == pytest.approx(1 / 3)
    np.testing.assert_allclose(whole.kept_energy, [25 / 26, 25 / 29])
    # Masks: |τ1| > 0.4 |τ2| at 0, 1, 9; |τ2| > 0.4 |τ1| at 1, 2, 9; none elsewhere.
    np.testing.assert_allclose(whole.mask_share, [0.3, 0.3])
    assert whole.catastrophic == pytest.approx(0.6)
    assert whole.selfish == pytest.approx(0.2)
    assert whole.shared == whole.universal == pytest.approx(0.2)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_planted_conflicts_are_found(share):
    rng = np.random.default_rng(0)
    n, shared = 4000, 400
    base = rng.standard_normal(n).astype(np.float32)
    at = rng.permutation(n)
    # 10 % of the coordinates are common, 5 % each expert's own: large, on a background of noise.
    steps = rng.standard_normal((2, n)).astype(np.float32) * 1e-3
    sign = np.sign(rng.standard_normal(shared))
    flipped = np.where(np.arange(shared) < share * shared, -1, 1)
    steps[0, at[:shared]] = sign
    steps[1, at[:shared]] = sign * flipped
    steps[0, at[shared : shared + 200]] = 1
    steps[1, at[shared + 200 : shared + 400]] = 1
    models = [{"w": base}, *({"w": base + step} for step in steps)]
    whole = inspect(pool_of(models), density=0.15).model
    assert whole.overlap[0, 1] == pytest.approx(400 / 800)
    assert whole.kept_conflict[0, 1] == pytest.approx(share)
    assert whole.kept_clash == pytest.approx(share / 2)
    assert whole.cosine[0, 1] == pytest.approx((1 - 2 * share) * 400 / 600, abs=0.02)


def test_layers_and_model_add_up():
    models = drawn(7, 3)
    found = inspect(pool_of(models))
    assert list(found.layers) == ["before", "0", "1", "after"]
    assert found.blocks == 2
    assert sum(tally.size for tally in found.layers.values()) == found.model.size
    flat = [np.concatenate([v.reshape(-1) for v in model.values()]) for model in models]
    expected = dense(flat[0], flat[1:])
    for key in ("gram", "changed", "both", "opposed", "masks", "masked_by", "clashing"):
        np.testing.assert_allclose(getattr(found.model, key), expected[key], rtol=1e-10)
    one = [np.concatenate([m[n].reshape(-1) for n in list(SHAPES)[1:3]]) for m in models]
    np.testing.assert_allclose(found.layers["0"].gram, dense(one[0], one[1:])["gram"], rtol=1e-10)


def test_kinds_and_cells_of_the_atlas_add_up():
    models = drawn(7, 3)
    found = inspect(pool_of(models))
    assert list(found.kinds) == ["embedding", "mlp", "norm", "head", "other"]
    assert sum(tally.size for tally in found.kinds.values()) == found.model.size
    assert list(found.atlas) == list(found.layers)
    for label, row in found.atlas.items():
        gram = sum(tally.gram for tally in row.values())
        np.testing.assert_allclose(gram, found.layers[label].gram, rtol=1e-10)
    one = [np.concatenate([m[n].ravel() for n in SHAPES if "up" in n]) for m in models]
    expected = dense(one[0], one[1:])
    np.testing.assert_allclose(found.kinds["mlp"].gram, expected["gram"], rtol=1e-10)
    np.testing.assert_array_equal(found.kinds["mlp"].opposed, expected["opposed"])
    assert found.atlas["1"]["mlp"].size == 70 * 33


def test_dictionary_is_plain_json():
    base, one, _ = drawn(1, 2)
    found = inspect(pool_of([base, one, base]))  # an expert that is the base has no cosine
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["model"]["cosine"] == [[1.0, None], [None, None]]
    assert told["experts"] == ["e0", "e1"]
    assert told["tensors"]["model.layers.1.empty"]["size"] == 0
    assert told["tensors"]["model.layers.1.up.weight"]["layer"] == 1
    assert told["tensors"]["model.layers.1.up.weight"]["kind"] == "mlp"
    assert set(told["atlas"]["0"]) == {"mlp", "other"}
    assert told["atlas"]["0"]["mlp"]["size"] == 70 * 33
    assert told["recommendation"]["rule_of_thumb"] is True


def test_text_and_page_tell_the_same():
    found = inspect(pool_of(drawn(2, 3)))
    text, page = found.table(), found.html("Three <experts>")
    cosine = f"{found.model.cosine[1, 0]:.3f}"
    assert cosine in text
    assert f"{found.model.cosine[1, 0]:.2f}" in page
    assert "Three &lt;experts&gt;" in page
    for word in ("e0 – e1", "catastrophic", "selfish", found.advice.text):
        assert word in text
    for name in SHAPES:
        assert name in page


def test_single_expert_is_shown_without_pairs():
    found = inspect(pool_of(drawn(2, 1)))
    assert "cosine" not in found.table()
    assert "cosine" not in found.html().lower()
    assert found.advice.method == "task_arithmetic"


# -- warnings --------------------------------------------------------------------------------------


def written(folder: Path, models, configs):
    for i, (model, config) in enumerate(zip(models, configs, strict=True)):
        (folder / f"m{i}").mkdir()
        Weights.of(model).save(folder / f"m{i}" / "model.safetensors")
        (folder / f"m{i}" / "config.json").write_text(json.dumps(config))
    names = [f"m{i}" for i in range(1, len(models))]
    return Pool(folder / "m0", {name: folder / name for name in names})


def test_quiet_about_ordinary_fine_tunes(tmp_path):
    models = drawn(0, 2)
    config = {"rope_theta": 1e4, "_name_or_path": "a", "transformers_version": "5"}
    pool = written(tmp_path, models, [config, {**config, "_name_or_path": "b"}, config])
    assert inspect(pool).warnings == ()


def test_configuration_differences(tmp_path):
    models = drawn(0, 1)
    pool = written(tmp_path, models, [{"rope_theta": 1e4}, {"rope_theta": 1e6, "torch_dtype": "x"}])
    (note,) = inspect(pool).warnings
    assert "m1 differs" in note
    assert "rope_theta (10000.0 → 1000000.0)" in note
    assert "torch_dtype" not in note


def test_another_base_is_noticed():
    stranger, expert = drawn(0, 1)[0], drawn(1, 1)[1]
    found = inspect(pool_of([stranger, expert]))
    assert "e0 lies 1.4" in found.warnings[0]
    assert found.advice.method == "linear"


def test_equal_models_are_noticed():
    base, one = drawn(0, 1)
    notes = inspect(pool_of([base, base, one, one])).warnings
    assert "e0 equals the base: it adds nothing to a merge" in notes
    assert "e1 and e2 are the same model" in notes


def test_longer_version_of_one_update_is_noticed():
    base, one = drawn(0, 1)
    twice = {n: base[n] + 2 * (one[n] - base[n]) for n in base}
    notes = inspect(pool_of([base, one, twice])).warnings
    assert "e0 and e1 differ only in the length of the update" in notes


def test_later_common_ancestor_is_noticed():
    base, ancestor = drawn(0, 1)
    experts = [{n: ancestor[n] + 0.2 * (m[n] - base[n]) for n in base} for m in drawn(0, 3)[2:]]
    notes = inspect(pool_of([base, *experts])).warnings
    assert any("later ancestor" in note for note in notes)


def test_uneven_and_frozen_experts_are_noticed():
    base, one, two = drawn(0, 2, still=0.8)
    far = {n: base[n] + 4.5 * (two[n] - base[n]) for n in base}
    notes = " ".join(inspect(pool_of([base, one, far])).warnings)
    assert "e1 moved 4." in notes
    assert "unchanged in e0 (80%), e1 (80%)" in notes


def test_rounded_expert_is_noticed():
    base, one = drawn(0, 1)
    low = {n: v.astype(ml_dtypes.bfloat16) for n, v in one.items()}
    assert any("F32 and BF16" in note for note in inspect(pool_of([base, low])).warnings)


def test_differing_whole_numbers_are_noticed():
    models = drawn(0, 2)
    for i, model in enumerate(models):
        model["ids"] = np.arange(3_000_000) + (i == 2) * (np.arange(3_000_000) == 2_999_999)
    (note,) = inspect(pool_of(models)).warnings
    assert note.startswith("tensor ids (I64[3000000]) holds whole numbers, and e1 differ from")


# -- recommendations -------------------------------------------------------------------------------


def planted(cosine, n=20_000, experts=3, *, heavy=False, opposed=False):
    rng = np.random.default_rng(0)
    base = rng.standard_normal(n).astype(np.float32)
    common = rng.standard_normal(n)
    size = rng.standard_normal(n) ** 3 if heavy else 1.0
    models = [{"layers.0.w": base, "layers.1.w": base.copy()}]
    for i in range(experts):
        own = rng.standard_normal(n)
        sign = -1 if opposed and i == 0 else 1
        step = size * (sign * cosine**0.5 * common + (1 - cosine) ** 0.5 * own)
        values = base + (0.01 * step).astype(np.float32)
        models.append({"layers.0.w": values, "layers.1.w": values.copy()})
    return pool_of(models)


@pytest.mark.parametrize(
    ("pool", "method"),
    [
        (planted(0.0), "lines"),
        (planted(0.7), "linear"),
        (planted(0.0, heavy=True), "ties"),  # large differences meet, signs are a toss
        (planted(0.4, experts=2, opposed=True), "ties"),
        (planted(0.25), "ties"),
    ],
)
def test_first_method_to_try(pool, method):
    found = inspect(pool)
    told = advise(found.model, found.blocks, found.density)
    assert told.method == method
    assert told.reasons
    assert not told.expected
    assert method_of(told.text) is not None
    assert method_of(found.advice.text) is not None


def test_without_blocks_the_sum_is_not_scaled_by_depth():
    whole = inspect(planted(0.0)).model
    found = advise(whole, 0, 0.2)
    assert found == Advice("task_arithmetic", {"scale": 0.3}, found.reasons)
    assert found.text == "task_arithmetic(scale=0.3)"
    assert method_of(found.text) is not None


# -- bad input -------------------------------------------------------------------------------------


def test_refusals():
    base, one = drawn(0, 1)
    with pytest.raises(InputError, match="give the base"):
        inspect(Pool(None, {"a": one, "b": base}))
    for density in (0, 1.5):
        with pytest.raises(InputError, match="density"):
            inspect(pool_of([base, one]), density=density)
    with pytest.raises(InputError, match="mask_lambda"):
        inspect(pool_of([base, one]), mask_lambda=-1)
    with pytest.raises(InputError, match="1MB"):
        inspect(pool_of([base, one]), memory=1000)
    with pytest.raises(MismatchError, match="lacks"):
        pool_of([base, {"other": one["lm_head.weight"]}])
    bad = {n: v.copy() for n, v in one.items()}
    bad["lm_head.weight"][3, 3] = np.nan
    with pytest.raises(NonFiniteError, match=r"e0: tensor 'lm_head\.weight'"):
        inspect(pool_of([base, bad]))
    whole = {"ids": np.arange(4)}
    with pytest.raises(InputError, match="floating point"):
        inspect(pool_of([whole, whole]))


def test_tallies_of_nothing():
    none = Tally.none(2)
    assert (none + none).size == 0
    assert np.isnan(none.cosine).all()
    assert np.isnan(none.catastrophic)
