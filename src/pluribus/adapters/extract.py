"""Extract a LoRA adapter from a fine-tuned model: the best low-rank update of each weight.

    U diag(s) V^T = W_ft - W_0,   B = U_k sqrt(s_k),  A = sqrt(s_k) V_k^T        (R, k), (k, c)

By Eckart-Young no other B A of rank k is nearer. Done one tensor at a time; what was written is
read back and compared with the fine-tuned model, and the report says what is missing. Tensors that
did not change are left out; those that have no low-rank form (norms, biases, parameters that are no
module's weight) are saved whole, in the way PEFT loads them.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pluribus.adapters.factors import (
    DTYPES,
    Product,
    balanced,
    check_choice,
    check_place,
    check_sizes,
    chosen,
    published,
    shaped,
)
from pluribus.adapters.report import Action, AdapterReport, ModuleReport
from pluribus.core.errors import InputError, listing
from pluribus.core.lowrank import CONFIG, FILES, LowRankSum, adapter, save_adapter, with_adapter
from pluribus.core.pool import fit
from pluribus.core.source import Source, files
from pluribus.core.weights import Weights

EMBEDDING = re.compile(r"(^|[._])(embed\w*|wte|wpe|\w+_embeddings?|shared)$")  # of a module's name
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "ctrl")  # weights lie (in, out)
CONV1D_NAMES = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")


def extract_lora(
    base: Any,
    finetuned: Any,
    out: str | os.PathLike[str],
    *,
    rank: int | None = 128,
    energy: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embed: Literal["save", "lora", "skip"] = "save",
    save_modules: Sequence[str] = (),
    distribute_scale: bool = True,
    sv_epsilon: float = 0.0,
    skip_undecomposable: bool = False,
    transposed: str | None = None,
    dtype: str = "float32",
    base_model: str | None = None,
    task_type: str | None = "CAUSAL_LM",
    overwrite: bool = False,
    on_step: Callable[[str, int, int], None] | None = None,
) -> AdapterReport:
    """Write the difference of two models as a PEFT folder; return what it holds, module by module.

    `rank` is the most a module gets, `energy` the share of its update to reach (the smaller rank of
    both wins), `sv_epsilon` the least singular value to keep. `include` and `exclude` are regular
    expressions searched in module names. Embeddings are saved whole, factored or left out by
    `embed`. `save_modules` are names (or last parts of names) of modules to save whole.
    `transposed` matches modules whose weight lies (in, out), as GPT-2's Conv1D (known by itself).
    A head such as lm_head is a linear layer like others. `on_step` is told (stage, done, total).

    Raises MismatchError if the models' tensors differ in name or shape, InputError if nothing of
    low rank changed or a changed tensor is tied to another, OutputError if `out` exists.
    """
    check_sizes(rank, energy)
    check_choice("dtype", dtype, DTYPES)
    check_choice("embed", embed, ("save", "lora", "skip"))
    check_place(out, overwrite)
    base, finetuned = Weights.open(base), Weights.open(finetuned)
    plan = _Plan(base, include, exclude, embed, save_modules, skip_undecomposable, transposed)
    base, finetuned = (w.select(lambda name: not plan.excluded(name)) for w in (base, finetuned))
    names, aliases = fit([base, finetuned])
    changed = [name for name in names if not _same(base.source(name), finetuned.source(name))]
    _refuse_ties(changed, aliases)
    actions = plan.actions({name: base.source(name).spec.shape for name in changed})
    pairs, turned, reports = {}, set(), {}
    told = on_step or (lambda *_: None)
    for done, name in enumerate(names):
        told("factoring", done, len(names))
        shape = base.source(name).spec.shape
        action = actions.get(name, "unchanged")
        held = None
        if action == "lora":
            matrix = _delta(base, finetuned, name).reshape(shape[0], -1)
            held = _held(matrix, rank, energy, sv_epsilon, distribute_scale)
            if held.a.shape[0] == 0:
                action, held = "skipped", None
        if held is not None:
            pairs[name] = shaped(held, shape, dtype)
            if plan.transposed(name, shape):
                turned.add(name)
        reports[name] = ModuleReport(
            name=name, action=action, shape=shape, rank=0 if held is None else held.a.shape[0]
        )
    told("factoring", len(names), len(names))
    if not pairs:
        raise InputError(
            f"{finetuned.label} differs from {base.label} in no weight that LoRA can hold"
            + (f"; changed: {listing(changed)}" if changed else ": they are equal")
        )
    whole = {name: finetuned.source(name) for name in names if reports[name].action == "saved"}

    def write(folder: Path) -> None:
        save_adapter(
            folder,
            pairs,
            base_model=base_model or str(base.folder or base.label),
            embeddings={name for name in pairs if plan.embedding(name)},
            transposed=turned,
            config={"task_type": task_type},
        )
        if whole:
            add_saved(folder, whole, plan.settings(whole), pairs)

    folder = published(out, write, overwrite)
    _verify(base, finetuned, folder, reports, told)
    return AdapterReport(tuple(reports[name] for name in names))


class _Plan:
    """Which tensors are factored, saved whole or left out."""

    def __init__(
        self,
        base: Weights,
        include: Sequence[str],
        exclude: Sequence[str],
        embed: str,
        save_modules: Sequence[str],
        skip_undecomposable: bool,
        transposed: str | None,
    ) -> None:
        try:
            self.include = [re.compile(pattern) for pattern in include]
            self.exclude = [re.compile(pattern) for pattern in exclude]
            self._transposed = re.compile(transposed) if transposed else None
        except re.error as error:
            raise InputError(f"{error.pattern!r} is not a regular expression: {error}") from None
        self.embed, self.skip = embed, skip_undecomposable
        self.save_modules = tuple(save_modules)
        if self._transposed is None and base.config().get("model_type") in CONV1D:
            self._transposed = CONV1D_NAMES

    def embedding(self, name: str) -> bool:
        """Return whether a tensor is an embedding, by its name."""
        return bool(EMBEDDING.search(name.removesuffix(".weight")))

    def excluded(self, name: str) -> bool:
        """Return whether a tensor stays out of the adapter whatever it is."""
        module = name.rpartition(".")[0]
        return any(pattern.search(module) for pattern in self.exclude) or (
            self.embed == "skip" and self.embedding(name)
        )

    def transposed(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether a weight lies (in, out)."""
        module = name.removesuffix(".weight")
        return len(shape) == 2 and bool(self._transposed and self._transposed.search(module))

    def actions(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Action]:
        """Return what to do with each changed tensor.

        A module that is saved takes everything below it along: PEFT copies it as a whole.
        """
        actions: dict[str, Action] = {
            name: self._action(name, shape) for name, shape in shapes.items()
        }
        roots = _roots(name for name, action in actions.items() if action == "saved")
        for name in actions:
            if any(name.startswith(f"{root}.") for root in roots):
                actions[name] = "saved"
        return actions

    def _action(self, name: str, shape: tuple[int, ...]) -> Action:
        module = name.rpartition(".")[0]
        if not module:
            return "skipped"  # a parameter of the model itself: PEFT has no place for it
        if any(module == one or module.endswith(f".{one}") for one in self.save_modules):
            return "saved"
        if self.include and not any(pattern.search(module) for pattern in self.include):
            return "skipped"
        if name.endswith(".weight") and 2 <= len(shape) <= 5 and min(shape) > 0:
            return "saved" if self.embedding(name) and self.embed == "save" else "lora"
        return "skipped" if self.skip else "saved"

    def settings(self, saved: Iterable[str]) -> dict[str, Any]:
        """Return the configuration by which PEFT loads tensors that are saved whole."""
        saved = list(saved)
        roots = _roots(saved)
        loose = [name for name in saved if not any(name.startswith(f"{r}.") for r in roots)]
        return {"modules_to_save": roots or None, "bias": "all" if loose else "none"}


