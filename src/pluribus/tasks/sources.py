"""Where text sets come from: files of public repositories at fixed commits, and how they are read.

Every file is named with its length and SHA-256, and every set with the digest of the rows that come
of it, so what is downloaded today has the same rows, in the same splits, wherever it is. Sets that
have no official split are dealt by a hash of each row's text, so equal texts fall on one side. What
an origin says of the licence stands in `licence`; mind it.
"""

import csv
import io
import json
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

import xxhash

Row = dict[str, Any]
RAW = "https://raw.githubusercontent.com"


@dataclass(frozen=True, kw_only=True)
class File:
    """One file at an address that never changes."""

    url: str
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A public set: its files, and what makes rows of their contents, given in the same order."""

    files: tuple[File, ...]
    licence: str
    rows: Callable[[list[bytes]], list[Row]]
    digest: str  # texts.digest of the rows


# -- pieces ----------------------------------------------------------------------------------------


def _lines(content: bytes, encoding: str = "utf-8") -> list[str]:
    return [line.strip() for line in content.decode(encoding).split("\n") if line.strip()]


def _cells(content: bytes, header: bool = False) -> list[list[str]]:
    """Return the tab-separated cells of every line; a header may be told by its word `index`."""
    lines = [line for line in content.decode("utf-8").split("\n") if line.strip()]
    cells = [line.split("\t") for line in lines]
    return [row for row in cells[header:] if row[0] != "index"]


def _once(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> list[Row]:
    """Keep the first row of each key."""
    first: dict[Hashable, Row] = {}
    for row in rows:
        first.setdefault(key(row), row)
    return list(first.values())


def _dealt(rows: Iterable[Row], key: str = "text") -> list[Row]:
    """Deal a fifth of the rows into test, the others into train, by a hash of their `key`."""

    def split(row: Row) -> str:
        return "train" if xxhash.xxh3_64_intdigest(f"split {row[key]}".encode()) % 5 else "test"

    return [{**row, "split": split(row)} for row in rows]


# -- one function a set ----------------------------------------------------------------------------


def _sst2(contents: list[bytes]) -> list[Row]:
    return [
        {"text": line[2:], "label": ("negative", "positive")[int(line[0])], "split": split}
        for split, content in zip(("train", "dev", "test"), contents, strict=True)
        for line in _lines(content)
    ]


def _trec(contents: list[bytes]) -> list[Row]:
    rows = []
    for split, content in zip(("train", "test"), contents, strict=True):
        for line in _lines(content, "latin-1"):
            fine, _, text = line.partition(" ")
            rows.append({"text": text, "label": fine.split(":")[0], "fine": fine, "split": split})
    return rows


def _two_files(contents: list[bytes], *, labels: tuple[str, str], once: bool = False) -> list[Row]:
    rows = [
        {"text": line, "label": label}
        for label, content in zip(labels, contents, strict=True)
        for line in _lines(content, "cp1252")
    ]
    return _dealt(_once(rows, lambda row: row["text"]) if once else rows)


def _ag_news(contents: list[bytes]) -> list[Row]:
    topics = ("World", "Sports", "Business", "Sci/Tech")
    read = csv.reader(io.StringIO(contents[0].decode("utf-8"), newline=""))
    rows = [
        {"text": f"{title}. {body}".replace("\\", " ").strip(), "label": topics[int(topic) - 1]}
        for topic, title, body in read
    ]
    return _dealt(rows)


def _banking77(contents: list[bytes]) -> list[Row]:
    return [
        {"text": row["text"].strip(), "label": row["category"], "split": split}
        for split, content in zip(("train", "test"), contents, strict=True)
        for row in csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""))
    ]


def _clinc150(contents: list[bytes]) -> list[Row]:
    found = json.loads(contents[0])
    return [
        {"text": text, "label": label, "split": split}
        for part in ("{}", "oos_{}")
        for split, name in (("train", "train"), ("dev", "val"), ("test", "test"))
        for text, label in found[part.format(name)]
    ]


def _cola(contents: list[bytes]) -> list[Row]:
    rows = [
        {"text": text.strip(), "label": ("unacceptable", "acceptable")[int(good)], "split": split}
        for split, content in zip(("train", "train", "test"), contents, strict=True)
        for _, good, _, text in _cells(content)
    ]
    return _once(rows, lambda row: (row["text"], row["label"]))


def _pairs(contents: list[bytes], *, named: tuple[str, ...] = ()) -> list[Row]:
    rows = [
        {"a": a.strip(), "b": b.strip(), "label": label.strip(), "split": split}
        for split, content in zip(("train", "train", "test"), contents, strict=True)
        for _, a, b, label in _cells(content)
    ]
    if named:
        return [{**row, "label": named[int(row["label"])]} for row in rows]
    return _once(rows, lambda row: tuple(row.values()))


def _mrpc(contents: list[bytes]) -> list[Row]:
    names = ("not_paraphrase", "paraphrase")
    return [
        {"a": a.strip(), "b": b.strip(), "label": names[int(same)], "split": split}
        for split, content in zip(("train", "dev", "test"), contents, strict=True)
        for same, _, _, a, b, *_ in _cells(content, header=True)
    ]


def _sick(contents: list[bytes]) -> list[Row]:
    return [
        {"a": a, "b": b, "label": label.strip().lower(), "score": float(score), "split": split}
        for split, content in zip(("train", "dev", "test"), contents, strict=True)
        for _, a, b, score, label, *_ in _cells(content, header=True)
    ]


def _bbh(contents: list[bytes]) -> list[Row]:
    rows = [
        {"task": name, "input": example["input"], "target": example["target"]}
        for name, content in zip(BBH, contents, strict=True)
        for example in json.loads(content)["examples"]
    ]
    return _dealt(rows, "input")


def _gsm8k(contents: list[bytes]) -> list[Row]:
    rows = []
    for split, content in zip(("train", "test"), contents, strict=True):
        for row in map(json.loads, _lines(content)):
            worked, _, final = row["answer"].partition("####")
            final = final.strip().replace(",", "")
            told = {"question": row["question"], "answer": worked.strip(), "final": final}
            rows.append({**told, "split": split})
    return rows


def _strategyqa(contents: list[bytes]) -> list[Row]:
    kept = ("question", "term", "facts", "decomposition")
    return [
        {**{key: row[key] for key in kept}, "label": "yes" if row["answer"] else "no"}
        | {"split": split}
        for split, content in zip(("train", "test"), contents, strict=True)
        for row in json.loads(content)
    ]


# -- the manifest ----------------------------------------------------------------------------------


def _table() -> tuple[dict[str, Origin], tuple[str, ...]]:
    text = (resources.files("pluribus.tasks") / "data" / "origins.json").read_text("utf-8")
    stored = json.loads(text)
    readers: dict[str, Callable[[list[bytes]], list[Row]]] = {
        "sst2": _sst2,
        "trec": _trec,
        "mr": partial(_two_files, labels=("negative", "positive")),
        "subj": partial(_two_files, labels=("objective", "subjective")),
        "cr": partial(_two_files, labels=("negative", "positive"), once=True),
        "mpqa": partial(_two_files, labels=("positive", "negative"), once=True),
        "ag_news": _ag_news,
        "clinc150": _clinc150,
        "banking77": _banking77,
        "cola": _cola,
        "rte": _pairs,
        "wnli": partial(_pairs, named=("not_entailment", "entailment")),
        "mrpc": _mrpc,
        "sick": _sick,
        "bbh": _bbh,
        "gsm8k": _gsm8k,
        "strategyqa": _strategyqa,
    }
    origins = {}
    for name, entry in stored.items():
        root = f"{RAW}/{entry['repository']}/{entry['commit']}"
        files = tuple(
            File(url=f"{root}/{path}", bytes=size, sha256=sha) for path, size, sha in entry["files"]
        )
        origins[name] = Origin(
            files=files, licence=entry["licence"], rows=readers[name], digest=entry["digest"]
        )
    tasks = tuple(file.name.removesuffix(".json") for file in origins["bbh"].files)
    return origins, tasks


ORIGINS, BBH = _table()
