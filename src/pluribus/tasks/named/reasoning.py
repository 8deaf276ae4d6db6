"""Reasoning: BIG-Bench Hard and GSM8K, answered in writing, and StrategyQA, yes or no."""

from functools import partial

from pluribus.core.errors import FormatError
from pluribus.tasks import sets
from pluribus.tasks.scorers import EXACT, NUMERIC
from pluribus.tasks.sources import BBH
from pluribus.tasks.task import Example, Examples, Prompt, Task, Text


def _field(row: dict, key: str, name: str) -> str:
    if not isinstance(row.get(key), str):
        raise FormatError(f"the set {name} has a row whose {key} is {row.get(key)!r}, not a text")
    return row[key]


def _split(name: str, rows: list[tuple[str, Example]], classes: tuple[str, ...] = ()) -> Examples:
    test = [example for split, example in rows if split == "test"]
    if not test:
        raise FormatError(f"the set {name} has no test rows for this task")
    return Examples(test, [example for split, example in rows if split != "test"], classes)


def bbh(task: str) -> Examples:
    """Return one of the 27 tasks."""
    rows = [
        (row["split"], Example(Text(_field(row, "input", "bbh")), _field(row, "target", "bbh")))
        for row in sets.records("bbh")
        if row.get("task") == task
    ]
    return _split("bbh", rows)


def gsm8k() -> Examples:
    """Return word problems with their final numbers, and worked solutions for the shots."""
    rows = []
    for row in sets.records("gsm8k"):
        question, worked, final = (_field(row, k, "gsm8k") for k in ("question", "answer", "final"))
        rows.append((row["split"], Example(Text(question), final, f"{worked}\n#### {final}")))
    return _split("gsm8k", rows)


def strategyqa() -> Examples:
    """Return questions to be answered with no (0) or yes (1)."""
    classes = ("no", "yes")
    rows = []
    for row in sets.records("strategyqa"):
        if row.get("label") not in classes:
            raise FormatError(f"the set strategyqa has the label {row.get('label')!r}")
        question = Text(_field(row, "question", "strategyqa"))
        rows.append((row["split"], Example(question, classes.index(row["label"]))))
    return _split("strategyqa", rows, classes)


_WRITTEN = Prompt(template="Q: {text}\nA:", stop=("\nQ:", "\n\n"), max_tokens=80)
_WORKED = Prompt(template="Question: {text}\nAnswer:", stop=("\nQuestion:", "\n\n"), max_tokens=256)

TASKS = [
    *(
        Task(
            name=f"bbh/{name}",
            load=partial(bbh, name),
            score=EXACT,
            family="answer",
            prompt=_WRITTEN,
            data=("bbh", sets.TEXTS),
        )
        for name in BBH
    ),
    Task(
        name="gsm8k",
        load=gsm8k,
        score=NUMERIC,
        family="answer",
        prompt=_WORKED,
        data=("gsm8k", sets.TEXTS),
    ),
    Task(
        name="strategyqa",
        load=strategyqa,
        prompt=Prompt(template="Question: {text}\nAnswer yes or no:"),
        data=("strategyqa", sets.TEXTS),
    ),
]
GROUPS = {"bbh": tuple(f"bbh/{name}" for name in BBH)}
