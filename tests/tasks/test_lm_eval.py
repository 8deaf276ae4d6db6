"""lm-evaluation-harness reads our outputs, on a task of our own, in its own environment.

Set LM_EVAL_PYTHON to a Python that has lm-eval and what pluribus needs; without it, and without
lm-eval here, these tests are skipped.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pluribus

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))
import tiny_model

PYTHON = os.environ.get("LM_EVAL_PYTHON") or (
    sys.executable if importlib.util.find_spec("lm_eval") else None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="needs lm-eval: set LM_EVAL_PYTHON"),
]
ROWS = [
    {"question": "a fine film", "label": 1},
    {"question": "a dull film", "label": 0},
    {"question": "tired and long", "label": 0},
    {"question": "12 34 56", "label": 1},
    {"question": "far from it", "label": 0},
]
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


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Two models, a recipe of their mean, and a task file with its data."""
    for name, seed in (("a", 0), ("b", 1)):
        tiny_model.save(tmp_path / name, seed)
    (tmp_path / "mean.yml").write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\n")
    data = tmp_path / "reviews.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(data=data))
    return tmp_path


def run(where, *arguments):
    """Run the command line in the environment that has lm-eval."""
    source = str(Path(pluribus.__file__).parents[1])
    clean = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(where / "hf"), "PYTHONPATH": source}
    return subprocess.run(
        [str(PYTHON), "-m", "pluribus", *map(str, arguments)],
        cwd=where,
        env=os.environ | clean,
        capture_output=True,
        text=True,
        timeout=300,
    )


@torch.inference_mode()
def accuracy(folder):
    """The harness's score by hand: the whole log-likelihood of each answer, no normalisation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hits = []
    for row in ROWS:
        start = tokenizer(f"Review: {row['question']}\nSentiment:")["input_ids"]
        scores = []
        for answer in (" negative", " positive"):
            rest = tokenizer(answer)["input_ids"]
            logits = model(input_ids=torch.tensor([start + rest])).logits[0].log_softmax(-1)
            places = range(len(start) - 1, len(start) + len(rest) - 1)
            scores.append(sum(logits[i, t].item() for i, t in zip(places, rest, strict=True)))
        hits.append(scores[1] > scores[0])
    return sum(h == bool(row["label"]) for h, row in zip(hits, ROWS, strict=True)) / len(ROWS)


def test_the_harness_scores_a_merged_model_as_by_hand(bench):
    merged = run(bench, "merge", "mean.yml", "merged")
    assert merged.returncode == 0, merged.stderr
    got = run(
        *(bench, "eval", "merged", "a", "--harness", "--tasks", "local_reviews"),
        *("--include", "tasks", "--json"),
    )
    assert got.returncode == 0, got.stderr
    reports = {entry["system"]: entry for entry in json.loads(got.stdout)["reports"]}
    for name in ("merged", "a"):
        wanted = accuracy(bench / name)
        assert reports[name]["score"] == wanted
        error = math.sqrt(wanted * (1 - wanted) / (len(ROWS) - 1))
        assert reports[name]["standard_error"] == pytest.approx(error)
        assert (reports[name]["metric"], reports[name]["n"], reports[name]["of"]) == ("acc", 5, 5)
    assert "lm_eval" in reports["a"]["versions"]


def test_says_which_task_the_harness_lacks(bench):
    got = run(bench, "eval", "a", "--harness", "--tasks", "local_review", "--include", "tasks")
    assert got.returncode == 1
    assert "lm-eval has no task 'local_review' nor in tasks" in got.stderr
