"""A composite as a folder: `routed.json`, `parts.safetensors`, and the base's tensors.

    routed.json            parts, forms, router's and features' settings, digest of the base
    parts.safetensors      NUMBER/FORM.FIELD/TENSOR; vectors that masks share once
    router.safetensors     a `Gate`'s tensors
    heads.safetensors      TASK/weight, TASK/bias
    base/                  a transformers model, as it saves itself
    base.safetensors       any other module's state dict

A folder is written whole or not at all. Without the base's tensors (`base=False`) the loader wants
the module that has them, and checks that it is the one.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pluribus import __version__
from pluribus.core.errors import (
    FormatError,
    InputError,
    MismatchError,
    MissingError,
    OutputError,
    listing,
)
from pluribus.core.optional import optional
from pluribus.core.whole import whole_folder
from pluribus.route.parts import Bottleneck, Delta, Dense, LowRank, Masked, Scaled
from pluribus.route.routed import Routed
from pluribus.route.router import Gate

VERSION = 1
MANIFEST = "routed.json"
FORMS: dict[str, type] = {
    "low_rank": LowRank,
    "dense": Dense,
    "masked": Masked,
    "scaled": Scaled,
    "bottleneck": Bottleneck,
}
FIELDS = {
    "low_rank": ("a", "b"),
    "dense": ("values",),
    "masked": ("bits",),
    "scaled": ("gain",),
    "bottleneck": ("down", "down_bias", "up", "up_bias"),
}


def save(
    routed: Routed,
    folder: str | os.PathLike[str],
    *,
    base: bool = True,
    overwrite: bool = False,
    tokenizer: Any = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write a composite. Raises OutputError if the folder exists or cannot be written.

    A tokenizer goes beside a transformers base. `origin` says which zoo a base's module is from.

    Only a composite is ever replaced. A router that is not a `Gate`, or features that have no name,
    cannot be kept: InputError.
    """
    if routed.switched is not None:
        raise InputError(f"the base is switched to {routed.switched}; call switch(None) first")
    router = routed.router
    if router is not None and not isinstance(router, Gate):
        raise InputError(
            f"a {type(router).__name__} cannot be saved: only routers fitted here; give it again "
            "after loading (set_router), and save without one"
        )
    features = getattr(routed.features, "name", None)
    if features is None:
        raise InputError("features that are a function of your own have no name to be saved by")
    parts, activations = _tensors(routed)
    transformers_model = hasattr(routed.base, "save_pretrained")
    with whole_folder(check(folder, overwrite)) as stage:
        names = {"parts": json.dumps(list(routed.names))}
        save_file(parts, stage / "parts.safetensors", names)
        if isinstance(router, Gate):
            save_file(_whole(router.state_dict()), stage / "router.safetensors")
        if routed.heads:
            flat = {f"{t}/{n}": v for t, head in routed.heads.items() for n, v in head.items()}
            save_file(_whole(flat), stage / "heads.safetensors")
        kind = "reference"
        if base and transformers_model:
            routed.base.save_pretrained(stage / "base")  # type: ignore[operator]
            if tokenizer is not None:
                tokenizer.save_pretrained(stage / "base")
            kind = "transformers"
        elif base:
            save_file(_whole(routed.base.state_dict()), stage / "base.safetensors")
            kind = "module"
        table = {
            "format": "pluribus routed",
            "version": VERSION,
            "pluribus": __version__,
            "parts": list(routed.names),
            "top_k": routed.top_k,
            "features": features,
            "router": router.settings() if isinstance(router, Gate) else None,
            "activations": activations,
            "heads": sorted(routed.heads),
            "origin": dict(origin or {}),
            "base": {
                "kind": kind,
                "class": type(routed.base).__name__,
                "digest": digest(routed.base),
            },
        }
        (stage / MANIFEST).write_text(json.dumps(table, indent=1) + "\n", "utf-8")


def load(
    folder: str | os.PathLike[str], module: nn.Module | None = None, *, device: str = "cpu"
) -> Routed:
    """Read a composite that `save` wrote.

    `module` is the base: needed unless it is a transformers model that was saved along; its tensors
    are replaced by those saved, if they were. Raises MissingError, FormatError, or MismatchError
    for another base than the parts were made for.
    """
    folder = Path(os.path.expanduser(folder))
    table = manifest(folder)
    told = table["base"]
    if module is None and table["origin"].get("zoo"):
        module = zoo_of(table["origin"]).module()
    if module is None:
        if told["kind"] != "transformers":
            raise InputError(
                f"{folder}: give the base, a {told['class']}: the composite was saved "
                + ("without it" if told["kind"] == "reference" else "with its tensors alone")
            )
        module = _pretrained(folder / "base", told["class"])
    elif told["kind"] == "module":
        _fill(module, _read(folder / "base.safetensors"), folder)
    if digest(module) != told["digest"]:
        raise MismatchError(
            f"{folder}: this base has other tensors than the one the parts were made for; give "
            "that one, or build the composite anew"
        )
    parts = _parts(table, _read(folder / "parts.safetensors", table["parts"]), folder)
    heads: dict[str, dict[str, Tensor]] = {}
    if table["heads"]:
        for key, value in _read(folder / "heads.safetensors").items():
            task, _, name = key.rpartition("/")
            heads.setdefault(task, {})[name] = value
    routed = Routed(module, parts, features=table["features"], top_k=table["top_k"], heads=heads)
    if table["router"] is not None:
        routed.set_router(_gate(table["router"], folder))
    return routed.to(device)


