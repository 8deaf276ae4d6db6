"""`pluribus merge --dry-run`: the plan and an honest guess of the time."""

import json
import math
import shutil
from dataclasses import MISSING, fields

import numpy as np
import pytest

from pluribus.core.merger import facts
from pluribus.core.pool import Pool
from pluribus.core.registry import MERGERS
from pluribus.core.source import ArraySource, TensorSpec
from pluribus.core.weights import Weights
from pluribus.engine.driver import plan_pool
from pluribus.engine.plan import BLOCK
from pluribus.recipe import estimate, load, plan, run
from pluribus.recipe.estimate import ELEMENTS, GUESS, MATRIX, Stopwatch

RECIPES = {
    "models": "merge_method: linear\nmodels: [{model: math}, {model: code}]\n",
    "folds": "merge_method: dare_ties\nbase_model: base\nparameters: {density: 0.5, weight: 1}\n"
    "models: [{model: math}, {model: code}]\n",
    "rows": "merge_method: della\nbase_model: base\nparameters: {density: 0.5, weight: 1}\n"
    "models: [{model: math}, {model: code}]\n",
    "whole tensors": "merge_method: iso_c\nbase_model: base\n"
    "models: [{model: math}, {model: code}]\n",
    "chain": "merge_method: trim(density=0.2) >> elect >> mean >> lines(beta=0.8)\n"
    "base_model: base\nmodels: [{model: math}, {model: code}]\n",
    "slices": "merge_method: passthrough\nslices:\n"
    "- sources: [{model: math, layer_range: [0, 2]}]\n"
    "- sources: [{model: code, layer_range: [1, 3]}]\n",
    "modules": "merge_method: linear\nmodules:\n"
    "  model.layers: {models: [{model: math}, {model: code}]}\n"
    "  default: {models: [{model: math}, {model: code}]}\n",
    "documents": "name: soup\nmerge_method: linear\nmodels: [{model: math}, {model: code}]\n"
    "---\nmerge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\nmodels: [{model: soup}]\n",
    "extras": "merge_method: fisher\nmodels:\n- {model: math, extras: {fisher: chat}}\n"
    "- {model: code, extras: {fisher: chat}}\n",
}


@pytest.mark.parametrize("kind", RECIPES)
def test_every_kind_of_recipe_has_a_time(cli, place, kind):
    (place / "r.yml").write_text(RECIPES[kind])
    told = cli("merge", "r.yml", "--dry-run", "--json").json
    entries = told["recipes"]
    for entry in entries:
        assert 0 < entry["seconds"] < 600
        assert entry["bytes_per_second"] > 0
    assert told["seconds"] == pytest.approx(sum(entry["seconds"] for entry in entries), rel=0.01)
    text = cli("merge", "r.yml", "--dry-run", "--threads", "1").out
    assert text.count("  time      about ") == len(entries)
    assert " s on 1 thread, reading at " in text


def test_it_says_what_a_run_then_does(cli, place):
    entry = cli("merge", "ties.yml", "--dry-run", "--json").json["recipes"][0]
    ran = cli("merge", "ties.yml", "out", "--json").json
    assert entry["bytes_read"] == ran["bytes_read"]
    assert entry["bytes_written"] == ran["bytes_written"]
    assert entry["digest"] == json.loads((place / "out" / "pluribus.json").read_text())["plan"]


def test_it_writes_nothing(cli, place):
    before = sorted(place.rglob("*"))
    assert cli("merge", "ties.yml", "out", "--dry-run").code == 0
    assert sorted(place.rglob("*")) == before


def test_a_model_that_cannot_be_read_leaves_the_plan(cli, place, monkeypatch):
    from pluribus.core.errors import FormatError
    from pluribus.core.source import FileSlice

    def read(self, start, stop, out):
        raise FormatError("the disk is gone")

    monkeypatch.setattr(FileSlice, "read", read)
    entry = cli("merge", "ties.yml", "--dry-run", "--json").json["recipes"][0]
    assert entry["bytes_per_second"] == pytest.approx(GUESS, rel=0.5)


def test_parameters_that_cannot_work_are_told_without_a_run(refused, place):
    (place / "r.yml").write_text(
        "merge_method: linear\nmodels:\n- {model: math, parameters: {weight: 1}}\n"
        "- {model: code, parameters: {weight: -1}}\n"
    )
    assert "sum to zero" in refused("merge", "r.yml", "--dry-run")


# -- the estimate by hand --------------------------------------------------------------------------


@pytest.fixture
def fixed(monkeypatch):
    """A machine that reads 1000 bytes and works through 10 elements a second, two passes each."""
    monkeypatch.setattr(estimate, "_measured", lambda *_: estimate._Cost(0.1, 2.0))
    monkeypatch.setattr(estimate.os, "cpu_count", lambda: 4)

    def time_files(self, sources, threads):
        self._rates.update(dict.fromkeys(sources, 1000.0))

    monkeypatch.setattr(Stopwatch, "_time_files", time_files)


def pool_of(elements):
    def model(seed):
        return Weights({"w": ArraySource(np.zeros(4 * elements, np.uint8), spec)}, label=str(seed))

    spec = TensorSpec("F32", (elements,))
    return Pool(None, [model(0), model(1)])


@pytest.mark.parametrize(("elements", "threads"), [(1000, 1), (2000, 1), (2000, 2), (2000, 9)])
def test_bytes_over_rate_and_work_over_threads(fixed, elements, threads):
    seconds, rate = Stopwatch().estimate(plan_pool(pool_of(elements), linear()), threads, 1 << 30)
    read, written = 2 * 2 * 4 * elements, 4 * elements
    working = elements * 0.1 / min(threads, 4)  # on four processors
    assert seconds == pytest.approx((read + written) / 1000 + working)
    assert rate == pytest.approx(1000 * read / (read + written))


