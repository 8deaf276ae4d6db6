import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pluribus.tokenizer import (
    TokenizerError,
    VocabIn,
    align,
    align_models,
    load_vocab,
    tokenizer_config,
    write_tokenizer,
)
from pluribus.tokenizer.files import check_written

tokenizers = pytest.importorskip("tokenizers")

NAMES = ["base", "chem", "code"]


def reload(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def copy(source, target):
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.fixture(scope="module")
def union(folders, tmp_path_factory):
    vocabs = [load_vocab(folders[n], label=n) for n in NAMES]
    alignment = align(vocabs, base=0)
    out = tmp_path_factory.mktemp("union")
    warnings = write_tokenizer(out, alignment, [folders[n] for n in NAMES])
    return alignment, out, warnings


def test_load_vocab(folders):
    vocab = load_vocab(folders["base"], rows=70)
    assert (vocab.rows, vocab.label) == (70, str(folders["base"]))
    assert vocab.added == ("<s>", "</s>", "<pad>")
    assert list(vocab.tokens.values()) == list(range(len(vocab.tokens)))
    assert load_vocab(folders["base"]).rows == len(vocab.tokens)


def test_token_only_the_configuration_declares_gets_its_id_from_transformers(folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = copy(folders["base"], tmp_path / "m")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"unk_token": "<unk>"}))
    vocab = load_vocab(folder)
    assert vocab.tokens["<unk>"] == len(vocab.tokens) - 1
    assert dict(vocab.tokens) == transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    alignment = align([vocab, load_vocab(folders["chem"])], base=0)
    write_tokenizer(tmp_path / "out", alignment, [folder, folders["chem"]])
    assert reload(tmp_path / "out").token_to_id("<unk>") == vocab.tokens["<unk>"]


def test_union_reads_back_token_by_token(union):
    alignment, out, warnings = union
    tok = reload(out)
    assert tok.get_vocab() == dict(alignment.tokens)
    for token, index in alignment.tokens.items():
        assert tok.token_to_id(token) == index < alignment.rows
        assert tok.id_to_token(index) == token
    assert warnings == []


def test_union_loads_in_transformers_with_the_same_ids(union):
    transformers = pytest.importorskip("transformers")
    alignment, out, _ = union
    tok = transformers.AutoTokenizer.from_pretrained(out)
    assert tok.get_vocab() == dict(alignment.tokens)
    assert (tok.bos_token, tok.pad_token) == ("<s>", "<pad>")
    assert tok("<|im_start|>the low").input_ids[0] == alignment.tokens["<|im_start|>"]


@pytest.mark.parametrize("text", ["the river", "lower", " low road", "<s>the low</s>", "slow<pad>"])
def test_union_encodes_base_text_as_the_base_does(union, folders, text):
    _, out, _ = union
    assert reload(out).encode(text).ids == reload(folders["base"]).encode(text).ids


@settings(max_examples=200)
@given(st.text("thelowrivadsnu ", max_size=30))  # letters the base knows
def test_union_only_joins_tokens_of_the_base(folders, union, text):
    _, out, _ = union
    base, joined = reload(folders["base"]), reload(out)
    cuts = {span[0] for span in base.encode(text).offsets}
    assert {span[0] for span in joined.encode(text).offsets} <= cuts
    assert joined.decode(joined.encode(text).ids) == text


def test_union_reaches_the_other_models_tokens(union):
    _, out, _ = union
    tok = reload(out)
    assert "Ġpolymer" in tok.encode("the polymer").tokens
    assert "<tool>" in tok.encode("a<tool>a").tokens


def test_union_with_an_extension_of_the_base_is_the_extension(folders, union, tmp_path):
    """What a model with a grown vocabulary encodes, the union encodes alike."""
    alignment, grown, _ = union
    vocabs = [load_vocab(folders["base"]), load_vocab(grown)]
    both = align(vocabs, base=0)
    write_tokenizer(tmp_path, both, [folders["base"], grown])
    text = "the polymer returns <|im_end|> slowly to the lowest index"
    assert reload(tmp_path).encode(text).tokens == reload(grown).encode(text).tokens
    assert set(both.tokens) == set(alignment.tokens)


