import json

import numpy as np
import pytest
import torch

from pluribus.compress import Twin, open_store
from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.core.weights import Weights


def arrays(weights):
    return {name: weights[name] for name in weights}


def equal(one, other, **tolerance):
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or {"rtol": 0, "atol": 0}))


def shared(base, experts):
    return {n: b + 0.3 * sum(e[n] - b for e in experts.values()) for n, b in base.items()}


def test_by_hand():
    base = {"w": torch.zeros(2, 2)}
    experts = {"a": {"w": torch.tensor([[10.0, 0.0], [0.0, 1.0]])}, "b": {"w": torch.zeros(2, 2)}}
    twin = Twin(rank=1).fit(base, experts)
    torch.testing.assert_close(twin.shared["w"], torch.tensor([[3.0, 0.0], [0.0, 0.3]]))
    # e_a = diag(7, 0.7): rank 1 keeps the 7.
    torch.testing.assert_close(twin["a"]["w"], torch.tensor([[10.0, 0.0], [0.0, 0.3]]))
    assert twin.kept["a"] == pytest.approx(49 / 49.49)
    half = twin.materialise({"a": 0.5})["w"]
    torch.testing.assert_close(half, torch.tensor([[6.5, 0.0], [0.0, 0.3]]))


def test_the_shared_expert_is_task_arithmetic(base, experts):
    equal(arrays(Twin().fit(base, experts).shared), shared(base, experts), rtol=0, atol=1e-6)


@pytest.mark.parametrize("compress", ["svd", "magnitude", "bernoulli"])
def test_density_1_and_the_right_route_give_the_expert(base, experts, compress):
    twin = Twin(compress=compress, density=1.0).fit(base, experts)
    for task, expert in experts.items():
        equal(arrays(twin[task]), expert, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "method", [Twin(rank=0), Twin(density=0.0), Twin(compress="magnitude", density=0.0)]
)
def test_rank_0_gives_the_shared_expert_for_matrices(base, experts, method):
    twin = method.fit(base, experts)
    for name in ("layers.0.w", "layers.1.w"):
        assert torch.equal(twin["math"][name], twin.shared[name])
    torch.testing.assert_close(twin["math"]["norm.weight"], experts["math"]["norm.weight"])


def test_uniform_weights_without_compression_average(base, experts):
    twin = Twin(density=1.0).fit(base, experts)
    mean = {n: sum(e[n] for e in experts.values()) / 3 for n in base}
    equal(arrays(twin.materialise([1 / 3] * 3)), mean, rtol=0, atol=1e-6)


def test_svd_is_the_best_approximation(base, experts):
    twin = Twin(density=0.25).fit(base, experts)
    for name, (rows, cols) in {"layers.0.w": (33, 21), "layers.1.w": (40, 7)}.items():
        rank = max(1, int(0.25 * min(rows, cols)))
        assert twin.ranks("code")[name] == rank
        e = (experts["code"][name] - twin.shared[name]).double()
        u, s, v = torch.linalg.svd(e, full_matrices=False)
        want = twin.shared[name] + (u[:, :rank] * s[:rank]) @ v[:rank]
        torch.testing.assert_close(twin["code"][name], want.float(), atol=1e-5, rtol=0)


def test_convolutions_are_matrices_of_output_channels(experts):
    rng = np.random.default_rng(0)
    base = {"conv.weight": torch.from_numpy(rng.standard_normal((6, 4, 3, 3)).astype(np.float32))}
    tuned = {
        "a": {
            "conv.weight": base["conv.weight"]
            + torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        }
    }
    twin = Twin(rank=2).fit(base, tuned)
    e = (tuned["a"]["conv.weight"] - twin.shared["conv.weight"]).reshape(6, 36)
    u, s, v = torch.linalg.svd(e, full_matrices=False)
    want = twin.shared["conv.weight"] + ((u[:, :2] * s[:2]) @ v[:2]).reshape(6, 4, 3, 3)
    torch.testing.assert_close(twin["a"]["conv.weight"], want, atol=1e-5, rtol=0)
    full = Twin(rank=100).fit(base, tuned)  # at most the full rank
    torch.testing.assert_close(
        full["a"]["conv.weight"], tuned["a"]["conv.weight"], atol=1e-5, rtol=0
    )


