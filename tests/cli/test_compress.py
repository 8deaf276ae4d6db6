"""`pluribus compress` and `pluribus expand`."""

import shutil

import pytest
import torch
from checkpoints import BANK

from pluribus.compress import COMPRESSORS
from pluribus.core.weights import Weights


def recipe(place, text):
    (place / "r.yml").write_text(text)
    return "r.yml"


def test_there_and_back(cli, place):
    got = cli("compress", "bank.yml", "bank")
    assert got.code == 0
    assert got.out.splitlines()[0].split() == ["task", "kept", "checkpoint"]
    assert "of the checkpoints, base included" in got.out
    assert cli("expand", "bank").out == got.out
    for out in ("math.safetensors", "math-out"):
        got = cli("expand", "bank", "math", out)
        assert got.out.startswith(f"{out}: math, 5.06 kB in ")
        wanted, expanded = Weights.open("math"), Weights.open(out)
        assert set(wanted) == set(expanded)
        base = Weights.open("base")
        nearer = [
            (expanded[n].float() - wanted[n].float()).norm()
            < (base[n].float() - wanted[n].float()).norm()
            for n in wanted
        ]
        assert all(nearer)
    assert (place / "math-out" / "config.json").is_file()


def test_an_exact_store_gives_the_same_bits(cli, place):
    text = "method: exact\nbase_model: base\nexperts: {math: math, chat: chat}\n"
    assert cli("compress", recipe(place, text.replace(", chat: chat", "")), "bank").code == 0
    assert cli("expand", "bank", "math", "out.safetensors").code == 0
    wanted, got = Weights.open("math"), Weights.open("out.safetensors")
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.mark.parametrize("method", sorted(COMPRESSORS))
def test_every_compressor(cli, place, method):
    parameters = "parameters: {lambda: l1}\n" if method == "tall_masks" else ""
    text = f"method: {method}\n{parameters}base_model: base\nexperts: {{math: math, code: code}}\n"
    got = cli("compress", recipe(place, text), "bank", "--json", terminal=True)
    assert got.code == 0, got.err
    assert got.json["method"] == method
    assert cli("expand", "bank", "code", "out.safetensors").code == 0
    assert set(Weights.open("out.safetensors")) == set(Weights.open("code"))


def test_json(cli, place):
    told = cli("compress", "bank.yml", "bank", "--json").json
    assert told["store"] == "bank"
    assert list(told["tasks"]) == ["math", "code"]
    assert cli("expand", "bank", "--json").json == told
    told = cli("expand", "bank", "code", "out", "--json").json
    assert (told["out"], told["task"], told["bytes_written"]) == ("out", "code", 5056)
    assert cli("expand", "bank", "code", "out", "--json").json["bytes_written"] == 0  # there


def test_a_base_that_has_moved(cli, place):
    assert cli("compress", "bank.yml", "bank").code == 0
    shutil.move("base", "moved")
    got = cli("expand", "bank", "math", "out")
    assert got.code == 1
    assert "base: no such file or folder" in got.err
    assert cli("expand", "bank", "math", "out", "--base", "moved").code == 0
    got = cli("expand", "bank", "math", "other", "--base", "code")
    assert got.code == 1
    assert "experts rebuilt on it would be wrong" in got.err


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (BANK, "", "r.yml: holds 0 YAML documents; a compression recipe is one"),
        (BANK, "hello", "r.yml: a recipe is keys with values: method, parameters, base_model, exp"),
        (BANK, "a: [b", "r.yml:1: not valid YAML: expected ',' or ']'"),
        ("experts", "expert", "r.yml:4: unknown key 'expert'; there are: method, parameters, base"),
        ("experts", "expert", "Did you mean 'experts'?"),
        ("base_model: base\n", "", "r.yml: base_model is missing; a recipe has method, parameters"),
        ("{math: math, code: code}", "[math]", "r.yml:4: experts are task names with their models"),
        ("{math: math, code: code}", "{}", "r.yml:4: experts are task names with their models"),
        ("math: math", "math: mth", "mth: no such file or folder. Did you mean 'math'?"),
        ("math: math", "math: 3", "3 is not a model: give a path, an address, org/name, or"),
        ("method: tall_masks", "method: tal_masks", "r.yml:1: no compressor is called 'tal_masks'"),
        ("method: tall_masks", "method: tal_masks", "Did you mean 'tall_masks'?"),
        ("method: tall_masks", "method: [a]", "r.yml:1: method is a name, not ['a']"),
        ("lambda: l1", "lmbda: l1", "r.yml:2: tall_masks has no parameter 'lmbda'"),
        ("lambda: l1", "lambda: l7", "r.yml:2: tall_masks: mask_lambda = 'l7'"),
        ("{lambda: l1}", "l1", "r.yml:2: parameters are names with their values"),
        ("parameters: {lambda: l1}\n", "", "without data give 'l1', or a number such as 0.4"),
    ],
)
def test_recipes(refused, place, old, new, said):
    assert said in refused("compress", recipe(place, BANK.replace(old, new, 1)), "bank")


