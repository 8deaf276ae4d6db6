"""`pluribus circuits`, on a tiny model, and the Python of docs/circuits.md."""

import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package

import head_models  # type: ignore[import-not-found]

from pluribus.cli import main

PAGE = Path(__file__).parents[3] / "docs" / "circuits.md"
SMALL = ("--prompts", 6, "--allow-small-gap", "--top", 0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    head_models.llama(vocabulary=1500).save_pretrained(made)
    head_models.tokenizer().save_pretrained(made)
    return made


def run(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    out = capsys.readouterr()
    return stop.value.code, out.out, out.err


def test_discover_and_compare(folder, tmp_path, capsys):
    for task in ("ioi", "the_other"):
        out = ("--out", tmp_path / f"{task}.json", "--html", tmp_path / f"{task}.html")
        code, told, err = run(capsys, "circuits", "discover", folder, task, *SMALL, *out)
        assert code == 0
        assert "warning: the model answers 0% of" in err
        assert f"6 prompts of {task}, seed 0" in told
        assert f"{task}.json: written" in told
        assert "<svg" in (tmp_path / f"{task}.html").read_text()
    both = (tmp_path / "ioi.json", tmp_path / "the_other.json")
    code, told, err = run(capsys, "circuits", "overlap", *both)
    assert (code, err) == (0, "")
    assert "jaccard" in told
    code, told, _ = run(capsys, "circuits", "overlap", *both, "--stage", "movers", "--json")
    found = json.loads(told)
    assert set(found) == {"shared", "jaccard", "overlap", "chance"}
    circuits = [json.loads(path.read_text()) for path in both]
    movers = [set(circuit["stages"][0]["heads"]) for circuit in circuits]
    assert set(found["shared"]) == movers[0] & movers[1]
    assert found["jaccard"] == len(movers[0] & movers[1]) / len(movers[0] | movers[1])


def test_one_stage_as_json(folder, capsys):
    given = ("circuits", "discover", folder, "ioi", *SMALL, "--stages", 1, "--json")
    code, told, _ = run(capsys, *given)
    found = json.loads(told)
    assert code == 0
    assert [stage["name"] for stage in found["stages"]] == ["movers"]
    assert len(found["stages"][0]["heads"]) == 2


def test_ablate(folder, capsys):
    given = ("circuits", "ablate", folder, "ioi", "--prompts", 6, "--heads", "1.1,2.0")
    code, told, err = run(capsys, *given)
    assert (code, err) == (0, "")
    assert told.splitlines()[0].split() == ["accuracy", "among", "options", "logit", "difference"]
    for more in ((), ("--everywhere",)):
        code, told, _ = run(capsys, *given, *more, "--kind", "resample", "--json")
        found = json.loads(told)
        assert set(found) == {"as it is", "resample"}
        assert found["as it is"]["logit difference"] != found["resample"]["logit difference"]


def test_repair(folder, tmp_path, capsys):
    recipe = tmp_path / "repair.yml"
    given = ("--stages", 1, "--repair", recipe)
    small = ("--prompts", 6, "--allow-small-gap", "--top", 0.5)
    code, _, _ = run(capsys, "circuits", "discover", folder, "ioi", *small, *given)
    assert code == 0
    text = recipe.read_text().replace("prompts: 48", "prompts: 5")
    recipe.write_text(text.replace("random_sets: 10", "random_sets: 2"))
    code, told, err = run(capsys, "circuits", "repair", recipe, "--model", folder)
    assert (code, err) == (0, "")
    assert "random 2" in told
    assert "heads look at wrong1, wrong2; new mistakes:" in told
    code, told, _ = run(capsys, "circuits", "repair", recipe, "--model", folder, "--json")
    assert json.loads(told)["prompts"] == 5
    code, told, err = run(capsys, "circuits", "repair", recipe)
    assert (code, told) == (1, "")
    assert "names no model; give --model" in err


def test_tasks(capsys):
    code, told, err = run(capsys, "circuits", "tasks")
    assert (code, err) == (0, "")
    assert "colored_objects_natural" in told
    code, told, _ = run(capsys, "circuits", "tasks", "--json")
    assert json.loads(told)["capitals"]["prompt"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["discover", "nowhere", "ioi"], "nowhere"),
        (["discover", "{folder}", "oio"], "there is no task 'oio'"),
        (["discover", "{folder}", "ioi", *map(str, SMALL[:3]), "--top", "0"], "top is 0.0"),
        (["discover", "{folder}", "ioi", "--html", "nowhere/x.html"], "no such folder"),
        (["ablate", "{folder}", "ioi", "--heads", "1"], "write LAYER.HEAD"),
        (["ablate", "{folder}", "ioi", "--heads", "9.9"], "head 9.9 does not exist"),
        (["overlap", "nowhere.json", "nowhere.json"], "no such circuit"),
        (["repair", "nowhere.yml"], "no such recipe"),
    ],
)
def test_bad_input(folder, capsys, args, said):
    code, out, err = run(capsys, "circuits", *(arg.format(folder=folder) for arg in args))
    assert (code, out) == (1, "")
    assert said in err
    assert "Traceback" not in err


def test_python_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pluribus.inspect.circuits.patching.GAP", 0.0)
    text = PAGE.read_text("utf-8").replace("n=64", "n=3")
    code = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(code) == 1
    model = head_models.llama(vocabulary=1500, layers=25, heads=8)
    names = {"model": model, "tokenizer": head_models.tokenizer()}
    exec(code[0], names)
    assert (tmp_path / "ioi.json").is_file()
    found: object = names["effects"]
    assert found.position == "S2"  # type: ignore[attr-defined]
    recipe = re.findall(r"^```text\n(circuit_repair.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "repair.yml").write_text(recipe[0])
    from pluribus.inspect.circuits.recipe import load

    assert load("repair.yml").chosen() == [(24, 4), (29, 0)]
