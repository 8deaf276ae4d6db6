"""What a page may start: an allow-list of commands, each with a form for its arguments.

A form makes a list of arguments, never a line for a shell. Values stand behind `--option=` or
behind `--`, so none is taken for an option, and whatever a command writes goes into the run's own
folder.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pluribus.catalogue import Card
from pluribus.core.errors import InputError, nearest
from pluribus.core.merger import Facts
from pluribus.core.whole import whole_file
from pluribus.ui.forms import FORMS, MEMORY, Field, Form

LONGEST = 4000  # characters of a value
MOST = 64  # lines of a value
PARAMETER = "parameter:"  # what a field's name begins with that is a merge method's own
QUOTES = "'"
METHOD = "method"  # the form that a merge method's own card makes


def form(name: str) -> Form:
    """Return a form. Raises InputError with the nearest name."""
    known = {one.name: one for one in FORMS}
    if name not in known:
        raise InputError(
            f"{name[:40]!r} cannot be started from a page; these can: {', '.join(known)}."
            + nearest(name[:40], known)
        )
    return known[name]


def offered(card: Card) -> list[tuple[Form, dict[str, str]]]:
    """Return the forms on a card's page, each with the values it begins with."""
    if not card.built:
        return []
    found: list[tuple[Form, dict[str, str]]] = []
    if (merge := method_form(card)) is not None:
        found.append((merge, {}))
    if card.record is not None:
        found.append((form("claims"), {"claim": card.record.name}))
    for one in FORMS:
        if card.package in one.cards or card.name in one.cards:
            own = one.name == "scale" and not card.system
            found.append((one, {"strategies": card.name} if own else {}))
    return found


def method_form(card: Card) -> Form | None:
    """Return the form that merges by one method, or None for what is no merge method."""
    if not isinstance(card.facts, Facts):
        return None
    own = tuple(_parameter(name, told) for name, told in card.parameters.items())
    base = Field(
        name="base", label="Base model", required=card.facts.base == "required", hint="a folder"
    )
    experts = Field(name="experts", label="Experts, one a line", kind="lines", required=True)
    return Form(
        name=f"{METHOD}:{card.name}",
        command=("merge",),
        title=f"Merge models by {card.name}",
        fields=(base, experts, *own, MEMORY),
        outputs=(("", "merged"),),
    )


def _parameter(name: str, told: str) -> Field:
    """Return the field of a parameter: a choice where its type names all there is."""
    kind, _, default = told.rpartition(" = ")
    choices = ("True", "False") if kind == "bool" else tuple(re.findall(r"'([^']*)'", kind))
    if " | ".join(map(repr, choices)) != kind and kind != "bool":
        return Field(name=f"{PARAMETER}{name}", label=name, hint=told)
    hint = f"default: {default.strip(QUOTES)}"
    return Field(name=f"{PARAMETER}{name}", label=name, kind="choice", choices=choices, hint=hint)


def arguments(form: Form, values: Mapping[str, str], folder: Path) -> list[str]:
    """Return the arguments of a command. Raises InputError for a value that is missing or wrong."""
    options, positional = [], []
    for field in form.fields:
        given = told(field, values)
        if field.kind == "flag":
            options += [field.option] if given else []
        elif field.option:
            options += [f"{field.option}={given[0]}"] if given else []
        else:
            positional += given
    for option, name in form.outputs:
        place = str(folder / name)
        if option:
            options.append(f"{option}={place}")
        else:
            positional.append(place)
    return [*form.command, *form.fixed, *options, "--", *positional]


def told(field: Field, values: Mapping[str, str]) -> list[str]:
    """Return what a field holds, line by line. Raises InputError naming it."""
    text = values.get(field.name, "").strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines and field.required:
        raise InputError(f"{field.label}: is missing")
    if len(text) > LONGEST or len(lines) > MOST:
        raise InputError(f"{field.label}: at most {LONGEST} characters in {MOST} lines")
    if field.kind != "lines" and len(lines) > 1:
        raise InputError(f"{field.label}: one line, not {len(lines)}")
    if any(not line.isprintable() for line in lines):
        raise InputError(f"{field.label}: holds characters that cannot be printed")
    if field.kind == "choice" and lines and lines[0] not in field.choices:
        known = ", ".join(field.choices)
        raise InputError(f"{field.label}: {lines[0]!r} is none of {known}")
    if field.kind == "number" and lines:
        try:
            float(lines[0])
        except ValueError:
            raise InputError(f"{field.label}: {lines[0]!r} is no number") from None
    return lines


def recipe(form: Form, method: str, values: Mapping[str, str], cwd: Path) -> str:
    """Return the recipe (YAML) that a merge method's form describes. Raises InputError."""
    import yaml

    parts = {field.name: told(field, values) for field in form.fields}
    parameters = {}
    for field in form.fields:
        if field.name.startswith(PARAMETER) and parts[field.name]:
            parameters[field.name.removeprefix(PARAMETER)] = _value(field, parts[field.name][0])
    written = {
        "merge_method": method,
        "base_model": _place(parts["base"][0], cwd) if parts["base"] else None,
        "models": [{"model": _place(name, cwd)} for name in parts["experts"]],
        "parameters": parameters,
    }
    return yaml.safe_dump({key: value for key, value in written.items() if value}, sort_keys=False)


def _value(field: Field, text: str) -> Any:
    """Return what a parameter's text means: a choice as it is, anything else as YAML has it."""
    import yaml

    if field.kind == "choice":
        return {"True": True, "False": False}.get(text, text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{field.label}: {text!r} is no value") from None


def _place(name: str, cwd: Path) -> str:
    """Return a path that means the same beside the recipe, or a name that is no path as it is."""
    path = Path(name).expanduser()
    return str(cwd / path) if (cwd / path).exists() else name


def prepared(form: Form, values: Mapping[str, str], folder: Path, cwd: Path) -> list[str]:
    """Return the arguments of a run; a method's form writes its recipe into the run's folder."""
    kind, _, method = form.name.partition(":")
    if kind != METHOD:
        return arguments(form, values, folder)
    text = recipe(form, method, values, cwd)
    with whole_file(folder / "recipe.yml") as part:
        part.write_text(text, "utf-8")
    memory = told(MEMORY, values) or [MEMORY.default]
    rest = [str(folder / "recipe.yml"), str(folder / "merged")]
    return [*form.command, f"--memory={memory[0]}", "--", *rest]


def program(words: Sequence[str]) -> list[str]:
    """Return what to execute: this Python with this package."""
    return [sys.executable, "-m", "pluribus", *words]
