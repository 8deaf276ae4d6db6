"""`pluribus prefer`: what it writes and refuses, and that its recipes replay through `merge`."""

import pytest
import torch
import yaml

from pluribus.core.weights import Weights

EXPERTS = ["maths=math:0.7", "code=code:0.3"]


def values(path):
    weights = Weights.open(path)
    return {name: weights[name] for name in weights}


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


def test_seventy_thirty(cli, place):
    got = cli("prefer", "out", *EXPERTS, "--base", "base")
    assert got.code == 0, got
    assert got.out.startswith("out: maths 0.7, code 0.3; 5.06 kB in ")
    base, math, code, out = (values(name) for name in ("base", "math", "code", "out"))
    for name, merged in out.items():
        start = base[name].float()
        exact = start + 0.7 * (math[name].float() - start) + 0.3 * (code[name].float() - start)
        torch.testing.assert_close(merged.float(), exact, rtol=2**-8, atol=1e-3)
    assert (place / "out" / "config.json").is_file()


@pytest.mark.parametrize("method", ["task_arithmetic", "ties(density=0.5)", "dare_ties", "linear"])
def test_pluribus_merge_replays_it_bit_for_bit(cli, place, method):
    words = ["--base", "base", "--method", method, "--seed", "3"]
    assert cli("prefer", "out", *EXPERTS, *words).code == 0
    told = cli("prefer", "unused", *EXPERTS, *words, "--dry-run", "--json").json
    (place / "again.yml").write_text(yaml.safe_dump(told[0]["recipe"]))
    assert cli("merge", "again.yml", "again").code == 0
    same(values("out"), values("again"))
    assert not (place / "unused").exists()


def test_a_dry_run_prints_a_recipe_and_a_plan(cli, place):
    got = cli("prefer", "out", *EXPERTS, "--base", "base", "--dry-run")
    assert got.code == 0
    assert "merge_method: task_arithmetic" in got.out
    assert "weight: 0.7" in got.out
    assert "  read  " in got.out
    assert not (place / "out").exists()


def test_json(cli, place):
    told = cli("prefer", "out", *EXPERTS, "--base", "base", "--total", "2", "--json").json
    assert told[0]["weights"] == [1.4, 0.6]
    assert told[0]["out"] == "out"
    assert told[0]["bytes_written"] > 0
    assert told[0]["recipe"]["base_model"] == str(place / "base")


def test_a_sweep_of_the_first_task(cli, place):
    words = ["maths=math:0.5", "code=code:0.3", "chat=chat:0.2", "--base", "base"]
    got = cli("prefer", "front", *words, "--sweep", "3", "--json")
    assert got.code == 0, got
    assert [entry["weights"] for entry in got.json] == [
        pytest.approx([0.0, 0.6, 0.4]),
        pytest.approx([0.5, 0.3, 0.2]),
        pytest.approx([1.0, 0.0, 0.0]),
    ]
    names = ["maths-0.00", "maths-0.50", "maths-1.00"]
    assert sorted(path.name for path in (place / "front").iterdir()) == names
    assert cli("prefer", "one", *words).code == 0
    same(values("front/maths-0.50"), values("one"))


def test_progress_and_quiet(cli, place):
    words = ["prefer", "out", *EXPERTS, "--base", "base"]
    assert "merging into out" in cli(*words, terminal=True).err
    assert "merging" not in cli(*words, "--quiet", terminal=True).err


def test_shares_can_be_normalised(cli, place):
    words = ["prefer", "out", "maths=math:7", "code=code:3", "--base", "base", "--json"]
    told = cli(*words, "--normalise").json
    assert told[0]["weights"] == pytest.approx([0.7, 0.3])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("maths=math:0.7 code=code:0.4 --base base", "sum to 1.1, not to 1; .*--normalise"),
        ("maths=math:1.7 code=code:-0.7 --base base", "share of code is -0.7"),
        ("maths=math:0 code=code:0 --base base", "all shares of the preference are zero"),
        ("maths=math:nan code=code:1 --base base", "share of maths is nan"),
        ("maths=math --base base", "write TASK=MODEL:SHARE"),
        ("math:0.7 --base base", "write TASK=MODEL:SHARE"),
        ("maths=math:most --base base", "a share from 0 to 1, not 'most'"),
        ("maths=math:0.5 maths=code:0.5 --base base", "given twice"),
        ("a/b=math:0.5 c=code:0.5 --base base --sweep 2", "use no slash"),
        ("maths=math:0.7 code=cod:0.3 --base base", "cod: no such file or folder.*'code'"),
        ("maths=math:0.7 code=code:0.3 --base nowhere", "nowhere: no such file"),
        ("maths=math:0.7 code=code:0.3 --base base --method tie", "no merge method.*'ties'"),
        ("maths=math:0.7 code=code:0.3 --base base --method model_stock", "takes no weight"),
        ("maths=math:0.7 code=code:0.3 --base base --method slerp", "slerp takes no weight"),
        ("maths=math:0.7 code=code:0.3 --base base --method slerp()", "argument: 't'; give it"),
        ("maths=math:0.7 code=code:0.3 --base base --method mean", "mean takes no weight"),
        ("maths=math:0.7 code=code:0.3 --base base --total 0", "total = 0"),
        ("maths=math:1 --base base --sweep 3", "only task"),
        ("maths=math:0.5 code=math:0.5 --base base", "given twice"),
    ],
)
def test_what_is_refused(refused, words, said):
    import re

    assert re.search(said, refused("prefer", "out", *words.split()))


def test_an_output_that_exists_is_kept(refused, place):
    before = (place / "math" / "model.safetensors").read_bytes()
    assert "exists already" in refused("prefer", "chat", *EXPERTS, "--base", "base")
    refused("prefer", "math", *EXPERTS, "--base", "base", "--overwrite")  # it is an input
    assert (place / "math" / "model.safetensors").read_bytes() == before
    (place / "file").write_text("text")
    refused_text = refused("prefer", "file", *EXPERTS, "--base", "base", "--sweep", "2")
    assert "is a file; a sweep writes a folder" in refused_text
    refused_text = refused("prefer", "no/where", *EXPERTS, "--base", "base", "--sweep", "2")
    assert "no: no such folder to write where into" in refused_text


def test_bad_usage(refused):
    assert "'--base'" in refused("prefer", "out", *EXPERTS, code=2)
    assert "'--sweep'" in refused("prefer", "out", *EXPERTS, "--base", "b", "--sweep", "1", code=2)
