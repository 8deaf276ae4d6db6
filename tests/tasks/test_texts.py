"""Text sets: reading, refusing, digests, and the conversion of every public source."""

import gzip
import json
from functools import partial

import pytest
import xxhash

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


zipped = partial(gzip.compress, mtime=0)  # names of tests must not hold the time


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"plain", "not a readable"),
        (zipped(b"x" * 1000)[:-9], "not a readable"),
        (zipped(b"\xff\n"), "not a readable"),
        (zipped(b"{\n"), "line 1: not JSON"),
        (zipped(b'{"split": "train"}\n[]\n'), "line 2: expected an object with a split"),
        (zipped(b'{"text": "a", "label": "b"}\n'), "line 1: expected an object"),
        (zipped(b""), "holds no rows"),
        (zipped(b'{"text": "a", "label": 1, "split": "train"}\n'), "label is 1"),
        (zipped(b'{"a": "a", "label": "x", "split": "train"}\n'), "a row's b is None"),
        (zipped(b'{"text": "a", "label": "x", "split": "train"}\n'), "no rows with split"),
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


DEALT = {"ag_news", "bbh", "cr", "mpqa", "mr", "subj"}  # have no official split: by a hash
OFFICIAL = sorted(set(sources.ORIGINS) - DEALT - {"gsm8k"})  # the folder has a sample of gsm8k


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_source_gives_the_rows_of_the_folder_with_the_real_sets(real_data, name):
    assert texts.digest(sets.records(name)) == sources.ORIGINS[name].digest


def convert(name, *contents):
    return sources.ORIGINS[name].rows([c.encode() if isinstance(c, str) else c for c in contents])


def test_converts_trec():
    train, test = convert("trec", b"DESC:manner How caf\xe9 ?\n", b"NUM:dist How far ?\n")
    assert train == {
        **{"text": "How café ?", "label": "DESC", "fine": "DESC:manner", "split": "train"}
    }
    assert (test["label"], test["split"]) == ("NUM", "test")


def dealt(text):
    """The rule of the split, written out."""
    return "test" if xxhash.xxh3_64(b"split " + text.encode()).intdigest() % 5 == 0 else "train"


def test_converts_two_files_and_deals_them():
    rows = convert("mr", b"dull \x96 long\n", b"fine\nfunny\n")
    assert [(r["text"], r["label"]) for r in rows] == [
        ("dull – long", "negative"),
        ("fine", "positive"),
        ("funny", "positive"),
    ]
    assert [r["split"] for r in rows] == [dealt(r["text"]) for r in rows]


def test_a_fifth_is_dealt_into_test_and_equal_texts_fall_on_one_side():
    lines = "".join(f"line {i % 4000}\n" for i in range(5000))
    rows = convert("subj", lines, "")
    sides = {}
    for row in rows:
        assert sides.setdefault(row["text"], row["split"]) == row["split"]
    share = sum(side == "test" for side in sides.values()) / len(sides)
    assert abs(share - 0.2) < 0.025  # four standard deviations of 4000 draws


def test_keeps_the_first_of_equal_texts():
    contents = (b"good\nsame\ngood\n", b"bad\nsame\n")  # positive, negative
    rows = convert("mpqa", *contents)
    assert [(r["text"], r["label"]) for r in rows] == [
        ("good", "positive"),
        ("same", "positive"),
        ("bad", "negative"),
    ]


def test_converts_ag_news():
    content = '"3","A title","Some\\text, and ""more"""\n"1","B","c"\n'
    rows = convert("ag_news", content)
    texts_of = ('A title. Some text, and "more"', "B. c")
    assert rows == [
        {"text": text, "label": label, "split": dealt(text)}
        for text, label in zip(texts_of, ("Business", "World"), strict=True)
    ]


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


def test_converts_reasoning():
    solved = {"question": "q", "answer": "2 * 600 = <<2*600=1200>>1200\n#### 1,200"}
    line = json.dumps(solved) + "\n"
    rows = convert("gsm8k", line * 2, line)
    assert [r["split"] for r in rows] == ["train", "train", "test"]
    assert rows[0]["final"] == "1200"
    assert rows[0]["answer"] == "2 * 600 = <<2*600=1200>>1200"
    told = {"question": "q", "term": "t", "facts": [], "decomposition": [], "answer": True}
    rows = convert("strategyqa", json.dumps([told]), json.dumps([{**told, "answer": False}]))
    assert [(r["label"], r["split"]) for r in rows] == [("yes", "train"), ("no", "test")]
    examples = json.dumps({"examples": [{"input": "i", "target": "t"}]})
    rows = convert("bbh", *[examples] * 27)
    told = {"task": sources.BBH[1], "input": "i", "target": "t", "split": dealt("i")}
    assert rows[1] == told
