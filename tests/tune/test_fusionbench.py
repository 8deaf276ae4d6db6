"""Merged weights, entropy, masks and twenty steps of adaptation against the real FusionBench."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pluribus import Pool
from pluribus.tune import AdaMerging, Blend, ModuleForward
from pluribus.tune._mask import ConcreteMask

pytestmark = pytest.mark.fusionbench

EXPERTS = ("a", "b", "c")
STEPS = 20


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What goes in, and what FusionBench makes of it."""
    folder = tmp_path_factory.mktemp("fusionbench")
    rng = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    shapes = {name: p.shape for name, p in net.named_parameters()}

    def drawn(shape, size=1.0):
        return size * torch.randn(shape, generator=rng)

    given = {f"base/{name}": drawn(shape, 0.4) for name, shape in shapes.items()}
    for label in EXPERTS:
        for name, shape in shapes.items():
            given[f"{label}/{name}"] = given[f"base/{name}"] + drawn(shape, 0.2)
        given[f"head/{label}"] = drawn((4, 6))
        given[f"x/{label}"] = drawn((STEPS, 16, 6))
    given["layer"] = 0.3 + drawn((len(EXPERTS), len(shapes)), 0.5)
    given["task"] = 0.3 + drawn((len(EXPERTS),), 0.5)
    for name, shape in shapes.items():
        given[f"mask/{name}"] = torch.rand(shape, generator=rng)
        given[f"logits/{name}"] = drawn(shape)
    python = os.environ.get("FUSIONBENCH_PYTHON")
    if python is None:
        pytest.skip("FUSIONBENCH_PYTHON is not set: no interpreter with fusion-bench 0.2")
    inputs, outputs = folder / "in.npz", folder / "out.npz"
    np.savez(inputs, **{name: tensor.numpy() for name, tensor in given.items()})
    script = Path(__file__).with_name("fusionbench_oracle.py")
    command = [python, str(script), str(inputs), str(outputs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return net, given, dict(np.load(outputs)), list(shapes)


def pool(given, names):
    base, *experts = (
        {name: given[f"{label}/{name}"] for name in names} for label in ("base", *EXPERTS)
    )
    return Pool(base, dict(zip(EXPERTS, experts, strict=True)))


def close(got, wanted, atol=1e-6):
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("kind", "by", "clamp"),
    [("layer", "tensor", None), ("clamped", "tensor", (0.0, 1.0)), ("task", "model", None)],
)
def test_merged_weights(both, kind, by, clamp):
    _, given, found, names = both
    blend = Blend(pool(given, names), by=by, clamp=clamp)
    scales = given["task"][None] if kind == "task" else given["layer"].T
    with torch.no_grad():
        blend.coefficients.copy_(scales[..., None])
    for name, leaf in blend.leaves().items():
        close(leaf.detach(), found[f"{kind}/{name}"])


def test_masked_weights(both):
    _, given, found, names = both
    blend = Blend(pool(given, names), by="model")
    with torch.no_grad():
        blend.coefficients.copy_(given["task"][None, :, None])
    masks = {name: given[f"mask/{name}"] for name in names}
    for name, leaf in blend.leaves(masks).items():
        close(leaf.detach(), found[f"masked/{name}"])


@pytest.mark.parametrize(("kind", "by"), [("layer", "tensor"), ("task", "model")])
def test_entropy_and_twenty_steps(both, kind, by):
    net, given, found, names = both
    heads = {label: {"weight": given[f"head/{label}"]} for label in EXPERTS}
    streams = {label: list(given[f"x/{label}"]) for label in EXPERTS}
    tuned = AdaMerging(by=by, steps=STEPS, lr=0.03).fit(
        pool(given, names), ModuleForward(net, heads), streams
    )
    entropies = [[step["by_task"][label] for label in EXPERTS] for step in tuned.history]
    close(entropies, found[f"entropy/{kind}"], atol=1e-5)
    wanted = found[f"adapted/{kind}"].clip(0, 1)
    for j, name in enumerate(names):
        close(tuned.coefficients.of(name), wanted[:, j] if kind == "layer" else wanted, atol=1e-5)


def test_soft_masks_of_the_same_uniform_numbers(both):
    """Its MaskModel draws tensor by tensor from torch's global generator, ours all at once."""
    _, given, found, names = both
    logits = {name: given[f"logits/{name}"] for name in names}
    mask = ConcreteMask({name: x.shape for name, x in logits.items()}, init=logits)
    drawn = mask.draw(torch.Generator().manual_seed(5))
    for name in names:
        soft = found[f"drawn/{name}"]
        close(drawn.masks[name].detach(), soft / soft.mean(), atol=1e-5)
