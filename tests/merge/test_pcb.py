import math

import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.core.merger import At
from pluribus.core.pool import Pool
from pluribus.engine.driver import plan_pool
from pluribus.engine.reference import merge_arrays
from pluribus.merge.pcb import CLIPS, PCB


def dense(base, experts, ratio, scales, variant, clip=None):
    """The definition on whole vectors in float64, by sorting."""
    c = CLIPS[variant] if clip is None else clip
    m = experts.astype(np.float64) - base.astype(np.float64)
    t, d = m.shape

    def winsor(x, low, high):
        s = np.sort(x, axis=1)
        below, above = s[:, [int(d * low)]], s[:, [int(d * (1 - high) - 1)]]
        return np.clip(x, below, above)

    def minmax(x):
        low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
        return (x - low) / (high - low)

    a = winsor(np.abs(m), c, c)
    clamped = np.sign(m) * a
    intra = np.exp(t * minmax(a) ** 2)
    total = (np.sign(m) * minmax(a) if variant == "vision" else m).sum(0)
    scores = minmax(winsor(intra * np.tanh(m * total), 1 - ratio, 0))
    update = (scores * np.array(scales)[:, None] * clamped).sum(0) / np.maximum(
        scores.sum(0), 1e-12
    )
    return base + update, scores


def planted(t=4, d=20_000, dtype=np.float64, spread=0.01):
    rng = np.random.default_rng(11)
    base = rng.standard_normal(d).astype(dtype)
    return base, (base + spread * rng.standard_normal((t, d))).astype(dtype)


def merged(method, base, experts):
    return merge_arrays(method, {"w": base}, [{"w": e} for e in experts])["w"]


@pytest.mark.parametrize("variant", ["paper-code", "nlp", "vision"])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 1.0])
def test_equals_the_dense_definition(variant, ratio):
    base, experts = planted()
    scales = (1.2, 0.8, 1.0, 2.0)
    want, _ = dense(base, experts, ratio, scales, variant)
    got = merged(PCB(ratio=ratio, scale=scales, variant=variant), base, experts)
    np.testing.assert_allclose(got, want, atol=1e-12)
    low = merged(
        PCB(ratio=ratio, scale=scales, variant=variant), np.float32(base), np.float32(experts)
    )
    want32, _ = dense(np.float32(base), np.float32(experts), ratio, scales, variant)
    # A score at the very cut may fall on either side of it in float32.
    assert np.mean(np.abs(low - want32) > 1e-6) < 1e-4
    assert low.dtype == np.float32


def test_quantiles_run_over_the_whole_model():
    base, experts = planted(d=20_000)
    pieces = {"a": slice(0, 7000), "b": slice(7000, 7001), "c": slice(7001, 20_000)}
    got = merge_arrays(
        PCB(ratio=0.1),
        {n: base[s] for n, s in pieces.items()},
        [{n: e[s] for n, s in pieces.items()} for e in experts],
    )
    want, _ = dense(base, experts, 0.1, [1.2] * 4, "paper-code")
    np.testing.assert_allclose(np.concatenate([got[n] for n in pieces]), want, atol=1e-12)


def test_scope_tensor_is_the_definition_on_each_tensor():
    base, experts = planted(d=4000)
    experts[:, 2000:] = base[2000:] + 100 * (experts[:, 2000:] - base[2000:])
    method = PCB(ratio=0.1, variant="nlp", scope="tensor")
    halves = {"a": slice(0, 2000), "b": slice(2000, 4000)}
    got = merge_arrays(
        method,
        {n: base[s] for n, s in halves.items()},
        [{n: e[s] for n, s in halves.items()} for e in experts],
    )
    for name, part in halves.items():
        want, _ = dense(base[part], experts[:, part], 0.1, [1.2] * 4, "nlp")
        np.testing.assert_allclose(got[name], want, atol=1e-10)


def test_scope_tensor_leaves_frozen_and_tiny_tensors():
    base, experts = planted(d=1000)
    tensors = {"w": base, "frozen": base[:10], "scalar": base[:1].reshape(())}
    models = [{"w": e, "frozen": base[:10], "scalar": e[:1].reshape(())} for e in experts]
    got = merge_arrays(PCB(scope="tensor"), tensors, models)
    assert np.array_equal(got["frozen"], base[:10])
    assert np.isfinite(got["scalar"])


