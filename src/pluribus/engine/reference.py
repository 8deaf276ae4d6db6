"""The slow obvious version of the driver: whole tensors in memory, one thread, one block each.

Tests hold the streaming driver to it, and methods are checked with it before they meet a file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pluribus.core.arrays import Array
from pluribus.core.fold import feed
from pluribus.core.merger import At, call, columns, facts, stages

Arrays = Mapping[str, Array]


def merge_arrays(
    method: Any,
    base: Arrays | None,
    experts: Sequence[Arrays],
    extras: Mapping[str, Sequence[Arrays]] | None = None,
    *,
    seed: int = 0,
    depth: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """Merge dictionaries of float arrays (all numpy or all torch) with one method.

    `depth` maps tensor names to residual blocks, for methods that look at depth. `extras` gives
    further inputs per expert, such as `{"fisher": [f1, f2]}`; a tensor that one of them lacks is
    merged without.
    """
    names = list(experts[0])
    layers = 1 + max(depth.values()) if depth else 0
    blocks = {}
    for job, name in enumerate(names):
        first = experts[0][name]
        shape = tuple(first.shape)
        at = At(name, shape, 0, int(np.prod(shape)), 0, job, (depth or {}).get(name), layers, seed)
        grain = facts(method).grain
        cols = columns(grain, shape)
        rows = (at.size // max(cols, 1), cols)
        view = {"element": (at.size,), "tensor": shape}.get(grain, rows)
        b = None if base is None else base[name].reshape(view)
        e = _stack([expert[name].reshape(view) for expert in experts])
        more = {
            k: _stack([x[name] for x in v])
            for k, v in (extras or {}).items()
            if all(name in x for x in v)
        }
        if grain != "tensor":
            more = {k: v.reshape(v.shape[0], *view) for k, v in more.items()}
        blocks[name] = (b, e, at, more)
    folded: dict[str, dict[str, Any]] = {name: {} for name in names}
    for stage in stages(method):
        for key, fold in stage.items():
            groups = [names] if fold.scope == "model" else [[name] for name in names]
            for group in groups:
                result = fold
                while hasattr(result, "finish"):
                    state = result.init()
                    for name in group:
                        b, e, at, more = blocks[name]
                        if at.size == 0:  # as in the driver: it has no blocks
                            continue
                        known = {**more, **folded[name]}
                        state = feed(result, state, b, e, at, known, method, key)
                    result = result.finish(state)
                for name in group:
                    folded[name][key] = result
    out = {}
    for name in names:
        b, e, at, more = blocks[name]
        if at.size == 0:
            out[name] = experts[0][name] * 1
            continue
        merged = call(method, b, e, at, {**more, **folded[name]})
        out[name] = merged.reshape(experts[0][name].shape)
    return out


def _stack(rows: Sequence[Any]) -> Array:
    if isinstance(rows[0], np.ndarray):
        return np.stack(rows)
    import torch

    return torch.stack(list(rows))
