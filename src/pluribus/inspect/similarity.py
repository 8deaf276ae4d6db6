"""Do models represent the same inputs alike, block by block? Linear CKA with an unbiased HSIC.

For representations X (n, d) and Y (n, e) of n inputs, K = X X^T, L = Y Y^T with zero diagonals:

    HSIC(K, L) = (tr(K L) + sum(K) sum(L) / ((n - 1) (n - 2)) - 2 sum(K L) / (n - 2)) / (n (n - 3))
    CKA(X, Y)  = mean HSIC(K, L) / sqrt(mean HSIC(K, K) mean HSIC(L, L))

means over batches. HSIC is Song et al.'s unbiased estimator (JMLR 2012, equation 5); CKA is
Kornblith et al.'s (ICML 2019, https://arxiv.org/abs/1905.00414), its average over batches that of
Nguyen, Raghu and Kornblith (ICLR 2021, https://arxiv.org/abs/2010.15327, section 3), so that its
expectation does not depend on how large the batches are. 1: equal up to rotation and scale; about 0
(it may be a little below) for unrelated ones. A plain CKA of few inputs is near 1 for anything.

A representation is the output of a block, averaged over all axes but the first and the channels
(`reduce="mean"`: the last axis of tokens, the second of images), or flattened.
"""

import inspect as signatures
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pluribus.core.depth import depth_map
from pluribus.core.errors import InputError, MismatchError, NonFiniteError, listing, nearest
from pluribus.core.shapes import Float

Reduce = Literal["mean", "flatten"]
CONSTANT = 1e-12  # outputs whose spread is below this share of their size do not depend on inputs


@dataclass(frozen=True, eq=False)
class Similarity:
    """CKA of every pair of m models at b blocks; NaN where a block's output is constant."""

    models: tuple[str, ...]
    blocks: tuple[str, ...]
    cka: Float[np.ndarray, "b m m"]
    inputs: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "models": list(self.models),
            "inputs": self.inputs,
            "blocks": {block: self.cka[i].tolist() for i, block in enumerate(self.blocks)},
        }


def hsic(k: Float[Tensor, "n n"], l: Float[Tensor, "n n"]) -> float:  # noqa: E741 - the formula's
    """Return the unbiased estimate for two Gram matrices of n >= 4 inputs."""
    n = len(k)
    k, l = (m - torch.diag(m.diagonal()) for m in (k, l))  # noqa: E741
    rows = k.sum(0) @ l.sum(1)
    total = (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)
    return float(total) / (n * (n - 3))


def similarity(
    models: Mapping[str, nn.Module | Callable[[], nn.Module]],
    batches: Sequence[Any],
    *,
    blocks: Sequence[str] | None = None,
    reduce: Reduce = "mean",
    on_step: Callable[[str, int, int], None] | None = None,
) -> Similarity:
    """Run the same inputs through all models and compare what their blocks make of them.

    A model is a module, or a function that loads one: those are in memory one at a time. A batch is
    a tensor, or a mapping or tuple of arguments; every one has at least four inputs. `blocks` are
    module paths that all models have, by default their numbered blocks (a Hugging Face model's
    layers). An "attention_mask" (b, s) keeps padding out of the means. Models are put in eval mode
    for the run, and hooks are removed again. Raises InputError for one model, no blocks or too
    small a batch, MismatchError for a batch that a model does not take or a block that one lacks,
    NonFiniteError for NaN in an output.
    """
    if len(models) < 2:
        raise InputError(f"{len(models)} model(s) given; a similarity needs at least two")
    if not len(batches):
        raise InputError("no batch was given; give inputs that the models should be compared on")
    names = list(blocks) if blocks is not None else []
    grams: list[list[list[Tensor]]] = []  # model, batch, block: (n, n), float64
    for label, given in models.items():
        model = given if isinstance(given, nn.Module) else given()
        names = names or _blocks(model)
        modules = _modules(label, model, names)
        rows = []
        for number, batch in enumerate(batches):
            rows.append(_grams(label, model, modules, names, batch, number, reduce))
            if on_step:
                done = len(grams) * len(batches) + number + 1
                on_step("representations", done, len(models) * len(batches))
        grams.append(rows)
    count = len(models)
    sums = np.zeros((len(names), count, count))
    for i, first in enumerate(grams):
        for j in range(i + 1):
            for own, other in zip(first, grams[j], strict=True):
                for b in range(len(names)):
                    if len(own[b]) != len(other[b]):
                        raise MismatchError(
                            f"block {names[b]} gives {len(own[b])} rows in one model and "
                            f"{len(other[b])} in another for the same inputs"
                        )
                    sums[b, i, j] += hsic(own[b], other[b])
    own = np.sqrt(np.maximum(np.diagonal(sums, axis1=1, axis2=2), 0))
    scale = own[:, :, None] * own[:, None, :]
    sums = sums + np.transpose(np.tril(sums, -1), (0, 2, 1))
    cka = np.divide(sums, scale, out=np.full(sums.shape, np.nan), where=scale > 0)
    seen = sum(len(batch[0]) for batch in grams[0])
    return Similarity(tuple(models), tuple(names), cka, seen)


