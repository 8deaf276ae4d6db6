"""Text sets: reading, refusing, digests, and the conversion of every public source."""

import gzip
import json

import pytest

from pluribus.core.errors import FormatError
from pluribus.tasks import sets, sources, texts
from pluribus.tasks.sets import DataError
from pluribus.tasks.texts import TextRow

PAIRS = [
    {"a": "one", "b": "two", "label": "same", "split": "train"},
    {"a": "three", "b": "four", "label": "other", "split": "train"},
    {"a": "five", "b": "six", "label": "same", "split": "test"},
]


def test_reads_pairs_and_orders_classes(own_folders):
    data, _ = own_folders
    texts.write(data / "text" / "pairs.jsonl.gz", PAIRS)
    found = sets.texts("pairs")
    assert found.classes == ("other", "same")
    assert found.train == [TextRow("one", "two", 1), TextRow("three", "four", 0)]
    assert found.dev == []
    assert found.test == [TextRow("five", "six", 1)]


def test_missing_set_says_where_it_looked(own_folders):
    data, _ = own_folders
    texts.write(data / "text" / "pairs.jsonl.gz", PAIRS)
    with pytest.raises(DataError) as caught:
        sets.texts("pears")
    told = str(caught.value)
    assert f"looked for text/pears.jsonl.gz and pears.jsonl.gz in {data} and" in told
    assert "Did you mean 'pairs'?" in told


@pytest.mark.parametrize("name", ["../pairs", "text/../../pairs", "/pairs"])
def test_a_name_is_not_a_path(own_folders, name):
    data, _ = own_folders
    texts.write(data.parent / "pairs.jsonl.gz", PAIRS)
    texts.write(data / "text" / "other.jsonl.gz", PAIRS)
    with pytest.raises(DataError):
        sets.texts(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"plain", "not a readable"),
        (gzip.compress(b"x" * 1000)[:-9], "not a readable"),
        (gzip.compress(b"\xff\n"), "not a readable"),
        (gzip.compress(b"{\n"), "line 1: not JSON"),
        (gzip.compress(b'{"split": "train"}\n[]\n'), "line 2: expected an object with a split"),
        (gzip.compress(b'{"text": "a", "label": "b"}\n'), "line 1: expected an object"),
        (gzip.compress(b""), "holds no rows"),
        (gzip.compress(b'{"text": "a", "label": 1, "split": "train"}\n'), "label is 1"),
        (gzip.compress(b'{"a": "a", "label": "x", "split": "train"}\n'), "a row's b is None"),
        (gzip.compress(b'{"text": "a", "label": "x", "split": "train"}\n'), "no rows with split"),
    ],
)
def test_refuses_a_malformed_set(own_folders, content, message):
    data, _ = own_folders
    (data / "text").mkdir(parents=True)
    (data / "text" / "bad.jsonl.gz").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        sets.texts("bad")


def test_digest_is_of_what_tasks_use_in_any_order():
    assert texts.digest(PAIRS) == texts.digest(PAIRS[::-1])
    assert texts.digest(PAIRS) == texts.digest([{**row, "score": 1.5} for row in PAIRS])
    assert texts.digest(PAIRS) != texts.digest(PAIRS[:2])
    changed = [*PAIRS[:2], {**PAIRS[2], "b": "six "}]
    assert texts.digest(PAIRS) != texts.digest(changed)


def test_writes_the_same_bytes_for_the_same_rows(tmp_path):
    texts.write(tmp_path / "a.jsonl.gz", PAIRS)
    texts.write(tmp_path / "b.jsonl.gz", PAIRS)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert texts.rows(tmp_path / "a.jsonl.gz") == PAIRS


# -- public sources --------------------------------------------------------------------------------


def test_every_file_is_at_a_full_commit_with_length_and_checksum():
    for name, origin in sources.ORIGINS.items():
        assert origin.files, name
        for file in origin.files:
            host, owner, repository, commit, *path = file.url.removeprefix("https://").split("/")
            assert host == "raw.githubusercontent.com"
            assert owner
            assert repository
            assert path
            for text, length in ((commit, 40), (file.sha256, 64)):
                assert len(text) == length
                assert set(text) <= set("0123456789abcdef")
            assert file.bytes > 0
        assert origin.licence


@pytest.mark.parametrize("name", sorted(sources.ORIGINS))
def test_the_source_gives_the_rows_of_the_folder_with_the_real_sets(real_data, name):
    assert texts.digest(sets.records(name)) == sources.ORIGINS[name].digest


def convert(name, *contents, mask=None, monkeypatch=None):
    if mask is not None:
        monkeypatch.setattr(sources, "split_mask", lambda _: iter(mask))
    return sources.ORIGINS[name].rows([c.encode() if isinstance(c, str) else c for c in contents])


