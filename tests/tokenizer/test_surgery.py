"""Matching, fitting and whole transplants, by hand and against slow obvious versions."""

import json

import numpy as np
import pytest
import torch

from pluribus.core.errors import InputError, MismatchError, NonFiniteError, OutputError
from pluribus.core.weights import Weights
from pluribus.engine.driver import Options
from pluribus.surgery import settings, transplant
from pluribus.tokenizer import TokenizerError, VocabIn, load_vocab
from pluribus.tokenizer.surgery import Surgery, from_pieces, rows_for
from pluribus.tokenizer.surgery_config import moved
from pluribus.tokenizer.surgery_fit import nearest, pursue
from pluribus.tokenizer.surgery_match import Lexicon, Made, match, pieces_of

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def tensor(values):
    return torch.tensor(values, dtype=torch.float32)


# -- fitting ---------------------------------------------------------------------------------------


def greedy(target, points, k):
    """Orthogonal matching pursuit, one target, each fit from scratch."""
    chosen, left = [], target
    for _ in range(k):
        scores = np.abs(points @ left)
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        share = np.linalg.lstsq(points[chosen].T, target, rcond=None)[0]
        left = target - points[chosen].T @ share
    return chosen, share


def test_pursuit_by_hand():
    points = tensor([[1, 0, 0], [0, 2, 0], [0, 0, 1], [1, 1, 0]])
    # (3, 4, 1): products 3, 8, 1, 7 -> point 1; left (3, 0, 1): 3, -, 1, 3 -> the first, 0; then 2.
    mix = pursue(tensor([[3, 4, 1]]), points, 3)
    assert mix.index.tolist() == [[1, 0, 2]]
    np.testing.assert_allclose(mix.share, [[2, 3, 1]], atol=1e-6)
    np.testing.assert_allclose(mix.of(points), [[3, 4, 1]], atol=1e-6)


def test_pursuit_is_the_greedy_fit():
    targets, points = draw(1, 30, 20), draw(2, 50, 20)
    mix = pursue(torch.from_numpy(targets), torch.from_numpy(points), 7)
    for row, target in enumerate(targets.astype(np.float64)):
        chosen, share = greedy(target, points.astype(np.float64), 7)
        assert mix.index[row].tolist() == chosen
        np.testing.assert_allclose(mix.share[row], share, atol=1e-4)


def test_pursuit_stops_where_nothing_is_left_to_explain():
    points = tensor([[1, 0, 0], [2, 0, 0], [1, 0, 0], [0, 1, 0]])
    targets = tensor([[4, 0, 0], [4, 0, 5], [0, 0, 0], [4, 3, 9]])
    mix = pursue(targets, points, 4)
    np.testing.assert_allclose(
        mix.of(points), [[4, 0, 0], [4, 0, 0], [0, 0, 0], [4, 3, 0]], atol=1e-6
    )
    assert (mix.share != 0).sum(1).tolist() == [1, 1, 0, 2]


def test_pursuit_of_more_points_than_dimensions_is_exact_and_tame():
    targets, points = torch.from_numpy(draw(3, 40, 8)), torch.from_numpy(draw(4, 100, 8))
    mix = pursue(targets, points, 64)
    assert ((mix.share != 0).sum(1) <= 8).all()
    np.testing.assert_allclose(mix.of(points), targets, atol=1e-4)


def test_neighbours_by_hand():
    points = tensor([[0, 0], [3, 0], [10, 0]])
    mix = nearest(tensor([[1, 0]]), points, 2, "distance_proportional")
    assert mix.index.tolist() == [[0, 1]]
    np.testing.assert_allclose(mix.share, [[2 / 3, 1 / 3]], atol=1e-6)
    # By direction: (1, 1) has cosines sqrt(1/2), 1 and -1 with these.
    points = tensor([[2, 0], [5, 5], [-1, -1]])
    mix = nearest(tensor([[1, 1]]), points, 2, "distance_proportional", cosine=True)
    assert mix.index.tolist() == [[1, 0]]
    root = 0.5**0.5
    np.testing.assert_allclose(mix.share, [[1 / (1 + root), root / (1 + root)]], atol=1e-6)


