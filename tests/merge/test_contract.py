"""What every merge method promises, whoever wrote it. Nothing here knows a method by name."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from pluribus.core import merger as core
from pluribus.core.errors import InputError
from pluribus.core.fold import feeder
from pluribus.core.merger import facts, fused, stages
from pluribus.core.registry import MERGERS
from pluribus.engine.reference import merge_arrays

from .conftest import DEPTH, SHAPES, make, merge_in_blocks

# -- building methods from their annotations -------------------------------------------------------


def options(hint: Any) -> tuple[Any, ...]:
    """Members of a union, or the hint alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def number(hint: Any) -> Any:
    """An allowed number of a hint, or None if it is no number."""
    if get_origin(hint) is Annotated:
        kind, *limits = get_args(hint)
        low, high = bound(limits, "gt", "ge", 0), bound(limits, "lt", "le", 2)
        return kind((low + high) / 2) if kind is float else max(2, int(low))
    return {float: 0.3, int: 2}.get(hint)


def bound(limits: Any, strict: str, weak: str, otherwise: float) -> float:
    """The limit that an annotation sets, strictly or not."""
    found = [getattr(x, key, None) for x in limits for key in (strict, weak)]
    return next((value for value in found if value is not None), otherwise)


def first_of(kind: Any) -> float:
    """Where distinct values of experts start, 0.1 apart: some may be 0, others not."""
    shares = get_origin(kind) is Annotated and number(kind) == 0.5
    return 0.4 if shares and getattr(get_args(kind)[1], "gt", None) == 0 else 0.1


def share(hint: Any) -> bool:
    """Whether a hint is a share that a default of 1 would make trivial."""
    return any(get_origin(o) is Annotated and number(o) == 0.5 for o in options(hint))


def per_expert(hint: Any) -> Any:
    """Return the number type of a hint that takes one value for each expert, else None."""
    for option in options(hint):
        if get_origin(option) is tuple and get_args(option)[-1] is Ellipsis:
            inner = get_args(option)[0]
            return inner if number(inner) is not None and len(options(hint)) > 1 else None
    return None


def hints(name: str) -> dict[str, Any]:
    return get_type_hints(MERGERS[name], include_extras=True)


def defaults(name: str) -> dict[str, Any]:
    """Values for the fields that have none."""
    given = {}
    for f in fields(MERGERS[name]):
        if f.default is MISSING and f.default_factory is MISSING:
            found = [number(o) for o in options(hints(name)[f.name])]
            given[f.name] = next(value for value in found if value is not None)
    return given


@cache
def variants() -> list[tuple[str, str, Any]]:
    """(name, what differs from the defaults, method) of every method and each of its switches."""
    out = []
    for name in MERGERS:
        start = defaults(name)
        out.append((name, "", MERGERS.build(name, start)))
        thin = {
            f.name: 0.5
            for f in fields(MERGERS[name])
            if share(hints(name)[f.name]) and f.default == 1
        }
        turns = [thin] if thin else []
        for f in fields(MERGERS[name]):
            for option in options(hints(name)[f.name]):
                if option is bool:
                    turns.append({**thin, f.name: not f.default})
                elif get_origin(option) is Literal:
                    others = [value for value in get_args(option) if value != f.default]
                    turns += [{**thin, f.name: value} for value in others]
        for turn in turns:
            try:
                out.append((name, text(turn), MERGERS.build(name, {**start, **turn})))
            except InputError:  # switches that exclude each other
                continue
    return out


def text(turn: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in turn.items())


def of(wanted: Callable[[Any], bool] = lambda method: True) -> Any:
    """Parametrise a test over the methods of which something is so."""
    cases = [pytest.param(m, id=f"{name}({turn})") for name, turn, m in variants() if wanted(m)]
    return pytest.mark.parametrize("method", cases)


every = of()


# -- inputs ----------------------------------------------------------------------------------------


def count_of(method: Any) -> int:
    low, high = facts(method).experts
    return min(max(low, 3), high or 3)


