"""`pluribus eval` and lm-evaluation-harness take a stack, or a saved fused model, as any model."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pluribus

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from members import moved, tiny, tokenizer  # type: ignore[import-not-found]

STACK = "models: {large: large, base: small, expert: expert}\nfuser: {kind: static, alpha: 0.7}\n"
PYTHON = os.environ.get("LM_EVAL_PYTHON") or (
    sys.executable if importlib.util.find_spec("lm_eval") else None
)
TASK = """\
task: local_reviews
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Review: {{{{question}}}}\\nSentiment:"
doc_to_choice: ["negative", "positive"]
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
ROWS = [("a fine film", 1), ("a dull film", 0), ("tired and long", 0), ("12 34 56", 1), ("far", 0)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    base = tiny(1)
    for name, model in {"large": tiny(0), "small": base, "expert": moved(base, 2)}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "up.yml").write_text(STACK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_stack_is_opened_by_name(place):
    from pluribus.decode.stack import open_reference
    from pluribus.tasks import runs
    from pluribus.tasks.language import CausalLM
    from pluribus.tasks.openers import opener

    assert opener("up.yml") is not None
    with runs.merged("up.yml") as what:
        system = CausalLM.open(what)
    assert system.model.fuser.alpha == 0.7
    open_reference("up.yml").model.save_pretrained(place / "saved")
    assert CausalLM.open("saved").digest() == system.digest()
    questions = [f"Review: {text}\nSentiment:" for text, _ in ROWS]
    scores, _ = system.choice_scores(questions, [" negative", " positive"])
    assert torch.equal(
        scores, CausalLM.open("saved").choice_scores(questions, [" negative", " positive"])[0]
    )


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="needs lm-eval: set LM_EVAL_PYTHON")
def test_the_harness_drives_it(place):
    data = place / "reviews.jsonl"
    data.write_text("".join(json.dumps({"question": q, "label": n}) + "\n" for q, n in ROWS))
    (place / "tasks").mkdir()
    (place / "tasks" / "local.yaml").write_text(TASK.format(data=data))
    source = str(Path(pluribus.__file__).parents[1])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    clean = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf"), "PYTHONPATH": path}
    got = subprocess.run(
        [
            *(str(PYTHON), "-m", "pluribus", "eval", "up.yml", "--harness", "--json"),
            *("--tasks", "local_reviews", "--include", "tasks"),
        ],
        env=os.environ | clean,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert got.returncode == 0, got.stderr
    [report] = json.loads(got.stdout)["reports"]
    from pluribus.decode.stack import open_reference

    fused, words = open_reference("up.yml")
    hits = 0
    for question, label in ROWS:
        start = words(f"Review: {question}\nSentiment:")["input_ids"]
        totals = []
        for answer in (" negative", " positive"):
            rest = words(answer)["input_ids"]
            with torch.no_grad():
                logits = fused(torch.tensor([start + rest])).logits[0]
            totals.append(sum(float(logits[len(start) - 1 + i, t]) for i, t in enumerate(rest)))
        hits += (totals[1] > totals[0]) == bool(label)
    assert report["score"] == hits / len(ROWS)
    assert (report["metric"], report["n"]) == ("acc", 5)