def test_neighbour_distances_do_not_cancel():
    """Points far from the origin and near each other; expanded squares in float32 lose them."""
    points = tensor([[1000, 0.00], [1000, 0.03], [1000, 0.10]])
    mix = nearest(tensor([[1000, 0.02]]), points, 3, "distance_proportional")
    inverse = {0: 1 / 0.02, 1: 1 / 0.01, 2: 1 / 0.08}
    wanted = [inverse[i] / sum(inverse.values()) for i in mix.index[0].tolist()]
    np.testing.assert_allclose(mix.share[0], wanted, rtol=1e-3)


def test_barycentric_shares_sum_to_one():
    corners = tensor([[0, 0], [4, 0], [0, 4]])
    mix = nearest(tensor([[1, 2]]), corners, 3, "barycentric")
    found = dict(zip(mix.index[0].tolist(), mix.share[0].tolist(), strict=True))
    np.testing.assert_allclose([found[0], found[1], found[2]], [1 / 4, 1 / 4, 1 / 2], atol=1e-6)
    # Outside the plane's line through two points: the foot of the perpendicular.
    mix = nearest(tensor([[1, 3]]), tensor([[0, 0], [2, 0]]), 2, "barycentric")
    np.testing.assert_allclose(mix.share, [[0.5, 0.5]], atol=1e-6)


@pytest.mark.parametrize("k", [4, 9])  # fewer points than dimensions, and more
def test_least_squares_is_the_least(k):
    targets, points = draw(5, 6, 5), draw(6, 20, 5)
    mix = nearest(torch.from_numpy(targets), torch.from_numpy(points), k, "least_squares")
    for row, target in enumerate(targets):
        near = points[mix.index[row]]
        distances = np.linalg.norm(points - target, axis=1)
        assert set(mix.index[row].tolist()) == set(np.argsort(distances)[:k].tolist())
        np.testing.assert_allclose(
            mix.share[row], np.linalg.lstsq(near.T, target, rcond=None)[0], atol=1e-5
        )


@pytest.mark.parametrize(
    ("how", "head", "wanted"),
    [
        ("mean", False, [3, 3]),
        ("sum", True, [9, 9]),
        ("weighted_mean", False, [(3 * 1 + 2 * 2 + 6) / 6, (3 * 0 + 2 * 4 + 5) / 6]),
        ("weighted_mean", True, [(1 * 1 + 2 * 2 + 18) / 6, (1 * 0 + 2 * 4 + 15) / 6]),
        ("first_last", False, [6, 5]),
        ("first_last", True, [1, 0]),
    ],
)
def test_pieces_by_hand(how, head, wanted):
    pieces = np.array([[1, 0], [2, 4], [6, 5]], np.float32)
    np.testing.assert_allclose(from_pieces(pieces, how, head), wanted, rtol=1e-6)
    np.testing.assert_array_equal(from_pieces(pieces[:0], how, head), [0, 0])


# -- matching --------------------------------------------------------------------------------------


def lexicon(tokens, mark="Ġ", rows=None, added=(), **roles):
    ids = tokens if isinstance(tokens, dict) else {t: i for i, t in enumerate(tokens)}
    vocab = VocabIn("m", ids, rows or max(ids.values()) + 1, tuple(added))
    return Lexicon(vocab, {token: role for role, token in roles.items()}, mark)


def test_tokens_match_by_meaning():
    model = lexicon(["<s>", "▁the", "the", "▁", "x", "<tool>"], "▁", bos="<s>", eos="<tool>")
    donor = lexicon(["Ġthe", "<|begin|>", "the", "Ġ", "y", "<tool>", "▁"], bos="<|begin|>")
    found = match(model, donor)
    E, N = Made.EXACT, Made.NEW
    assert found.made.tolist() == [E, E, E, E, N, E, N]
    # <tool> is the model's end of text and only a string to the donor; "▁" is no mark there, but
    # the model has it as a string.
    assert found.row.tolist()[:6] == [1, 0, 2, 3, -1, 5]


def test_tokens_match_by_text_whatever_the_spelling():
    pieces = lexicon(["é", "▁▁", "▁été", "\n", "Ã", "▁a▁b", "<x▁y>"], "▁", added=["<x▁y>"])
    levels = lexicon(["Ã©", "ĠĠ", "ĠÃ©tÃ©", "Ċ", "Ã", "ĠaĠb", "<xĠy>", "é"], added=["<xĠy>"])
    assert match(pieces, levels).row.tolist() == [0, 1, 2, 3, -1, 5, -1, -1]
    assert match(levels, pieces).row.tolist() == [0, 1, 2, 3, -1, 5, -1]
    assert match(levels, levels).row.tolist() == list(range(8))
    words = lexicon(["é", "##a"], "")
    assert match(words, pieces).row.tolist()[:2] == [0, -1]


