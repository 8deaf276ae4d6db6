"""Heads' outputs, patterns and path patching against the real transformer_lens."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package

import head_models  # type: ignore[import-not-found]
import torch

from pluribus.inspect.circuits import HeadModel, path_patch

ORACLE = Path(__file__).with_name("lens_oracle.py")
close = {"atol": 1e-4, "rtol": 1e-4}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_as_transformer_lens(kind, tmp_path):
    python = os.environ.get("TRANSFORMER_LENS_PYTHON")
    if not python:
        pytest.skip("TRANSFORMER_LENS_PYTHON is not set: no interpreter with transformer_lens")
    model = head_models.KINDS[kind]()
    model.save_pretrained(tmp_path / "model")
    head_models.tokenizer().save_pretrained(tmp_path / "model")
    prompts = head_models.drawn(rows=4, shortest=9, longest=9)
    np.savez(
        tmp_path / "tokens.npz",
        clean=prompts.clean.numpy(),
        corrupt=prompts.corrupt.numpy(),
        answers=prompts.answers.numpy(),
        alternatives=prompts.alternatives.numpy(),
    )
    files = (tmp_path / "model", tmp_path / "tokens.npz", tmp_path / "out.npz")
    done = subprocess.run(
        [python, ORACLE, *files],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    said = {name: torch.tensor(value) for name, value in np.load(tmp_path / "out.npz").items()}
    heads = HeadModel(model)
    kept = heads.run(prompts.clean, prompts.ends)
    torch.testing.assert_close(torch.stack(kept.z), said["z"], **close)
    torch.testing.assert_close(torch.stack(kept.pattern), said["pattern"], **close)
    torch.testing.assert_close(kept.logits, said["logits"], **close)
    to_logits = path_patch(heads, prompts, allow_small_gap=True)
    torch.testing.assert_close(to_logits.differences.double(), said["paths"], **close)
    receiver = [(2, 1, "q")]
    queries = path_patch(heads, prompts, receiver, allow_small_gap=True)
    torch.testing.assert_close(queries.differences[:2].double(), said["queries"][:2], **close)
    direct = path_patch(heads, prompts, receiver, freeze_mlps=True, allow_small_gap=True)
    torch.testing.assert_close(
        direct.differences[:2].double().mean(-1), said["direct"][:2], **close
    )
    assert (said["queries"].mean(-1) - said["direct"])[:2].abs().max() > 1e-3  # not the same thing
