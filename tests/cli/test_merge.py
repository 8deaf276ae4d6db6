"""`pluribus merge` and `pluribus verify`: what they write, say, and leave alone."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from pluribus import Pool
from pluribus.core.weights import Weights
from pluribus.engine.driver import merge

SOUP = "merge_method: linear\nmodels: [{model: math}, {model: code}]\n"


def values(path):
    weights = Weights.open(path)
    return {name: weights[name] for name in weights}


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


def test_the_average_of_two(cli, place):
    (place / "soup.yml").write_text(SOUP)
    got = cli("merge", "soup.yml", "out")
    assert got.code == 0
    assert got.out.startswith("out: 5.06 kB in ")
    math, code, out = values("math"), values("code"), values("out")
    for name, merged in out.items():
        exact = (math[name].float() + code[name].float()) / 2
        assert torch.equal(merged, exact.bfloat16()), name
    assert sorted(path.name for path in (place / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "pluribus.json",
    ]


def test_the_command_line_gives_what_python_gives(cli, place):
    assert cli("merge", "ties.yml", "out").code == 0
    pool = Pool("base", ["math", "code"])
    merged = merge(pool, "ties(density=(0.5, 0.5), weight=(1.0, 0.5))")
    same(values("out"), {name: merged[name] for name in merged})


@pytest.mark.parametrize(
    "options",
    [
        ["--threads", "1"],
        ["--memory", "1MB", "--threads", "7"],
        ["--max-shard-size", "2kB"],
        ["--no-resume"],
        ["--device", "torch:cpu"],
    ],
)
def test_how_it_runs_changes_no_bit(cli, place, options):
    assert cli("merge", "ties.yml", "plain").code == 0
    assert cli("merge", "ties.yml", "out", *options).code == 0
    same(values("out"), values("plain"))


def test_shards_have_an_index(cli, place):
    assert cli("merge", "ties.yml", "out", "--max-shard-size", "2kB").code == 0
    index = json.loads((place / "out" / "model.safetensors.index.json").read_bytes())
    assert set(index["weight_map"]) == set(values("math"))
    for shard in set(index["weight_map"].values()):
        assert (place / "out" / shard).stat().st_size < 4000


def test_one_file(cli, place):
    assert cli("merge", "ties.yml", "out.safetensors", "--verify").code == 0
    assert cli("merge", "ties.yml", "out").code == 0
    same(values("out.safetensors"), values("out"))
    assert cli("verify", "out.safetensors").code == 0


def test_json(cli, place):
    told = cli("merge", "ties.yml", "out", "--verify", "--json").json
    size = sum(2 * np.prod(tensor.shape) for tensor in values("math").values())
    assert told.pop("seconds") > 0
    assert told == {
        "out": "out",
        "bytes_read": 2 * 3 * size,  # ties looks at three models, twice
        "bytes_written": size,
        "resumed": False,
        "warnings": [],
        "verified": True,
    }
    again = cli("merge", "ties.yml", "out", "--json").json
    assert (again["resumed"], again["bytes_written"], again["verified"]) == (True, 0, None)


def test_the_same_command_again_has_nothing_to_do(cli, place):
    assert cli("merge", "ties.yml", "out").code == 0
    before = (place / "out" / "model.safetensors").stat()
    got = cli("merge", "ties.yml", "out", "--verify")
    assert got.code == 0
    assert "complete already, verified" in got.out
    after = (place / "out" / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_overwrite_replaces_another_output(cli, refused, place):
    (place / "soup.yml").write_text(SOUP)
    assert cli("merge", "soup.yml", "out").code == 0
    assert "out: exists already; choose another name, or pass --overwrite" in refused(
        "merge", "ties.yml", "out"
    )
    assert cli("merge", "ties.yml", "out", "--overwrite").code == 0
    assert cli("merge", "ties.yml", "fresh").code == 0
    same(values("out"), values("fresh"))
    assert not list(place.glob("out.*"))


@pytest.mark.parametrize("place_of_input", ["math", "math/model.safetensors", "../math"])
def test_an_input_is_never_replaced(refused, place, place_of_input):
    if place_of_input == "../math":
        shutil.copytree(place / "math", place.parent / "math")
    (place / "r.yml").write_text(SOUP.replace("math", place_of_input))
    out = place_of_input.removesuffix("/model.safetensors")
    said = refused("merge", "r.yml", out, "--overwrite")
    assert f"{out}: is an input of this recipe and would be replaced; choose another output" in said


def test_a_recipe_may_come_through_a_pipe(child, place):
    read, write = os.pipe()
    os.write(write, (place / "ties.yml").read_bytes())
    os.close(write)
    process = child("merge", f"/dev/fd/{read}", "out", "--json", pass_fds=(read,))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out)["bytes_written"] > 0


# -- warnings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            "merge_method: ties\nbase_model: base\nmodels: [{model: math}]\n",
            "ties is given a single model: there is nothing to reconcile",
        ),
        (
            "merge_method: ties\nbase_model: base\nmodels: [{model: base}, {model: math}]\n",
            "ties is given a single model: there is nothing to reconcile",
        ),
        (
            "merge_method: ties\nbase_model: base\nmodels: [{model: copy}, {model: math}]\n",
            "copy and base hold the same values: one of them adds nothing",
        ),
        (
            "merge_method: linear\nmodels: [{model: math}]\nsedd: 3\n",
            "sedd: unknown key 'sedd'",
        ),
    ],
)
def test_odd_but_usable_is_a_warning(cli, place, recipe, said):
    shutil.copytree("base", "copy")
    (place / "r.yml").write_text(recipe)
    got = cli("merge", "r.yml", "out", "--lenient")
    assert got.code == 0
    assert "warning: " in got.err
    assert said in got.err
    assert said in " ".join(cli("merge", "r.yml", "again", "--lenient", "--json").json["warnings"])


# -- verify ----------------------------------------------------------------------------------------


def test_verify_finds_a_flipped_bit(cli, place):
    assert cli("merge", "ties.yml", "out").code == 0
    assert cli("verify", "out").out == "out: every tensor is as it was written\n"
    path = place / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    got = cli("verify", "out")
    assert got.code == 1
    assert got.out == ""
    assert got.err == (
        "pluribus: out: 1 tensor(s) are not as written: lm_head.weight differs from what was "
        "written\n"
    )
    told = cli("verify", "out", "--json")
    assert told.code == 1
    assert told.json["faults"] == {"lm_head.weight": "differs from what was written"}


def test_verify_needs_a_record(refused, place):
    assert "only outputs of pluribus can be verified" in refused("verify", "math")
    assert "nowhere: no such file or folder" in refused("verify", "nowhere")


@pytest.mark.parametrize("text", ["{", "[]", '{"output": {"tensors": 3}}'])
def test_verify_with_a_broken_record(cli, refused, place, text):
    assert cli("merge", "ties.yml", "out").code == 0
    (place / "out" / "pluribus.json").write_text(text)
    assert "out/pluribus.json: not a record of pluribus" in refused("verify", "out")