def test_converts_trec():
    train, test = convert("trec", b"DESC:manner How caf\xe9 ?\n", b"NUM:dist How far ?\n")
    assert train == {
        **{"text": "How café ?", "label": "DESC", "fine": "DESC:manner", "split": "train"}
    }
    assert (test["label"], test["split"]) == ("NUM", "test")


def test_converts_two_files_by_mask(monkeypatch):
    contents = (b"dull \x96 long\n", b"fine\nfunny\n")
    rows = convert("mr", *contents, mask=[True, False, True], monkeypatch=monkeypatch)
    assert [(r["text"], r["label"], r["split"]) for r in rows] == [
        ("dull – long", "negative", "test"),
        ("fine", "positive", "train"),
        ("funny", "positive", "test"),
    ]


def test_keeps_the_first_of_equal_texts(monkeypatch):
    contents = (b"good\nsame\ngood\n", b"bad\nsame\n")  # positive, negative
    rows = convert("mpqa", *contents, mask=[False] * 3, monkeypatch=monkeypatch)
    assert [(r["text"], r["label"]) for r in rows] == [
        ("good", "positive"),
        ("same", "positive"),
        ("bad", "negative"),
    ]


def test_a_mask_of_another_length_is_not_stretched(monkeypatch):
    with pytest.raises(ValueError, match="zip"):
        convert("mr", b"one\n", b"two\n", mask=[True], monkeypatch=monkeypatch)


def test_converts_ag_news(monkeypatch):
    content = '"3","A title","Some\\text, and ""more"""\n"1","B","c"\n'
    rows = convert("ag_news", content, mask=[False, True], monkeypatch=monkeypatch)
    first = {"text": 'A title. Some text, and "more"', "label": "Business", "split": "train"}
    assert rows == [first, {"text": "B. c", "label": "World", "split": "test"}]


def test_converts_glue():
    cola = convert("cola", "x\t1\t\tA b.\nx\t1\t\tA b.\n", "x\t0\t*\tC d.\n", "x\t0\t*\tA b.\n")
    assert [(r["text"], r["label"], r["split"]) for r in cola] == [
        ("A b.", "acceptable", "train"),
        ("C d.", "unacceptable", "train"),
        ("A b.", "unacceptable", "test"),
    ]
    head = "index\tsentence1\tsentence2\tlabel\n"
    rte = convert(
        "rte",
        f"{head}0\ta\tb\tentailment\n",
        "1\tc\td\tnot_entailment\n",
        f"{head}0\te\tf\tentailment\n",
    )
    assert [(r["a"], r["b"], r["split"]) for r in rte] == [
        ("a", "b", "train"),
        ("c", "d", "train"),
        ("e", "f", "test"),
    ]
    wnli = convert("wnli", f"{head}0\ta\tb\t1\n", "", f"{head}0\te\tf\t0\n")
    assert [r["label"] for r in wnli] == ["entailment", "not_entailment"]


def test_converts_pairs_with_a_header():
    head = "Quality\tid\tid\tone\ttwo\n"
    mrpc = convert("mrpc", f"{head}1\t7\t8\ta\tb\n", head, f"{head}0\t7\t8\tc\td\n")
    assert [(r["a"], r["b"], r["label"], r["split"]) for r in mrpc] == [
        ("a", "b", "paraphrase", "train"),
        ("c", "d", "not_paraphrase", "test"),
    ]
    head = "pair_ID\tA\tB\tscore\tjudgment\n"
    sick = convert(
        "sick", f"{head}1\ta\tb\t4.5\tNEUTRAL\n", head, f"{head}2\tc\td\t1\tENTAILMENT\r\n"
    )
    assert (sick[0]["score"], sick[0]["label"]) == (4.5, "neutral")
    assert sick[1]["label"] == "entailment"


def test_converts_reasoning(monkeypatch):
    solved = {"question": "q", "answer": "2 * 600 = <<2*600=1200>>1200\n#### 1,200"}
    line = json.dumps(solved) + "\n"
    rows = convert("gsm8k", line * 2, line, mask=[False, True], monkeypatch=monkeypatch)
    assert [r["split"] for r in rows] == ["train", "test"]
    assert rows[0]["final"] == "1200"
    assert rows[0]["answer"] == "2 * 600 = <<2*600=1200>>1200"
    told = {"question": "q", "term": "t", "facts": [], "decomposition": [], "answer": True}
    rows = convert("strategyqa", json.dumps([told]), json.dumps([{**told, "answer": False}]))
    assert [(r["label"], r["split"]) for r in rows] == [("yes", "train"), ("no", "test")]
    examples = json.dumps({"examples": [{"input": "i", "target": "t"}]})
    rows = convert(
        "bbh", *[examples] * 27, mask=[False, True] * 13 + [False], monkeypatch=monkeypatch
    )
    assert rows[1] == {"task": sources.BBH[1], "input": "i", "target": "t", "split": "test"}
