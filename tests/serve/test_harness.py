"""lm-evaluation-harness asks the server, by both of its interfaces to OpenAI's protocol.

Set LM_EVAL_PYTHON to a Python that has lm-eval with its extra `api`; without it, and without
lm-eval here, these tests are skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from server_help import greedy, tiny, tokenizer, trio
from serving import background

from pluribus.decode import DynamicFusion, Fused
from pluribus.serve import Served
from pluribus.serve.prompts import PLAIN_STOP, plain

PYTHON = os.environ.get("LM_EVAL_PYTHON") or (
    sys.executable if importlib.util.find_spec("lm_eval") else None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="needs lm-eval: set LM_EVAL_PYTHON"),
]
DATA = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
CHOICE = """\
task: local_reviews
output_type: multiple_choice
doc_to_text: "Review: {{question}}\\nSentiment:"
doc_to_choice: ["negative", "positive"]
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
WRITE = """\
task: local_write
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: ["e"], max_gen_toks: 9}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROWS = [("a fine film", 1), ("a dull film", 0), ("tired and long", 0), ("12 34 56", 1)]
WORDS = tokenizer()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    made = tmp_path_factory.mktemp("harness")
    data = made / "reviews.jsonl"
    data.write_text("".join(json.dumps({"question": q, "label": n}) + "\n" for q, n in ROWS))
    (made / "tasks").mkdir()
    for name, task in {"choice": CHOICE, "write": WRITE}.items():
        (made / "tasks" / f"{name}.yaml").write_text(task + DATA.format(data=data))
    WORDS.save_pretrained(made / "words")
    return made


@pytest.fixture(scope="module")
def models():
    return {"plain": tiny(3), "fused": Fused(trio(), DynamicFusion())}


@pytest.fixture(scope="module")
def url(models):
    with background({name: Served(name, one, WORDS) for name, one in models.items()}) as found:
        yield found


SCRIPT = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

tasks, told = TaskManager(include_path="tasks"), []
for name, settings, wanted, chat in json.load(sys.stdin):
    found = simple_evaluate(
        model=name, model_args=settings, tasks=wanted, task_manager=tasks, apply_chat_template=chat
    )
    samples = {
        task: [[one["doc"]["question"], one["resps"]] for one in rows]
        for task, rows in found["samples"].items()
    }
    told.append([found["results"], samples])
print("TOLD" + json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(place, url):
    """Results and samples by task of each model and interface, by one process: it starts slowly."""
    clean = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf"), "OPENAI_API_KEY": "-"}
    settings = {"env": os.environ | clean, "cwd": place, "capture_output": True, "text": True}
    needed = [str(PYTHON), "-c", "import aiohttp, tenacity"]
    if subprocess.run(needed, **settings).returncode:
        pytest.skip("needs lm-eval's extra api")
    more = f"tokenizer={place / 'words'},num_concurrent=3"
    runs = [
        (
            "local-completions",
            f"model={name},base_url={url}/completions,{more}",
            ["local_reviews", "local_write"],
            False,
        )
        for name in ("plain", "fused")
    ]
    chat = f"model=plain,base_url={url}/chat/completions,num_concurrent=3"
    runs.append(("local-chat-completions", chat, ["local_write"], True))
    got = subprocess.run(
        [str(PYTHON), "-c", SCRIPT], input=json.dumps(runs), timeout=400, **settings
    )
    assert got.returncode == 0, got.stderr
    plain_one, fused, chatted = json.loads(got.stdout.rpartition("TOLD")[2])
    return {"plain": plain_one, "fused": fused, "chat": chatted}


@pytest.mark.parametrize("name", ["plain", "fused"])
def test_local_completions(told, models, name):
    """Log-likelihoods of answers, and texts until a stop text."""
    results, samples = told[name]
    model, hits = models[name], 0
    scored = dict(samples["local_reviews"])
    for question, label in ROWS:
        start = WORDS(f"Review: {question}\nSentiment:")["input_ids"]
        totals = []
        for answer in (" negative", " positive"):
            rest = WORDS(answer)["input_ids"]
            with torch.no_grad():
                table = model(torch.tensor([start + rest])).logits[0].log_softmax(-1)
            totals.append(sum(float(table[len(start) - 1 + i, t]) for i, t in enumerate(rest)))
        given = [float(one[0][0]) for one in scored[question]]
        assert given == pytest.approx(totals, abs=1e-3)
        hits += (totals[1] > totals[0]) == bool(label)
    assert results["local_reviews"]["acc,none"] == hits / len(ROWS)
    for question, [[text]] in samples["local_write"]:
        found = greedy(model, WORDS(question)["input_ids"], 9)
        whole = WORDS.decode([i for i in found if i], skip_special_tokens=True)
        assert text == whole.partition("e")[0]


def test_local_chat_completions(told, models):
    results, samples = told["chat"]
    assert results["local_write"]["exact_match,none"] == 0
    assert len(samples["local_write"]) == len(ROWS)
    for question, [[text]] in samples["local_write"]:
        start = plain([{"role": "user", "content": question}])
        found = greedy(models["plain"], WORDS(start)["input_ids"], 9)
        whole = WORDS.decode([i for i in found if i], skip_special_tokens=True)
        assert text == whole.partition("e")[0].partition(PLAIN_STOP)[0]