def manifest(folder: Path) -> dict[str, Any]:
    """Read `routed.json`. Raises MissingError or FormatError."""
    where = folder / MANIFEST
    if not where.is_file():
        raise MissingError(f"{folder}: no composite in it ({MANIFEST} is not there)")
    try:
        table = json.loads(where.read_bytes())
        if table["format"] != "pluribus routed" or not table["parts"]:
            raise ValueError("another format")
        for key in (
            "top_k",
            "features",
            "router",
            "activations",
            "heads",
            "origin",
            "base",
            "version",
        ):
            table[key]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{where}: not the manifest of a composite ({error!r})") from None
    if table["version"] != VERSION:
        raise FormatError(
            f"{where}: version {table['version']!r} of the format; this release reads {VERSION}"
        )
    return table


def check(folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Return where a composite may be written, or raise OutputError: before the work."""
    out = Path(folder).expanduser()
    if out.exists():
        if not (out / MANIFEST).is_file():
            raise OutputError(f"{out}: exists and is no composite; choose another name")
        if not overwrite:
            raise OutputError(
                f"{out}: exists already; choose another name, or pass --overwrite to replace it"
            )
    if not out.absolute().parent.is_dir():
        raise OutputError(f"{out.parent}: no such folder to write into; create it")
    return out


def zoo_of(origin: Mapping[str, Any]) -> Any:
    """Return the zoo that a composite was made of."""
    from pluribus.tasks import zoo as zoos

    return zoos.build(origin["zoo"], origin["seed"], **origin["sizes"])


def tokenizer_of(folder: str | os.PathLike[str]) -> Any:
    """Return the tokenizer that was saved along. Raises MissingError if there is none."""
    hf = optional("transformers", "hf", "to read texts")
    try:
        return hf.AutoTokenizer.from_pretrained(Path(folder) / "base", local_files_only=True)
    except (OSError, ValueError):
        raise MissingError(f"{folder}: no tokenizer was saved with this composite") from None


def digest(module: nn.Module) -> str:
    """Return a digest of a module's tensors: names, types, shapes and bytes."""
    from xxhash import xxh3_128

    state = xxh3_128()
    for name, tensor in sorted(module.state_dict().items()):
        state.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return state.hexdigest()


def _tensors(routed: Routed) -> tuple[dict[str, Tensor], dict[str, str]]:
    found: dict[str, Tensor] = {}
    activations: dict[str, str] = {}
    vectors: dict[int, str] = {}
    forms = {cls: name for name, cls in FORMS.items()}
    for number, label in enumerate(routed.names):
        for name, delta in routed.part(label).items():
            form = forms[type(delta)]
            for field in FIELDS[form]:
                found[f"{number}/{form}.{field}/{name}"] = getattr(delta, field)
            if isinstance(delta, Bottleneck):
                activations[f"{number}/{name}"] = delta.activation
            if isinstance(delta, Masked):
                key = vectors.setdefault(id(delta.vector), f"vector.{len(vectors)}")
                found[f"{number}/masked.{key}/{name}"] = torch.zeros(0)
                found[key] = delta.vector
    return _whole(found), activations


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}


def _parts(
    table: Mapping[str, Any], found: Mapping[str, Tensor], folder: Path
) -> dict[str, dict[str, Delta | Bottleneck]]:
    fields: dict[tuple[int, str, str], dict[str, Any]] = {}
    for key, tensor in found.items():
        number, _, rest = key.partition("/")
        if not rest:
            continue
        what, _, name = rest.partition("/")
        form, _, field = what.partition(".")
        slot = fields.setdefault((int(number), name, form), {})
        if field.startswith("vector."):
            slot["vector"] = found[field]
        else:
            slot[field] = tensor
    parts: dict[str, dict[str, Delta | Bottleneck]] = {label: {} for label in table["parts"]}
    for (number, name, form), given in fields.items():
        if form == "bottleneck":
            given["activation"] = table["activations"][f"{number}/{name}"]
        try:
            parts[table["parts"][number]][name] = FORMS[form](**given)
        except (KeyError, IndexError, TypeError) as error:
            raise FormatError(f"{folder}: {name} of part {number} is not whole ({error})") from None
    return parts


def _gate(settings: Mapping[str, Any], folder: Path) -> Gate:
    tensors = _read(folder / "router.safetensors")
    try:
        gate = Gate(**settings)
        gate.load_state_dict(tensors)
    except (TypeError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise FormatError(f"{folder}: the router is not what {MANIFEST} says ({told})") from None
    return gate.eval().requires_grad_(False)


def _read(path: Path, parts: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Read a file of a composite; of the parts' file, their names as it was written must agree."""
    try:
        with safe_open(path, framework="pt") as file:
            names = (file.metadata() or {}).get("parts")
            if parts is not None and names is not None and json.loads(names) != list(parts):
                raise MismatchError(
                    f"{path}: holds the parts {listing(json.loads(names))} in this order; "
                    f"{MANIFEST} says {listing(parts)}"
                )
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise MissingError(f"{path}: named by {MANIFEST}, but not there") from None
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: not a whole safetensors file ({error})") from None


def _pretrained(folder: Path, kind: str) -> nn.Module:
    transformers = optional("transformers", "hf", "to open the composite's base")
    cls = getattr(transformers, kind, None)
    if cls is None:
        raise FormatError(f"{folder}: transformers has no {kind}; a newer release may")
    try:
        return cls.from_pretrained(folder).eval()
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder}: the base cannot be opened: {error}") from None


def _fill(module: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    own = {name: list(t.shape) for name, t in module.state_dict().items()}
    theirs = {name: list(t.shape) for name, t in weights.items()}
    if own != theirs:
        odd = next(n for n in {**theirs, **own} if own.get(n) != theirs.get(n))
        raise MismatchError(
            f"{folder}: {odd} is {theirs.get(odd, 'not there')} in the composite's base, but "
            f"{own.get(odd, 'not there')} in {type(module).__name__}"
        )
    module.load_state_dict(dict(weights))