def test_identical_experts_give_the_trimmed_update():
    base, experts = planted(t=1)
    both = np.concatenate([experts, experts, experts])
    got = merged(PCB(ratio=0.1, scale=1.0), base, both)
    _, scores = dense(base, both, 0.1, [1.0] * 3, "paper-code")
    tau = experts[0] - base
    kept = scores[0] > 0
    assert 0.09 < kept.mean() < 0.101
    clamped = np.sign(tau) * np.clip(
        np.abs(tau), np.sort(np.abs(tau))[2], np.sort(np.abs(tau))[int(20_000 * (1 - 1e-4) - 1)]
    )
    np.testing.assert_allclose(got[kept], (base + clamped)[kept], atol=1e-12)
    assert np.array_equal(got[~kept], base[~kept])


@pytest.mark.claim(
    "arXiv:2410.02396: each expert's important parameters survive, conflicts go to mass"
)
def test_planted_competition():
    rng = np.random.default_rng(0)
    d = 4000
    base = np.zeros(d)
    tau = 0.001 * rng.standard_normal((2, d))
    tau[0, :100] = 1.0 + 0.1 * rng.random(100)  # important to the first alone
    tau[1, 100:200] = 1.0 + 0.1 * rng.random(100)  # to the second alone
    tau[0, 200:250], tau[1, 200:250] = 0.9, -0.5  # a conflict that the first wins
    update = merged(PCB(ratio=0.1, scale=1.0, variant="nlp"), base, tau)
    assert (update[:100] / tau[0, :100]).min() > 0.9
    assert (update[100:200] / tau[1, 100:200]).min() > 0.9
    assert (update[200:250] > 0).all()


def test_any_split_into_blocks_gives_the_same_bits():
    base, experts = planted(dtype=np.float32, d=5003)
    method = PCB(ratio=0.1)
    at = At("w", (5003,), 0, 5003)
    folded = {}
    for stage in method.folds():
        for key, fold in stage.items():
            keys = {k: v for k, v in folded.items() if fold.of.__name__ == "_balance"}
            values = fold.of(base, experts, **keys)
            folded[key] = fold.finish(fold.update(fold.init(), values, at))
    whole = method(base, experts, **folded)
    for size in (1, 7, 64, 1000):
        parts = [
            method(base[i : i + size], experts[:, i : i + size], **folded)
            for i in range(0, 5003, size)
        ]
        assert np.array_equal(np.concatenate(parts), whole)


def test_many_experts_do_not_overflow():
    base, experts = planted(t=100, d=500, dtype=np.float32)
    assert np.isfinite(merged(PCB(ratio=0.2), base, experts)).all()


def test_saturated_scores_share_instead_of_dividing_by_zero():
    base, experts = planted(dtype=np.float32, d=2000, spread=50.0)
    method = PCB(ratio=0.1, clip=0.25)  # many magnitudes clamp to one, and tanh is 1 there
    assert np.isfinite(merged(method, base, experts)).all()


def test_torch_gives_what_numpy_gives():
    torch = pytest.importorskip("torch")
    base, experts = planted(d=3000)
    want = merged(PCB(), base, experts)
    got = merged(PCB(), torch.from_numpy(base), list(torch.from_numpy(experts)))
    np.testing.assert_allclose(got.numpy(), want, atol=1e-10)


# -- bad input -------------------------------------------------------------------------------------


def test_an_expert_that_is_the_base():
    base, experts = planted(d=3000)
    experts[2] = base
    with pytest.raises(InputError, match=r"expert 3 of 4 .* drop_unchanged"):
        merged(PCB(), base, experts)
    dropped = merged(PCB(drop_unchanged=True), base, experts)
    without = merged(PCB(), base, experts[[0, 1, 3]])
    np.testing.assert_allclose(dropped, without, atol=1e-12)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.5, math.nan])
def test_ratio_out_of_range(ratio):
    with pytest.raises(InputError, match="ratio"):
        PCB(ratio=ratio)


def test_nothing_would_be_kept():
    base, experts = planted(d=50)
    with pytest.raises(InputError, match="keeps none of the model's 50"):
        merged(PCB(ratio=0.01, clip=0.02), base, experts)


def test_as_many_scales_as_experts():
    base, experts = planted(d=500)
    with pytest.raises(InputError, match="2 values were given for 4 experts"):
        merged(PCB(scale=(1.0, 2.0)), base, experts)


def test_one_expert_warns_once():
    base, experts = planted(t=1, d=2000)
    (warning,) = plan_pool(Pool({"x": base}, [{"x": experts[0]}]), PCB()).warnings
    assert "a single expert was given" in warning


def test_one_expert_is_only_trimmed():
    base, experts = planted(t=1, d=2000)
    update = merged(PCB(scale=1.0), base, experts) - base
    assert 0.05 < (update != 0).mean() < 0.11


def test_unknown_variant_and_clip():
    with pytest.raises(InputError, match="variant"):
        PCB(variant="audio")
    with pytest.raises(InputError, match="clip"):
        PCB(clip=0.7)
