"""Choosing among answers: as `pluribus eval` does it, beside lm-evaluation-harness.

    LM_EVAL_PYTHON=.venv-lm/bin/python python benchmarks/eval_speed.py MODEL --out results.json

MODEL is a folder that transformers loads; LM_EVAL_PYTHON a Python with lm-eval (its own
environment). For every task the same rows, questions and answers go to both, each in a process of
its own, in turn, `--repeats` times: the harness's `hf` model with its default settings but for
`--batch`, and `CausalLM`. Loading a model is not counted. Prints seconds, their ratio, peak memory,
versions, and how far the log-likelihoods of all answers are apart, which must be rounding.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""

THEIRS = """
import json, resource, sys, time
import lm_eval, torch, transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
model, folder, name, batch, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
lm = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=int(batch))
manager = TaskManager(include_path=folder)
began = time.perf_counter()
found = lm_eval.simple_evaluate(
    model=lm, tasks=[name], task_manager=manager, log_samples=True, bootstrap_iters=0
)
seconds = time.perf_counter() - began
samples = sorted(found["samples"][name], key=lambda one: one["doc_id"])
scores = [[float(answer[0][0]) for answer in one["resps"]] for one in samples]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
versions = {"lm_eval": lm_eval.__version__, "torch": torch.__version__,
            "transformers": transformers.__version__}
print(json.dumps({"seconds": seconds, "peak_mb": peak, "scores": scores, "versions": versions}))
"""

OURS = """
import json, resource, sys, time
import torch, transformers
import pluribus
from pluribus.tasks.language import CausalLM
model, folder, name, batch, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
rows = [json.loads(line) for line in open(f"{folder}/{name}.jsonl")]
lm = CausalLM.open(model)
began = time.perf_counter()
scores, _ = lm.choice_scores([row["question"] for row in rows], rows[0]["choices"])
seconds = time.perf_counter() - began
counts = [
    [len(rest) for rest in lm._tokens(row["question"], row["choices"]).rests] for row in rows
]
scores = (scores * torch.tensor(counts)).tolist()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
versions = {"pluribus": pluribus.__version__, "torch": torch.__version__,
            "transformers": transformers.__version__}
print(json.dumps({"seconds": seconds, "peak_mb": peak, "scores": scores, "versions": versions}))
"""


def written(folder: Path, name: str, shots: int, limit: int) -> dict[str, int]:
    """Write a task's rows, behind worked examples, and its file for the harness; return sizes."""
    from pluribus.tasks import named
    from pluribus.tasks.task import sample

    task = named.get(name)
    assert task.prompt is not None
    examples = task.load()
    rows = sample(examples.test, limit, 0, "test")
    choices = task.prompt.choices(examples.classes)
    before = task.prompt.before(sample(examples.train, shots, 0, "shots"), examples.classes)
    name = f"{name}_{shots}"
    data = folder / f"{name}.jsonl"
    with data.open("w") as file:
        for row in rows:
            told = {
                "question": before + task.prompt.ask(row),
                "choices": choices,
                "label": row.target,
            }
            file.write(json.dumps(told) + "\n")
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    return {"questions": len(rows), "answers": len(choices)}


def run(python: str, script: str, *given: Any) -> dict[str, Any]:
    """Run a script and return what it printed last."""
    clean = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    made = subprocess.run(
        [python, "-c", script, *map(str, given)],
        env=os.environ | clean,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        raise SystemExit(f"{python} failed:\n{made.stderr[-2000:]}")
    return json.loads(made.stdout.strip().splitlines()[-1])


def spread(values: list[float]) -> dict[str, float]:
    """Return the middle and the ends."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 3) for name, value in found.items()}


def compared(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """Return times, ratios by repeat, memory, and how far the scores are apart."""
    pairs = zip(theirs[0]["scores"], ours[0]["scores"], strict=True)
    apart = max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(theirs, ours, strict=True)]
    return {
        "lm_eval_s": spread([one["seconds"] for one in theirs]),
        "pluribus_s": spread([one["seconds"] for one in ours]),
        "lm_eval_over_pluribus": spread(ratios),
        "lm_eval_peak_mb": round(max(one["peak_mb"] for one in theirs)),
        "pluribus_peak_mb": round(max(one["peak_mb"] for one in ours)),
        "log_likelihoods_apart": float(f"{apart:.2g}"),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("model", help="a folder that transformers loads")
    arguments.add_argument("--tasks", nargs="+", default=["sst2", "trec", "banking77"])
    arguments.add_argument("--shots", type=int, nargs="+", default=[0, 5], help="worked examples")
    arguments.add_argument("--limit", type=int, default=40, help="questions of each task")
    arguments.add_argument("--batch", type=int, default=8, help="of the harness")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    python = os.environ.get("LM_EVAL_PYTHON")
    if not python:
        raise SystemExit("set LM_EVAL_PYTHON to a Python that has lm-eval")
    result: dict[str, Any] = {"rows": [], "repeats": given.repeats, "threads": given.threads}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for task, shots in itertools.product(given.tasks, given.shots):
            sizes = written(folder, task, shots, given.limit)
            theirs, ours = [], []
            for repeat in range(given.repeats):
                common = (given.model, folder, f"{task}_{shots}", given.batch, given.threads)
                theirs.append(run(python, THEIRS, *common))
                ours.append(run(sys.executable, OURS, *common))
                print(f"{task}, {shots} shots: repeat {repeat + 1}", file=sys.stderr, flush=True)
            told = {"task": task, "shots": shots, **sizes, **compared(theirs, ours)}
            result["rows"].append(told)
            result["versions"] = {"lm_eval": theirs[0]["versions"], "pluribus": ours[0]["versions"]}
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