def test_gaps_padding_and_tokens_without_a_row():
    model = lexicon(["a", "b", "c"], rows=2)  # c has no row
    donor = lexicon({"b": 0, "c": 2, "d": 5, "a": 6}, rows=4)  # d and a have none
    found = match(model, donor, pad_to_multiple_of=4)
    made = [Made.EXACT, Made.NONE, Made.NEW, Made.NONE, Made.NONE, Made.NONE, Made.EXACT, Made.NONE]
    assert found.made.tolist() == made
    assert found.row.tolist() == [1, -1, -1, -1, -1, -1, 0, -1]
    own = np.array([[1, 1], [3, 5]], np.float32)
    rows, report = rows_for("e", own, draw(0, 4, 3), found, Surgery(method="mean"))
    np.testing.assert_array_equal(rows[[0, 6, 2]], [[3, 5], [1, 1], [2, 3]])
    np.testing.assert_array_equal(rows[[1, 3, 4, 5, 7]], [[2, 3]] * 5)
    assert (report.copied, report.approximated, report.without_token) == (2, 1, 5)


def test_bytes_and_prefixes_only_on_request():
    model = lexicon(["<0x0A>", "<0xC3>", "▁lo", "lo", "l"], "▁")
    donor = lexicon(["Ċ", "Ã", "Ġlower", "lower", "lost", "Ġ!"])
    assert match(model, donor).made.tolist() == [Made.NEW] * 6
    found = match(model, donor, byte=True, prefix=True)
    assert found.row.tolist() == [0, 1, 2, 3, 3, -1]
    assert found.count(Made.BYTE) == 2
    assert found.count(Made.PREFIX) == 3
    back = match(donor, model, byte=True)
    assert back.row.tolist() == [0, 1, -1, -1, -1]


def test_special_tokens_have_no_prefix():
    model = lexicon(["<", "<s"])
    found = match(model, lexicon(["<s>", "<sx"], bos="<s>"), prefix=True)
    assert found.row.tolist() == [-1, 1]


def test_pieces_of_tokens():
    """Text goes through the model's tokenizer, a part of a character byte by byte."""
    model = lexicon(["<0xC3>", "<0xA9>", "▁", "x", "y"], "▁", rows=4)
    donor = lexicon(["ĠxĠ", "Ã", "Ã©x", "Ãx", "©Ã"])
    encoded = {" x ": [2, 3, 2], "éx": [3, 4]}
    found = [pieces_of(model, donor, encoded.__getitem__)(t) for t in donor.vocab.tokens]
    assert found == [[2, 3, 2], [0], [3], [0, 3], [1, 0]]


def test_text_of_tokens():
    donor = lexicon(["Ġthe", "Ã©t", "ĠĠĊ", "Ã", "<s>"], bos="<s>")
    texts = [donor.text(token) for token in donor.vocab.tokens]
    assert texts == [" the", "ét", "  \n", "Ã", "<s>"]
    assert lexicon(["▁the▁ét"], "▁").text("▁the▁ét") == " the ét"


# -- rows ------------------------------------------------------------------------------------------


def test_a_linear_map_between_the_spaces_is_recovered():
    """If W = D M, combinations found over D are right for W."""
    names = [chr(97 + i) for i in range(20)]
    model, donor = lexicon(names[:14]), lexicon(names)
    theirs = draw(1, 20, 6)
    own = theirs[:14] @ draw(2, 6, 9)
    wanted = theirs @ draw(2, 6, 9)
    seen = []
    rows, report = rows_for(
        "e",
        own,
        theirs,
        match(model, donor),
        Surgery(k=6),
        on_rows=lambda *told: seen.append(told),
    )
    np.testing.assert_array_equal(rows[:14], own)
    np.testing.assert_allclose(rows, wanted, atol=1e-4)
    assert report.worst_error < 1e-5
    assert seen[-1] == (6, 6)


