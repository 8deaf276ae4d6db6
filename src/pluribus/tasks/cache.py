"""Keep trained weights in the cache folder, and trust them only if every byte is as written.

One safetensors file per zoo under `zoos/` of the cache folder. Its name ends in the digest of all
that decides its contents; its header carries the digest of its tensors. A file that can't be read
or doesn't match counts as absent. Writes go to a temporary name and are renamed.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pluribus.core.errors import OutputError
from pluribus.core.whole import whole_file


def digest(parts: Iterable[str | Tensor]) -> str:
    """Return one digest over texts and over tensors: dtype, shape and bytes, in order."""
    state = xxhash.xxh3_128()
    for part in parts:
        if isinstance(part, str):
            state.update(f"{len(part)}:{part}".encode())
        else:
            state.update(f"{part.dtype}{list(part.shape)}".encode())
            state.update(part.contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def load(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of an intact file, or None."""
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = (file.metadata() or {}).get("digest")
    except (OSError, SafetensorError):
        return None
    return weights if written == _contents(weights) else None


def save(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the tensors under their final name only when whole; warn if that can't be done."""
    try:
        with whole_file(path, parents=True) as part:
            whole = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(whole, part, {"digest": _contents(weights)})
    except OutputError as error:
        warnings.warn(
            f"{path.name} was built but not kept for next time: {error}; "
            "set PLURIBUS_CACHE to a folder that can be written",
            stacklevel=2,
        )


def _contents(weights: Mapping[str, Tensor]) -> str:
    return digest(part for name in sorted(weights) for part in (name, weights[name]))
