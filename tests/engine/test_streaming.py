"""Streamed from disk in blocks and spans, on any threads and budget, equals merged in memory."""

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from pluribus.core.chain import parse
from pluribus.core.errors import InputError, MismatchError
from pluribus.core.fold import Sum
from pluribus.core.merger import facts, merger, stages
from pluribus.core.order import TopK
from pluribus.core.pool import Pool
from pluribus.core.registry import MERGERS
from pluribus.core.source import ArraySource, FileSlice, TensorSpec
from pluribus.core.weights import Weights
from pluribus.engine.driver import Options, execute, merge, merge_tensors, plan_pool
from pluribus.merge.linear import Linear
from pluribus.merge.ties import Ties

REQUIRED = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.05}}
MORE = [
    Ties(density=0.2),
    Ties(density=(0.1, 0.5, 1.0)),
    Ties(density=0.2, scope="model"),
    Ties(density=0.3, scope="model", count="official"),
    Ties(density=0.4, agg="max"),
    parse("trim(density=0.3, scope='model') >> elect >> mean"),
]


def registered():
    for name in MERGERS:
        if set(facts(MERGERS[name]).needs) - {"fisher"}:
            continue  # their further inputs have shapes of their own; tests/merge has them
        yield pytest.param(MERGERS.build(name, REQUIRED.get(name, {})), id=name)
    for number, method in enumerate(MORE):
        yield pytest.param(method, id=f"more{number}")


METHODS = list(registered())


def pool_for(models, method, **keywords):
    low, high = facts(method).experts
    pool = models.write(min(high or 3, max(low, 3)), **keywords)
    if "fisher" in facts(method).needs:
        fisher = [expert.map(np.square) for expert in pool.experts.values()]
        pool = Pool(pool.base, pool.experts, extras={"fisher": fisher})
    return pool


def sums(method):
    """Whether the method adds in float64 by blocks, so that bits belong to one block size."""
    return any(isinstance(fold, Sum) for stage in stages(method) for fold in stage.values())


