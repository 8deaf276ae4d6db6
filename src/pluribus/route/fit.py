"""Fit a composite's router from examples of each task's inputs; no label is needed."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pluribus.core.errors import InputError, nearest
from pluribus.route import router as routers
from pluribus.route.routed import Routed
from pluribus.route.router import RouterReport


def fit_router(
    routed: Routed,
    inputs: Mapping[str, Iterable[Any] | Tensor],
    val: Mapping[str, Iterable[Any] | Tensor] | None = None,
    *,
    rows: int = 64,
    **settings: Any,
) -> RouterReport:
    """Train a router on features of inputs, by part, and give it to the composite.

    `inputs[name]` is a tensor (n, ...) or an iterable of batches: tensors, or mappings of keywords.
    A tensor goes through the base `rows` at a time. `settings` are those of
    `pluribus.route.router.fit`: kind, epochs, lr, batch_size, seed and others. Raises
    InputError for a part that is not there, or none of whose inputs are given.
    """
    for name in [*inputs, *(val or {})]:
        if name not in routed.names:
            raise InputError(
                f"there is no part {name!r}; there are: {', '.join(routed.names)}."
                f"{nearest(name, routed.names)}"
            )
    if lacking := [name for name in routed.names if name not in inputs]:
        raise InputError(
            f"no inputs are given for {', '.join(lacking)}; a router needs some of each"
        )
    seen = {name: features(routed, found, rows) for name, found in inputs.items()}
    held = None if val is None else {n: features(routed, x, rows) for n, x in val.items()}
    gate, told = routers.fit(seen, held, **settings)
    routed.set_router(gate.to(next(routed.base.parameters()).device))
    return told


def features(routed: Routed, inputs: Iterable[Any] | Tensor, rows: int = 64) -> Tensor:
    """Return the router's features of inputs (n, d). Raises InputError if there are none."""
    batches = inputs.split(rows) if isinstance(inputs, Tensor) else inputs
    found = []
    with torch.no_grad():
        for batch in batches:
            one = routed.embed(**batch) if isinstance(batch, Mapping) else routed.embed(batch)
            found.append(one.float().cpu())
    if not found:
        raise InputError("there are no inputs to take features of")
    return torch.cat(found)