def test_no_recipe(refused, place):
    assert "bnk.yml: no such recipe. Did you mean 'bank.yml'?" in refused(
        "compress", "bnk.yml", "bank"
    )
    assert "base: is a folder; a recipe is a YAML file" in refused("compress", "base", "bank")
    assert "not a text file" in refused("compress", "base/model.safetensors", "bank")


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_only_a_store_is_ever_replaced(refused, place, overwrite):
    (place / "thesis").mkdir()
    (place / "thesis" / "chapter.tex").write_text("years of work")
    (place / "bank.partial").mkdir()
    (place / "bank.partial" / "mine.txt").write_text("keep")
    for name in ("base", "math", "thesis", "bank.yml", "."):
        said = refused("compress", "bank.yml", name, *overwrite)
        assert ("is no store" if overwrite else "exists already; choose another name") in said
    assert "bank.partial: is no store, and writing bank would remove it" in refused(
        "compress", "bank.yml", "bank", *overwrite
    )


def test_a_store_is_replaced_whole(cli, refused, place):
    assert cli("compress", "bank.yml", "bank").code == 0
    assert "bank: exists already" in refused("compress", "bank.yml", "bank")
    other = recipe(place, BANK.replace("{math: math, code: code}", "{chat: chat}"))
    assert cli("compress", other, "bank", "--overwrite").code == 0
    assert list(cli("expand", "bank", "--json").json["tasks"]) == ["chat"]
    assert not list(place.glob("bank.*")) or list(place.glob("bank.*")) == [place / "bank.yml"]


def test_a_killed_store_is_begun_anew(cli, place):
    """What an earlier, killed run left behind is no obstacle."""
    assert cli("compress", "bank.yml", "whole").code == 0
    (place / "bank.partial").mkdir()
    (place / "bank.partial" / ".unfinished").touch()
    (place / "bank.partial" / "multi.safetensors").write_bytes(b"half")
    assert cli("compress", "bank.yml", "bank").code == 0
    for path in (place / "whole").glob("*.safetensors"):
        assert (place / "bank" / path.name).read_bytes() == path.read_bytes()
    shutil.move("bank", "bank.replaced")  # killed between the two renames
    got = cli("compress", "bank.yml", "bank")
    assert got.code == 1
    assert "bank: exists already" in got.err
    assert cli("expand", "bank").code == 0


def test_outputs(refused, cli, place):
    assert cli("compress", "bank.yml", "bank").code == 0
    for words, said in {
        "compress bank.yml no/such": "no: no such folder to write such into; create it",
        "compress bank.yml ties.yml/x": "ties.yml: is no folder to write x into",
        "expand bank math": "name the output: pluribus expand STORE TASK OUT",
        "expand bank mth out": "bank has no task 'mth'; it has: math, code. Did you mean 'math'?",
        "expand bank math code": "code: exists already",
        "expand bank math base --overwrite": "base: math is read from there, and it would be",
        "expand bank math bank --overwrite": "is a folder with other things than a model in it",
        "expand bank math no/x": "no: no such folder to write x into; create it",
        "expand nowhere": "nowhere: no store in it (store.json is not there)",
        "expand math": "math: no store in it (store.json is not there)",
        "expand bank --base nowhere": "nowhere: no such file or folder",
    }.items():
        assert said in refused(*words.split()), words


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "pluribus-store", "version": 1}'])
def test_broken_stores(cli, refused, place, text):
    assert cli("compress", "bank.yml", "bank").code == 0
    (place / "bank" / "store.json").write_text(text)
    assert "bank/store.json: not the manifest of a store" in refused("expand", "bank")


def test_a_store_that_lacks_a_file(cli, refused, place):
    assert cli("compress", "bank.yml", "bank").code == 0
    (place / "bank" / "multi.safetensors").unlink()
    assert "multi.safetensors: named by the manifest, but not there" in refused("expand", "bank")
