"""Small models, and a driver that cuts tensors anywhere: what streaming must not change."""

import numpy as np
import pytest
import torch  # noqa: F401 - loaded first, annotations of arrays admit its tensors

from pluribus.core.fold import feed
from pluribus.core.merger import At, call, columns, facts, stages
from pluribus.engine.reference import merge_arrays

SHAPES = {
    "layers.0.weight": (6, 8),
    "layers.0.bias": (8,),
    "layers.1.weight": (5, 8),
    "layers.1.kernel": (4, 3, 2, 2),
    "head": (11, 3),
    "one": (1,),
    "scalar": (),
    "empty": (0, 4),
}
DEPTH = {"layers.0.weight": 0, "layers.0.bias": 0, "layers.1.weight": 1, "layers.1.kernel": 1}


def make(count, dtype=np.float32, seed=0, shapes=SHAPES):
    """Return a base and `count` experts; a fifth of each update is exactly zero."""
    rng = np.random.default_rng(seed)
    base = {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    experts = []
    for _ in range(count):
        expert = {}
        for name, shape in shapes.items():
            update = rng.normal(0, 0.3, shape) * (rng.random(shape) < 0.8)
            expert[name] = np.asarray(base[name] + update, dtype)
        experts.append(expert)
    return base, experts


@pytest.fixture
def model():
    """The function that makes models."""
    return make


def merge_in_blocks(method, base, experts, extras=None, *, size, seed=0, depth=None):
    """As `engine.reference.merge_arrays`, in blocks of about `size` elements, folded backwards."""
    names = [name for name in experts[0] if experts[0][name].size]
    layers = 1 + max(depth.values()) if depth else 0
    grain = facts(method).grain
    blocks = {}
    for job, name in enumerate(experts[0]):
        if name not in names:
            continue
        shape = experts[0][name].shape
        cols = 1 if grain == "element" else columns(grain, shape)
        step = experts[0][name].size if grain == "tensor" else max(size // cols, 1) * cols
        blocks[name] = []
        for number, start in enumerate(range(0, experts[0][name].size, step)):
            stop = min(start + step, experts[0][name].size)
            view = {"tensor": shape, "element": (-1,)}.get(grain, (-1, cols))

            def cut(array, start=start, stop=stop, view=view):
                return array.reshape(-1)[start:stop].reshape(view).copy()

            at = At(name, shape, start, stop, number, job, (depth or {}).get(name), layers, seed)
            more = {}
            for key, group in (extras or {}).items():
                if all(name in x for x in group):
                    same = all(x[name].shape == shape for x in group)
                    more[key] = np.stack([cut(x[name]) if same else x[name] for x in group])
            b = None if base is None else cut(base[name])
            blocks[name].append((b, np.stack([cut(e[name]) for e in experts]), at, more))
    folded = {name: {} for name in names}
    for stage in stages(method):
        for key, fold in stage.items():
            for group in [names] if fold.scope == "model" else [[name] for name in names]:
                result = fold
                while hasattr(result, "finish"):
                    state = result.init()
                    for name in reversed(group):
                        for b, e, at, more in reversed(blocks[name]):
                            known = {**more, **folded[name]}
                            fed = feed(result, result.init(), b, e, at, known, method, key)
                            state = result.join(fed, state)
                    result = result.finish(state)
                for name in group:
                    folded[name][key] = result
    out = {}
    for name, array in experts[0].items():
        parts = [
            np.asarray(call(method, b, e, at, {**more, **folded[name]})).reshape(-1)
            for b, e, at, more in blocks.get(name, [])
        ]
        out[name] = np.concatenate(parts).reshape(array.shape) if parts else array.copy()
    return out


def merged(method, base, *experts, seed=0, dtype=np.float32):
    """Merge a single tensor given as lists."""
    base = None if base is None else {"x": np.array(base, dtype)}
    experts = [{"x": np.array(expert, dtype)} for expert in experts]
    return merge_arrays(method, base, experts, seed=seed)["x"]
