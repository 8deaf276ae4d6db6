"""lm-evaluation-harness on a model folder: its own `hf` model and tasks, its figures as Reports.

The package is the extra `eval`. Task names are the harness's; `include` is a folder of task files
of one's own (YAML), as for `lm_eval --include_path`.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pluribus.core.errors import InputError, MissingError, need
from pluribus.tasks.evaluate import Report, versions
from pluribus.tasks.openers import opener

PREFERRED = ("acc_norm", "acc", "exact_match", "f1")


def harness(
    folder: str | Path,
    tasks: Sequence[str],
    *,
    label: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
    include: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    batch_size: int = 8,
) -> list[Report]:
    """Evaluate a model folder and return one Report a task, with the first metric of `PREFERRED`.

    The harness takes the first `limit` rows; shots None is what each task says. Raises ExtraError
    without lm-eval, MissingError if the folder is no model, InputError for a task it doesn't know.
    """
    folder = Path(folder).expanduser()
    system = opener(folder)
    if system is None and not (folder / "config.json").is_file():
        raise MissingError(f"{folder}: no model folder; the harness reads one with config.json")
    if include is not None and not Path(include).expanduser().is_dir():
        raise MissingError(f"{include}: no such folder of task files")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise need("lm-eval", "eval", "the evaluation harness") from None
    path = None if include is None else str(Path(include).expanduser())
    manager = TaskManager(include_path=path)
    known = set(manager.all_tasks)
    if unknown := [name for name in tasks if name not in known]:
        own = "" if include is None else f" nor in {include}"
        raise InputError(f"lm-eval has no task '{unknown[0]}'{own}; see `lm_eval ls tasks`")
    began = time.perf_counter()
    model: Any = "hf"
    arguments: dict[str, Any] | None = {"pretrained": str(folder), "dtype": dtype}
    if system is not None:  # several models as one, which the harness cannot open itself
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

        fused, tokenizer = system.language(folder, device)
        model, arguments = HFLM(pretrained=fused, tokenizer=tokenizer, batch_size=batch_size), None
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(tasks),
        num_fewshot=shots,
        batch_size=batch_size,
        device=device,
        limit=limit,
        bootstrap_iters=1000,
        task_manager=manager,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert found is not None  # it is None in the other processes of a distributed run only
    seconds = time.perf_counter() - began
    return [
        _report(name, found, label or str(folder), seed, seconds / len(tasks)) for name in tasks
    ]


def _report(name: str, found: Mapping[str, Any], label: str, seed: int, seconds: float) -> Report:
    told = found["results"].get(name) or found.get("groups", {}).get(name, {})
    values = {
        key: value
        for key, value in told.items()
        if isinstance(value, int | float) and "," in key and "_stderr," not in key
    }
    if not values:
        raise InputError(f"lm-eval gave no figure for '{name}'; name its subtasks instead")
    ranked = sorted(values, key=lambda key: _rank(key.partition(",")[0]))
    metric, _, how = ranked[0].partition(",")
    error = told.get(f"{metric}_stderr,{how}")
    counts = found.get("n-samples", {}).get(name, {})
    others = ", ".join(f"{key.partition(',')[0]} {values[key]:.4f}" for key in ranked[1:])
    return Report(
        task=name,
        system=label,
        metric=metric,
        score=float(values[ranked[0]]),
        standard_error=float(error) if isinstance(error, int | float) else None,
        n=int(counts.get("effective", 0)),
        of=int(counts.get("original", 0)),
        seed=seed,
        settings={"harness": "lm-eval", "shots": found.get("n-shot", {}).get(name)},
        seconds=seconds,
        versions=versions(),
        notes=(f"also {others}",) if others else (),
    )


def _rank(metric: str) -> int:
    return PREFERRED.index(metric) if metric in PREFERRED else len(PREFERRED)
