"""`pluribus tokensurgeon` on the command line."""

import json
import signal

import numpy as np
import pytest
from checkpoints import ROWS

from pluribus.core.weights import Weights

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OLD = ["<s>", *"abcdefghijklmno", "stale"]
NEW = [*"onmlkji", "<s>", *"abcd", "fresh", "new", "newer", "newest", "last"]


def tokenizer(folder, words):
    """Write a word-level tokenizer whose ids are the words' places."""
    tokenizers = pytest.importorskip("tokenizers")
    ids = {word: index for index, word in enumerate(words)}
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<s>"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tok.add_special_tokens(["<s>"])
    tok.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def two(place):
    """The models base and math with different tokenizers."""
    assert len(OLD) == len(NEW) == ROWS
    tokenizer(place / "base", OLD)
    tokenizer(place / "math", NEW)
    return place


def rows(folder, name=EMBED):
    source = Weights.open(folder).source(name)
    return source.floats().reshape(source.spec.shape)


def test_text(cli, two):
    got = cli("tokensurgeon", "base", "math", "out", "--k", 4)
    assert got.code == 0, got
    assert got.err == ""
    first, second, last = got.out.splitlines()
    assert first.startswith(f"{EMBED}: 12 rows kept, 5 made by omp; relative error in the donor's")
    assert second.startswith(f"{HEAD}: 12 rows kept")
    assert last.startswith("out: 17 rows before, 17 now")
    for name in (EMBED, HEAD):
        for new, word in enumerate(NEW):
            if word in OLD:
                np.testing.assert_array_equal(
                    rows("out", name)[new], rows("base", name)[OLD.index(word)]
                )
    assert cli("verify", "out").code == 0


def test_json(cli, two):
    got = cli("tokensurgeon", "base", "math", "out", "--pad-to-multiple-of", 8, "--json")
    assert got.code == 0, got
    told = got.json
    assert (told["rows_before"], told["rows"], told["tokens"]) == (17, 24, 17)
    one = told["matrices"][0]
    assert (one["name"], one["copied"], one["approximated"], one["without_token"]) == (
        *(EMBED, 12, 5),
        7,
    )
    assert 0 <= one["mean_error"] <= one["worst_error"] < 1
    assert one["worst_token"] in NEW
    assert told["bytes_written"] == Weights.open("out").nbytes
    again = cli("tokensurgeon", "base", "math", "out", "--pad-to-multiple-of", 8, "--json").json
    assert again["bytes_written"] == 0
    assert again["matrices"] == told["matrices"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--method zero", lambda old: np.zeros(16)),
        ("--method mean", lambda old: old.mean(0)),
        ("--method mean --scale 2", lambda old: 2 * old.mean(0)),
        ("--method subword", lambda old: old[0]),  # an unknown word is <s> to the model
        ("--prefix-match embed", lambda old: old[OLD.index("n")]),
        ("--prefix-match lm_head --method zero", lambda old: np.zeros(16)),
    ],
)
def test_options_reach_the_rows(cli, two, words, wanted):
    assert cli("tokensurgeon", "base", "math", "out", *words.split()).code == 0
    found = rows("out")[NEW.index("newest")]
    np.testing.assert_allclose(found, wanted(rows("base")), rtol=2**-8, atol=1e-6)


def test_random_rows_are_those_of_their_seed(cli, two):
    """base's matrices are bfloat16; the rows are drawn in float32 and rounded once."""
    from pluribus.tokenizer.surgery_draw import normal

    words = ["--method", "randn", "--scale", "0.5", "--seed", "3"]
    assert cli("tokensurgeon", "base", "math", "out", *words).code == 0
    ids = np.array([new for new, word in enumerate(NEW) if word not in OLD])
    for name in (EMBED, HEAD):
        drawn = normal(ids, 16, name=name, stream="row", seed=3)
        np.testing.assert_allclose(rows("out", name)[ids], drawn / 2, rtol=2**-8)
    noise = normal(ids, 16, name=EMBED, stream="noise", seed=0)
    words = ["--method", "zero", "--noise", "0.1"]
    assert cli("tokensurgeon", "base", "math", "noisy", *words).code == 0
    np.testing.assert_allclose(rows("noisy")[ids], 0.1 * noise, rtol=2**-8)


def test_neighbours_and_their_options(cli, two):
    words = "--method common_interpolation --k 3 --cosine --weighting barycentric --json"
    got = cli("tokensurgeon", "base", "math", "out", *words.split())
    assert got.code == 0, got
    record = json.loads((two / "out" / "pluribus.json").read_text())["recipe"]
    assert record["tokensurgeon"] == "base"
    assert (record["k"], record["cosine"], record["weighting"]) == (3, True, "barycentric")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("base nope out", "nope: no such file or folder"),
        ("base code out", "code has no tokenizer"),
        ("base math out --method ompp", "method = 'ompp': input should be 'omp', "),
        ("base math out --k 0", "k = 0: input should be greater than or equal to 1"),
        ("base math out --weighting far", "weighting = 'far': input should be"),
        ("base math out --byte-match head", "byte_match = 'head': input should be 'no', "),
        ("base math out --noise -1", "noise = -1.0: input should be greater than or equal to 0"),
        ("base math out --scale nan", "scale = nan: input should be a finite number"),
        ("base math out --memory lots", "'lots' is not a size"),
        ("base math out --device abacus", "device 'abacus'"),
        ("base math math", "math is read from there, and it would be replaced"),
        ("base math code", "code: exists already"),
        ("base math out.safetensors", "name a folder, because a tokenizer"),
        ("base/model.safetensors math out", "is not a model folder"),
    ],
)
def test_what_cannot_be_done(refused, two, words, said):
    assert said in refused("tokensurgeon", *words.split())


def test_progress_of_fitting_and_writing(cli, two):
    got = cli("tokensurgeon", "base", "math", "out", "--json", terminal=True)
    assert got.code == 0
    assert EMBED in got.err
    assert "writing out" in got.err
    got = cli("tokensurgeon", "base", "math", "out2", "--quiet", terminal=True)
    assert got.err == ""


def test_an_output_is_replaced_only_when_the_new_one_is_whole(cli, two, monkeypatch):
    assert cli("tokensurgeon", "base", "math", "out").code == 0
    before = rows("out")
    monkeypatch.setattr("pluribus.surgery.execute", lambda *_: 1 / 0)
    args = ("tokensurgeon", "base", "math", "out", "--method", "zero", "--overwrite")
    assert cli(*args).code == 70
    np.testing.assert_array_equal(rows("out"), before)
    monkeypatch.undo()
    monkeypatch.chdir(two)
    assert cli(*args).code == 0
    assert not np.array_equal(rows("out"), before)


KILL = """
import os, signal
from pluribus.engine.sink import FileSink
FileSink.publish = lambda self, extra: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_goes_on(cli, two, child):
    """Killed when all is copied and nothing published: the next run copies nothing twice."""
    process = child("tokensurgeon", "base", "math", "out", before=KILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (two / "out").exists()
    assert cli("tokensurgeon", "base", "math", "out", "--json").json["resumed"]
    assert not cli("tokensurgeon", "base", "math", "fresh", "--json").json["resumed"]
    for name in Weights.open("fresh"):
        np.testing.assert_array_equal(rows("out", name), rows("fresh", name))
    assert sorted(p.name for p in (two / "out").iterdir()) == sorted(
        p.name for p in (two / "fresh").iterdir()
    )