def _roots(saved: Iterable[str]) -> list[str]:
    """Return the modules of tensors saved whole; a bias has PEFT's own switch and needs none."""
    return sorted({name.rpartition(".")[0] for name in saved if not name.endswith(".bias")})


def add_saved(
    folder: Path,
    saved: Mapping[str, Source],
    settings: Mapping[str, Any],
    factored: Iterable[str],
) -> None:
    """Add whole tensors to an adapter that `save_adapter` wrote, under PEFT's names for them."""
    factored = set(factored)
    path = folder / FILES[0]
    written = Weights.open(path)
    sources = {name: written.source(name) for name in written}
    for name, source in saved.items():
        module, _, leaf = name.rpartition(".")
        inside = "base_layer." if f"{module}.weight" in factored else ""
        sources[f"base_model.model.{module}.{inside}{leaf}"] = source
    Weights(sources).save(path, {"format": "pt"})
    files.refresh(str(path))  # the file under this name is another one now
    config = json.loads((folder / CONFIG).read_text("utf-8")) | dict(settings)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _held(
    matrix: np.ndarray, rank: int | None, energy: float | None, epsilon: float, distribute: bool
) -> Product:
    import torch

    u, s, vh = torch.linalg.svd(torch.from_numpy(matrix), full_matrices=False)
    k = chosen(s, rank, energy, epsilon)
    return balanced(u[:, :k], s[:k], vh[:k], distribute)


def _same(one: Source, other: Source) -> bool:
    """Return whether two tensors hold the same values, reading a few megabytes at a time."""
    step = 1 << 20
    for start in range(0, one.spec.size, step):
        stop = min(start + step, one.spec.size)
        if one.spec.dtype == other.spec.dtype:
            if not np.array_equal(one.load(start, stop), other.load(start, stop)):
                return False
        elif not np.array_equal(
            one.floats(start, stop, np.float64), other.floats(start, stop, np.float64)
        ):
            return False
    return True


def _delta(base: Weights, finetuned: Weights, name: str) -> np.ndarray:
    delta = finetuned.source(name).floats(wide=np.float64)
    delta -= base.source(name).floats(wide=np.float64)
    return delta


def _refuse_ties(changed: Sequence[str], aliases: Mapping[str, str]) -> None:
    for alias, target in aliases.items():
        if target in changed:
            raise InputError(
                f"{target!r} changed and is tied to {alias!r}; an adapter would change one of them "
                "and untie them. Untie both models first (store both tensors, set "
                "tie_word_embeddings to false), or leave it out with embed='skip' or exclude"
            )


def _verify(
    base: Weights,
    finetuned: Weights,
    folder: Path,
    reports: dict[str, ModuleReport],
    told: Callable[[str, int, int], None],
) -> None:
    """Read the adapter back and measure it against the fine-tuned model."""
    opened = with_adapter(base, adapter(folder))
    for done, (name, one) in enumerate(reports.items(), 1):
        told("reading it back", done, len(reports))
        if one.action == "unchanged":
            continue
        source = opened.source(name)
        size = source.spec.size
        if isinstance(source, LowRankSum):  # before it is rounded to the base's type
            values = source.values(0, size).astype(np.float64)
        else:
            values = source.floats(wide=np.float64)
        error = values - finetuned.source(name).floats(wide=np.float64)
        energy = float(np.square(_delta(base, finetuned, name)).sum())
        reports[name] = replace(
            one,
            energy=energy,
            kept=1 - float(np.square(error).sum()) / energy if energy else 1.0,  # 0 became -0
            max_error=float(np.abs(error).max()),
        )