def test_errors_are_relative_and_name_the_token():
    model, donor = lexicon(["a", "b"]), lexicon(["a", "b", "c", "d"])
    theirs = np.array([[1, 0, 0], [0, 1, 0], [3, 0, 4], [2, 5, 0]], np.float32)
    _, report = rows_for("e", draw(0, 2, 5), theirs, match(model, donor), Surgery())
    assert report.worst_token == "c"
    assert report.worst_error == pytest.approx(4 / 5)
    assert report.mean_error == pytest.approx(2 / 5)


def test_batches_change_nothing(monkeypatch):
    names = [chr(97 + i) for i in range(26)]
    args = ("e", draw(0, 12, 9), draw(1, 26, 8))
    model, donor = lexicon(names[:12]), lexicon(names)
    whole, _ = rows_for(*args, match(model, donor), Surgery(k=3))
    monkeypatch.setattr("pluribus.tokenizer.surgery.BATCH_BYTES", 1)
    single, _ = rows_for(*args, match(model, donor), Surgery(k=3))
    np.testing.assert_allclose(single, whole, atol=1e-5)


def test_no_common_token():
    model, donor = lexicon(["a"]), lexicon(["b"])
    args = ("e", draw(0, 1, 2), draw(1, 1, 2), match(model, donor))
    with pytest.raises(TokenizerError, match="no token in common"):
        rows_for(*args, Surgery())
    np.testing.assert_array_equal(rows_for(*args, Surgery(method="zero"))[0], [[0, 0]])


# -- configuration ---------------------------------------------------------------------------------


def test_token_ids_are_the_donors_or_follow_their_token():
    config = {
        "vocab_size": 10,
        "bos_token_id": 1,
        "sep_token_id": 3,
        "image_token_id": 4,
        "eos_token_id": [2, 5],
        "suppress_tokens": [7],
        "text_config": {"vocab_size": 10, "pad_token_id": 0},
        "audio_config": {"vocab_size": 99},
    }
    donor = {"bos_token_id": None, "eos_token_id": 8, "mask_token_id": 6, "padding_side": "left"}
    out, notes = moved(config, donor, 20, 10, {0: 11, 3: 13}.get)
    assert out == {
        "vocab_size": 20,
        "bos_token_id": None,
        "sep_token_id": 13,
        "image_token_id": None,
        "eos_token_id": 8,
        "mask_token_id": 6,
        "padding_side": "left",
        "text_config": {"vocab_size": 20, "pad_token_id": 11},
        "audio_config": {"vocab_size": 99},
    }
    assert notes == [
        "the donor has no token for image_token_id: set to null",
        "suppress_tokens named tokens of the old vocabulary: taken out",
    ]
    assert config["vocab_size"] == 10


# -- whole models ----------------------------------------------------------------------------------


@pytest.fixture
def models(folders, tmp_path):
    """A maker of model folders: `make(name, tokenizer, width, **more)`."""

    def make(name, source, width, *, tied=False, more=0, dtype=np.float32, seed=0, **tensors):
        folder = tmp_path / name
        folder.mkdir()
        for path in folders[source].iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        rows = len(load_vocab(folder).tokens) + more
        config = {"vocab_size": rows, "tie_word_embeddings": tied, "bos_token_id": 0}
        config |= {"eos_token_id": 1, "name": name}
        (folder / "config.json").write_text(json.dumps(config))
        values = {EMBED: draw(seed, rows, width), NORM: draw(9, width)}
        if not tied:
            values[HEAD] = draw(seed + 1, rows, width)
        values |= {key: make_one(rows) for key, make_one in tensors.items()}
        Weights.of({k: v.astype(dtype) for k, v in values.items()}).save(
            folder / "model.safetensors"
        )
        return folder

    return make


def values(folder, name):
    source = Weights.open(folder).source(name)
    return source.floats().reshape(source.spec.shape)


