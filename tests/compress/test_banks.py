"""TALL masks, EMR and exact residuals: three ways to fill one kind of bank."""

import json

import numpy as np
import pytest
import torch

from pluribus.compress import Emr, Exact, TallMasks, build, compressor, open_store
from pluribus.core.errors import (
    FormatError,
    InputError,
    MismatchError,
    MissingError,
    OutputError,
    RecipeError,
)
from pluribus.core.weights import Weights
from pluribus.merge.ties import Ties


def arrays(weights):
    return {name: weights[name] for name in weights}


def same_bits(one, other):
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(
            one[name].contiguous().reshape(-1).view(torch.uint8),
            other[name].contiguous().reshape(-1).view(torch.uint8),
        )
        for name in one
    )


# -- the published rules ---------------------------------------------------------------------------


@pytest.mark.parametrize("mask_lambda", [0.2, 0.4, 1.0])
def test_tall_masks_as_published(base, experts, mask_lambda):
    bank = TallMasks(mask_lambda=mask_lambda).fit(base, experts)
    assert bank.tasks == ("math", "code", "law")
    for task, expert in experts.items():
        for name, b in base.items():
            tau = torch.stack([e[name] - b for e in experts.values()]).sum(0)
            mask = (b - expert[name]).abs() > (b + tau - expert[name]).abs() * mask_lambda
            packed = bank.entries[task].masks[name].numpy()
            bits = np.unpackbits(packed, count=b.numel()).reshape(b.shape).astype(bool)
            assert packed.size == (b.numel() + 7) // 8
            assert np.array_equal(bits, mask.numpy())  # the authors' function, bit for bit
            assert torch.equal(bank[task][name], torch.where(mask, b + tau, b))


def test_ties_as_the_vector(base, experts):
    bank = TallMasks(multi="ties", mask_lambda=0.4).fit(base, experts)
    want = Ties(density=0.2, scope="model", count="official", tie="global", agg="sum")
    from pluribus.engine.reference import merge_arrays

    merged = merge_arrays(
        want,
        {n: v.numpy() for n, v in base.items()},
        [{n: v.numpy() for n, v in e.items()} for e in experts.values()],
    )
    for name in base:
        np.testing.assert_allclose(
            bank.multi[name].numpy(), merged[name] - base[name].numpy(), atol=1e-6
        )


def test_one_expert_comes_back(base, experts):
    bank = TallMasks(mask_lambda=0.5).fit(base, {"math": experts["math"]})
    for name, value in experts["math"].items():
        torch.testing.assert_close(bank["math"][name], value, atol=1e-6, rtol=0)
    assert bank.report()["tasks"]["math"]["density"] == 1.0


def test_identical_experts_are_kept_below_one_over_t_minus_one(base, experts):
    same = {str(i): experts["math"] for i in range(4)}
    assert TallMasks(mask_lambda=0.33).fit(base, same).report()["tasks"]["0"]["density"] == 1.0
    assert TallMasks(mask_lambda=0.34).fit(base, same).report()["tasks"]["0"]["density"] < 0.01


def test_l1_is_the_best_of_all_thresholds(base, experts):
    def error(bank, task):
        return sum((bank[task][n] - experts[task][n]).abs().sum() for n in base)

    best = TallMasks(mask_lambda="l1").fit(base, experts)
    for value in (0.3, 0.6, 0.9, 1.1, 1.5):
        assert error(best, "code") <= error(TallMasks(mask_lambda=value).fit(base, experts), "code")


@pytest.mark.parametrize("rescale", ["sum", "mean"])
def test_emr_as_published(base, experts, rescale):
    bank = Emr(rescale=rescale).fit(base, experts)
    taus = {t: {n: e[n] - base[n] for n in base} for t, e in experts.items()}
    unified, own, kept = {}, dict.fromkeys(experts, 0.0), dict.fromkeys(experts, 0.0)
    for name in base:
        total = sum(tau[name] for tau in taus.values())
        sign = torch.where(total > 0, 1.0, -1.0)
        size = torch.stack([(tau[name] * sign).clamp(min=0) for tau in taus.values()]).amax(0)
        unified[name] = sign * size
        for task, tau in taus.items():
            mean = (lambda x: x.mean().item()) if rescale == "mean" else (lambda x: x.sum().item())
            mask = tau[name] * sign > 0
            own[task] += mean(tau[name].abs())
            kept[task] += mean((mask * unified[name]).abs())
    for task in experts:
        factor = own[task] / kept[task]
        assert bank.entries[task].factor == pytest.approx(factor, rel=1e-5)
        for name in base:
            mask = taus[task][name] * unified[name] > 0
            want = base[name] + factor * mask * unified[name]
            torch.testing.assert_close(bank[task][name], want, atol=1e-6, rtol=1e-6)