@pytest.fixture(autouse=True)
def _one_blas_thread():
    """As in the driver, so that the reference has the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", METHODS)
def test_equals_the_reference_in_one_block(models, oracle, raw_bytes, method):
    pool = pool_for(models, method)
    assert raw_bytes(merge(pool, method, seed=7)) == oracle(pool, method, seed=7)


@pytest.mark.parametrize("method", METHODS)
def test_packed_blocks_equal_the_reference(models, oracle, raw_bytes, small_blocks, method):
    pool = pool_for(models, method, kinds=["BF16"])
    got, wanted = raw_bytes(merge(pool, method, seed=7, threads=2)), oracle(pool, method, seed=7)
    if not sums(method):
        assert got == wanted
        return
    for name, data in wanted.items():  # sums of other blocks may round to the neighbour
        ours, theirs = (np.frombuffer(raw, np.uint16).astype(np.int64) for raw in (got[name], data))
        assert abs(ours - theirs).max(initial=0) <= 1, name


@pytest.mark.parametrize("method", METHODS)
def test_equals_the_reference_in_many_blocks(
    models, oracle, raw_bytes, small_blocks, tmp_path, method
):
    pool = pool_for(models, method)
    wanted = oracle(pool, method, seed=7)
    got = merge(pool, method, tmp_path / "out", seed=7, threads=3)
    if not sums(method):
        assert raw_bytes(got) == wanted
        return
    for name, data in wanted.items():
        values = np.frombuffer(data, np.float32)
        np.testing.assert_allclose(
            got.source(name).floats(), values, rtol=1e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("method", METHODS)
def test_threads_budget_shards_and_place_change_no_bit(
    models, raw_bytes, small_blocks, tmp_path, method
):
    pool = pool_for(models, method)
    wanted = raw_bytes(merge(pool, method, seed=3, threads=1))
    runs = [(2, "1MB", 2000), (5, "1GB", 500), (1, "64MB", None)]
    for number, (threads, memory, shard) in enumerate(runs):
        options = Options(
            threads=threads, memory={"1MB": 1 << 20, "64MB": 64 << 20, "1GB": 1 << 30}[memory]
        )
        got = merge(
            pool,
            method,
            tmp_path / f"out{number}",
            seed=3,
            options=options,
            max_shard_size=shard,
        )
        assert raw_bytes(got) == wanted
        assert list(got.spec) == list(pool.names)
    assert len(list((tmp_path / "out1").glob("*.safetensors"))) > 1


def test_output_files_have_the_same_bytes_for_every_thread_count(models, sha, tmp_path):
    pool = models.write(2, {"a": (700, 900), "b": (11,), "c": (300_001,)}, ["BF16"])
    method = Ties(density=0.2, scope="model")
    found = []
    for threads, memory in itertools.product((1, 2, 5), (1 << 20, 1 << 30)):
        out = tmp_path / f"{threads}-{memory}" / "merged"
        out.parent.mkdir()
        merge(pool, method, out, threads=threads, memory=memory, max_shard_size=1_000_000)
        found.append(sha(out))
    assert len(found[0]) == 5  # two shards, index, config.json, pluribus.json
    assert all(files == found[0] for files in found)


def test_a_pool_in_memory_gives_the_bits_of_the_same_pool_on_disk(models, raw_bytes, small_blocks):
    on_disk = models.write(3, kinds=["BF16"])
    method = Ties(density=0.3, scope="model")
    assert raw_bytes(merge(models.in_memory(), method)) == raw_bytes(merge(on_disk, method))


def test_real_block_size_over_several_spans(models, oracle, raw_bytes):
    """One row longer than a span, so that 1-row tensors are cut as well."""
    pool = models.write(2, {"row": (1, (1 << 22) + 77), "tail": (5,)}, ["BF16"])
    for scope in ("tensor", "model"):
        method = Ties(density=0.2, scope=scope)
        assert raw_bytes(merge(pool, method, threads=2)) == oracle(pool, method)


def test_a_guess_that_sets_too_much_aside_is_given_up(
    models, oracle, raw_bytes, small_blocks, monkeypatch
):
    """Large tensors are counted twice rather than kept."""
    monkeypatch.setattr("pluribus.core.order.HELD", 20)
    pool, method = models.write(3), Ties(density=0.2)
    seen = []
    got = merge(pool, method, on_progress=lambda progress: seen.append(progress.total))
    assert raw_bytes(got) == oracle(pool, method)
    assert seen[-1] > plan_pool(pool, method).bytes_read


def test_a_sample_saves_a_pass(models, oracle, raw_bytes):
    pool, method = models.write(2, {"row": (1, 1 << 19)}, ["BF16"]), Ties(density=0.2)
    seen = []
    got = merge(pool, method, on_progress=lambda progress: seen.append(progress.total))
    assert raw_bytes(got) == oracle(pool, method)
    assert seen[-1] == plan_pool(pool, method).bytes_read  # once to trim, once to merge


def test_a_sample_that_misleads_costs_a_pass(models, oracle, raw_bytes, monkeypatch):
    pool, method = models.write(2, {"row": (1, 1 << 19)}, ["BF16"]), Ties(density=0.2)
    aim = TopK.aim

    def beside(fold, sample, size):
        return aim(fold, sample * np.float32(1.5), size)

    monkeypatch.setattr(TopK, "aim", beside)
    seen = []
    got = merge(pool, method, on_progress=lambda progress: seen.append(progress.total))
    assert raw_bytes(got) == oracle(pool, method)
    assert seen[-1] > plan_pool(pool, method).bytes_read


def test_inputs_are_read_again_where_they_are_too_large_to_hold(
    models, oracle, raw_bytes, monkeypatch
):
    pool, method = models.write(2, {"a": (300, 1000), "b": (70, 1000)}, ["BF16"]), Ties(density=0.2)
    reads = Counter()
    read = FileSlice.read

    def counted(source, start, stop, out):
        reads[source.spec.shape] += out.size if stop - start > 2000 else 0  # not of samples
        read(source, start, stop, out)

    monkeypatch.setattr(FileSlice, "read", counted)
    merged = merge(pool, method, memory=512 << 20)
    once = Counter(reads)
    reads.clear()
    again = merge(pool, method, memory=4 << 20)
    assert reads[300, 1000] == 2 * once[300, 1000]
    assert reads[70, 1000] == once[70, 1000]  # there is still room for it
    assert raw_bytes(merged) == raw_bytes(again) == oracle(pool, method)


# -- element types ---------------------------------------------------------------------------------

KINDS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [Linear(), Ties(density=0.4), Ties(density=0.4, scope="model")])
def test_every_float_type(models, oracle, raw_bytes, small_blocks, tmp_path, kind, method):
    pool = models.write(3, kinds=[kind])
    got = merge(pool, method, tmp_path / "out")
    assert {spec.dtype for spec in got.spec.values()} == {kind}
    assert raw_bytes(got) == oracle(pool, method)


@pytest.mark.parametrize("kinds", [["BF16", "F32", "F16"], ["F32", "F64", "BF16"]])
def test_models_of_different_float_types(models, oracle, raw_bytes, small_blocks, kinds):
    pool = models.write(3, kinds=kinds)
    got = merge(pool, Ties(density=0.4))
    assert {spec.dtype for spec in got.spec.values()} == {kinds[0]}  # the base's
    assert raw_bytes(got) == oracle(pool, Ties(density=0.4))


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_tensors_of_different_float_types_in_one_model(
    models, oracle, raw_bytes, small_blocks, scope
):
    """A fold over the whole model compares them all in the widest working precision."""
    shapes = {"a": (30, 9), "b": (200,), "c": (7,), "d": (50, 4)}
    pool = models.write(3, shapes, [{"a": "BF16", "b": "F64", "c": "F32", "d": "F16"}])
    method = Ties(density=0.3, scope=scope)
    got = merge(pool, method)
    assert [spec.dtype for spec in got.spec.values()] == ["BF16", "F64", "F32", "F16"]
    assert raw_bytes(got) == oracle(pool, method)


def test_output_type_is_rounded_to_once(models, tmp_path):
    pool = models.write(2, {"w": (40, 5)}, ["F32"])
    got = merge(pool, Linear(), tmp_path / "out", out_dtype="bfloat16")
    wide = merge(pool, Linear())["w"]
    assert got.spec["w"].dtype == "BF16"
    assert torch.equal(got["w"], wide.bfloat16())


# -- shapes ----------------------------------------------------------------------------------------


def test_empty_scalar_and_single_tensors_keep_their_shapes(models):
    got = merge(models.write(3), Ties(density=0.5))
    shapes = {name: spec.shape for name, spec in got.spec.items()}
    assert shapes["empty"] == (0, 5)
    assert shapes["scalar"] == ()
    assert shapes["one"] == (1,)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_model_of_empty_tensors(models, tmp_path, scope):
    pool = models.write(2, {"a": (0,), "b": (3, 0)})
    got = merge(pool, Ties(density=0.5, scope=scope), tmp_path / "out")
    assert [spec.shape for spec in got.spec.values()] == [(0,), (3, 0)]


def test_order_of_tensors_is_the_bases(models):
    models.write(2, {"z": (3,), "a": (4,), "m": (2, 2)})
    shuffled = Weights({name: models.pool().experts["e0"].source(name) for name in ("a", "m", "z")})
    pool = Pool(models.folder / "base", [shuffled, models.folder / "e1"])
    assert list(merge(pool, Linear())) == ["z", "a", "m"]
    without = Pool(None, [shuffled, models.folder / "e1"])
    assert list(merge(without, Linear())) == ["a", "m", "z"]


def test_order_of_tensors_in_the_file_changes_no_value(models, raw_bytes, small_blocks):
    pool = models.write(3)
    names = list(reversed(pool.names))

    def turned(weights):
        return Weights({name: weights.source(name) for name in names})

    other = Pool(turned(pool.base), [turned(expert) for expert in pool.experts.values()])
    method = Ties(density=0.3, scope="tensor")
    assert raw_bytes(merge(other, method)) == raw_bytes(merge(pool, method))


# -- integers, aliases, base -----------------------------------------------------------------------


def with_integers(models, experts=2, kind="I64"):
    shapes = {"w": (9, 9), "positions": (150,), "flag": ()}
    return models.write(experts, shapes, [{"w": "F32", "positions": kind, "flag": "BOOL"}])


@pytest.mark.parametrize("kind", ["I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL"])
def test_equal_integer_buffers_are_copied(models, oracle, raw_bytes, small_blocks, kind):
    pool = with_integers(models, kind=kind)
    got = merge(pool, Linear())
    assert got.spec["positions"].dtype == kind
    assert raw_bytes(got) == oracle(pool, Linear())


def test_integer_buffers_stay_whole_when_the_output_type_changes(models):
    got = merge(with_integers(models), Linear(), out_dtype="float16")
    assert [spec.dtype for spec in got.spec.values()] == ["F16", "I64", "BOOL"]


def test_integer_buffers_that_differ_are_refused_by_name(models, small_blocks):
    pool = with_integers(models)
    positions = np.arange(150)
    positions[149] += 1
    changed = {**pool.experts["e1"], "w": pool.experts["e1"]["w"]}
    changed["positions"] = torch.from_numpy(positions)
    other = Pool(pool.base, {"e0": pool.experts["e0"], "odd": Weights.of(changed, label="odd")})
    with pytest.raises(MismatchError, match=r"'positions' .*whole numbers.* odd and .*base"):
        merge(other, Linear())


def test_counters_of_batch_norms_may_differ_and_are_the_first_models():
    def model(count):
        return {"bn.weight": torch.ones(3), "bn.num_batches_tracked": torch.tensor(count)}

    got = merge(Pool(model(7), {"a": model(9), "b": model(11)}), Linear())
    assert int(got["bn.num_batches_tracked"]) == 7


def test_a_model_without_floats_is_refused(models):
    pool = models.write(2, {"i": (3,)}, ["I64"])
    with pytest.raises(InputError, match="nothing to merge"):
        merge(pool, Linear())


def tied(seed, also=()):
    draw = torch.Generator().manual_seed(seed)
    embed = torch.randn(50, 8, generator=draw)
    out = {"embed": embed, "lm_head": embed, "norm": torch.randn(8, generator=draw)}
    return out | {name: torch.randn(3, generator=draw) for name in also}


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_tied_tensors_are_kept_once_and_found_under_both_names(tmp_path, suffix):
    for number, name in enumerate(("base", "e0", "e1")):
        Weights.of(tied(number)).save(tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "e0", "e1")]
    out = tmp_path / f"merged{suffix}"
    got = merge(Pool(files[0], files[1:]), Linear(), out)
    assert list(got.spec) == ["embed", "norm"]
    assert got.aliases == {"lm_head": "embed"}
    again = Weights.open(out)
    assert torch.equal(again["lm_head"], again["embed"])
    mean = (tied(1)["embed"] + tied(2)["embed"]) / 2
    torch.testing.assert_close(again["lm_head"], mean)


def test_tensors_tied_in_the_base_alone_become_two(tmp_path):
    loose = {**tied(1), "lm_head": tied(1)["embed"] + 1}
    got = merge(Pool(tied(0), [loose, {**tied(2), "lm_head": tied(2)["embed"].clone()}]), Linear())
    assert set(got.spec) == {"embed", "lm_head", "norm"}
    assert not torch.equal(got["lm_head"], got["embed"])


def test_an_expert_that_leaves_the_tied_name_out_fits(tmp_path):
    short = {name: tensor for name, tensor in tied(1).items() if name != "lm_head"}
    got = merge(Pool(tied(0), [short, tied(2)]), Linear())
    assert torch.equal(got["lm_head"], got["embed"])


def test_a_base_that_a_method_ignores_changes_nothing(models, raw_bytes):
    with_base = merge(models.write(3), Linear())
    assert raw_bytes(with_base) == raw_bytes(merge(models.pool(base=False), Linear()))


def test_a_base_that_a_method_needs_is_asked_for(models):
    models.write(2)
    with pytest.raises(InputError, match="ties needs a base model"):
        merge(models.pool(base=False), Ties())


def test_inputs_are_left_untouched(models, raw_bytes, tmp_path, sha):
    pool = models.write(2)
    before = [raw_bytes(model) for model in pool.models], sha(tmp_path / "base")
    merge(pool, Ties(density=0.2), tmp_path / "out")
    assert ([raw_bytes(model) for model in pool.models], sha(tmp_path / "base")) == before


# -- the run itself --------------------------------------------------------------------------------


def test_progress_ends_at_its_total(models, small_blocks):
    seen = []
    pool = models.write(3)
    merge(
        pool,
        Ties(density=0.2, scope="model", tie="global"),
        on_progress=lambda p: seen.append((p.done, p.total)),
    )
    assert seen[-1][0] == seen[-1][1] > 0
    assert all(done <= total for done, total in seen)


def test_an_error_in_a_method_names_the_tensor(models):
    @merger("explode")
    @dataclass(frozen=True, kw_only=True)
    class Explode:
        def __call__(self, base, experts):
            raise ZeroDivisionError("boom")

    with pytest.raises(ZeroDivisionError, match="boom") as caught:
        merge(models.write(2), Explode(), threads=1)
    assert any("'embed.weight'" in note for note in caught.value.__notes__)


def test_a_callback_that_fails_stops_the_run(models):
    def stop(progress):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        merge(models.write(2), Linear(), on_progress=stop)


def test_merge_tensors_returns_a_state_dict():
    one, two = {"w": torch.ones(3)}, {"w": torch.full((3,), 3.0)}
    got = merge_tensors(None, [one, two], "linear")
    assert torch.equal(got["w"], torch.full((3,), 2.0))


def test_a_budget_below_one_megabyte_is_refused(models):
    with pytest.raises(InputError, match="at least 1MB"):
        merge(models.write(2), Linear(), memory=1000)


def test_the_plan_tells_inputs_apart_by_their_part(models):
    """A base and one expert are not two experts."""
    models.write(2)
    method = MERGERS.build("multislerp", {})
    one = plan_pool(Pool(models.folder / "e0", [models.folder / "e1"]), method)
    two = plan_pool(Pool(None, [models.folder / "e0", models.folder / "e1"]), method)
    assert one.digest() != two.digest()


def test_result_tells_what_was_read_and_written(models, tmp_path):
    pool = models.write(2)
    plan = plan_pool(pool, Ties(density=0.5))
    result = execute(plan, tmp_path / "out", Options(threads=1))
    assert result.bytes_read == 2 * sum(model.nbytes for model in pool.models)
    assert result.bytes_written == pool.base.nbytes
    assert not result.resumed
    assert result.out == tmp_path / "out"


def test_sources_that_compute_their_values_stream_too(models, raw_bytes, small_blocks):
    """Task arithmetic by hand on lazy weights: base + (e0 - base) + (e1 - base)."""
    pool = models.write(2, {"w": (41, 7)})
    base, (one, two) = pool.base, pool.experts.values()
    by_hand = base + ((one - base) + (two - base))
    held = Weights({"w": ArraySource(by_hand.source("w").load(), TensorSpec("F32", (41, 7)))})
    lazy = merge(Pool(base, [by_hand, one]), Linear())
    assert raw_bytes(lazy) == raw_bytes(merge(Pool(base, [held, one]), Linear()))
