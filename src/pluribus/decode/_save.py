"""A `Fused` as a folder: `fused.json`, members in subfolders or by reference, a tokenizer.

    config.json      what transformers reads first
    fused.json       fuser, roles, templates, and each member's folder with a digest of its tensors
    members/N/       models as they save themselves; one for all roles that share it

A folder is written whole or not at all. A member given by reference stays where it is, and loading
checks that it is still the one. Digests are of tensors' names, types, shapes and bytes.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pluribus import __version__
from pluribus.core.errors import FormatError, InputError, MismatchError, MissingError, OutputError
from pluribus.core.optional import optional
from pluribus.core.whole import whole_folder
from pluribus.decode.fusers import build, settings_of
from pluribus.route.store import digest

if TYPE_CHECKING:
    from pluribus.decode.fused import Fused

VERSION = 1
MANIFEST = "fused.json"
KEYS = ("roles", "members", "fuser", "align", "prompts", "tokenizers")


def save(
    fused: "Fused",
    folder: str | os.PathLike[str],
    *,
    references: Mapping[str, str | os.PathLike[str]] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a fused model. `references` maps roles to folders whose weights are not copied.

    Only a fused model is ever replaced. Raises OutputError if the folder exists or cannot be
    written, InputError for an adapter's role, an unknown role, or a fuser of one's own.
    """
    fuser = settings_of(fused.fuser)
    references = {role: Path(path).expanduser() for role, path in (references or {}).items()}
    for role in references:
        if role not in fused.roles:
            raise InputError(f"references names {role!r}; roles are {', '.join(fused.roles)}")
    for role, one in fused.members_by_role.items():
        if one.adapted is not None:
            raise InputError(
                f"the role {role!r} is a model with an adapter; merge it (merge_and_unload) and "
                "save that, or write a stack recipe with BASE+ADAPTER"
            )
    number: dict[int, int] = {}
    for one in fused.members_by_role.values():
        number.setdefault(id(one.module), len(number))
    of_module = {id(fused.members_by_role[role].module): path for role, path in references.items()}
    with whole_folder(check(folder, overwrite)) as stage:
        told = []
        (stage / "members").mkdir()
        for key, i in number.items():
            module: Any = next(m for m in fused.members if id(m) == key)
            if key in of_module:
                told.append({"folder": str(of_module[key].absolute()), "digest": digest(module)})
                continue
            with _quiet():
                module.save_pretrained(stage / "members" / str(i))
            told.append({"folder": f"members/{i}", "digest": digest(module)})
        fused.config.architectures = [type(fused).__name__]
        fused.config.save_pretrained(stage)
        fused.generation_config.save_pretrained(stage)
        spoken: dict[int, str] = {}
        for one in fused.tokenizers.values():
            if id(one) not in spoken:
                spoken[id(one)] = f"tokenizers/{len(spoken)}"
                one.save_pretrained(stage / spoken[id(one)])
        if fused.tokenizers:
            from pluribus.decode._score import tokenizer_of

            tokenizer_of(fused).save_pretrained(stage)
        table = {
            "format": "pluribus fused",
            "version": VERSION,
            "pluribus": __version__,
            "roles": {r: number[id(one.module)] for r, one in fused.members_by_role.items()},
            "members": told,
            "fuser": fuser,
            "align": fused.config.align,
            "prompts": fused.prompts,
            "tokenizers": {role: spoken[id(one)] for role, one in fused.tokenizers.items()},
        }
        (stage / MANIFEST).write_text(json.dumps(table, indent=1) + "\n", "utf-8")


def load(
    folder: str | os.PathLike[str],
    *,
    device: Any = None,
    dtype: Any = "auto",
    **_: Any,
) -> "Fused":
    """Read a fused model; its logits are those it was saved with, bit for bit.

    `device` is one for all, or a mapping from roles; `dtype` an element type for all members.
    What else transformers' `from_pretrained` hands on is not needed.
    Raises MissingError, FormatError, or MismatchError for a member that is another by now.
    """
    from pluribus.decode.fused import Fused

    hf = optional("transformers", "hf", "to open a fused model")
    folder = Path(folder).expanduser()
    table = manifest(folder)
    modules = [_member(folder, one, dtype) for one in table["members"]]
    try:
        models = {role: modules[number] for role, number in table["roles"].items()}
        paths = table["tokenizers"]
        opened = {p: hf.AutoTokenizer.from_pretrained(folder / p) for p in set(paths.values())}
    except (IndexError, TypeError, OSError, ValueError) as error:
        raise FormatError(f"{folder}: not a whole fused model ({error})") from None
    tokenizers = {role: opened[path] for role, path in paths.items()} or None
    devices = device if isinstance(device, Mapping) else None
    fused = Fused(models, build(table["fuser"]), tokenizers, table["align"], devices)
    fused.set_prompts(table["prompts"])
    if (folder / "generation_config.json").is_file():
        fused.generation_config = hf.GenerationConfig.from_pretrained(folder)
    return fused if device is None or devices is not None else fused.to(device)


def manifest(folder: Path) -> dict[str, Any]:
    """Read `fused.json`. Raises MissingError or FormatError."""
    where = folder / MANIFEST
    if not where.is_file():
        raise MissingError(f"{folder}: no fused model in it ({MANIFEST} is not there)")
    try:
        table = json.loads(where.read_bytes())
        if table["format"] != "pluribus fused" or not table["roles"]:
            raise ValueError("another format")
        version = table["version"]
        for key in KEYS:
            table[key]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{where}: not the manifest of a fused model ({error!r})") from None
    if version != VERSION:
        raise FormatError(f"{where}: version {version!r} of the format; this one reads {VERSION}")
    return table


def _member(folder: Path, told: Any, dtype: Any) -> Any:
    if not isinstance(told, Mapping) or not {"folder", "digest"} <= set(told):
        raise FormatError(f"{folder / MANIFEST}: a member needs a folder and a digest")
    where = folder / told["folder"]  # an absolute one stays as it is
    if (where / MANIFEST).is_file():
        module: Any = load(where, dtype=dtype)
    elif not (where / "config.json").is_file():
        raise MissingError(f"{where}: this member of {folder} is not there any more")
    else:
        try:
            module = _opened(where, "auto")
        except (OSError, ValueError, RuntimeError) as error:
            raise FormatError(f"{where}: this member cannot be opened: {error}") from None
    if digest(module) != told["digest"]:
        raise MismatchError(
            f"{where}: has other tensors than the member that was saved; give that one, or save "
            "the fused model anew"
        )
    if dtype in (None, "auto") or (where / MANIFEST).is_file():
        return module
    return _opened(where, dtype)  # not cast: tables of angles stay in float32


def _opened(where: Path, dtype: Any) -> Any:
    hf = optional("transformers", "hf", "to open a fused model")
    with _quiet():
        return hf.AutoModelForCausalLM.from_pretrained(where, dtype=dtype, local_files_only=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Show no bars of transformers' own for each member."""
    told = optional("transformers.utils.logging", "hf", "to open a fused model")
    shown = told.is_progress_bar_enabled()
    told.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            told.enable_progress_bar()


def check(folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Return where a fused model may be written, or raise OutputError."""
    out = Path(folder).expanduser()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not (out / MANIFEST).is_file():
            raise OutputError(f"{out}: exists and is no fused model; choose another name")
        if not overwrite:
            raise OutputError(f"{out}: exists already; choose another name, or overwrite=True")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"{out.parent}: no such folder to write into; create it")
    return out
