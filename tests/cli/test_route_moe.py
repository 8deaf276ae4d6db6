"""`pluribus route moe`: a recipe in, a folder for transformers and a page out."""

import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "route"))  # tests have no package
import moe_models  # type: ignore[import-not-found]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, two experts and their texts; written once."""
    root = tmp_path_factory.mktemp("moe")
    moe_models.family(root)
    (root / "maths.txt").write_text("\n".join(f"{i} 34 56 7 8 90 {i}" for i in range(30)))
    (root / "bank.txt").write_text("\n".join(f"alarm account blocked {i}" for i in range(30)))
    return root


@pytest.fixture
def where(place, models):
    for entry in models.iterdir():
        (place / entry.name).symlink_to(entry)
    write(place, moe_models.told())
    return place


def write(place, recipe):
    (place / "moe.yml").write_text(yaml.safe_dump(recipe))


def learned(**changes):
    made = moe_models.told(gate_mode="trained", **changes)
    for entry, name in zip(made["experts"], ("maths", "bank"), strict=True):
        entry["data"] = f"{name}.txt"
    return made


def test_words_for_people(cli, where):
    got = cli("route", "moe", "moe.yml", "mixture")
    assert got.code == 0
    lines = got.out.splitlines()
    assert lines[0].split() == ["expert", "from", "prompts", "data", "noise", "factor"]
    assert lines[1].split() == ["llama-0", "llama-0", "2+/0-", "-", "0", "1"]
    told = dict(line.split(": ", 1) for line in lines[3:])
    assert told["architecture"] == "mixtral (MixtralForCausalLM)"
    assert told["experts a token"] == "2 of 2"
    assert told["gates"] == "hidden"
    assert told["condition number of gates"].endswith("over 2 layers")
    model = moe_models.loaded(where / "mixture")
    total = sum(p.numel() for p in model.parameters())
    assert told["numbers"].startswith(f"{total / 1e6:.4g} M, {total / 1e6:.4g} M active")
    assert got.err == ""


def test_gates_that_are_alike_are_warned_of(cli, where):
    recipe = moe_models.told()
    for number, entry in enumerate(recipe["experts"]):
        entry["positive_prompts"] = ["12 34 56 7 8 90", f"{number}"][: number + 1] * 9
    recipe["experts"][1]["positive_prompts"] = ["12 34 56 7 8 90"] * 9 + ["12 34 56 7 8 9"]
    write(where, recipe)
    got = cli("route", "moe", "moe.yml", "mixture", "--json")
    assert max(got.json["conditions"]) > 5
    assert "warning: gates of all layers are nearly alike" in got.err
    assert "gate_mode trained" in got.err


def test_learned_gates_and_their_page(cli, where):
    write(where, learned(experts_per_token=1))
    got = cli("route", "moe", "moe.yml", "mixture", "--html", "routes.html", "--json").json
    assert min(got["training"]["accuracy"]) > 0.9
    assert got["training"]["before"] is None
    assert got["active"] == got["total"] - 2 * 3 * 32 * 48
    shares = got["routes"]
    assert list(shares) == ["llama-0", "llama-1"]
    for group, layers in shares.items():
        assert len(layers) == 2
        assert layers[0][group] > 0.9  # it takes in what the base's does; the next, not quite
        assert layers[1][group] > 0.6
    page = (where / "routes.html").read_text()
    for said in ("Who takes the tokens", "Tokens of llama-1", "layer 1", "held-out tokens"):
        assert said in page
    write(where, learned(train={"steps": 3}))
    text = cli("route", "moe", "moe.yml", "mixture", "--overwrite").out
    told = dict(line.split(": ", 1) for line in text.splitlines()[3:])
    assert told["held-out tokens to their own expert"].endswith("nats)")
    before, after = (float(told["held-out loss of the mixture"].split()[i]) for i in (0, 2))
    assert after <= before


def test_shards_and_overwriting(cli, refused, where):
    cli("route", "moe", "moe.yml", "mixture", "--max-shard-size", "20kB", "--quiet")
    assert len(list((where / "mixture").glob("*.safetensors"))) > 3
    moe_models.loaded(where / "mixture")
    assert "exists already" in refused("route", "moe", "moe.yml", "mixture")
    assert cli("route", "moe", "moe.yml", "mixture", "--overwrite", "--quiet").code == 0
    assert len(list((where / "mixture").glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gate_mode": "hiden"}, "moe.yml"),
        ({"experts_per_token": 9}, "experts_per_token is 9, and there are 2 experts"),
        ({"experts": []}, "at least one is needed"),
        ({"base_model": "nowhere"}, "nowhere: no such file or folder"),
        ({"architecture": "qwen2"}, "exactly one shared expert"),
        ({"parts": "masks"}, "run it with: pluribus route build"),
    ],
)
def test_recipes_that_are_refused(refused, where, change, said):
    write(where, {**moe_models.told(), **change})
    assert said in refused("route", "moe", "moe.yml", "mixture", "--quiet")


def test_data_that_is_refused(refused, where):
    write(where, learned())
    recipe = yaml.safe_load((where / "moe.yml").read_text())
    recipe["experts"][0]["data"] = "nothing.txt"
    write(where, recipe)
    assert "no such file of texts" in refused("route", "moe", "moe.yml", "mixture", "--quiet")
    (where / "one.jsonl").write_text(json.dumps({"text": "12"}) + "\n")
    recipe["experts"][0]["data"] = "one.jsonl"
    write(where, recipe)
    assert "llama-0 has 1 text" in refused("route", "moe", "moe.yml", "mixture", "--quiet")
    write(where, moe_models.told())
    said = refused("route", "moe", "moe.yml", "mixture", "--html", "routes.html")
    assert "--html shows where texts go; give experts data" in said
    assert "no such folder" in refused("route", "moe", "moe.yml", "mixture", "--html", "a/b.html")
