"""Vocabulary matrices and configuration against the real mergekit-tokensurgeon."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pluribus.core.weights import Weights
from pluribus.surgery import transplant
from pluribus.tokenizer import load_vocab

pytestmark = pytest.mark.mergekit

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FEW = ("-k", "8")  # fewer than the donor is wide: its matrices can't be met exactly
CI = ("-a", "common_interpolation", *FEW)
# name: (model, donor, mergekit's options, ours)
CASES = {
    "omp": ("a", "b", FEW, {"k": 8}),
    "omp_small_batches": ("a", "b", (*FEW, "--batch-size", "3"), {"k": 8}),
    "omp_back": ("b", "a", FEW, {"k": 8}),
    "omp_one": ("a", "c", ("-k", "1"), {"k": 1}),
    "omp_tied_model": ("t", "b", FEW, {"k": 8}),
    "omp_tied_donor": ("a", "u", FEW, {"k": 8}),
    "distance": ("a", "b", CI, {"k": 8}),
    "cosine": ("a", "b", (*CI, "-c"), {"k": 8, "cosine": True}),
    "barycentric": ("a", "b", (*CI, "-w", "barycentric"), {"k": 8, "weighting": "barycentric"}),
    "barycentric_cosine": (
        "a",
        "c",
        (*CI, "-w", "barycentric", "-c"),
        {"k": 8, "weighting": "barycentric", "cosine": True},
    ),
    "least_squares": (
        "a",
        "b",
        (*CI, "-w", "least_squares"),
        {"k": 8, "weighting": "least_squares"},
    ),
    "mean": ("a", "b", ("-a", "mean"), {}),
    "zero": ("a", "b", ("-a", "zero"), {}),
    "scaled": ("a", "b", (*FEW, "-nvs", "0.5"), {"k": 8, "scale": 0.5}),
    **{
        f"subword_{how}": ("a", "b", ("-a", "subword", "-s", how), {"subword": how})
        for how in ("mean", "sum", "weighted_mean", "first_last")
    },
    "prefix": ("a", "b", (*FEW, "-pm", "yes"), {"k": 8, "prefix_match": "yes"}),
    "prefix_back": ("b", "c", (*FEW, "-pm", "yes"), {"k": 8, "prefix_match": "yes"}),
}
# mergekit solves the bordered system in float32, and its rows here have entries of up to 8.
ATOL = {"barycentric_cosine": 1e-4}
METHODS = {"distance": "common_interpolation", "cosine": "common_interpolation"} | {
    "barycentric": "common_interpolation",
    "barycentric_cosine": "common_interpolation",
    "least_squares": "common_interpolation",
    "mean": "mean",
    "zero": "zero",
}


def method(name):
    return "subword" if name.startswith("subword") else METHODS.get(name, "omp")


@pytest.fixture(scope="module")
def oracle(folders, tmp_path_factory):
    python = os.environ.get("MERGEKIT_PYTHON")
    if not python:
        pytest.skip("MERGEKIT_PYTHON is not set")
    root = tmp_path_factory.mktemp("surgery")
    sources = {"a": "base", "t": "base", "b": "chem", "u": "chem", "c": "code"}
    about = {"a": (5, 16, False), "t": (0, 16, True), "b": (0, 24, False)}
    about |= {"u": (3, 24, True), "c": (0, 12, False)}  # rows beyond the tokens, width, tied
    jobs = {"models": {}, "runs": {}}
    for name, source in sources.items():
        (root / name).mkdir()
        for path in folders[source].iterdir():
            (root / name / path.name).write_bytes(path.read_bytes())
        more, width, tied = about[name]
        rows = len(load_vocab(root / name).tokens) + more
        jobs["models"][str(root / name)] = [rows, width, tied]
    for name, (model, donor, options, _) in CASES.items():
        jobs["runs"][f"their-{name}"] = [str(root / model), str(root / donor), *options]
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("surgery_oracle.py")
    env = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [python, str(script), str(root / "jobs.json")], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return root


@pytest.mark.parametrize("name", CASES)
def test_rows_and_configuration(oracle, name, tmp_path):
    theirs = oracle / f"their-{name}"
    error = theirs / "error.txt"
    assert not error.exists(), error.read_text()[-1500:]
    model, donor, _, settings = CASES[name]
    out = tmp_path / "out"
    _, report = transplant(oracle / model, oracle / donor, out, method=method(name), **settings)
    assert report.matrices[0].approximated > 5
    mine, wanted = Weights.open(out), Weights.open(theirs)
    assert set(mine.spec) == set(wanted.spec)
    for tensor in wanted.spec:
        values = wanted.source(tensor).floats().reshape(wanted.source(tensor).spec.shape)
        found = mine.source(tensor).floats().reshape(mine.source(tensor).spec.shape)
        np.testing.assert_allclose(found, values, rtol=0, atol=ATOL.get(name, 1e-5), err_msg=tensor)
    config, expected = (json.loads((p / "config.json").read_text()) for p in (out, theirs))
    for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "hidden_size"):
        assert config.get(key) == expected.get(key), key
    assert load_vocab(out).tokens == load_vocab(theirs).tokens