def test_a_model_gets_the_donors_tokenizer(models, tmp_path):
    model, donor = models("m", "base", 8, more=5), models("d", "chem", 12, seed=4)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "top_k": 5}))
    (model / "README.md").write_text("mine")
    (donor / "chat_template.jinja").write_text("theirs")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    result, report = transplant(model, donor, tmp_path / "out", k=4)
    out, old, new = tmp_path / "out", load_vocab(model).tokens, load_vocab(donor).tokens
    assert load_vocab(out).tokens == new
    assert report.rows == result.weights.spec[EMBED].shape[0] == len(new)
    common = [token for token in new if token in old]
    assert 10 < len(common) < len(new)
    for name in (EMBED, HEAD):
        here, there = values(out, name), values(model, name)
        for token in common:
            np.testing.assert_array_equal(here[new[token]], there[old[token]])
    np.testing.assert_array_equal(values(out, NORM), values(model, NORM))
    # One approximated row of each matrix, by the slow version.
    token = next(t for t in new if t not in old and t.isalpha())
    for name in (EMBED, HEAD):
        theirs = values(donor, name).astype(np.float64)
        points = theirs[[new[t] for t in common]]
        chosen, share = greedy(theirs[new[token]], points, 4)
        wanted = share @ values(model, name)[[old[common[i]] for i in chosen]]
        np.testing.assert_allclose(values(out, name)[new[token]], wanted, atol=1e-4)
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["name"]) == (len(new), "m")
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 1, "top_k": 5, "bos_token_id": 0}
    assert (out / "README.md").read_text() == "mine"
    assert (out / "chat_template.jinja").read_text() == "theirs"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (donor / name).read_bytes()
    assert before == {path.name: path.read_bytes() for path in model.iterdir()}


def test_a_model_as_its_own_donor_is_unchanged(models, tmp_path):
    model = models("m", "code", 8, dtype=np.float16)
    _, report = transplant(model, model, tmp_path / "out")
    for name in (EMBED, HEAD, NORM):
        np.testing.assert_array_equal(values(tmp_path / "out", name), values(model, name))
    assert report.matrices[0].approximated == 0
    assert report.matrices[0].worst_error is None
    config = (json.loads((f / "config.json").read_text()) for f in (model, tmp_path / "out"))
    assert next(config) == next(config)


def test_tied_models_stay_tied(models, tmp_path):
    model, donor = models("m", "base", 8, tied=True), models("d", "chem", 8, seed=3)
    result, report = transplant(model, donor, tmp_path / "out")
    assert list(result.weights.spec) == [EMBED, NORM]
    assert [one.name for one in report.matrices] == [EMBED]


def test_a_tied_head_that_is_stored_apart_follows_the_embedding(models, tmp_path):
    model = models("m", "base", 8, tied=True, **{HEAD: lambda rows: draw(0, rows, 8)})
    result, report = transplant(model, models("d", "chem", 8, seed=3), tmp_path / "out")
    np.testing.assert_array_equal(result.weights[HEAD], result.weights[EMBED])
    assert len(report.matrices) == 1


def test_an_untied_model_takes_a_tied_donors_embedding_for_its_head(models, tmp_path):
    model, donor = models("m", "base", 8), models("d", "chem", 8, tied=True, seed=3)
    transplant(model, donor, tmp_path / "out", k=3)
    old, new = load_vocab(model).tokens, load_vocab(donor).tokens
    common = [token for token in new if token in old]
    token = next(t for t in new if t not in old)
    theirs = values(donor, EMBED).astype(np.float64)
    chosen, share = greedy(theirs[new[token]], theirs[[new[t] for t in common]], 3)
    wanted = share @ values(model, HEAD)[[old[common[i]] for i in chosen]]
    np.testing.assert_allclose(values(tmp_path / "out", HEAD)[new[token]], wanted, atol=1e-4)


def test_a_bias_is_combined_like_its_head(models, tmp_path):
    """With h = (1, 0, ...), a head whose first column equals the bias keeps that so."""
    bias = {"lm_head.bias": lambda rows: draw(1, rows, 8)[:, 0]}  # HEAD is drawn from seed 1
    model, donor = models("m", "base", 8, **bias), models("d", "chem", 8, seed=5)
    result, _ = transplant(model, donor, tmp_path / "out", k=5)
    head, found = values(tmp_path / "out", HEAD), values(tmp_path / "out", "lm_head.bias")
    assert found.shape == head.shape[:1]
    np.testing.assert_allclose(found, head[:, 0], atol=1e-5)
    assert set(result.weights.spec) == {EMBED, HEAD, NORM, "lm_head.bias"}


