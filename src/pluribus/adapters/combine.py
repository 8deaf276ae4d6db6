"""Merge LoRA adapters of one base into one adapter, without the base.

    dW_t = s_t B_t A_t                                                          (R, c), rank r_t

A linear method's sum_t w_t dW_t is a product of rank sum_t r_t: [w_1 s_1 B_1 ..] @ [A_1; ..], so
neither it nor its SVD needs a dW_t. Any other method (ties, dare, knots, ...) sees the dW_t of one
module at a time, with base 0, and its result is factored again; what such a method knows of the
whole model it then knows of one module.

`mode` says how the linear sum is written: "cat" as that product (exact, the ranks add up), "svd" as
its best approximation of lower rank, "linear" as the product of the factors' own sums,
(sum_t sqrt(w_t s_t) B_t) (sum_t sqrt(w_t s_t) A_t), which has cross terms B_i A_j; it is what
PEFT's add_weighted_adapter does by that name. The report says what each kept of the exact sum.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pluribus.adapters.factors import (
    DTYPES,
    Product,
    balanced,
    check_choice,
    check_place,
    check_sizes,
    chosen,
    minus,
    product,
    published,
    shaped,
    stacked,
    truncated,
)
from pluribus.adapters.report import AdapterReport, ModuleReport
from pluribus.core.errors import InputError, MismatchError, listing
from pluribus.core.lowrank import Adapter, Factors, adapter, save_adapter
from pluribus.core.merger import facts

if TYPE_CHECKING:
    from torch import Tensor

Path = str | os.PathLike[str]
Weights = Sequence[float]
CARRIED = ("task_type", "revision", "auto_mapping")  # of the first adapter's configuration


def merge_adapters(
    folders: Sequence[Path],
    out: Path,
    method: Any = "linear",
    *,
    weights: Weights | None = None,
    mode: Literal["svd", "linear", "cat"] = "svd",
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "float32",
    base_model: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    on_step: Callable[[str, int, int], None] | None = None,
) -> AdapterReport:
    """Merge PEFT LoRA folders into a new one, `out`.

    `weights` multiply the adapters' updates under "linear", which then does not normalise them;
    without, they are averaged. Other methods are mergers or their text, with weights of their own.
    A module that some adapters lack counts as unchanged by them; ranks may differ. With mode "svd"
    a module gets the largest of its adapters' ranks, or `rank`, or as few as hold `energy` of its
    update. `on_step` is told (stage, done, total).

    Raises MismatchError for adapters of different bases (unless `base_model` names the one that all
    fit) or shapes, InputError for DoRA, saved modules that differ, and modes that a method lacks,
    OutputError if `out` exists.
    """
    check_sizes(rank, energy)
    check_choice("dtype", dtype, DTYPES)
    check_choice("mode", mode, ("svd", "linear", "cat"))
    check_place(out, overwrite)
    adapters = [adapter(folder) for folder in folders]
    if not adapters:
        raise InputError("no adapters were given; name at least one folder")
    _check(adapters, base_model)
    shares = _coefficients(method, weights, len(adapters))
    if shares is None and mode != "svd":
        raise InputError(f"mode={mode!r} needs a linear method; {method!r} is merged as 'svd'")
    reports, pairs = [], {}
    names = list(dict.fromkeys(name for one in adapters for name in one.factors))
    for done, name in enumerate(names, 1):
        if on_step is not None:
            on_step("merging", done, len(names))
        parts = [one.factors.get(name) for one in adapters]
        first = next(part for part in parts if part is not None)
        shape = (first.b.spec.shape[0], *first.a.spec.shape[1:])
        most = rank or (None if energy else max(part.rank for part in parts if part is not None))
        if shares is None:
            exact, held = _factored(name, method, parts, shape, most, energy, seed)
            total = float(exact.square().sum())
            lost = float((exact - held.b @ held.a).square().sum())
        else:
            target = stacked(
                [product(p, w) for p, w in zip(parts, shares, strict=True) if p is not None]
            )
            if mode == "cat":
                held = target
            elif mode == "linear":
                held = _crossed(name, parts, shares)
            else:
                held = truncated(target, most, energy)
            total = target.energy
            lost = minus(target, held).energy if mode != "cat" else 0.0
        k = held.a.shape[0]
        kept = 1 - lost / total if k and total else 1.0
        reports.append(
            ModuleReport(
                name=name,
                action="lora" if k else "unchanged",
                shape=shape,
                rank=k,
                energy=total,
                kept=kept,
            )
        )
        if k:
            pairs[name] = shaped(held, shape, dtype)
    config = {key: adapters[0].config[key] for key in CARRIED if key in adapters[0].config}
    base = base_model or adapters[0].config.get("base_model_name_or_path")

    def write(folder: Any) -> None:
        save_adapter(
            folder,
            pairs,
            base_model=base,
            embeddings=_union(adapters, "embeddings") & set(pairs),
            transposed=_union(adapters, "transposed") & set(pairs),
            config=config,
        )
        if adapters[0].replaced:
            from pluribus.adapters.extract import add_saved

            saved = adapters[0].config.get("modules_to_save")
            bias = adapters[0].config.get("bias", "none")
            add_saved(folder, adapters[0].replaced, {"modules_to_save": saved, "bias": bias}, pairs)

    published(out, write, overwrite)
    return AdapterReport(tuple(reports))


def _union(adapters: Sequence[Adapter], field: str) -> set[str]:
    return {name for one in adapters for name in getattr(one, field)}


def _check(adapters: Sequence[Adapter], base_model: str | None) -> None:
    """Raise for adapters that do not belong together."""
    bases = list(dict.fromkeys(one.config.get("base_model_name_or_path") for one in adapters))
    if len(bases) > 1 and base_model is None:
        raise MismatchError(
            f"the adapters are for different bases: {listing(map(str, bases))}; if these are one "
            "model, name it with base_model"
        )
    flags = {bool(one.config.get("fan_in_fan_out")) for one in adapters}
    if len(flags) > 1:
        raise MismatchError("some adapters have fan_in_fan_out and some don't")
    for one in adapters:
        if one.magnitudes:
            raise InputError(
                f"{one.folder}: a DoRA is not base + delta; merge the full models instead "
                f"(base+{one.folder})"
            )
        biases = [name for name in one.factors if not name.endswith(".weight")]
        if biases:
            raise InputError(
                f"{one.folder}: has updates of {listing(biases)}, which are not weights; merge the "
                f"full models instead (base+{one.folder})"
            )
    shapes: dict[str, tuple[tuple[int, ...], Adapter]] = {}
    for one in adapters:
        for name, part in one.factors.items():
            shape = (part.b.spec.shape[0], *part.a.spec.shape[1:])
            known, where = shapes.setdefault(name, (shape, one))
            if known != shape:
                raise MismatchError(
                    f"{name!r} is {list(known)} in {where.folder}, but {list(shape)} in "
                    f"{one.folder}; the adapters are for different bases"
                )
    _check_saved(adapters)


def _check_saved(adapters: Sequence[Adapter]) -> None:
    """Raise InputError unless whole tensors (modules_to_save, biases) are the same in all."""
    first = adapters[0]
    for one in adapters[1:]:
        for name in dict.fromkeys([*first.replaced, *one.replaced]):
            here, there = first.replaced.get(name), one.replaced.get(name)
            if (
                here is None
                or there is None
                or here.spec != there.spec
                or here.load().tobytes() != there.load().tobytes()
            ):
                raise InputError(
                    f"{name!r} is saved whole and differs between {first.folder} and {one.folder}; "
                    f"whole tensors need the base: merge the full models (base+{one.folder}, ...)"
                )


def _coefficients(method: Any, weights: Weights | None, count: int) -> list[float] | None:
    """Return each update's factor if the method is a weighted sum, else None."""
    from pluribus.core.arrays import per_expert
    from pluribus.core.method import method_of

    if weights is not None and method != "linear":
        raise InputError('weights go with method="linear"; other methods have their own')
    if weights is not None:
        if len(weights) != count:
            raise InputError(f"{len(weights)} weights were given for {count} adapters: {weights}")
        return [float(w) for w in weights]
    merger = method_of(method)
    name = facts(merger).name
    if facts(merger).needs:
        raise InputError(f"{name} needs {facts(merger).needs[0]!r}, which an adapter has not")
    if name not in ("linear", "task_arithmetic"):
        return None
    shares = list(per_expert(merger.weight, count))
    if merger.normalize:
        total = sum(shares)
        if abs(total) < 1e-8:
            raise InputError(f"{name}: weights {merger.weight} sum to zero; set normalize: false")
        shares = [share / total for share in shares]
    scale = merger.scale if name == "task_arithmetic" else 1.0
    return [scale * share for share in shares]


