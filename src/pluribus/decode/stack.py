"""A stack: a YAML file that says which models write together, and how. And who opens it.

    models: {ref: large/, tuned: small-chat/, base: small/}     # folders, BASE+ADAPTER, hub names
    fuser: {kind: eft, weights: 1.0}
    prompts: {tuned: chat, ref: "Question: {prompt}\nAnswer:"}   # optional, by role
    align: same | prefix         device: cpu | {role: device}         dtype: float32

Paths are looked for beside the file first. Two roles with the same reference share one model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import yaml
from pydantic import Field, ValidationError

from pluribus.core.errors import InputError, MismatchError, PluribusError, RecipeError
from pluribus.decode._prompts import check_templates
from pluribus.decode._save import MANIFEST, load
from pluribus.decode.fusers import build as fuser_of
from pluribus.recipe.single import Placed, fault, single

if TYPE_CHECKING:
    from pluribus.decode.fused import Fused
    from pluribus.tasks.systems import ZooSystem
    from pluribus.tasks.zoo import Zoo

NAME = "stack.yml"


class Stack(Placed):
    """Models in roles, a fuser, and where they run."""

    models: dict[str, str] = Field(min_length=1)
    fuser: dict[str, Any]
    prompts: dict[str, str] = Field(default_factory=dict)
    align: Literal["same", "prefix"] = "same"
    device: str | dict[str, str] = "cpu"
    dtype: str = "float32"


class Opened(NamedTuple):
    """A model that writes, and the tokenizer of its ids."""

    model: Any
    tokenizer: Any


def read(path: str | Path) -> Stack:
    """Read a stack's file (or `stack.yml` in a folder).

    Raises MissingError, or RecipeError with file, line and the nearest key.
    """
    path = Path(path).expanduser()
    path = path / NAME if path.is_dir() else path
    document = single(path, "a stack")
    try:
        stack = Stack.model_validate(document.value)
    except ValidationError as error:
        raise RecipeError(fault(error, str(path), document)) from None
    try:
        fuser_of(stack.fuser).check_roles(list(stack.models))
        check_templates(stack.prompts, list(stack.models))
        if isinstance(stack.device, dict):
            _check_devices(stack.device, stack)
    except PluribusError as error:
        raise RecipeError(f"{path}: {error}") from None
    stack._folder = path.parent
    return stack


def build(stack: Stack, device: str | None = None) -> Opened:
    """Open all models of a stack. `device` goes before the stack's.

    Raises what opening models raises, InputError for a device that does not work here,
    MismatchError for tokenizers that differ.
    """
    from pluribus.core.weights import Weights
    from pluribus.decode._score import tokenizer_of
    from pluribus.decode.fused import Fused
    from pluribus.tasks.device import usable
    from pluribus.tasks.open_model import load as open_model

    placed = stack.device if device is None else device
    devices = placed if isinstance(placed, dict) else dict.fromkeys(stack.models, placed)
    for where in dict.fromkeys(devices.values()):
        usable(where)
    opened: dict[str, tuple[Any, Any]] = {}
    for role, reference in stack.models.items():
        if reference not in opened:
            where = devices.get(role, "cpu")
            opened[reference] = open_model(
                Weights.open(_found(stack, reference)), where, stack.dtype
            )
    models = {role: opened[reference][0] for role, reference in stack.models.items()}
    tokenizers = {role: opened[reference][1] for role, reference in stack.models.items()}
    fused = Fused(models, fuser_of(stack.fuser), tokenizers, stack.align)
    fused.set_prompts(stack.prompts)
    return Opened(fused, tokenizer_of(fused))


def _check_devices(devices: Mapping[str, str], stack: Stack) -> None:
    for role in devices:
        if role not in stack.models:
            raise InputError(f"device names {role!r}; roles are {', '.join(stack.models)}")


def _found(stack: Stack, reference: str) -> str:
    """Return a reference with the paths in it placed; an adapter's parts each."""
    return "+".join(stack.place(part) for part in reference.split("+"))


def open_reference(reference: str | Path, device: str = "cpu", dtype: str = "float32") -> Opened:
    """Open what writes: a stack's file, a saved fused model, any system folder, or a plain model.

    Raises MissingError, RecipeError, FormatError or MismatchError of whoever opens it.
    """
    from pluribus.core.weights import Weights
    from pluribus.tasks.open_model import load as open_model
    from pluribus.tasks.openers import opener

    path = Path(reference).expanduser()
    if (path / MANIFEST).is_file() or STACKS.takes(path):
        return Opened(*STACKS.language(path, device))
    if path.suffix in (".yml", ".yaml"):
        raise RecipeError(
            f"{path}: is no stack: a stack has 'models' by role and a 'fuser'; merge a recipe first"
            if path.is_file()
            else f"{path}: no such stack"
        )
    if (found := opener(reference)) is not None:
        return Opened(*found.language(reference, device))
    return Opened(*open_model(Weights.open(reference), device, dtype))


class Stacks:
    """Opens stacks and folders that `save_pretrained` wrote; see `pluribus.tasks.openers`."""

    def takes(self, path: Path) -> bool:
        """Whether this is a stack: a folder with one, or a YAML file with models and a fuser."""
        if path.is_dir():
            return (path / NAME).is_file()
        if path.suffix not in (".yml", ".yaml") or not path.is_file():
            return False
        try:
            found = yaml.safe_load(path.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            return False  # whoever reads recipes says what is wrong with it
        return isinstance(found, Mapping) and {"models", "fuser"} <= set(found)

    def language(self, folder: str | Path, device: str) -> "tuple[Fused, Any]":
        """Return the fused model and the tokenizer of its ids."""
        path = Path(folder).expanduser()
        if not (path / MANIFEST).is_file():
            opened = build(read(path), None if device == "cpu" else device)
            return opened.model, opened.tokenizer
        from pluribus.decode._score import tokenizer_of

        fused = load(path, device=device)
        return fused, tokenizer_of(fused)

    def of_zoo(self, folder: str | Path, zoo: "Zoo", label: str, device: str) -> "ZooSystem":
        """Raise MismatchError: zoos classify, and this writes."""
        raise MismatchError(
            f"{label} combines language models while they write; it answers no zoo's tasks. Score "
            "it on texts: leave --zoo out"
        )


STACKS = Stacks()
