"""Blocks on a GPU give what they give on a CPU, up to the rounding of float32 arithmetic."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pluribus.core.dtypes import numpy_dtype  # noqa: E402
from pluribus.engine.driver import merge  # noqa: E402

METHODS = [
    "linear",
    "slerp(t=0.3)",
    "karcher",
    "model_stock",
    "multislerp",
    "task_arithmetic(scale=0.4)",
    "ties(density=0.3)",
    "ties(density=0.3, scope='model', tie='global')",
    "dare_linear(density=0.5)",
    "dare_ties(density=0.5)",
    "della(density=0.5)",
    "breadcrumbs(density=0.8, gamma=0.05)",
    "sce(select_topk=0.3)",
    "pcb(ratio=0.2)",
    "consensus",
    "magmax",
    "iso_c",
    "tsv_m",
    "trim(density=0.2) >> elect >> mean",
    "lines(of='ties(density=0.3)', beta=0.8)",
]


def values(weights) -> dict[str, np.ndarray]:
    return {
        name: weights.source(name).load().view(numpy_dtype(spec.kind)).astype(np.float64)
        for name, spec in weights.spec.items()
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_cuda_agrees_with_cpu(models, small_blocks, raw_bytes, method):
    pool = models.write(experts=1 if method.startswith("slerp") else 3)
    host = values(merge(pool, method))
    once = merge(pool, method, device="cuda", threads=1)
    for name, found in values(once).items():
        np.testing.assert_allclose(found, host[name], rtol=0, atol=2e-6, err_msg=name)
    again = merge(pool, method, device="cuda", threads=4, memory=4 << 20)
    assert raw_bytes(again) == raw_bytes(once)


@pytest.mark.parametrize("method", METHODS)
def test_torch_blocks_agree_with_numpy_blocks(models, small_blocks, monkeypatch, method):
    """The path of a GPU on the CPU: the same uploads, the array API's torch functions."""
    from pluribus.engine import blocks

    pool = models.write(experts=1 if method.startswith("slerp") else 3)
    host = values(merge(pool, method))
    monkeypatch.setattr(blocks.Reader, "_upload", lambda self, block: torch.tensor(block))
    plain = blocks.Reader.__init__
    monkeypatch.setattr(blocks.Reader, "__init__", lambda self, *_: plain(self, "torch"))
    for name, found in values(merge(pool, method)).items():
        np.testing.assert_allclose(found, host[name], rtol=0, atol=2e-6, err_msg=name)
