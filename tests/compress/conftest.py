import numpy as np
import pytest
import torch

SHAPES = {"layers.0.w": (33, 21), "layers.1.w": (40, 7), "norm.weight": (13,), "scalar": ()}


def _narrow(values, kind):
    return torch.from_numpy(np.asarray(values, np.float32)).to(getattr(torch, kind))


def _state(rng, base=None, kind="float32", spread=0.02):
    """A state dict, or an expert near one."""
    out = {}
    for name, shape in SHAPES.items():
        drawn = rng.standard_normal(shape) * (1 if base is None else spread)
        out[name] = _narrow(drawn if base is None else base[name].float().numpy() + drawn, kind)
    return out


@pytest.fixture
def narrow():
    return _narrow


@pytest.fixture
def state():
    return _state


@pytest.fixture
def base():
    return _state(np.random.default_rng(0))


@pytest.fixture
def experts(base):
    rng = np.random.default_rng(1)
    return {task: _state(rng, base) for task in ("math", "code", "law")}