def _crossed(name: str, parts: Sequence[Factors | None], shares: Sequence[float]) -> Product:
    """Return the product of the factors' weighted sums; the sign of a weight goes to b."""
    present = [(p, w) for p, w in zip(parts, shares, strict=True) if p is not None]
    ranks = [part.rank for part, _ in present]
    if len(set(ranks)) > 1:
        raise InputError(
            f"{name!r} has ranks {ranks}; mode='linear' adds factors entry by entry and needs one "
            "rank; use 'svd' or 'cat'"
        )
    b, a = (0 * factor for factor in product(present[0][0]))
    for part, weight in present:
        raw = product(part._replace(scale=1.0))
        root = abs(part.scale * weight) ** 0.5
        a = a + root * raw.a
        b = b + math.copysign(root, part.scale * weight) * raw.b
    return Product(b, a)


def _factored(
    name: str,
    method: Any,
    parts: Sequence[Factors | None],
    shape: tuple[int, ...],
    rank: int | None,
    energy: float | None,
    seed: int,
) -> "tuple[Tensor, Product]":
    """Merge one module's deltas with any method; return the result (R, c) and its factors."""
    import numpy as np
    import torch

    from pluribus.core.method import method_of
    from pluribus.core.spectral import matrices
    from pluribus.engine.reference import merge_arrays

    merger = method_of(method)
    zero = np.zeros(shape, np.float32)
    deltas: list[Mapping[str, Any]] = []
    for part in parts:
        if part is None:
            deltas.append({name: zero})
        else:
            whole = product(part)
            deltas.append({name: (whole.b @ whole.a).float().numpy().reshape(shape)})
    base = None if facts(merger).base == "ignored" else {name: zero}
    merged = matrices(merge_arrays(merger, base, deltas, seed=seed)[name], 0)
    u, s, vh = torch.linalg.svd(merged, full_matrices=False)
    k = chosen(s, rank, energy)
    return merged, balanced(u[:, :k], s[:k], vh[:k])