def test_emr_of_one_expert_is_that_expert(base, experts):
    bank = Emr().fit(base, {"math": experts["math"]})
    assert bank.entries["math"].factor == 1.0
    for name, value in experts["math"].items():
        torch.testing.assert_close(bank["math"][name], value, atol=1e-6, rtol=0)


# -- choosing the threshold ------------------------------------------------------------------------


def test_validation_takes_the_first_best(base, experts):
    seen = []

    def score(task, weights):
        assert isinstance(weights, Weights)
        seen.append(task)
        if task == "code":
            return 1.0  # all alike: the first of the grid
        return -sum((weights[n] - experts[task][n]).abs().sum().item() for n in base)

    bank = TallMasks(grid=(0.2, 0.6, 1.0, 3.0)).fit(base, experts, score)
    assert seen == [t for t in experts for _ in range(4)]
    assert [bank.entries[t].mask_lambda for t in experts] == [1.0, 0.2, 1.0]


def test_a_threshold_for_each_task(base, experts):
    chosen = {"math": 0.3, "code": "l1", "law": 0.5}
    bank = TallMasks(mask_lambda=chosen).fit(base, experts)
    assert [e.mask_lambda for e in bank.entries.values()] == [0.3, 1.0, 0.5]
    with pytest.raises(InputError, match=r"differ in 'laws'. Did you mean 'law'"):
        TallMasks(mask_lambda={"math": 0.3, "code": 0.3, "laws": 1.0}).fit(base, experts)


def test_validation_needs_a_score(base, experts):
    with pytest.raises(InputError, match=r"needs score\(task, weights\)"):
        TallMasks().fit(base, experts)
    with pytest.raises(InputError, match=r"score of math at mask_lambda = 0.2 is nan"):
        TallMasks().fit(base, experts, lambda task, weights: float("nan"))
    with pytest.raises(InputError, match="grid"):
        TallMasks(grid=())


# -- keeping ---------------------------------------------------------------------------------------

