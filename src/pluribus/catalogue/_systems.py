"""The published systems: one file a system, read where this package lies.

`systems/NAME.toml` holds what a card says that no code says yet: title, summary, needs, data,
trains, at, where, memory, inference; of a planned one also paper and package. A system is built as
soon as the file or folder that `code` names, or a claim of its name, is there. A built one takes
paper, documentation and parameters from its code.
"""

import dataclasses
import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pluribus.catalogue._card import AT, DATA, WHERE, Card
from pluribus.catalogue._families import Method, methods
from pluribus.catalogue.records import records
from pluribus.core.errors import FormatError, nearest

HERE = Path(__file__).parent
WORDS = ("title", "summary", "needs", "data", "trains", "memory", "inference")  # always there
LISTS = {"at": AT, "where": WHERE}
OPTIONAL = ("paper", "package", "code", "command", "claim")


@dataclasses.dataclass(frozen=True)
class System:
    """A file of `systems`: the card as far as it goes, and where its code is to be."""

    card: Card
    code: str  # a file or a folder below the package, or nothing
    claim: str


@cache
def systems() -> dict[str, System]:
    """Return all systems by name. Raises FormatError for a file that is no card."""
    folder = resources.files("pluribus.catalogue") / "systems"
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda one: one.name):
        if entry.name.endswith(".toml"):
            name = entry.name.removesuffix(".toml")
            found[name] = read(name, entry.read_text("utf-8"))
    return found


def read(name: str, text: str) -> System:
    """Read one file. Raises FormatError naming it, the key and what was expected."""
    where = f"catalogue/systems/{name}.toml"
    try:
        told = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FormatError(f"{where}: not TOML: {error}") from None
    known = (*WORDS, *LISTS, *OPTIONAL)
    for key in told:
        if key not in known:
            raise FormatError(f"{where}: there is no {key!r} in a card.{nearest(key, known)}")
    for key in (*WORDS, *LISTS):
        if not told.get(key):
            raise FormatError(f"{where}: {key} is missing")
    for key, value in told.items():
        allowed = DATA if key == "data" else LISTS.get(key)
        for one in value if key in LISTS else [value]:
            if not isinstance(one, str) or (allowed is not None and one not in allowed):
                options = "a text" if allowed is None else f"one of {', '.join(allowed)}"
                raise FormatError(f"{where}: {key} is {one!r}; expected {options}")
    code, claim = told.get("code", ""), told.get("claim", name)
    package = told.get("package") or code.split("/")[0].removesuffix(".py")
    if not package:
        raise FormatError(f"{where}: give package, where it is to be built, or code, where it is")
    here = HERE.parent
    built = (bool(code) and (here / code).exists()) or (
        here / "claims" / f"{claim.replace('-', '_')}.py"
    ).exists()
    values: dict[str, Any] = {key: told[key] for key in (*WORDS, *LISTS)}
    values |= {key: tuple(values[key]) for key in LISTS}
    card = Card(
        name=name,
        package=package,
        paper=told.get("paper", ""),
        command=told.get("command", f"pluribus claims {claim}") if built else "",
        built=built,
        system=True,
        record=records().get(claim),
        **values,
    )
    return System(card, code, claim)


def joined(system: System, method: Method | None) -> Card:
    """Return the card of a system with what its code says: a registered method, or its files."""
    card, record = system.card, system.card.record
    paper = card.paper or (record.paper if record is not None else "")
    if method is not None:
        return dataclasses.replace(
            card,
            paper=method.facts.paper or paper,
            facts=method.facts,
            parameters=method.parameters,
            doc=method.doc,
        )
    return dataclasses.replace(card, paper=paper, doc=_doc(system.code))


def _doc(code: str) -> str:
    """Return the docstring of a file or a package, read but not imported."""
    import ast
    import inspect

    path = HERE.parent / code
    path = path / "__init__.py" if path.is_dir() else path
    if not code or not path.is_file():
        return ""
    return inspect.cleandoc(ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "")


@cache
def cards() -> tuple[Card, ...]:
    """Return every card by name: systems, and the methods of families that are no system."""
    by_file = {method.file: method for method in methods()}
    known = systems().values()
    taken = {system.code for system in known}
    found = [joined(system, by_file.get(system.code)) for system in known]
    found += [method.card() for file, method in by_file.items() if file not in taken]
    return tuple(sorted(found, key=lambda card: card.name))