def test_magnitude_keeps_the_largest(base, experts):
    twin = Twin(compress="magnitude", density=0.1).fit(base, experts)
    for name in ("layers.0.w", "layers.1.w"):
        e = experts["law"][name] - twin.shared[name]
        count = int(0.1 * e.numel())
        cut = e.abs().flatten().topk(count).values[-1]
        want = twin.shared[name] + torch.where(e.abs() >= cut, e, 0.0)
        torch.testing.assert_close(twin["law"][name], want, atol=1e-6, rtol=0)
        assert twin.parts["law"][f"kept/{name}"].numel() == count


def test_bernoulli_is_unbiased_and_seeded():
    base = {"w": torch.zeros(300, 200)}
    experts = {"a": {"w": torch.ones(300, 200)}}
    method = Twin(compress="bernoulli", density=0.25, shared="scale(scale=0.0) >> sum")
    twin = method.fit(base, experts, seed=1)
    assert set(twin["a"]["w"].unique().tolist()) == {0.0, 4.0}
    assert twin["a"]["w"].mean() == pytest.approx(1, abs=0.03)
    assert torch.equal(twin["a"]["w"], method.fit(base, experts, seed=1)["a"]["w"])
    assert not torch.equal(twin["a"]["w"], method.fit(base, experts, seed=2)["a"]["w"])


METHODS = [
    Twin(),
    Twin(rank=3),
    Twin(density=1.0),
    Twin(compress="magnitude", density=0.2),
    Twin(compress="bernoulli", density=0.2),
    Twin(shared="ties(density=0.3)"),
    Twin(rank=3, dtype="float16"),
    Twin(compress="magnitude", density=0.2, dtype="bfloat16"),
]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_saving_changes_no_bit_and_any_range_reads_alike(tmp_path, method, kind, state):
    rng = np.random.default_rng(3)
    base = state(rng, kind=kind)
    experts = {t: state(rng, base, kind) for t in ("a", "b")}
    fitted = method.fit(base, experts)
    fitted.save(tmp_path / "one")
    streamed = method.fit(base, experts, out=tmp_path / "two")
    mixed = {"a": 0.7, "b": 0.4}
    for twin in (open_store(tmp_path / "one"), streamed):  # no base needed
        for task in experts:
            equal(arrays(twin[task]), arrays(fitted[task]))
            assert twin[task]["layers.0.w"].dtype == getattr(torch, kind)
        equal(arrays(twin.materialise(mixed)), arrays(fitted.materialise(mixed)))
    source = streamed.materialise(mixed).source("layers.0.w")
    whole, size = source.load(), source.spec.kind.size
    for start, stop in ((0, 1), (20, 22), (7, 500), (692, 693)):
        assert np.array_equal(source.load(start, stop), whole[size * start : size * stop])
    assert not list(tmp_path.glob("*.partial"))


def test_sparse_parts_find_their_values_far_inside(tmp_path):
    rng = np.random.default_rng(1)
    base = {"w": torch.zeros(400, 500)}
    values = torch.from_numpy(rng.standard_normal((400, 500)).astype(np.float32))
    method = Twin(compress="magnitude", density=0.3, shared="scale(scale=0.0) >> sum")
    twin = method.fit(base, {"a": {"w": values}}, out=tmp_path / "t")
    cut = values.abs().flatten().topk(60_000).values[-1]
    want = torch.where(values.abs() >= cut, values, 0.0)
    assert torch.equal(twin["a"]["w"], want)
    part = twin["a"].source("w").floats(150_001, 150_999)
    assert np.array_equal(part, want.flatten()[150_001:150_999].numpy())


def test_report(tmp_path, base, experts):
    twin = Twin(rank=2).fit(base, experts, out=tmp_path / "t")
    told = json.loads(json.dumps(twin.report()))
    each = sum(v.numel() * 4 for v in base.values())
    part = 4 * (2 * (33 + 21) + 2 * (40 + 7) + 13 + 1)
    assert told["shared_bytes"] == each
    assert told["tasks"]["law"]["bytes"] == part
    assert told["ratio"] == pytest.approx((each + 3 * part) / (3 * each))
    assert 0 < told["tasks"]["law"]["kept"] < 1
    assert told["tasks"]["law"]["largest_rank"] == 2


