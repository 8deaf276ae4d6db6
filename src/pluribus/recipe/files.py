"""The small files of a merged model: configuration, tokenizer, chat template."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pluribus.engine import provenance
from pluribus.engine.plan import Plan
from pluribus.recipe.expand import Expanded
from pluribus.tokenizer import (
    chat_template,
    read_chat_template,
    write_chat_template,
    write_tokenizer,
)
from pluribus.tokenizer.files import COPIED

NAMES = ("tokenizer_config.json", "chat_template.jinja")


def made_files(expanded: Expanded) -> tuple[dict[str, bytes], list[str]]:
    """Return all files that go beside the output's tensors, by name, and warnings.

    Raises TokenizerError for a tokenizer that cannot be written or a chat template that is none.
    """
    plan, recipe = expanded.plan, expanded.recipe
    files = provenance.carried(plan, Path("model"))
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokens = expanded.tokens
        if tokens is not None:
            files = {name: data for name, data in files.items() if not _is_tokenizer(name)}
            notes += write_tokenizer(folder, tokens.alignment, tokens.folders, donor=tokens.donor)
        template = None
        if recipe.chat_template is not None:
            inputs = [read_chat_template(path) for path in expanded.folders]
            template = chat_template(recipe.chat_template, inputs)
            if template is None:
                notes.append("chat_template: auto: no input has a chat template")
        if template is not None and tokens is None and not _has_tokenizer(files):
            notes.append("chat_template: the output has no tokenizer to hold it; it is left out")
        elif template is not None:
            if tokens is None:
                for name in NAMES:
                    if name in files:
                        (folder / name).write_bytes(files[name])
                files.pop("chat_template.json", None)
            write_chat_template(folder, template)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path.read_bytes()
    return files, notes


def without_carried(plan: Plan) -> Plan:
    """Return the plan without its model folder: all its files are given by `made_files`."""
    return replace(plan, carry=None)


def config_of(files: Mapping[str, bytes]) -> dict[str, object]:
    """Return the configuration among the files, or an empty one."""
    return json.loads(files["config.json"]) if "config.json" in files else {}


def _is_tokenizer(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in COPIED) or name == "chat_template.json"


def _has_tokenizer(files: Mapping[str, bytes]) -> bool:
    return any(name in files for name in ("tokenizer.json", "tokenizer_config.json")) or any(
        name.endswith(".model") for name in files
    )