def _blocks(model: nn.Module) -> list[str]:
    found = depth_map({name: tuple(p.shape) for name, p in model.named_parameters()})
    labels = [label for label in found.labels if " and " not in label]
    if not labels:
        modules = [name for name, _ in model.named_children()]
        raise InputError(f"no numbered blocks were found among {listing(modules)}; name blocks")
    return labels


def _modules(label: str, model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    known = dict(model.named_modules())
    if lacking := [name for name in names if name not in known]:
        raise MismatchError(
            f"{label} has no module {listing(lacking)}.{nearest(lacking[0], known)} Name blocks "
            "that all models have"
        )
    return [known[name] for name in names]


def _grams(
    label: str,
    model: nn.Module,
    modules: Sequence[nn.Module],
    names: Sequence[str],
    batch: Any,
    number: int,
    reduce: Reduce,
) -> list[Tensor]:
    caught: dict[int, Tensor] = {}
    hooks = [
        module.register_forward_hook(_catch(caught, place)) for place, module in enumerate(modules)
    ]
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            _call(model)(batch)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        told = str(error).strip().splitlines()
        raise MismatchError(
            f"{label} does not take batch {number} ({_shapes(batch)}): "
            f"{told[0] if told else type(error).__name__}"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    out = []
    for place, name in enumerate(names):
        if place not in caught:
            raise MismatchError(f"{label}: block {name} did not run, or gave no tensor")
        rows = _rows(caught[place], reduce, mask)
        if len(rows) < 4:
            raise InputError(f"batch {number} has {len(rows)} inputs; CKA needs at least 4 in each")
        if not bool(rows.isfinite().all()):
            raise NonFiniteError(f"{label}: the output of {name} on batch {number} is not finite")
        centred = rows - rows.mean(0)  # changes nothing but rounding: the estimate centres itself
        if float(centred.abs().max()) <= CONSTANT * float(rows.abs().max()):
            centred = torch.zeros_like(centred)
        out.append(centred @ centred.T)
    return out


def _catch(caught: dict[int, Tensor], place: int) -> Callable[..., None]:
    def hook(module: nn.Module, given: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor):
            caught[place] = first.detach()

    return hook


def _call(model: nn.Module) -> Callable[[Any], Any]:
    def call(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            known = signatures.signature(model.forward).parameters
            free = any(p.kind is p.VAR_KEYWORD for p in known.values())
            return model(**{key: v for key, v in batch.items() if free or key in known})
        return model(*batch) if isinstance(batch, tuple | list) else model(batch)

    return call


def _rows(output: Tensor, reduce: Reduce, mask: Tensor | None) -> Float[Tensor, "n d"]:
    """Return one float64 vector an input."""
    values = output.double()
    if values.ndim < 2 or reduce == "flatten":
        return values.reshape(len(values), -1)
    if values.ndim == 3:  # tokens
        if mask is not None and mask.shape == values.shape[:2]:
            weight = mask.to(values).unsqueeze(-1)
            return (values * weight).sum(1) / weight.sum(1).clamp(min=1)
        return values.mean(1)
    return values.flatten(2).mean(2) if values.ndim > 3 else values


def _shapes(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"shape {list(batch.shape)}"
    if isinstance(batch, Mapping):
        return ", ".join(f"{key} {_shapes(value)}" for key, value in batch.items())
    if isinstance(batch, tuple | list):
        return ", ".join(map(_shapes, batch))
    return type(batch).__name__