METHODS = [
    TallMasks(mask_lambda=0.4),
    TallMasks(mask_lambda=0.4, exact=True),
    TallMasks(multi="trim(density=0.5) >> elect >> mean", mask_lambda=0.4),
    Emr(),
    Emr(exact=True),
    Exact(),
]
KINDS = ["float32", "bfloat16", "float16", "float64"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_saving_changes_no_bit(tmp_path, method, kind, state):
    rng = np.random.default_rng(4)
    base = state(rng, kind=kind)
    experts = {t: state(rng, base, kind) for t in ("a", "b/c", "d")}
    fitted = method.fit(base, experts)
    before = {task: arrays(fitted[task]) for task in experts}
    fitted.save(tmp_path / "one")
    streamed = method.fit(base, experts, out=tmp_path / "two")
    for bank in (open_store(tmp_path / "one", base), streamed):
        assert bank.tasks == tuple(experts)
        for task in experts:
            assert same_bits(arrays(bank[task]), before[task])
            if bank.exact:
                assert same_bits(arrays(bank[task]), experts[task])
    open_store(tmp_path / "one", base).save(tmp_path / "three")  # and once more from disk
    again = open_store(tmp_path / "three", base)
    assert all(same_bits(arrays(again[task]), before[task]) for task in experts)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("method", [Exact(), TallMasks(mask_lambda="l1", exact=True)], ids=repr)
def test_exact_survives_other_types_and_odd_values(tmp_path, base, method, state):
    weird = {n: v.clone() for n, v in base.items()}
    weird["layers.0.w"][0, :4] = torch.tensor([-0.0, 1e-42, -3e38, 3e38])
    half = {n: v.to(torch.bfloat16) for n, v in state(np.random.default_rng(9), base).items()}
    bank = method.fit(base, {"weird": weird, "half": half}, out=tmp_path / "bank")
    assert same_bits(arrays(bank["weird"]), weird)
    assert same_bits(arrays(bank["half"]), half)


def test_any_range_may_be_read(base, experts, tmp_path):
    for method in METHODS:
        bank = method.fit(base, experts, out=tmp_path / f"{METHODS.index(method)}")
        source = bank["code"].source("layers.0.w")
        whole = source.load()
        for start, stop in ((0, 1), (3, 700 - 7), (8, 16), (692, 693), (5, 5)):
            part = source.load(start, stop)
            assert np.array_equal(part, whole[4 * start : 4 * stop])


def test_large_tensors_cross_chunks(tmp_path, narrow):
    rng = np.random.default_rng(2)
    size = (1 << 20) + 4321
    base = {"w": narrow(rng.standard_normal(size), "bfloat16")}
    experts = {
        t: {"w": narrow(base["w"].float().numpy() + 0.01 * rng.standard_normal(size), "bfloat16")}
        for t in "ab"
    }
    fitted = TallMasks(mask_lambda=0.4, exact=True).fit(base, experts)
    fitted.save(tmp_path / "bank")
    bank = open_store(tmp_path / "bank", base)
    assert all(same_bits(arrays(bank[t]), experts[t]) for t in "ab")
    plain = TallMasks(mask_lambda=0.4).fit(base, experts)
    assert same_bits(
        arrays(plain["a"]),
        arrays(TallMasks(mask_lambda=0.4).fit(base, experts, out=tmp_path / "plain")["a"]),
    )


def test_report(tmp_path, base, experts):
    bank = TallMasks(mask_lambda=0.4).fit(base, experts, out=tmp_path / "bank")
    told = json.loads(json.dumps(bank.report()))
    each = sum(v.numel() * 4 for v in base.values())
    bits = sum((v.numel() + 7) // 8 for v in base.values())
    assert told["base_bytes"] == told["multi_bytes"] == each
    assert told["checkpoints_bytes"] == 3 * each
    assert told["tasks"]["law"]["bytes"] == bits
    assert told["store_bytes"] == each + 3 * bits
    assert told["ratio"] == pytest.approx((2 * each + 3 * bits) / (3 * each))
    assert sum(told["kept_by"]) == pytest.approx(1)
    kept = sum(k * share for k, share in enumerate(told["kept_by"]))
    densities = [t["density"] for t in told["tasks"].values()]
    assert kept == pytest.approx(sum(densities))


def test_expert_files_open_anywhere(tmp_path, base, experts):
    bank = TallMasks(mask_lambda=0.4).fit(base, experts, out=tmp_path / "bank")
    bank.expand("math").save(tmp_path / "math.safetensors")
    assert same_bits(arrays(Weights.open(tmp_path / "math.safetensors")), arrays(bank["math"]))


# -- tensors of single tasks -----------------------------------------------------------------------


def test_heads_buffers_and_excluded_tensors_stay_with_their_task(tmp_path, base, experts):
    base["bn.running_mean"] = torch.zeros(4)
    base["bn.num_batches_tracked"] = torch.tensor(1)
    base["ids"] = torch.arange(3)
    base["cls.weight"] = torch.zeros(2, 2)
    for number, expert in enumerate(experts.values()):
        expert["bn.running_mean"] = torch.full((4,), float(number))
        expert["bn.num_batches_tracked"] = torch.tensor(1 + number)
        expert["ids"] = torch.arange(3)
        expert["cls.weight"] = torch.ones(2 + number, 2)
        expert["head.weight"] = torch.full((number + 1, 2), 7.0)
    method = TallMasks(mask_lambda=0.4, exclude=("^cls",))
    for bank in (method.fit(base, experts), method.fit(base, experts, out=tmp_path / "bank")):
        for number, task in enumerate(experts):
            got = arrays(bank[task])
            assert set(got) == set(base) | {"head.weight"}
            for name in ("bn.running_mean", "bn.num_batches_tracked", "ids", "cls.weight"):
                assert same_bits({0: got[name]}, {0: experts[task][name]})
            assert got["head.weight"].shape == (number + 1, 2)
        assert "ids" not in bank.entries["code"].own  # equal to the base's: not kept twice
        assert bank.names == ("layers.0.w", "layers.1.w", "norm.weight", "scalar")
    with pytest.raises(MismatchError, match=r"'cls.weight' .* leave it to each task with exclude"):
        TallMasks(mask_lambda=0.4).fit(base, experts)


def test_tied_tensors_stay_tied(tmp_path, base, experts):
    for model in (base, *experts.values()):
        model["tied"] = model["layers.0.w"]
    bank = TallMasks(mask_lambda=0.4).fit(base, experts, out=tmp_path / "bank")
    assert bank["math"].aliases == {"tied": "layers.0.w"}
    assert torch.equal(bank["math"]["tied"], bank["math"]["layers.0.w"])


# -- switching in place ----------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(5, 4)
        self.two = torch.nn.Linear(4, 3)


def test_switching_a_module_rewrites_only_what_differs():
    torch.manual_seed(0)
    base = Model()
    experts = {}
    for task in ("a", "b"):
        expert = Model()
        expert.load_state_dict(base.state_dict())
        with torch.no_grad():
            expert.one.weight += 0.1 * torch.randn(4, 5)
        experts[task] = expert
    bank = TallMasks(mask_lambda=0.4).fit(base, experts)
    model = Model()
    weight = model.one.weight
    assert set(bank.load_into(model, "a")) == set(model.state_dict())
    assert bank.load_into(model, "b") == ["one.weight"]
    assert bank.load_into(model, "b") == []
    assert model.one.weight is weight
    assert same_bits(dict(model.state_dict()), arrays(bank["b"]))
    double = Model().double()
    bank.load_into(double, "a")
    torch.testing.assert_close(double.one.weight.float(), bank["a"]["one.weight"])
    state = {"one.weight": torch.zeros(4, 5)}
    with pytest.raises(MismatchError, match=r"'one.bias' is F32\[4\] in a, but is not there"):
        bank.load_into(state, "a")
    assert state["one.weight"].eq(0).all()


# -- adding ----------------------------------------------------------------------------------------


def test_adding_a_task(tmp_path, base, experts, state):
    late = state(np.random.default_rng(8), base)
    for method in (TallMasks(mask_lambda=0.4), TallMasks(mask_lambda=0.4, exact=True), Emr()):
        bank = method.fit(
            base, experts, out=tmp_path / repr(METHODS.index(method) if method in METHODS else 9)
        )
        more = bank.add("art", late, mask_lambda=0.4)
        assert more.tasks == ("math", "code", "law", "art")
        assert bank.tasks == ("math", "code", "law")  # as it was
        assert same_bits(arrays(more["code"]), arrays(bank["code"]))
        for name in base:
            vector, whole = bank.multi[name], late[name]
            if bank.rule == "tall" and not bank.exact:
                mask = (base[name] - whole).abs() > 0.4 * (base[name] + vector - whole).abs()
                assert torch.equal(
                    more["art"][name], torch.where(mask, base[name] + vector, base[name])
                )
        where = bank.folder.with_name(bank.folder.name + "+")
        more.save(where)
        assert same_bits(arrays(open_store(where, base)["art"]), arrays(more["art"]))
    with pytest.raises(InputError, match="already"):
        bank.add("math", late)
    with pytest.raises(InputError, match="needs the old experts"):
        bank.add("art", late, freeze_multi=False)
    with pytest.raises(InputError, match="needs score"):
        TallMasks(mask_lambda=0.4).fit(base, experts).add("art", late, mask_lambda="validate")


# -- bad input -------------------------------------------------------------------------------------


def test_another_base_is_refused(tmp_path, base, experts):
    TallMasks(mask_lambda=0.4).fit(base, experts, out=tmp_path / "bank")
    other = {n: v.clone() for n, v in base.items()}
    other["norm.weight"][3] += 1e-3
    with pytest.raises(MismatchError, match="made for another base"):
        open_store(tmp_path / "bank", other)
    with pytest.raises(MismatchError, match="other names, types or shapes"):
        open_store(tmp_path / "bank", {n: v.half() for n, v in base.items()})
    assert open_store(tmp_path / "bank", other, verify=False).tasks == tuple(experts)


def test_a_copy_of_the_base_is_accepted(tmp_path, base, experts):
    Weights.of(base).save(tmp_path / "base.safetensors")
    TallMasks(mask_lambda=0.4).fit(tmp_path / "base.safetensors", experts, out=tmp_path / "bank")
    bank = open_store(tmp_path / "bank")  # the base lies where it lay
    assert same_bits(arrays(open_store(tmp_path / "bank", base)["law"]), arrays(bank["law"]))
    (tmp_path / "base.safetensors").unlink()
    with pytest.raises(MissingError):
        open_store(tmp_path / "bank")


def test_models_must_fit(base, experts):
    short = {n: v for n, v in experts["math"].items() if n != "norm.weight"}
    with pytest.raises(MismatchError, match=r"math has no tensor 'norm.weight'"):
        TallMasks(mask_lambda=0.4).fit(base, {"math": short})
    with pytest.raises(InputError, match="mapping from task names"):
        TallMasks(mask_lambda=0.4).fit(base, {})
    with pytest.raises(InputError, match="regular expression"):
        TallMasks(mask_lambda=0.4, exclude=("(",)).fit(base, experts)
    with pytest.raises(InputError, match="left to be shared"):
        TallMasks(mask_lambda=0.4, exclude=(".",)).fit(base, experts)


def test_folders(tmp_path, base, experts):
    Exact().fit(base, experts, out=tmp_path / "bank")
    with pytest.raises(OutputError, match="exists already"):
        Exact().fit(base, experts, out=tmp_path / "bank")
    Emr().fit(base, experts, out=tmp_path / "bank", overwrite=True)
    assert open_store(tmp_path / "bank", base).method == "emr"
    with pytest.raises(OutputError, match="no such folder"):
        Exact().fit(base, experts, out=tmp_path / "no" / "bank")
    with pytest.raises(MissingError, match="no store in it"):
        open_store(tmp_path)
    (tmp_path / "bank" / "store.json").write_text("{}")
    with pytest.raises(FormatError, match="not the manifest"):
        open_store(tmp_path / "bank", base)


def test_a_failed_fit_leaves_nothing(tmp_path, base, experts):
    def broken(task, weights):
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        TallMasks().fit(base, experts, broken, out=tmp_path / "bank")
    assert not list(tmp_path.iterdir())


def test_damage_is_noticed(tmp_path, base, experts):
    Exact().fit(base, experts, out=tmp_path / "bank")
    bank = open_store(tmp_path / "bank", base)
    path = tmp_path / "bank" / "exact-000.safetensors"
    raw = bytearray(path.read_bytes())
    at = raw.index(b"\x78\x01")  # the first zlib stream
    raw[at + 20 : at + 40] = bytes(20)
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="damaged"):
        arrays(open_store(tmp_path / "bank", base)["math"])
    path.unlink()
    with pytest.raises(MissingError, match="exact-000"):
        open_store(tmp_path / "bank", base)
    del bank


def test_unknown_names(base, experts):
    bank = Emr().fit(base, experts)
    with pytest.raises(KeyError, match="Did you mean 'math'"):
        bank["maths"]
    with pytest.raises(RecipeError, match="Did you mean 'tall_masks'"):
        compressor("tall_mask")
    with pytest.raises(RecipeError, match="method and parameters"):
        compressor({"name": "emr"})
    with pytest.raises(InputError, match="Did you mean 'exact'"):
        compressor({"method": "emr", "parameters": {"exakt": True}})
    assert compressor({"method": "tall_masks", "parameters": {"lambda": 0.5}}).mask_lambda == 0.5


def test_build_is_fit(tmp_path, base, experts):
    recipe = {"method": "tall_masks", "parameters": {"multi": "ties", "lambda": "l1"}}
    built = build(recipe, base, experts, tmp_path / "bank")
    fitted = TallMasks(multi="ties", mask_lambda="l1").fit(base, experts)
    assert all(same_bits(arrays(built.expand(t)), arrays(fitted[t])) for t in experts)


@pytest.mark.claim("arXiv:2405.07813, abstract: masks keep the tasks where one merged model cannot")
def test_masks_reconstruct_better_than_chance(base, experts):
    bank = TallMasks(mask_lambda=0.4).fit(base, experts)
    rng = np.random.default_rng(0)
    for task, expert in experts.items():
        name = "layers.0.w"
        tau, multi = expert[name] - base[name], bank.multi[name]
        density = bank.report()["tasks"][task]["density"]
        random = torch.from_numpy(rng.random(tau.shape) < density) * multi
        got = bank[task][name] - base[name]
        cosine = torch.nn.functional.cosine_similarity
        assert (
            cosine(got.flatten(), tau.flatten(), 0)
            > cosine(random.flatten(), tau.flatten(), 0) + 0.2
        )
