import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pluribus.tokenizer import Fill, Kind, Run, TokenizerError, VocabIn, align, apply


def vocab(label, text, rows=None, added=()):
    tokens = {token: i for i, token in enumerate(text.split())}
    return VocabIn(label, tokens, rows or len(tokens), tuple(added))


def matrices(*models):
    """Row r of model m is (m, r), so that a copied row says where it came from."""
    return [
        np.array([[m, r] for r in range(v.rows)], dtype=np.float32) for m, v in enumerate(models)
    ]


A = vocab("a", "x y z")
B = vocab("b", "z w x")
C = vocab("c", "w v")


def test_union_takes_base_order_then_the_others():
    out = align([A, B, C], base=0)
    assert out.tokens == {"x": 0, "y": 1, "z": 2, "w": 3, "v": 4}
    assert align([A, B, C], base=1).tokens == {"z": 0, "w": 1, "x": 2, "y": 3, "v": 4}
    assert align([A, B, C]).tokens == out.tokens


def test_added_tokens_come_last():
    a = vocab("a", "x <s>", added=["<s>"])
    b = vocab("b", "<s> <t> y q", added=["<s>", "<t>"])
    c = vocab("c", "q <u> <t>", added=["<u>", "<t>", "q"][:2])
    out = align([a, b, c], base=0, add=["<new>", "y"])
    assert list(out.tokens) == ["x", "<s>", "y", "q", "<t>", "<u>", "<new>"]
    assert list(out.tokens.values()) == list(range(7))
    assert out.added == ("<new>",)


def test_own_base_owner_and_mean_rows_by_hand():
    models = A, B, C
    out = align(models, base=0)
    rows = matrices(*models)
    # x y z are the base's; w is in b (row 1) and c (row 0) but not in the base; v only in c.
    np.testing.assert_array_equal(
        apply(out.maps[0], rows), [[0, 0], [0, 1], [0, 2], [1.5, 0.5], [2, 1]]
    )
    np.testing.assert_array_equal(
        apply(out.maps[1], rows), [[1, 2], [0, 1], [1, 0], [1, 1], [2, 1]]
    )
    np.testing.assert_array_equal(
        apply(out.maps[2], rows), [[0, 0], [0, 1], [0, 2], [2, 0], [2, 1]]
    )
    kinds = [Kind.BASE, Kind.BASE, Kind.BASE, Kind.OWN, Kind.OWN]
    assert out.maps[2].kind.tolist() == kinds
    assert out.maps[0].means == {3: ((1, 1), (2, 0))}


def test_without_a_base_shared_tokens_are_averaged():
    out = align([A, B, C], source=0)
    rows = apply(out.maps[2], matrices(A, B, C))
    np.testing.assert_array_equal(
        rows, [[0.5, 1], [0, 1], [0.5, 1]]
    )  # x in a, b; y in a; z in a, b
    assert out.maps[2].kind.tolist() == [Kind.MEAN, Kind.OWNER, Kind.MEAN]


def test_base_source_drops_the_other_tokens():
    out = align([A, B, C], base=1, source="base")
    assert out.tokens == B.tokens
    assert [m.dropped for m in out.report.models] == [1, 0, 1]
    assert out.template == 1


def test_vocabulary_from_outside_gives_zero_rows_and_a_warning():
    donor = vocab("d", "x new z")
    out = align([A, B], base=0, source=donor)
    assert out.template is None
    np.testing.assert_array_equal(apply(out.maps[1], matrices(A, B)), [[1, 2], [0, 0], [1, 0]])
    assert out.report.models[0].zero == 1
    assert any("'new'" in text and "zero" in text for text in out.warnings)


def test_named_rows_fill_gaps_and_force_replaces_own_rows():
    fills = {
        "y": Fill(model=1, index=1),
        "z": Fill(model=1, index=2, force=True),
        "x": Fill(force=True),
    }
    out = align([A, B], base=0, fills=fills)
    rows = matrices(A, B)
    np.testing.assert_array_equal(apply(out.maps[0], rows), [[0, 0], [0, 1], [1, 2], [1, 1]])
    np.testing.assert_array_equal(apply(out.maps[1], rows), [[0, 0], [1, 1], [1, 2], [1, 1]])
    assert not any("zero" in text for text in out.warnings)  # asked for


def test_padding_is_the_mean_of_the_aligned_rows():
    out = align([A, B], base=0, pad_to_multiple_of=8)
    assert out.rows == 8
    rows = apply(out.maps[1], matrices(A, B))
    np.testing.assert_allclose(rows[4:], np.tile(rows[:4].mean(0), (4, 1)), rtol=1e-6)
    assert out.report.models[1].pad == 4
    assert align([A, A], pad_to_multiple_of=3).rows == 3


def test_padded_input_rows_are_left_out():
    padded = vocab("p", "x y z", rows=8)
    out = align([A, padded], base=1)
    assert out.rows == 3
    assert out.maps[0].is_identity
    assert not out.maps[1].is_identity