def test_memory_limits_how_much_is_done_at_a_time(fixed):
    plan_ = plan_pool(pool_of(2000), linear())
    most = plan_.jobs[0].working_bytes
    wide = Stopwatch().estimate(plan_, 2, 2 * most).seconds
    narrow = Stopwatch().estimate(plan_, 2, 2 * most - 1).seconds
    assert narrow - wide == pytest.approx(2000 * 0.1 / 2)


def linear():
    from pluribus.merge.linear import Linear

    return Linear()


def test_whole_tensors_cost_their_size_times_the_shorter_side():
    assert estimate._work_of((30, 50), whole=True) == 30 * 50 * 30
    assert estimate._work_of((30, 2, 5), whole=True) == 30 * 10 * 10
    assert estimate._work_of((30, 50), whole=False) == 1500
    assert estimate._work_of((), whole=False) == 1
    assert estimate._work_of((0, 5), whole=True) == 0


def big(place, shape, method, extras=""):
    """Return the one job of a merge of a large tensor that takes no space on the disk."""
    for name in ("one", "two", "gram"):
        own = (shape[1], shape[1]) if name == "gram" else shape
        size = 4 * math.prod(own)
        head = json.dumps({"w": {"dtype": "F32", "shape": own, "data_offsets": [0, size]}})
        head = head.encode().ljust(-(-len(head) // 8) * 8)
        with open(place / f"{name}.safetensors", "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.truncate(8 + len(head) + size)
    text = f"merge_method: {method}\n"
    text += "" if extras else "base_model: one.safetensors\n"
    text += "models:\n" + "".join(f"- {{model: {n}.safetensors{extras}}}\n" for n in ("one", "two"))
    return plan(load(text, folder=place))[0].plan


def test_samples_are_small_and_like_the_tensor(place):
    whole = big(place, (1 << 16, 1 << 12), "iso_c").jobs[0]
    small = estimate._sample(whole)
    assert MATRIX / 4 < small.spec.size <= MATRIX
    assert small.experts[0].spec.shape == small.spec.shape
    elements = big(place, (1 << 16, 1 << 12), "ties").jobs[0]
    small = estimate._sample(elements)
    assert small.spec.shape == (ELEMENTS >> 12, 1 << 12)
    assert small.merger is elements.merger
    gram = big(place, (1 << 12, 1 << 13), "regmean", ", extras: {gram: gram.safetensors}").jobs[0]
    small = estimate._sample(gram)
    assert small.extras["gram"][0].spec.shape == (small.spec.shape[1],) * 2


def test_a_cheap_estimate_of_a_large_merge(place):
    """Gigabytes of input; the measurement itself reads a few MB."""
    seen = []
    original = estimate._read

    def read(source, count, start):
        seen.append(count * source.spec.kind.size)
        original(source, count, start)

    estimate._read = read
    try:
        planned = big(place, (1 << 15, 1 << 12), "ties")
        seconds, _ = Stopwatch().estimate(planned, 2, 512 << 20)
    finally:
        estimate._read = original
    assert 0.05 < seconds < 3600
    assert sum(seen) <= 2 * 2 * estimate.CHUNK


def test_sampled_passes_count(place):
    """An exact cut in the whole model takes a further pass, in the sample as well."""
    planned = big(place, (1 << 10, 1 << 12), "ties\nparameters: {scope: model}")
    cost = estimate._measured(planned.jobs[0], planned, "cpu")
    assert cost.passes > 2
    assert estimate._sample(planned.jobs[0]).spec.size > BLOCK


def test_a_result_that_is_not_made_yet_is_taken_as_usual(place, monkeypatch):
    """The second recipe reads nothing but the first one's result."""
    shutil.copytree("math", "other")
    text = (
        "name: one\nmerge_method: linear\nmodels: [{model: math}, {model: code}]\n---\n"
        "name: two\nmerge_method: linear\nmodels: [{model: chat}, {model: code}]\n---\n"
        "merge_method: linear\nmodels: [{model: one}, {model: two}]\n"
    )
    planned = plan(load(text, folder=place))
    watch = Stopwatch()
    rates = [watch.estimate(each.plan, 1, 1 << 29).rate for each in planned]
    assert set(watch._rates) == {"math", "code", "chat"}
    assert all(rate > 0 for rate in rates)
    assert run(load(text, folder=place), None).weights


@pytest.mark.parametrize("name", sorted(MERGERS))
def test_every_method_can_be_sampled(name):
    """Random numbers in place of weights must not stop any of them."""
    cls = MERGERS[name]
    about = facts(cls)
    needed = {f.name: 0.5 for f in fields(cls) if f.default is MISSING}
    shapes = {"square.weight": (24, 24), "layers.0.w": (40, 24), "layers.1.w": (40, 24)}
    shapes |= {"conv.weight": (6, 5, 3, 3), "norm": (24,), "scalar": (), "empty": (0, 3)}
    rng = np.random.default_rng(0)

    def made(label, shapes=shapes):
        values = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
        return Weights.of(values, label=label)

    experts = [made(str(i)) for i in range(min(3, about.experts[1] or 3))]
    columns = {k: (math.prod(s[1:]),) * 2 for k, s in shapes.items() if len(s) > 1 and s[0]}
    extras = {need: [made("x", columns if need == "gram" else shapes)] * 3 for need in about.needs}
    extras = {need: group[: len(experts)] for need, group in extras.items()}
    base = None if about.base == "ignored" else made("base")
    plan_ = plan_pool(Pool(base, experts, extras=extras), cls(**needed))
    assert 0 < Stopwatch().estimate(plan_, 2, 1 << 29).seconds < 60
