"""Composites from what people have: checkpoints, LoRA adapters, stores of compressed experts.

    from_checkpoints   Twin-Merging: a merge as the base, low-rank parts of what each expert lacks
    from_store         the same from a store that `pluribus compress` wrote; banks of masks too
    from_adapters      PEFT LoRA folders beside their base

The module is yours: it is loaded with the base's tensors where that is another model than it holds,
and is part of the composite from then on.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pluribus.compress import open_store
from pluribus.compress._bank import ExpertBank
from pluribus.compress._twins import TwinStore
from pluribus.compress.twin import Twin
from pluribus.core.errors import InputError, MismatchError, listing
from pluribus.core.lowrank import adapter
from pluribus.core.source import Source
from pluribus.core.weights import Weights, to_torch
from pluribus.route.parts import Delta, Dense, LowRank, Masked, Part
from pluribus.route.routed import Routed


def from_checkpoints(
    module: nn.Module,
    base: Any,
    experts: Mapping[str, Any],
    *,
    shared: Any = None,
    density: float | None = None,
    rank: int | None = None,
    exclude: tuple[str, ...] = (),
    **settings: Any,
) -> Routed:
    """Return a composite of one merge and what each expert adds to it, in low rank.

    `shared`, `density`, `rank` and `exclude` are `pluribus.compress.Twin`'s; `settings` are
    `Routed`'s. Raises MismatchError if the models or the module differ in a tensor.
    """
    given = {} if shared is None else {"shared": shared}
    store = Twin(density=density, rank=rank, exclude=exclude, **given).fit(base, experts)
    return from_store(module, store, **settings)


def from_store(
    module: nn.Module,
    store: TwinStore | ExpertBank | str | os.PathLike[str],
    *,
    base: Any = None,
    **settings: Any,
) -> Routed:
    """Return a composite of a store's experts: low-rank, sparse or masked parts.

    Tensors that tasks keep for themselves and the module has too are parts as well; others, such as
    heads, are left out. Raises MismatchError if the module is of another shape.
    """
    if isinstance(store, str | os.PathLike):
        opened = open_store(store, base)
        if not isinstance(opened, TwinStore | ExpertBank):
            raise InputError(f"{store}: its experts are no deltas of a base")
        store = opened
    ground = store.shared if isinstance(store, TwinStore) else store.base
    _load(module, ground)
    known = dict(module.state_dict())
    parts: dict[str, Part] = {}
    vectors: dict[str, Tensor] = {}  # one for all tasks of a bank
    for task in store.tasks:
        if isinstance(store, TwinStore):
            part = _twin_part(store, task)
        else:
            part = _masks(store, task, vectors)
        own = store.own[task] if isinstance(store, TwinStore) else store.entries[task].own
        for name in own:
            if name in known and known[name].is_floating_point():
                part[name] = Dense(to_torch(own.source(name)).to(known[name]) - known[name])
        parts[task] = part
    return Routed(module, parts, **settings)


def _twin_part(store: TwinStore, task: str) -> dict[str, Delta]:
    part: dict[str, Delta] = {}
    found = store.parts[task]
    for key in found:
        form, _, name = key.partition("/")
        if form == "a":
            a, b = to_torch(found.source(key)), to_torch(found.source(f"b/{name}"))
            part[name] = LowRank(a, b)
        elif form == "dense":
            part[name] = Dense(to_torch(found.source(key)))
        elif form == "kept":
            spec = store.shared.source(name).spec
            values = np.zeros(spec.size, np.float32)
            piece = store.part(task, name)
            assert piece is not None
            piece.add(values, 0, 1.0)
            part[name] = Dense(torch.from_numpy(values).view(spec.shape))
    return part


def _masks(bank: ExpertBank, task: str, vectors: dict[str, Tensor]) -> dict[str, Delta]:
    entry = bank.entries[task]
    part: dict[str, Delta] = {}
    for name in bank.names:
        if name not in vectors:
            vectors[name] = to_torch(bank.multi.source(name))
        vector = vectors[name]
        if entry.factor != 1.0:  # EMR's rescaler: a vector of its own, of this task alone
            vector = vector * entry.factor
        bits = torch.from_numpy(np.ascontiguousarray(entry.masks.source(name).load()))
        part[name] = Masked(bits.view(torch.uint8).clone(), vector)
    return part


def from_adapters(
    module: nn.Module, adapters: Mapping[str, str | os.PathLike[str]], **settings: Any
) -> Routed:
    """Return a composite of a model and LoRA adapters that PEFT wrote for it, by name.

    Raises MismatchError for an adapter of another model, InputError for DoRA or whole tensors in an
    adapter: those are no low-rank deltas.
    """
    parts: dict[str, Part] = {}
    for label, folder in adapters.items():
        found = adapter(folder)
        if found.magnitudes:
            raise InputError(f"{folder}: DoRA scales rows of the base; merge it first")
        part: dict[str, Delta] = {}
        for name, (a, b, scale) in found.factors.items():
            part[name] = LowRank(_matrix(a), scale * _matrix(b))
        known = module.state_dict()
        for name, source in found.replaced.items():
            if name not in known:
                raise MismatchError(f"{folder}: the model has no tensor {name!r}")
            part[name] = Dense(to_torch(source).to(known[name]) - known[name])
        parts[label] = part
    return Routed(module, parts, **settings)


def _matrix(source: Source) -> Tensor:
    tensor = to_torch(source).float()
    return tensor.reshape(tensor.shape[0], -1) if tensor.ndim > 2 else tensor


def _load(module: nn.Module, weights: Weights) -> None:
    """Load the tensors into the module. Raises MismatchError if it is of another shape."""
    own = module.state_dict(keep_vars=True)
    known = {id(own[name]) for name in own if name in weights.spec}
    aliases = [n for n in own if n not in weights.spec and id(own[n]) in known]  # tied tensors
    lacking = [n for n in own if n not in weights.spec and n not in aliases]
    extra = [name for name in weights.spec if name not in own]
    if lacking or extra:
        what = f"lacks {listing(extra)}" if extra else f"has {listing(lacking)}, which they lack"
        raise MismatchError(f"the models do not fit the module: {type(module).__name__} {what}")
    for name, tensor in own.items():
        shape = weights.spec[name].shape if name in weights.spec else tuple(tensor.shape)
        if tuple(tensor.shape) != tuple(shape):
            raise MismatchError(
                f"{name} is {list(shape)} in the models, but {list(tensor.shape)} in "
                f"{type(module).__name__}"
            )
    module.load_state_dict({n: weights[n] for n in own if n not in aliases}, strict=False)
