"""Assemble a mixture of experts: open and compare, make the gates, stream the tensors.

The models' headers are compared before anything is computed, and the output appears under its name
when it is whole. Tensors are streamed; only gates are held (and the base, where gates come of its
states; and the mixture itself, where gates are trained on its loss).
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from pluribus.core.errors import NonFiniteError, OutputError
from pluribus.core.shapes import Float
from pluribus.core.weights import Weights, carried_files
from pluribus.engine.driver import Options, Result, check_options, execute, target_of
from pluribus.engine.plan import Job, Plan
from pluribus.engine.run import Progress
from pluribus.engine.sink import _is_model, check_parent
from pluribus.recipe.lines import read
from pluribus.route.moe import gates as made
from pluribus.route.moe import parts as models
from pluribus.route.moe.gates import OnStep
from pluribus.route.moe.gating import fine_tuned, gates_of, lazy, tokenizer_of
from pluribus.route.moe.parts import Parts
from pluribus.route.moe.recipe import Expert, MoeRecipe
from pluribus.route.moe.train import TrainingReport
from pluribus.tasks.device import usable

TOKENIZER = "tokenizer_config.json"
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that a file may leave open


@dataclass(frozen=True, kw_only=True)
class MoeReport:
    """What an assembly made."""

    out: str
    architecture: str
    model: str  # class in transformers
    gate_mode: str
    experts: list[dict[str, Any]]  # name, source, scales, number of prompts and texts
    shared: list[dict[str, Any]]
    experts_per_token: int
    layers: int
    conditions: list[float]  # condition number of each layer's gates
    total: int  # numbers in all tensors
    active: int  # of those, what one token passes
    dtype: str
    training: TrainingReport | None
    warnings: list[str]
    seconds: float
    bytes_written: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and text, for JSON."""
        return dataclasses.asdict(self)