def test_subword_rows_come_from_the_models_own_pieces(models, tmp_path):
    import tokenizers

    model, donor = models("m", "base", 8), models("d", "chem", 8)
    transplant(model, donor, tmp_path / "out", method="subword")
    old, new = load_vocab(model).tokens, load_vocab(donor).tokens
    token = next(t for t in new if t.startswith("Ġ") and t not in old)
    tok = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    pieces = tok.encode(" " + token[1:], add_special_tokens=False).ids
    assert len(pieces) > 1
    np.testing.assert_allclose(
        values(tmp_path / "out", EMBED)[new[token]], values(model, EMBED)[pieces].mean(0), atol=1e-6
    )


def test_rows_are_padded(models, tmp_path):
    model, donor = models("m", "base", 8), models("d", "chem", 8)
    _, report = transplant(model, donor, tmp_path / "out", pad_to_multiple_of=48, method="zero")
    rows = values(tmp_path / "out", EMBED)
    tokens = len(load_vocab(donor).tokens)
    assert report.rows == len(rows) == 96
    mean = np.broadcast_to(rows[:tokens].mean(0), (96 - tokens, 8))
    np.testing.assert_allclose(rows[tokens:], mean, atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 96


def test_the_same_command_again_finds_it_complete(models, tmp_path):
    model, donor = models("m", "base", 8), models("d", "chem", 8)
    first, _ = transplant(model, donor, tmp_path / "out")
    assert not first.resumed
    again, report = transplant(model, donor, tmp_path / "out")
    assert again.resumed
    assert again.bytes_written == 0
    assert report.matrices[0].worst_error is not None
    with pytest.raises(OutputError, match="exists already"):
        transplant(model, donor, tmp_path / "out", k=3)
    replaced, _ = transplant(model, donor, tmp_path / "out", k=3, options=Options(overwrite=True))
    assert replaced.bytes_written > 0


def test_what_cannot_be_done_is_refused_before_anything_is_written(models, tmp_path):
    model, donor = models("m", "base", 8), models("d", "chem", 8)
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"no setting 'kk'.* Did you mean 'k'"):
        transplant(model, donor, out, kk=3)
    with pytest.raises(InputError, match="method = 'ompp'"):
        transplant(model, donor, out, method="ompp")
    with pytest.raises(InputError, match="k = 0"):
        settings(k=0)
    with pytest.raises(OutputError, match="name a folder"):
        transplant(model, donor, tmp_path / "out.safetensors")
    with pytest.raises(OutputError, match="would be replaced"):
        transplant(model, donor, donor)
    with pytest.raises(InputError, match="not a model folder"):
        transplant(model / "model.safetensors", donor, out)
    with pytest.raises(InputError, match="device"):
        transplant(model, donor, out, device="abacus")
    (donor / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        transplant(model, donor, out)
    broken = models("n", "base", 8)
    rows = values(broken, EMBED)
    rows[3, 2] = np.nan
    tensors = {name: values(broken, name) for name in (HEAD, NORM)}
    Weights.of({EMBED: rows, **tensors}).save(broken / "model.safetensors")
    with pytest.raises(NonFiniteError, match=EMBED):
        transplant(broken, models("e", "chem", 8), out)
    whole = models("w", "base", 8)
    Weights.of({EMBED: np.ones((67, 8), np.int8)}).save(whole / "model.safetensors")
    with pytest.raises(MismatchError, match="floating-point"):
        transplant(whole, models("f", "chem", 8), out)
    assert not out.exists()


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_and_runs_the_output(models, tmp_path, tied):
    """Logits of common tokens are those of the model, on the same words in new ids."""
    transformers = pytest.importorskip("transformers")
    model, donor = models("m", "base", 16), models("d", "chem", 8, seed=4)
    config = transformers.LlamaConfig(
        vocab_size=len(load_vocab(model).tokens),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    before = transformers.LlamaForCausalLM(config).eval()
    before.save_pretrained(model)
    transplant(model, donor, tmp_path / "out", pad_to_multiple_of=16, k=4)
    after, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(told.values())
    head, embedding = after.lm_head.weight, after.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) == tied
    old, new = load_vocab(model).tokens, load_vocab(donor).tokens
    common = [token for token in new if token in old]
    here, there = [torch.tensor([ids[t] for t in common]) for ids in (old, new)]
    with torch.no_grad():
        wanted = before(here[None]).logits[0][:, here]
        found = after.eval()(there[None]).logits[0][:, there]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == new