def test_token_beyond_the_matrix_counts_as_absent():
    short = vocab("s", "x y z", rows=2)
    out = align([short, A], base=0)
    assert list(out.tokens) == ["x", "y", "z"]  # z again, from the other model
    assert out.maps[0].kind.tolist() == [Kind.OWN, Kind.OWN, Kind.OWNER]
    assert "1 tokens have ids beyond its 2 rows" in out.warnings[0]
    assert list(align([short, A], base=0, source="base").tokens) == ["x", "y"]


def test_gap_in_the_ids_becomes_padding():
    gap = VocabIn("g", {"x": 0, "y": 3}, 4)
    out = align([gap], source="base")
    assert out.maps[0].kind.tolist() == [Kind.OWN, Kind.PAD, Kind.PAD, Kind.OWN]
    assert "2 ids below 4 have no token" in out.warnings[0]


def test_runs_are_maximal_and_cover_the_copied_rows():
    out = align([A, B, C], base=0)
    assert out.maps[1].runs() == [
        Run(0, 1, 1, 2),
        Run(1, 2, 0, 1),
        Run(2, 4, 1, 0),
        Run(4, 5, 2, 1),
    ]
    assert out.maps[0].runs(1, 4) == [Run(1, 3, 0, 1)]
    assert out.maps[0].runs(9) == []


def test_tensors_of_any_rank_follow_the_map():
    out = align([A, B], base=0)
    bias = [np.arange(3.0), 10 + np.arange(3.0)]
    np.testing.assert_array_equal(apply(out.maps[1], bias), [12, 1, 10, 11])


def test_report_counts_and_prints():
    report = align([A, B, C], base=0).report
    assert [(m.own, m.substituted, m.zero) for m in report.models] == [
        (3, 2, 0),
        (3, 2, 0),
        (2, 3, 0),
    ]
    lines = report.table()
    assert lines[0].split() == [
        *("model", "tokens", "rows", "kept", "substituted", "zero", "padding", "dropped")
    ]
    assert lines[1].split() == ["a", "3", "3", "3", "2", "0", "0", "0"]
    assert lines[-1] == "output: 5 tokens, 5 rows (tokenizer: union)"
    assert json.loads(json.dumps(report.to_dict()))["models"][2]["base"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": 2}, "base 2 is not one of the 2 models"),
        ({"source": -1}, "source -1"),
        ({"fills": {"nope": Fill()}}, "no such token.*'nope'"),
        ({"fills": {"x": Fill(model=0, index=3)}}, "row 3 of model 0 does not exist"),
        ({"source": VocabIn("empty", {}, 1)}, "empty"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(TokenizerError, match=message):
        align([A, B], **arguments)


@pytest.mark.parametrize("tokens", [{"x": -1}, {"x": 0, "y": 0}])
def test_impossible_vocabularies_are_refused(tokens):
    with pytest.raises(TokenizerError, match="has id"):
        VocabIn("v", tokens, 4)


WORDS = st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=8, unique=True)


MODELS = st.lists(
    st.tuples(WORDS, st.sets(st.integers(0, 7)), st.integers(0, 3)), min_size=1, max_size=4
)


@given(MODELS, st.integers(-1, 3))
def test_union_holds_every_token_once_with_contiguous_ids(drawn, position):
    models = []
    for i, (words, places, spare) in enumerate(drawn):
        tokens = {word: k for k, word in enumerate(words)}
        added = tuple(word for k, word in enumerate(words) if k in places)
        models.append(VocabIn(f"m{i}", tokens, len(words) + spare, added))
    base = None if position < 0 else position % len(models)
    out = align(models, base=base)
    assert set(out.tokens) == set().union(*(m.tokens for m in models))
    assert list(out.tokens.values()) == list(range(len(out.tokens))) == list(range(out.rows))
    lead = models[base or 0]
    assert {t: out.tokens[t] for t in lead.tokens} == lead.tokens
    rows = matrices(*models)
    for i, model in enumerate(models):
        aligned = apply(out.maps[i], rows)
        for token, index in model.tokens.items():
            assert aligned[out.tokens[token]].tolist() == [i, index]
        report = out.report.models[i]
        assert report.own == len(model.tokens)
        assert report.zero == report.dropped == 0
        for run in out.maps[i].runs():
            part = rows[run.model][run.index : run.index + run.stop - run.start]
            np.testing.assert_array_equal(aligned[run.start : run.stop], part)


@given(WORDS, st.integers(1, 3), st.sampled_from(["union", "base", 0]))
def test_equal_vocabularies_leave_every_matrix_alone(words, count, source):
    tokens = {w: i for i, w in enumerate(words)}
    out = align([VocabIn(f"m{i}", tokens, len(words)) for i in range(count)], base=0, source=source)
    assert out.is_identity
    assert out.tokens == tokens
    assert out.warnings == ()