def extras_of(method: Any, experts: list[dict[str, np.ndarray]], seed: int = 5) -> Any:
    """Further inputs: a Gram matrix for each matrix if so named, else positive numbers."""
    rng = np.random.default_rng(seed)
    out: dict[str, list[dict[str, np.ndarray]]] = {}
    for need in facts(method).needs:
        out[need] = []
        for expert in experts:
            more = {}
            for key, array in expert.items():
                if need == "gram":
                    if array.ndim == 2 and array.size:
                        x = rng.normal(size=(20, array.shape[1]))
                        more[key] = (x.T @ x).astype(array.dtype)
                else:
                    more[key] = np.asarray(rng.random(array.shape) + 0.1, array.dtype)
            out[need].append(more)
    return out


def run(method: Any, base: Any, experts: Any, extras: Any = None, seed: int = 0) -> Any:
    extras = extras_of(method, experts) if extras is None else extras
    base = None if facts(method).base == "ignored" else base
    return merge_arrays(method, base, experts, extras, seed=seed, depth=DEPTH)


def close(one: Any, other: Any, atol: float = 1e-6) -> None:
    assert list(one) == list(other)
    for key in one:
        np.testing.assert_allclose(one[key], other[key], rtol=1e-6, atol=atol, err_msg=key)


def same_bits(one: Any, other: Any) -> None:
    assert list(one) == list(other)
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


# -- the contract ----------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_names_shapes_and_dtypes_are_kept_and_inputs_untouched(method, dtype):
    base, experts = make(count_of(method), dtype)
    extras = extras_of(method, experts)
    before = [{k: v.copy() for k, v in model.items()} for model in (base, *experts)]
    merged = run(method, base, experts, extras)
    assert list(merged) == list(SHAPES)
    for key, shape in SHAPES.items():
        assert merged[key].shape == shape, key
        assert merged[key].dtype == dtype, key
        assert np.isfinite(merged[key]).all(), key
    for kept, model in zip(before, (base, *experts), strict=True):
        same_bits(kept, model)


@pytest.mark.parametrize(
    "name", [n for n, turn, m in variants() if facts(m).idempotent and not turn]
)
def test_experts_equal_to_the_base_give_the_base(name):
    method = MERGERS.build(name, defaults(name))
    base, _ = make(0)
    close(run(method, base, [dict(base)] * count_of(method)), base)


@of(lambda m: not facts(m).ordered and not facts(m).random and count_of(m) > 1)
def test_the_order_of_experts_changes_nothing(method):
    known, count = facts(method), count_of(method)
    name, own = known.name, {f.name: getattr(method, f.name) for f in fields(method)}
    base, experts = make(count)
    extras = extras_of(method, experts)
    order = [*range(1, count), 0]
    given, turned = dict(own), dict(own)
    for key, hint in hints(name).items():
        if (kind := per_expert(hint)) is not None and own[key] is not None:
            given[key] = tuple(first_of(kind) + 0.1 * k for k in range(count))
            turned[key] = tuple(given[key][k] for k in order)
    one = run(type(method)(**given), base, experts, extras)
    permuted = {key: [group[k] for k in order] for key, group in extras.items()}
    close(run(type(method)(**turned), base, [experts[k] for k in order], permuted), one)


@every
def test_chance_depends_on_the_seed_alone(method):
    base, experts = make(count_of(method))
    one = run(method, base, experts, seed=1)
    same_bits(run(method, base, experts, seed=1), one)
    other = run(method, base, experts, seed=2)
    differs = any(not np.array_equal(one[key], other[key]) for key in one)
    known = hints(facts(method).name)
    thin = [getattr(method, f.name) for f in fields(method) if share(known[f.name])]
    if not (facts(method).random and thin and max(thin) == 1):  # nothing to draw at density 1
        assert differs == facts(method).random


