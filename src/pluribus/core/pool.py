"""`Pool`: a base and its experts, checked against each other from headers alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pluribus.core.errors import InputError, MismatchError, listing, nearest
from pluribus.core.weights import Weights


def is_counter(name: str) -> bool:
    """Return whether a tensor only counts training steps: the base's is as good as any."""
    return name.split(".")[-1] == "num_batches_tracked"


class Pool:
    """A base (or none) and named experts whose tensors fit together.

    `names` are the tensors of the output in the reference model's order (the base, or the first
    expert), `aliases` the further names that every model ties to the same tensor.
    """

    def __init__(
        self,
        base: Any,
        experts: Mapping[str, Any] | Sequence[Any],
        *,
        extras: Mapping[str, Mapping[str, Any] | Sequence[Any]] | None = None,
    ) -> None:
        self.base = None if base is None else Weights.open(base)
        if isinstance(experts, Mapping):
            self.experts = {name: Weights.open(what, label=name) for name, what in experts.items()}
        else:
            self.experts = {}
            for number, what in enumerate(experts):
                weights = Weights.open(what)
                label = weights.label
                if label in self.experts or label in ("state dict", "weights"):
                    label = f"{label} {number}"
                self.experts[label] = weights
        if not self.experts:
            raise InputError("no experts were given; name at least one model to merge")
        self.extras = {
            name: _ordered(name, group, self.experts) for name, group in (extras or {}).items()
        }
        self.names, self.aliases = fit(self.models)

    @property
    def models(self) -> list[Weights]:
        """Base (if any) and experts, in order."""
        return [*([] if self.base is None else [self.base]), *self.experts.values()]


def _ordered(
    name: str, group: Mapping[str, Any] | Sequence[Any], experts: Mapping[str, Weights]
) -> tuple[Weights, ...]:
    """Return one further input per expert, in the experts' order, keyed by name if possible."""
    if isinstance(group, Mapping):
        absent = [label for label in experts if label not in group]
        if absent:
            raise InputError(f"{name} is missing for {listing(absent)}")
        return tuple(Weights.open(group[label]) for label in experts)
    if len(group) != len(experts):
        raise InputError(f"{name} was given for {len(group)} models, but there are {len(experts)}")
    return tuple(Weights.open(what) for what in group)


def fit(models: Iterable[Weights]) -> tuple[list[str], dict[str, str]]:
    """Check that all models have the same tensors; return their names and shared aliases.

    Raises MismatchError naming the tensors, models and both shapes. Float types may differ (values
    are widened before any arithmetic); whole numbers are copied, so their types may not.
    """
    models = list(models)
    first = models[0]
    aliases = {
        name: target
        for name, target in first.aliases.items()
        if all(name not in m.spec and m.aliases.get(name, target) == target for m in models)
    }
    names = [name for name in first if name not in aliases]
    for model in models[1:]:
        lacks = [name for name in names if name not in model]
        more = [name for name in model if name not in first and name not in model.aliases]
        if lacks or more:
            raise MismatchError(_difference(first, model, lacks, more))
        for name in names:
            one, other = first.source(name).spec, model.source(name).spec
            floats = one.kind.is_float and other.kind.is_float
            if one.shape != other.shape or not (floats or one.dtype == other.dtype):
                raise MismatchError(
                    f"tensor {name!r} is {one} in {first.label}, but {other} in {model.label}; "
                    "only models of one architecture and vocabulary can be merged "
                    "(for different vocabularies give a tokenizer_source)"
                )
    return names, aliases


def _difference(first: Weights, other: Weights, lacks: list[str], more: list[str]) -> str:
    parts = []
    if lacks:
        parts.append(
            f"{other.label} lacks {listing(lacks)}, which {first.label} has."
            + nearest(lacks[0], more or other)
        )
    if more:
        parts.append(f"{other.label} has {listing(more)}, which {first.label} lacks.")
    return " ".join(parts) + " Only models with the same tensors can be merged."
