"""Low-rank parts as adapters that PEFT opens."""

import os
from pathlib import Path
from typing import Any

from torch import nn

from pluribus.core.errors import InputError, OutputError, listing
from pluribus.core.lowrank import CONFIG, save_adapter
from pluribus.route._inventory import is_transposed
from pluribus.route.parts import LowRank
from pluribus.route.routed import Routed


def to_peft(
    routed: Routed, name: str, folder: str | os.PathLike[str], *, base_model: str | None = None
) -> None:
    """Write one part as a PEFT LoRA folder; `base_model` is what PEFT loads it onto.

    Raises InputError for a part that PEFT cannot represent (anything but low-rank deltas of module
    weights) or an unknown one, OutputError if the folder holds an adapter already.
    """
    if (Path(folder) / CONFIG).exists():
        raise OutputError(f"{folder}: holds an adapter already; choose another folder")
    part = routed.part(name)
    odd = [n for n, d in part.items() if not (isinstance(d, LowRank) and n.endswith(".weight"))]
    if odd:
        raise InputError(
            f"part {name}: PEFT's LoRA holds low-rank deltas of module weights, not "
            f"{listing(odd)}; exclude them when the parts are made"
        )
    modules = dict(routed.base.named_modules())
    of: dict[str, Any] = {n: modules[n.removesuffix(".weight")] for n in part}
    save_adapter(
        folder,
        {n: (d.a, d.b) for n, d in part.items() if isinstance(d, LowRank)},
        base_model=base_model,
        embeddings=[n for n, module in of.items() if isinstance(module, nn.Embedding)],
        transposed=[n for n, module in of.items() if is_transposed(module)],
    )