def assemble(
    recipe: MoeRecipe,
    out: str | os.PathLike[str],
    *,
    options: Options | None = None,
    device: str = "cpu",
    on_step: OnStep | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> MoeReport:
    """Write the mixture of a recipe into the folder `out`.

    `device` is where the base runs for its states, and the mixture while its gates are trained;
    `on_step` is told (stage, done, total) of that, `on_progress` the bytes of writing. Raises
    PluribusError for models that do not fit, prompts or texts that are not there, values that are
    not finite, or an output that exists.
    """
    options = options or Options()
    check_options(options)
    usable(device)
    path = target_of(out)
    _check_place(path, options)
    parts = models.opened(recipe)
    for one in (parts.base, *parts.experts, *parts.shared):
        if one.folder is not None and path.exists() and path.samefile(one.folder):
            raise OutputError(
                f"{out}: {one.label} is read from there, and it would be replaced; choose another "
                "output"
            )
    config = models.written_config(recipe, parts)
    texts = _texts(recipe, parts)
    rows, own, report = gates_of(recipe, parts, texts, device, on_step)
    if recipe.gate_mode == "trained" and recipe.train.steps:
        assert report is not None
        rows, own = fine_tuned(recipe, parts, config, rows, own, texts, report, device, on_step)
    trained = recipe.gate_mode == "trained"
    every = rows if own is None or trained else torch.cat([rows, own], 1)
    conditions = made.conditions(every, trained)
    notes = [*parts.warnings]
    if (told := made.degenerate(conditions)) is not None and len(parts.experts) > 1:
        notes.append(told)
    plan, files = _plan(recipe, parts, config, rows, own, notes)
    result = execute(plan, path, replace(options, resume=False), on_progress, files)
    return _report(recipe, parts, plan, result, conditions, report, notes, str(path))


def _check_place(path: Path, options: Options) -> None:
    """Raise OutputError at once if writing will not be allowed at the end."""
    if path.name.endswith(".safetensors"):
        raise OutputError(f"{path}: name a folder, because a configuration goes with the tensors")
    check_parent(path)
    if path.exists() and not options.overwrite:
        raise OutputError(
            f"{path}: exists already; choose another name, or pass --overwrite to replace it"
        )
    if path.is_dir() and not _is_model(path):
        raise OutputError(
            f"{path}: is a folder with other things than a model in it, and --overwrite would "
            "remove them; choose another name"
        )


def _texts(recipe: MoeRecipe, parts: Parts) -> dict[str, list[str]]:
    """Read the texts that gates learn from. Raises MissingError, FormatError or InputError."""
    if recipe.gate_mode != "trained":
        return {}
    return texts_of(recipe, parts.names)


def texts_of(recipe: MoeRecipe, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the texts of each expert that has data, by its name."""
    return {
        name: [row["text"] for row in read(recipe.place(entry.data), False)]
        for name, entry in zip(names, recipe.experts, strict=True)
        if entry.data is not None
    }


# -- writing ---------------------------------------------------------------------------------------


def _plan(
    recipe: MoeRecipe,
    parts: Parts,
    config: Mapping[str, Any],
    rows: Float[Tensor, "l t d"],
    own: Float[Tensor, "l e d"] | None,
    notes: Sequence[str],
) -> tuple[Plan, dict[str, bytes]]:
    """Return the plan of the output's tensors, and its small files."""
    if not bool(rows.isfinite().all()):
        raise NonFiniteError("the gates are not finite; look at the base's weights and the data")
    kind = models.kind_of_gates(recipe, parts.base)
    shared = [None if own is None else lazy(own[n], kind) for n in range(parts.layers)]
    found, aliases = models.pieces(recipe, parts, [lazy(row, kind) for row in rows], shared)
    jobs = [
        Job(name, p.source.spec, None, None, (p.source,), {}, None, (p.label,), index)
        for index, (name, p) in enumerate(found.items())
    ]
    assert parts.base.folder is not None
    files = {
        entry.name: entry.read_bytes()
        for entry in carried_files(parts.base.folder)
        if entry.suffix not in (".md", ".py")  # they speak of the dense model
    }
    if TOKENIZER in files:
        files |= _tokenizer(parts.base, files[TOKENIZER])
    files["config.json"] = (json.dumps(dict(config), indent=2, default=str) + "\n").encode()
    state = xxhash.xxh3_128()
    for name in sorted(files):
        state.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    told = recipe.model_dump(mode="json", exclude_none=True)
    plan = Plan(
        tuple(jobs),
        seed=recipe.seed,
        aliases=aliases,
        recipe={"moe": told},
        warnings=tuple(notes),
        files=state.hexdigest(),
    )
    return plan, files


def _tokenizer(base: Weights, text: bytes) -> dict[str, bytes]:
    """Return what of a tokenizer's files must change for the mixture to read texts as its base.

    Where they name no class of their own, transformers goes by the model type, which is another one
    now: for a Qwen2 its class takes the place of what tokenizer.json says. So that class is named,
    and what it made of the file is written.
    """
    told = json.loads(text)
    if told.get("tokenizer_class", GENERIC[0]) not in GENERIC:
        return {}
    found = tokenizer_of(base)
    if type(found).__name__ in GENERIC:
        return {}
    told["tokenizer_class"] = type(found).__name__
    return {
        TOKENIZER: (json.dumps(told, indent=2) + "\n").encode(),
        "tokenizer.json": found.backend_tokenizer.to_str(pretty=True).encode(),
    }


def _report(
    recipe: MoeRecipe,
    parts: Parts,
    plan: Plan,
    result: Result,
    conditions: list[float],
    report: TrainingReport | None,
    notes: list[str],
    out: str,
) -> MoeReport:
    total = sum(spec.size for spec in plan.specs.values())
    block = 3 * parts.width * int(parts.config["intermediate_size"])
    idle = (len(parts.experts) - recipe.experts_per_token) * block * parts.layers
    warnings = [*notes, *(w for w in result.warnings if w not in notes)]
    return MoeReport(
        out=out,
        architecture=parts.facts.name,
        model=f"{parts.facts.family}ForCausalLM",
        gate_mode=recipe.gate_mode,
        experts=[_told(*one) for one in zip(parts.names, recipe.experts, strict=True)],
        shared=[_told(Path(str(e.source_model)).name, e) for e in recipe.shared],
        experts_per_token=recipe.experts_per_token,
        layers=parts.layers,
        conditions=conditions,
        total=total,
        active=total - idle,
        dtype=recipe.dtype or "as the base",
        training=report,
        warnings=warnings,
        seconds=round(result.seconds, 3),
        bytes_written=result.bytes_written,
    )


def _told(name: str, entry: Expert) -> dict[str, Any]:
    return {
        "name": name,
        "source": str(entry.source_model),
        "positive_prompts": len(entry.positive_prompts or ()),
        "negative_prompts": len(entry.negative_prompts or ()),
        "data": entry.data,
        "noise_scale": entry.noise_scale or 0.0,
        "residual_scale": 1.0 if entry.residual_scale is None else entry.residual_scale,
    }