@pytest.mark.parametrize(("kind", "digits"), [("float16", 11), ("bfloat16", 8)])
def test_half_precision_rounds_each_value_of_a_factor_once(tmp_path, base, experts, kind, digits):
    whole = Twin(rank=3).fit(base, experts)
    half = Twin(rank=3, dtype=kind).fit(base, experts, out=tmp_path / "t")
    for name in ("layers.0.w", "layers.1.w"):
        for form in ("a", "b"):
            found, want = (s.parts["law"][f"{form}/{name}"] for s in (half, whole))
            assert found.dtype == getattr(torch, kind)
            torch.testing.assert_close(found.float(), want, rtol=2.0**-digits, atol=1e-7)
        product = half.parts["law"][f"b/{name}"].float() @ half.parts["law"][f"a/{name}"].float()
        torch.testing.assert_close(half["law"][name], half.shared[name] + product)
    factors = 4 * 3 * (33 + 21 + 40 + 7)
    told = (store.report()["tasks"]["law"]["bytes"] for store in (half, whole))
    assert -np.subtract(*told) == factors // 2
    assert half.parts["law"]["dense/norm.weight"].dtype == torch.float32


def test_what_half_precision_cannot_hold_is_told():
    base = {"w": torch.zeros(2, 2)}
    experts = {"a": {"w": torch.full((2, 2), 1e12)}}
    with pytest.raises(NonFiniteError, match="part a of w is beyond the range of float16; give"):
        Twin(rank=1, dtype="float16").fit(base, experts)
    kept = Twin(rank=1, dtype="bfloat16").fit(base, experts)["a"]["w"]
    torch.testing.assert_close(kept, experts["a"]["w"], rtol=2.0**-7, atol=0)


def test_heads_and_excluded_tensors(tmp_path, base, experts):
    base["cls.bias"] = torch.zeros(3)
    for number, expert in enumerate(experts.values()):
        expert["cls.bias"] = torch.full((3,), float(number + 1))
        expert["head.weight"] = torch.ones(number + 1, 2)
    method = Twin(rank=1, exclude=(r"bias$",))
    twin = method.fit(base, experts, out=tmp_path / "t")
    assert torch.equal(twin["code"]["cls.bias"], torch.full((3,), 2.0))
    assert twin["law"]["head.weight"].shape == (3, 2)
    mixed = twin.materialise([0.5, 0.5, 0.0])
    assert torch.equal(mixed["cls.bias"], torch.zeros(3))  # the shared one
    assert "head.weight" not in mixed
    own = twin.materialise([0.5, 0.5, 0.0], task="law")
    assert torch.equal(own["cls.bias"], torch.full((3,), 3.0))
    assert own["head.weight"].shape == (3, 2)


def test_a_shared_expert_of_ones_own(tmp_path, base, experts):
    given = Weights.of({n: v * 0 for n, v in base.items()})
    twin = Twin(shared=given, density=1.0).fit(base, experts, out=tmp_path / "t")
    assert twin.shared["layers.0.w"].eq(0).all()
    equal(arrays(twin["math"]), experts["math"])


# -- bad input -------------------------------------------------------------------------------------


def test_parameters():
    with pytest.raises(InputError, match="give one"):
        Twin(density=0.1, rank=4)
    with pytest.raises(InputError, match="rank is for svd"):
        Twin(compress="magnitude", rank=4)
    with pytest.raises(InputError, match="density"):
        Twin(density=1.5)
    with pytest.raises(InputError, match="rank"):
        Twin(rank=-1)


def test_exclude_that_matches_nothing_or_much(base, experts):
    with pytest.warns(UserWarning, match="'nowhere' matches no tensor"):
        Twin(exclude=("nowhere",)).fit(base, experts)
    with pytest.warns(UserWarning, match="leaves 1 of 4 tensors"):
        Twin(exclude=("layers", "scalar")).fit(base, experts)
    with pytest.raises(InputError, match="left to be shared"):
        Twin(exclude=(".*",)).fit(base, experts)


def test_different_heads_are_named(base, experts):
    experts["law"]["norm.weight"] = torch.zeros(5)
    with pytest.raises(MismatchError, match=r"'norm.weight' is F32\[13\] .* F32\[5\] in law"):
        Twin().fit(base, experts)


def test_weights(base, experts):
    twin = Twin(rank=1).fit(base, experts)
    with pytest.raises(InputError, match="2 weights were given for 3 tasks"):
        twin.materialise([0.5, 0.5])
    with pytest.raises(KeyError, match="Did you mean 'law'"):
        twin.materialise({"laws": 1.0})
    with pytest.raises(InputError, match="weight of law is nan"):
        twin.materialise({"law": float("nan")})
    equal(arrays(twin.materialise({})), arrays(twin.shared))
