"""Aligned rows against the slow version of the tokenizer package, for any range."""

import numpy as np
import pytest
import tiny

from pluribus.core.errors import MismatchError
from pluribus.core.source import ArraySource
from pluribus.core.weights import Weights
from pluribus.recipe.rows import AlignedRows, Rounded, aligned, vocabulary_of
from pluribus.tokenizer import Fill, VocabIn, align, apply

WIDTH = 5


@pytest.fixture
def case():
    """Return an alignment of three vocabularies with every kind of row, and the matrices."""
    vocabs = [
        VocabIn("a", {"<s>": 0, "x": 1, "y": 2}, 4),
        VocabIn("b", {"<s>": 1, "z": 0, "u": 2}, 3),
        VocabIn("c", {"u": 0, "y": 1, "v": 2, "<s>": 3, "x": 4}, 5),
    ]
    fills = {"new": Fill(model=1, index=2, force=True), "nil": Fill()}
    alignment = align(vocabs, add=["new", "nil"], fills=fills, pad_to_multiple_of=6)
    rng = np.random.default_rng(0)
    matrices = [rng.standard_normal((v.rows, WIDTH)).astype(np.float32) for v in vocabs]
    return alignment, matrices


def sources(matrices, kind="F32"):
    return [ArraySource.of(matrix, kind) for matrix in matrices]


@pytest.mark.parametrize("model", [0, 1, 2])
def test_every_range_is_the_slow_versions(case, model):
    alignment, matrices = case
    row_map = alignment.maps[model]
    expected = apply(row_map, matrices).reshape(-1)
    source = AlignedRows(row_map, sources(matrices))
    assert source.spec.shape == (alignment.rows, WIDTH)
    for start in range(0, expected.size, 3):
        for stop in range(start, expected.size + 1, 4):
            got = source.floats(start, stop)
            np.testing.assert_allclose(got, expected[start:stop], rtol=1e-6, atol=1e-7)


def test_bits_do_not_depend_on_ranges(case):
    alignment, matrices = case
    source = AlignedRows(alignment.maps[0], sources(matrices))
    whole = source.load()
    parts = [AlignedRows(alignment.maps[0], sources(matrices)).load(i, i + 1) for i in range(60)]
    assert whole.tobytes() == b"".join(part.tobytes() for part in parts)


def test_biases_are_rows_of_one(case):
    alignment, matrices = case
    biases = [matrix[:, 0].copy() for matrix in matrices]
    source = AlignedRows(alignment.maps[1], sources(biases))
    np.testing.assert_allclose(source.floats(), apply(alignment.maps[1], biases), rtol=1e-6)


def test_mixed_types_are_widened(case):
    alignment, matrices = case
    halves = [matrices[0].astype(np.float16), matrices[1], matrices[2]]
    mixed = [ArraySource.of(m, "F16" if m.dtype == np.float16 else "F32") for m in halves]
    source = AlignedRows(alignment.maps[0], mixed)
    assert source.spec.dtype == "F32"
    expected = apply(alignment.maps[0], [m.astype(np.float32) for m in halves])
    np.testing.assert_allclose(source.floats().reshape(expected.shape), expected, rtol=1e-6)


def test_fingerprint_changes_with_rows_and_bytes(case):
    alignment, matrices = case
    one = AlignedRows(alignment.maps[0], sources(matrices)).fingerprint
    assert one == AlignedRows(alignment.maps[0], sources(matrices)).fingerprint
    assert one != AlignedRows(alignment.maps[1], sources(matrices)).fingerprint
    changed = [matrices[0] + 1, *matrices[1:]]
    assert one != AlignedRows(alignment.maps[0], sources(changed)).fingerprint


def test_an_identity_is_the_models_own_source():
    vocab = VocabIn("a", {"x": 0, "y": 1}, 2)
    alignment = align([vocab])
    own = ArraySource.of(np.zeros((2, WIDTH), np.float32), "F32")
    assert aligned("embed", [own], dict(enumerate(alignment.maps)), 0) is own
    short = ArraySource.of(np.zeros((1, WIDTH), np.float32), "F32")
    with pytest.raises(MismatchError, match="has 1 rows, but the input embedding has 2"):
        aligned("embed", [short], dict(enumerate(alignment.maps)), 0)


def test_rounded_rounds_once_and_widens_exactly():
    values = np.array([1.0, 1.0 + 2**-12, 3.3], np.float32)
    half = Rounded(ArraySource.of(values, "F32"), "F16")
    assert half.floats().tolist() == values.astype(np.float16).astype(np.float32).tolist()
    wide = Rounded(ArraySource.of(values, "F32"), "F64")
    assert wide.floats(wide=np.float64).tolist() == values.astype(np.float64).tolist()


def test_vocabulary_tensors_of_a_model(tmp_path):
    weights = Weights.open(tiny.model(tmp_path / "m"))
    found = vocabulary_of(weights)
    assert found.rows == 14
    assert found.inputs == ("model.embed_tokens.weight",)
    assert found.outputs == ("lm_head.weight",)


def test_no_or_several_embeddings():
    zeros = np.zeros((3, 2), np.float32)
    with pytest.raises(MismatchError, match="no input embedding was found"):
        vocabulary_of(Weights.of({"fc.weight": zeros}))
    two = {"a.embed_tokens.weight": zeros, "b.wte.weight": np.zeros((4, 2), np.float32)}
    with pytest.raises(MismatchError, match="cannot tell which matrix"):
        vocabulary_of(Weights.of(two))
