"""Problems of a file, or of a named task.

A file has one JSON object a line: `question`, and of `answer`, `tests` and `id` what there is. A
named task must be answered in writing (`bbh/...`, `gsm8k`): its own template, stop texts and length
are used, and answers are compared as its scorer does.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pluribus.core.errors import FormatError, InputError, MissingError, nearest
from pluribus.decode.scaling._prompts import check_fields, fill
from pluribus.decode.scaling.answers import Extract, extractor, number
from pluribus.decode.scaling.interface import DRAWN, Problem, Sampling

FIELDS = ("question", "answer", "tests", "id")


class Problems(NamedTuple):
    """Problems, and how completions of them are drawn unless something else is asked for."""

    name: str
    problems: list[Problem]
    sampling: Sampling


def load(
    where: str,
    *,
    limit: int | None = None,
    template: str = "",
    extract: str | None = None,
    seed: int = 0,
) -> Problems:
    """Return the problems of a .jsonl file or a named task; `limit` takes the first, or a sample.

    `template` puts questions of a file into a prompt: a text with {question}. Raises MissingError,
    FormatError with the line, or InputError for a task that is answered by choosing.
    """
    if limit is not None and limit < 1:
        raise InputError(f"{limit} problems were asked for; give at least 1")
    if where.endswith((".jsonl", ".json")) or Path(where).expanduser().is_file():
        found = of_file(Path(where).expanduser(), template, extract)
        return Problems(Path(where).name, found[:limit], DRAWN)
    if template:
        raise InputError(f"the task {where} has its own template; leave --template out")
    return of_task(where, limit, extract, seed)


def of_file(path: Path, template: str = "", extract: str | None = None) -> list[Problem]:
    """Return the problems of a file. Raises MissingError, FormatError."""
    if template:
        check_fields("the template", template, ("question",))
    how = extractor("final" if extract is None else extract)
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        near = nearest(path.name, [entry.name for entry in beside])
        raise MissingError(f"{path}: no such file of problems.{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: not a text file in UTF-8 that can be read ({error})") from None
    found = []
    for place, line in enumerate(lines, 1):
        if line.strip():
            told = _row(path, place, line)
            asked = fill(template, question=told["question"]) if template else told["question"]
            if (answer := told.get("answer")) is not None:
                answer = _canonical(how, answer)
            found.append(
                Problem(
                    question=asked,
                    answer=answer,
                    tests=told.get("tests"),
                    id=told.get("id", str(place)),
                    extract=how,
                )
            )
    if not found:
        raise FormatError(f"{path}: holds no problem")
    return found


def _row(path: Path, place: int, line: str) -> dict[str, str]:
    where = f"{path}, line {place}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise FormatError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, Mapping) or not isinstance(row.get("question"), str):
        raise FormatError(f"{where}: expected an object with a question, not {line[:60]}")
    told: dict[str, str] = {}
    for key, value in row.items():
        if key not in FIELDS:
            raise FormatError(
                f"{where}: there is no field '{key}'; a problem has {', '.join(FIELDS)}."
                f"{nearest(key, FIELDS)}"
            )
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise FormatError(f"{where}: {key} is {value!r}; expected a text or a number")
        told[key] = str(value)
    return told


def _canonical(how: Extract, answer: str) -> str:
    """Return an answer as the extractor would tell it, so that both are written alike."""
    if how is number and (found := number(answer)) is not None:
        return found
    return answer.strip()


def of_task(name: str, limit: int | None, extract: str | None = None, seed: int = 0) -> Problems:
    """Return the problems of a named task that is answered in writing."""
    from pluribus.tasks import named
    from pluribus.tasks.scorers import NUMERIC
    from pluribus.tasks.task import sample

    task = named.get(name)
    if task.family != "answer" or task.prompt is None:
        raise InputError(
            f"{name} is answered by choosing a class; scaling needs answers in writing: bbh/..., "
            "gsm8k, or a file of problems"
        )
    rows = sample(task.load().test, limit, seed)
    found = []
    for place, row in enumerate(rows):
        target = str(row.target)
        how: Extract = number if task.score is NUMERIC else _short(target)
        how = how if extract is None else extractor(extract)
        answer = how(target)
        found.append(
            Problem(
                question=task.prompt.ask(row),
                answer=target if answer is None else answer,
                id=f"{name}/{place}/{row.identity()[-64:].hex()[-16:]}",
                extract=how,
            )
        )
    settings: dict[str, Any] = {"max_tokens": task.prompt.max_tokens, "stop": task.prompt.stop}
    return Problems(name, found, replace(DRAWN, **settings))


def _short(target: str) -> Extract:
    """Return what finds answers to a target as `tasks.scorers.same_answer` compares them."""
    import re

    from pluribus.tasks.scorers import OPTION, short_answer

    def letter(text: str) -> str | None:
        answer = short_answer(text)
        found = OPTION.search(answer) or re.match(r"([A-Za-z])(?:[).:]|\s|$)", answer)
        return found.group(1).upper() if found else None

    def words(text: str) -> str | None:
        return " ".join(short_answer(text).lower().split()) or None

    return letter if OPTION.fullmatch(target) else words
