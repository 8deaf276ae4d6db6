"""Sets of examples and the batches dealt from them: a new order every time they are read."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Generator, Tensor

from pluribus.core.errors import InputError
from pluribus.core.random import key
from pluribus.tune._streams import LABELS

CHUNK = 256  # inputs that are in the model at a time when nothing is learned
Augment = Callable[[Any, Generator], Any]


class Examples:
    """Inputs, and labels (b,) if there are any, that are dealt in batches.

    Inputs are a tensor whose rows are inputs, or a mapping of such tensors. Each reading deals all
    rows in a new order. `fewest`: if r batches a reading are fewer, the rows are repeated
    floor(fewest / r) + 1 times, as the aTLAS authors do with shots. `augment(inputs, generator)`
    changes inputs as they are dealt. Raises InputError if the lengths differ or are 0.
    """

    def __init__(
        self,
        inputs: Any,
        labels: Tensor | None = None,
        *,
        batch_size: int = 128,
        seed: int = 0,
        fewest: int = 0,
        augment: Augment | None = None,
        name: str = "examples",
    ) -> None:
        self.inputs, self.labels, self.augment = inputs, labels, augment
        self.batch_size, self.name = batch_size, name
        lengths = {len(part) for part in parts_of(inputs)} | (
            {len(labels)} if labels is not None else set()
        )
        if len(lengths) != 1:
            raise InputError(f"{name}: inputs and labels have different lengths: {sorted(lengths)}")
        self.count = lengths.pop()
        if not self.count:
            raise InputError(f"{name}: there are no examples")
        batches = -(-self.count // batch_size)
        self.repeats = fewest // batches + 1 if batches < fewest else 1
        self._rng = Generator().manual_seed(key(seed, name, "examples"))

    def __len__(self) -> int:
        """Batches of one reading."""
        return -(-self.count * self.repeats // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        """Deal all rows in a new order."""
        order = torch.randperm(self.count * self.repeats, generator=self._rng) % self.count
        for rows in order.split(self.batch_size):
            inputs = taken(self.inputs, rows)
            if self.augment is not None:
                inputs = self.augment(inputs, self._rng)
            yield inputs if self.labels is None else (inputs, self.labels[rows])

    def ordered(self, size: int = CHUNK) -> Iterator[Any]:
        """Return all examples as they are, in their order."""
        for rows in torch.arange(self.count).split(size):
            inputs = taken(self.inputs, rows)
            yield inputs if self.labels is None else (inputs, self.labels[rows])


def parts_of(inputs: Any) -> list[Tensor]:
    """Return the tensors whose rows are the inputs. Raises InputError if they are none."""
    parts = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    if not parts or not all(isinstance(part, Tensor) and part.ndim for part in parts):
        raise InputError(
            f"a set of inputs is a tensor or a mapping of tensors, not {type(inputs).__name__}"
        )
    return parts


def taken(inputs: Any, rows: Tensor) -> Any:
    """Return some rows of the inputs."""
    if isinstance(inputs, Mapping):
        return {name: part[rows.to(part.device)] for name, part in inputs.items()}
    return inputs[rows.to(inputs.device)]


def joined(batches: Iterable[Any]) -> Any:
    """Return the inputs of all batches as one set."""
    batches = list(batches)
    if isinstance(batches[0], Mapping):
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return torch.cat(batches)


def is_pair(what: Any) -> bool:
    """Return whether this is a whole labelled set: inputs, and as many whole numbers."""
    if not isinstance(what, tuple | list) or len(what) != 2:
        return False
    inputs, labels = what
    whole = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
    return whole and isinstance(inputs, Tensor | Mapping)


def set_of(task: str, what: Any, labelled: bool, **options: Any) -> Examples | None:
    """Return the set that a user gave whole, or None if it is batches of it.

    A labelled set is a pair (inputs, labels), or a mapping that holds labels; an unlabelled one the
    inputs. Raises InputError for labels that the objective must not see, or that it lacks.
    """
    if isinstance(what, Examples):
        pair = what.labels is not None
        if pair == labelled:
            return what
    elif is_pair(what):
        pair = True
        if labelled:
            return Examples(what[0], what[1], name=task, **options)
    elif isinstance(what, Mapping):
        keys = [name for name in LABELS if name in what]
        pair = bool(keys)
        if labelled and len(keys) == 1:
            inputs = {name: part for name, part in what.items() if name != keys[0]}
            return Examples(inputs, what[keys[0]], name=task, **options)
        if not labelled and not pair:
            return Examples(what, name=task, **options)
    elif isinstance(what, Tensor):
        pair = False
        if not labelled:
            return Examples(what, name=task, **options)
    else:
        return None
    if pair:
        raise InputError(
            f"task {task!r}: labels were given, but the objective learns without and must not see "
            "any; give the inputs alone"
        )
    raise InputError(
        f"task {task!r}: the objective needs labels; give (inputs, labels), or batches of such"
    )


def finite(stream: Any) -> bool:
    """Return whether a stream has a length, and can be read again."""
    return isinstance(stream, Sized) and not isinstance(stream, Iterator)


def rereadable(task: str, what: Any, purpose: str) -> None:
    """Raise InputError for a stream that can be read once only."""
    if isinstance(what, Iterator):
        raise InputError(
            f"task {task!r}: {purpose} is read more than once, but an iterator was given; give a "
            "list, a DataLoader, or the whole set"
        )


def epoch_of(streams: Mapping[str, Any], asked: int | None) -> int:
    """Return the steps of an epoch: what was asked for, or the shortest stream's batches.

    Raises InputError if no stream has a length.
    """
    if asked is not None:
        return asked
    lengths = [len(stream) for stream in streams.values() if isinstance(stream, Sized)]
    if not lengths:
        raise InputError(
            "no stream has a length, so an epoch has none; give steps_per_epoch, or whole sets"
        )
    if not min(lengths):
        raise InputError("a stream is empty: it has no batch")
    return min(lengths)


def deal(
    streams: Mapping[str, Any], labelled: bool, *, batch_size: int, **options: Any
) -> dict[str, Any]:
    """Return every task's batches; what was given whole as `Examples`.

    Those are dealt in batches of batch_size / tasks, so that a step takes batch_size in all.
    """
    if not streams:
        raise InputError("no examples were given; give a mapping from tasks to examples")
    size = max(1, batch_size // len(streams))
    dealt = {}
    for task, what in streams.items():
        found = set_of(task, what, labelled, batch_size=size, **options)
        dealt[task] = what if found is None else found
    return dealt


def whole(task: str, what: Any, purpose: str) -> Examples:
    """Return a stream of unlabelled batches as one set.

    Raises InputError for labels, for an iterator, and for an empty stream.
    """
    if isinstance(what, Examples):
        return what
    rereadable(task, what, purpose)
    batches = list(what)
    if not batches:
        raise InputError(f"the stream of task {task!r} is empty")
    for batch in batches:
        set_of(task, batch, False)  # labels are refused here
    sizes = [len(parts_of(batch)[0]) for batch in batches]
    return Examples(joined(batches), batch_size=max(sizes), name=task)