@every
def test_torch_and_numpy_agree(method):
    base, experts = make(count_of(method))
    extras = extras_of(method, experts)

    def to_torch(model):
        return {key: torch.from_numpy(np.array(value)) for key, value in model.items()}

    merged = run(
        method,
        to_torch(base),
        [to_torch(expert) for expert in experts],
        {key: [to_torch(x) for x in group] for key, group in extras.items()},
    )
    for key, value in merged.items():
        assert isinstance(value, torch.Tensor), key
        assert value.dtype == torch.float32, key
    close({key: value.numpy() for key, value in merged.items()}, run(method, base, experts, extras))


# Rows of one, of a few and of thousands; lengths that fill no whole chunk and no whole lane.
LONG = {"rows": (37, 99), "line": (3001,), "wide": (3, 2500), "thin": (40, 3), "one": (5, 1)}


@of(lambda method: fused(method) is not None)
@pytest.mark.parametrize("packed", [False, True], ids=["float32", "bfloat16"])
def test_kernels_have_the_bits_of_the_readable_form(method, packed, monkeypatch):
    base, experts = make(count_of(method), shapes=LONG)
    models = [{key: bf16(value) for key, value in model.items()} for model in (base, *experts)]
    folds = [(fold, key) for stage in stages(method) for key, fold in stage.items()]
    if packed and not all(feeder(fold, method, key) for fold, key in folds):
        pytest.skip("one of its folds has no kernel, so that blocks are widened for it")
    with monkeypatch.context() as patch:
        patch.setattr(core, "fused", lambda *_: None)
        patch.setattr("pluribus.core.fold.feeder", lambda *_: None)
        readable = run(method, models[0], models[1:])
    if packed:
        models = [{key: bits(value) for key, value in model.items()} for model in models]
        kernel = fused(method)

        def rounding(*arguments, out=None, **keywords):
            out = np.empty(arguments[2].shape[1:], np.uint16)
            assert kernel(*arguments, out=out, **keywords) is out
            return out

        monkeypatch.setattr(core, "fused", lambda *_: rounding)
        readable = {key: bits(bf16(value)) for key, value in readable.items()}
    same_bits(run(method, models[0], models[1:]), readable)


def bf16(values):
    """Round to bfloat16, as float32; zeros become positive."""
    return torch.from_numpy(values).bfloat16().float().numpy() + 0.0


def bits(values):
    """The patterns of bfloat16 numbers, with one zero."""
    return ((values + 0.0).view(np.uint32) >> 16).astype(np.uint16)


@every
@pytest.mark.parametrize("size", [5, 16, 1000])
def test_blocks_may_be_cut_anywhere(method, size):
    base, experts = make(count_of(method))
    extras = extras_of(method, experts)
    whole = run(method, base, experts, extras, seed=3)
    base = None if facts(method).base == "ignored" else base
    cut = merge_in_blocks(method, base, experts, extras, size=size, seed=3, depth=DEPTH)
    same_bits(cut, whole)


@of(lambda method: facts(method).base == "optional")
def test_works_without_an_optional_base(method):
    _, experts = make(count_of(method))
    merged = run(method, None, experts)
    assert all(np.isfinite(merged[key]).all() for key in merged)


# -- what is written about them --------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MERGERS))
def test_is_documented(name):
    cls = MERGERS[name]
    about = facts(cls)
    doc = inspect.getdoc(sys.modules[cls.__module__]) or ""
    assert cls.__module__ == f"pluribus.merge.{name}"
    assert about.summary
    assert about.summary == doc.split("\n")[0]
    assert about.summary.endswith(".")
    assert about.paper or "http" in doc or "mergekit" in doc, "no paper or source"
    assert cls.__doc__
    assert not cls.__doc__.startswith(cls.__name__ + "("), "the class has no docstring of its own"
    for f in fields(cls):
        assert f.kw_only, f.name
        hint = hints(name)[f.name]
        if f.default is not MISSING and NoneType not in options(hint):
            assert f.default is not None, f"{f.name} is None, but not by its type"


@pytest.mark.parametrize("name", list(MERGERS))
def test_refuses_unknown_parameters(name):
    # Where annotations are executed, that wrapper is the first to complain.
    with pytest.raises((InputError, TypeError), match="'densty'"):
        MERGERS.build(name, {**defaults(name), "densty": 0.1})
