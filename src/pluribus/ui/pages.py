"""Templates and what they show. Everything from outside is escaped; nothing is marked as safe."""

import datetime
import hashlib
import json
import unicodedata
from functools import cache
from importlib import resources
from typing import Any

import jinja2

from pluribus import catalogue
from pluribus.ui import commands
from pluribus.ui.store import Run

CHOICES = {  # of the filters, by the name of their field
    "data": (("", "any"), ("none", "no data"), ("unlabelled", "no labels")),
    "trains": (("", "any"), ("no", "trains nothing"), ("yes", "trains something")),
    "at": (("", "any time"), *((at, catalogue.STAGES[at]) for at in catalogue.AT)),
    "where": (("", "anywhere"), *((w, catalogue.PLACES[w]) for w in catalogue.WHERE)),
    "state": (("", "any"), ("built", "built"), ("planned", "planned")),
}
LABELS = {
    "data": "Data",
    "trains": "Training",
    "at": "When it acts",
    "where": "Where it recombines",
    "state": "State",
}
SHORT_DATA = {"none": "no data", "unlabelled": "inputs, no labels", "labelled": "labelled data"}
MEANS = {
    "running": "running",
    "done": "done",
    "failed": "failed",
    "cancelled": "cancelled",
    "killed": "killed",
    "lost": "lost",
}
TYPES = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}


def _clean(value: Any) -> Any:
    """Replace characters that a page would obey: controls, and those that turn text around."""
    if not isinstance(value, str) or value.isprintable():
        return value
    kept = "".join(
        "\ufffd" if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cs", "Cf") else c
        for c in value
    )
    return type(value)(kept)


@cache
def static(name: str) -> tuple[bytes, str, str]:
    """Return a file's bytes, type and digest. Raises KeyError for what there is not."""
    kind = TYPES[name.rpartition(".")[2]]
    if name not in ("ui.css", "ui.js"):
        raise KeyError(name)
    body = (resources.files("pluribus.ui") / "static" / name).read_bytes()
    return body, kind, hashlib.sha256(body).hexdigest()[:12]


@cache
def _environment() -> jinja2.Environment:
    folder = resources.files("pluribus.ui") / "templates"

    def load(name: str) -> str | None:
        entry = folder / name
        return entry.read_text("utf-8") if entry.is_file() else None

    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_clean,
    )
    made.globals |= {
        "CHOICES": CHOICES,
        "LABELS": LABELS,
        "PLACES": catalogue.PLACES,
        "SHORT_DATA": SHORT_DATA,
        "static": lambda name: f"/static/{name}?v={static(name)[2]}",
    }
    made.filters |= {"moment": _moment, "lasted": _lasted, "bytes": _bytes}
    return made


def page(name: str, **values: Any) -> str:
    """Return a rendered template."""
    return _environment().get_template(name).render(**values)


def _moment(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _lasted(run: Run) -> str:
    if run.ended is None:
        return "–"
    seconds = run.ended - run.began
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _bytes(count: int) -> str:
    return f"{count} B" if count < 1000 else f"{count / 1000:.0f} kB"


def pretty(body: bytes) -> str:
    """Return a JSON document with indents, or the text as it is."""
    text = body.decode("utf-8", "replace")
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except ValueError:
        return text


def form_of(name: str) -> commands.Form:
    """Return a form by its name, a merge method's own included. Raises InputError, RecipeError."""
    kind, _, method = name.partition(":")
    if kind == commands.METHOD:
        found = commands.method_form(catalogue.card(method))
        if found is not None:
            return found
    return commands.form(name)
