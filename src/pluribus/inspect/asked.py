"""What `pluribus inspect` asks of models beyond their weights: scores on tasks, and texts to run.

score(weights) -> {task: score}       for `connectivity` and `trial`
loaders, batches                      for `similarity`
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pluribus.core.errors import InputError, MissingError
from pluribus.core.pool import Pool
from pluribus.core.weights import Weights
from pluribus.inspect.inspection import Inspection

BATCH = 16  # texts in a batch
LENGTH = 128  # most tokens of a text


def completed(
    found: Inspection,
    pool: Pool,
    points: int,
    score: Callable[[Weights], Any] | None = None,
    tries: int = 0,
    models: Mapping[str, Any] | None = None,
    inputs: Sequence[Any] | None = None,
    threads: int | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Inspection:
    """Return an inspection with the lines, the trials and the similarity that were asked for."""
    if score is not None and tries:
        from pluribus.inspect.trial import methods_to_try, trials

        expected = [one.method for one in found.advice.expected]
        methods = methods_to_try(expected, found.advice.text, tries)
        tried = trials(pool, methods, score, threads=threads, on_step=on_step)
        found = replace(found, trials=tried)
    if score is not None and points:
        from pluribus.inspect.connectivity import connectivity

        walked = connectivity(pool, score, points=points, on_step=on_step)
        found = replace(found, connectivity=walked)
    if models is not None and inputs is not None:
        from pluribus.inspect.similarity import similarity

        found = replace(found, similarity=similarity(models, inputs, on_step=on_step))
    return found


def on_zoo(name: str, tasks: Sequence[str], limit: int | None) -> Callable[[Weights], Any]:
    """Return what scores weights of a zoo's encoder on its validation inputs: NAME or NAME:SEED.

    Raises InputError for an unknown zoo or task, MismatchError (when it is called) for weights of
    another encoder.
    """
    from pluribus.tasks.zoo import build

    name, _, number = name.partition(":")
    if number and not number.isdecimal():
        raise InputError(f"--zoo {name}:{number}: the seed must be a number, as in {name}:1")
    zoo = build(name, int(number or 0))
    chosen = list(tasks) or list(zoo.tasks)
    for task in chosen:
        zoo.score(zoo.base, task, "val", 1)  # an unknown task is told before any work

    def score(weights: Weights) -> Mapping[str, float]:
        state = {tensor: weights[tensor] for tensor in weights}
        return {task: zoo.score(state, task, "val", limit) for task in chosen}

    return score


def on_tasks(tasks: Sequence[str], limit: int | None) -> Callable[[Weights], Any]:
    """Return what scores a language model's weights on named tasks, on rows that a seed chose.

    Raises InputError for an unknown task, DataError if its data is not there.
    """
    from pluribus.tasks import named
    from pluribus.tasks.evaluate import evaluate_all
    from pluribus.tasks.language import CausalLM
    from pluribus.tasks.runs import fetch

    wanted = named.expand(tuple(tasks))
    for task in wanted:
        if task.prompt is None:
            raise InputError(f"{task.name} is of images; score weights of a zoo with --zoo NAME")
    fetch(wanted)

    def score(weights: Weights) -> Mapping[str, float]:
        system = CausalLM.open(weights)
        reports = evaluate_all([system], wanted, limit=limit).reports
        return {report.task: report.score for report in reports}

    return score


def language_models(pool: Pool) -> dict[str, Callable[[], Any]]:
    """Return functions that load the pool's language models, base first."""
    from pluribus.tasks.open_model import load

    return {model.label: lambda w=model: load(w, "cpu", "float32")[0] for model in pool.models}


def batches(path: Path, pool: Pool) -> list[dict[str, Any]]:
    """Tokenize a file of texts, one a line, with the first model's tokenizer.

    Raises MissingError for no such file, InputError for fewer than four texts.
    """
    from pluribus.core.optional import optional

    if not path.is_file():
        raise MissingError(f"{path}: no such file of texts, one a line")
    lines = path.read_text("utf-8").splitlines()
    texts = [line.strip() for line in lines if line.strip()]
    if len(texts) < 4:
        raise InputError(f"{path}: {len(texts)} texts; similarity needs at least four, one a line")
    folder = pool.models[0].folder
    if folder is None:
        raise MissingError(
            f"{pool.models[0].label}: no tokenizer beside the tensors; name a folder"
        )
    hf = optional("transformers", "hf", "running texts through language models")
    try:
        tokenizer = hf.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        told = str(error).strip().splitlines()[0]
        raise MissingError(f"{folder}: no tokenizer that can be opened ({told})") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    count = -(-len(texts) // BATCH)
    if len(texts) % BATCH in (1, 2, 3) and count > 1:
        count -= 1  # too few for a batch of their own: spread over the others
    return [
        dict(
            tokenizer(
                texts[i::count],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=LENGTH,
                return_token_type_ids=False,
            )
        )
        for i in range(count)
    ]
