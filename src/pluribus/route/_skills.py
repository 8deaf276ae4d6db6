"""Around an inventory: the layers it adapts, what it has learned, fixed mixtures, its file.

One safetensors file: `a/LAYER`, `b/LAYER`, `z/LAYERS`, and `own_a/TASK/LAYER`, `own_b/TASK/LAYER`;
the metadata's `pluribus` holds settings, tasks and the base's digest.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pluribus.core.errors import (
    InputError,
    OutputError,
    listing,
    nearest,
)
from pluribus.core.lowrank import save_adapter
from pluribus.core.whole import whole_file
from pluribus.route._adapter_file import read as read_file
from pluribus.route._inventory import TaskRouter, widths
from pluribus.route.parts import LowRank

Granularity = Literal["layer", "module", "block", "stack", "model"]
FORMAT = "pluribus mhr 1"


@dataclass(frozen=True)
class Routing:
    """What one table of routing logits has learned.

    `sparsity` is the share of skills that are on (sigmoid(Z) rounds to 1), `discreteness` the mean
    entropy of those choices in bits (0: decided), `efficiency` the entropy of the tasks' mean
    weights over ln S (1: all skills are used alike), `largest` the largest |Z|.
    """

    sparsity: float
    discreteness: float
    efficiency: float
    largest: float


@dataclass(frozen=True, eq=False)
class Collapsed:
    """A mixture that is fixed, as an ordinary LoRA: factors (r, c) and (R, r) by tensor name."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    transposed: frozenset[str]  # names of tensors that lie (inputs, outputs)
    task_type: str | None = None  # by which PEFT chooses its wrapper

    def part(self) -> dict[str, LowRank]:
        """Return it as a part for `Routed`."""
        return {name: LowRank(a, b) for name, (a, b) in self.factors.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return it under PEFT's names, at scale 1."""
        found = {}
        for name, (a, b) in self.factors.items():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            down, up = (b.t(), a.t()) if name in self.transposed else (a, b)
            found[f"{stem}.lora_A.weight"] = down.contiguous()
            found[f"{stem}.lora_B.weight"] = up.contiguous()
        return found

    def save(self, folder: str | os.PathLike[str], *, base_model: str | None = None) -> None:
        """Write it as a folder that PEFT reads."""
        save_adapter(
            folder,
            self.factors,
            base_model=base_model,
            transposed=self.transposed,
            config={"task_type": self.task_type},
        )


def task_type(model: nn.Module) -> str | None:
    """Return PEFT's name for what a model is; None for any module."""
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    config = getattr(model, "config", None)
    return "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"


def targets(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Return the layers to adapt by name. Raises InputError for none, or another kind of module."""
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise InputError(f"targets {pattern!r} is no regular expression: {error}") from None
    modules = {path: module for path, module in model.named_modules() if path}
    found = {path: module for path, module in modules.items() if wanted.fullmatch(path)}
    if not found:
        linear = [path for path, module in modules.items() if isinstance(module, nn.Linear)]
        raise InputError(
            f"targets {pattern!r} matches no module; it is matched against whole names, such as "
            f"{listing(linear) or 'none, as the model has no linear layer'}."
            f"{nearest(pattern, modules)}"
        )
    for path, module in found.items():
        try:
            widths(module)
        except InputError as error:
            raise InputError(f"targets {pattern!r} matches {path}: {error}") from None
        above = path.rpartition(".")[0]
        if isinstance(modules.get(above, model if not above else None), nn.MultiheadAttention):
            raise InputError(
                f"targets {pattern!r} matches {path}, which torch.nn.MultiheadAttention reads "
                "without calling it; leave it out"
            )
    return found


def shared_by(path: str, granularity: Granularity) -> str:
    """Return the name of what shares one table of logits."""
    pieces = path.split(".")
    numbers = [i for i, piece in enumerate(pieces) if piece.isdigit()]
    if granularity == "layer":
        return path
    if granularity == "module":
        return ".".join(pieces[:-1])
    if granularity == "block":
        return ".".join(pieces[: numbers[0] + 1] if numbers else pieces[:1])
    if granularity == "stack":
        return ".".join(pieces[: numbers[0]] if numbers else pieces[:1])
    return ""


def routing(router: TaskRouter) -> Routing:
    """Return what a table of logits has learned."""
    with torch.no_grad():
        z = router.table().double().view(-1, router.heads, router.skills)
        p = torch.sigmoid(z)
        rest = torch.sigmoid(-z)
        bits = -(p * p.clamp(min=1e-300).log2() + rest * rest.clamp(min=1e-300).log2())
        mean = (p / p.sum(-1, keepdim=True)).mean(0)  # (h, S)
        entropy = -(mean * mean.clamp(min=1e-300).log()).sum(-1).mean()
    spread = float(entropy) / math.log(router.skills) if router.skills > 1 else 1.0
    return Routing(float(p.round().mean()), float(bits.mean()), spread, float(z.abs().max()))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a saved inventory: its settings and tensors. Raises MissingError or FormatError."""
    return read_file(path, FORMAT, ("settings", "tasks", "own", "base"), "an inventory")


def write(
    out: Path, table: Mapping[str, Any], tensors: Mapping[str, Tensor], *, overwrite: bool
) -> None:
    """Write an inventory, whole or not at all. Raises OutputError."""
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already; choose another name, or pass overwrite=True")
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    told = {"pluribus": json.dumps({"format": FORMAT, **table})}
    with whole_file(out, parents=True) as part:
        save_file(whole, part, told)