@pytest.mark.parametrize(("source", "name"), [("base", "base"), (1, "chem")])
def test_one_models_tokenizer_is_copied_byte_by_byte(folders, tmp_path, source, name):
    extra = copy(folders["chem"], tmp_path / "chem")
    (extra / "chat_template.jinja").write_text("{{ x }}")
    (extra / "config.json").write_text("{}")
    paths = [folders["base"], extra]
    alignment = align([load_vocab(p) for p in paths], base=0, source=source)
    write_tokenizer(tmp_path / "out", alignment, paths)
    source_folder = folders["base"] if name == "base" else extra
    copied = {p.name for p in source_folder.iterdir()} - {"config.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == copied
    for file in copied:
        assert (tmp_path / "out" / file).read_bytes() == (source_folder / file).read_bytes()


def test_equal_vocabularies_copy(folders, tmp_path):
    vocab = load_vocab(folders["base"])
    write_tokenizer(tmp_path, align([vocab, vocab], base=0), [folders["base"]] * 2)
    assert (tmp_path / "tokenizer.json").read_bytes() == (
        folders["base"] / "tokenizer.json"
    ).read_bytes()


def test_tokens_of_the_recipe_become_added_tokens(folders, tmp_path):
    config = tokenizer_config({"source": "base", "tokens": {"<new>": {}, "low": {}}})
    vocab = load_vocab(folders["base"])
    alignment = align_models(config, [vocab], base=0)
    write_tokenizer(tmp_path, alignment, [folders["base"]])
    tok = reload(tmp_path)
    assert tok.token_to_id("<new>") == len(vocab.tokens) == alignment.tokens["<new>"]
    assert tok.encode("a<new>a").tokens == ["a", "<new>", "a"]


def test_tokens_beyond_the_matrix_are_taken_out(folders, tmp_path):
    whole = load_vocab(folders["base"])
    vocab = load_vocab(folders["base"], label="base", rows=len(whole.tokens) - 3)
    alignment = align([vocab], base=0, source="base")
    warnings = write_tokenizer(tmp_path, alignment, [folders["base"]])
    assert "<pad>" in warnings[0]
    assert load_vocab(tmp_path).tokens == alignment.tokens
    assert len(alignment.tokens) == len(whole.tokens) - 3
    assert "pad_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert reload(tmp_path).decode(reload(tmp_path).encode("the lowest").ids) == "the lowest"


def test_another_way_of_splitting_is_a_warning(folders, tmp_path):
    other = copy(folders["chem"], tmp_path / "other")
    spec = json.loads((other / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["add_prefix_space"] = True
    (other / "tokenizer.json").write_text(json.dumps(spec))
    paths = [folders["base"], other]
    alignment = align([load_vocab(p) for p in paths], base=0)
    warnings = write_tokenizer(tmp_path / "out", alignment, paths)
    assert any("splits text in another way" in text for text in warnings)
    text, base = "a slow land and an inn", reload(folders["base"])  # chem has "Ġand"
    assert reload(tmp_path / "out").encode(text).tokens == base.encode(text).tokens


def test_disputed_added_tokens_are_a_warning(folders, tmp_path):
    other = copy(folders["chem"], tmp_path / "other")
    spec = json.loads((other / "tokenizer.json").read_text())
    spec["added_tokens"][0]["lstrip"] = True
    (other / "tokenizer.json").write_text(json.dumps(spec))
    paths = [folders["base"], other]
    alignment = align([load_vocab(p) for p in paths], base=0)
    warnings = write_tokenizer(tmp_path / "out", alignment, paths)
    assert warnings == ["added tokens with different settings, using the first: '<s>'"]


def test_side_files_follow_the_new_vocabulary(folders, tmp_path):
    base = copy(folders["base"], tmp_path / "base")
    values = json.loads((base / "tokenizer_config.json").read_text())
    entry = {"content": "<s>", "special": True, "normalized": False}
    values["added_tokens_decoder"] = {"0": entry}
    (base / "tokenizer_config.json").write_text(json.dumps(values))
    (base / "added_tokens.json").write_text(json.dumps({"<pad>": 60}))
    (base / "vocab.json").write_text("{}")
    paths = [base, folders["chem"]]
    alignment = align([load_vocab(p) for p in paths], base=0)
    write_tokenizer(tmp_path / "out", alignment, paths)
    added = json.loads((tmp_path / "out" / "added_tokens.json").read_text())
    decoder = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())[
        "added_tokens_decoder"
    ]
    assert {int(i): e["content"] for i, e in decoder.items()} == {i: t for t, i in added.items()}
    assert added["<|im_end|>"] == alignment.tokens["<|im_end|>"]
    assert not (tmp_path / "out" / "vocab.json").exists()  # it would contradict tokenizer.json


def test_merges_written_as_text_stay_text(folders, tmp_path):
    base = copy(folders["base"], tmp_path / "base")
    spec = json.loads((base / "tokenizer.json").read_text())
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    (base / "tokenizer.json").write_text(json.dumps(spec))
    paths = [base, folders["chem"]]
    alignment = align([load_vocab(p) for p in paths], base=0)
    write_tokenizer(tmp_path / "out", alignment, paths)
    merges = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["merges"]
    assert all(isinstance(merge, str) for merge in merges)
    assert len(merges) > len(spec["model"]["merges"])


def other_kind(folder, kind, words):
    models = tokenizers.models
    if kind == "WordPiece":
        model = models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    elif kind == "WordLevel":
        model = models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    else:
        model = models.Unigram([(w, -float(i)) for i, w in enumerate(words)], unk_id=0)
    tok = tokenizers.Tokenizer(model)
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tok.add_special_tokens(["[UNK]"])
    folder.mkdir()
    tok.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kind", ["WordPiece", "WordLevel", "Unigram"])
def test_union_of_other_kinds(kind, tmp_path):
    one = other_kind(tmp_path / "one", kind, ["[UNK]", "river", "road"])
    two = other_kind(tmp_path / "two", kind, ["[UNK]", "road", "stone", "wood"])
    alignment = align([load_vocab(one), load_vocab(two)], base=0)
    warnings = write_tokenizer(tmp_path / "out", alignment, [one, two])
    assert reload(tmp_path / "out").encode("road stone river").ids == [2, 3, 1]
    assert bool(warnings) == (kind != "WordLevel")


@pytest.mark.parametrize("kind", ["WordPiece", "WordLevel", "Unigram"])
def test_other_kinds_lose_tokens_beyond_the_matrix(kind, tmp_path):
    one = other_kind(tmp_path / "one", kind, ["[UNK]", "river", "road"])
    alignment = align([load_vocab(one, rows=2)], base=0, source="base")
    write_tokenizer(tmp_path / "out", alignment, [one])
    assert load_vocab(tmp_path / "out").tokens == {"[UNK]": 0, "river": 1}


def test_folder_without_a_tokenizer_says_what_was_looked_for(tmp_path):
    with pytest.raises(TokenizerError, match=r"has no tokenizer: looked for tokenizer\.json, .*"):
        load_vocab(tmp_path)
    with pytest.raises(TokenizerError, match="is not a folder"):
        load_vocab(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{", "{}", '{"model": 3}'])
def test_broken_tokenizer_file(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        load_vocab(tmp_path)


def test_written_tokenizer_that_disagrees_is_an_error(folders):
    vocab = load_vocab(folders["base"])
    moved = {t: i + 1 for t, i in vocab.tokens.items()}
    with pytest.raises(TokenizerError, match=r"does not read back as planned.*has id 0, not 1"):
        check_written(folders["base"], align([VocabIn("m", moved, len(moved) + 1)], base=0))


def test_donor_outside_the_merge(folders, tmp_path):
    donor = load_vocab(folders["chem"], label="chem")
    alignment = align([load_vocab(folders["base"])], base=0, source=donor)
    with pytest.raises(TokenizerError, match="its folder is missing"):
        write_tokenizer(tmp_path, alignment, [folders["base"]])
    write_tokenizer(tmp_path, alignment, [folders["base"]], donor=folders["chem"])
    assert load_vocab(tmp_path).tokens == donor.tokens


def test_folder_without_tokenizer_json_is_read_by_transformers(folders, tmp_path):
    pytest.importorskip("transformers")
    old = tmp_path / "old"
    old.mkdir()
    reload(folders["base"]).model.save(str(old))  # vocab.json and merges.txt
    (old / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "unk_token": "<s>", "bos_token": "<s>"})
    )
    vocab = load_vocab(old)
    inside = load_vocab(folders["base"]).tokens
    assert {t: vocab.tokens[t] for t in inside if t != "<pad>"} == {
        t: i for t, i in inside.items() if t != "<pad>"
    }
    write_tokenizer(tmp_path / "copy", align([vocab], source="base"), [old])
    names = {"vocab.json", "merges.txt", "tokenizer_config.json"}
    assert {p.name for p in (tmp_path / "copy").iterdir()} == names
    both = align([vocab, load_vocab(folders["chem"])], base=0)
    write_tokenizer(tmp_path / "both", both, [old, folders["chem"]])
    assert reload(tmp_path / "both").get_vocab() == dict(both.tokens)
