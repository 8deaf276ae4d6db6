"""Batches for each task: unlabelled unless the objective asks for labels, then and only then.

A stream is an iterable of batches. One that can be read again (a list, a DataLoader) starts over
when it ends; an iterator that ends stops the tuning there.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, NamedTuple

from torch import Tensor

from pluribus.core.errors import InputError, nearest

LABELS = ("labels", "label", "targets", "target", "y")


class Batch(NamedTuple):
    """Inputs of one task, and labels if the objective needs them."""

    task: str
    inputs: Any
    labels: Tensor | None = None


class Ended(Exception):
    """A stream that cannot be read again has ended."""


class Streams:
    """One endless stream a task, checked batch by batch."""

    def __init__(
        self, streams: Mapping[str, Iterable[Any]], *, labelled: bool, device: Any = "cpu"
    ) -> None:
        if not streams:
            raise InputError(
                "no streams of inputs were given; give a mapping from tasks to batches"
            )
        self._given, self._labelled, self._device = dict(streams), labelled, device
        self._open: dict[str, Iterator[Any]] = {}

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the user's order."""
        return list(self._given)

    def next(self, task: str) -> Batch:
        """Return the next batch of a task.

        Raises Ended if an iterator has no more, InputError for an empty stream or a batch that is
        not what the objective takes.
        """
        stream = self._given[task]
        if task not in self._open:
            self._open[task] = iter(stream)
        try:
            batch = next(self._open[task])
        except StopIteration:
            if self._open[task] is stream:
                raise Ended(task) from None
            self._open[task] = iter(stream)
            try:
                batch = next(self._open[task])
            except StopIteration:
                raise InputError(f"the stream of task {task!r} is empty") from None
        return self._checked(task, batch)

    def _checked(self, task: str, batch: Any) -> Batch:
        pair = isinstance(batch, tuple | list)
        keys = [key for key in LABELS if isinstance(batch, Mapping) and key in batch]
        if not self._labelled:
            if pair:
                raise InputError(
                    f"task {task!r}: its batches are pairs, but the objective learns without "
                    "labels and must not see any; give the inputs alone"
                )
            if keys:
                raise InputError(
                    f"task {task!r}: its batches hold {keys[0]!r}, but the objective learns "
                    "without labels and must not see any; leave it out"
                )
            return Batch(task, _moved(batch, self._device))
        if pair:
            if len(batch) != 2:
                raise InputError(
                    f"task {task!r}: a batch is (inputs, labels), not {len(batch)} things"
                )
            return Batch(task, _moved(batch[0], self._device), _moved(batch[1], self._device))
        if len(keys) != 1:
            raise InputError(
                f"task {task!r}: the objective needs labels; give batches of (inputs, labels), or "
                "mappings with 'labels'"
            )
        inputs = {key: value for key, value in batch.items() if key != keys[0]}
        return Batch(task, _moved(inputs, self._device), _moved(batch[keys[0]], self._device))


def check_tasks(tasks: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise InputError for a task that has a stream but no `what`, or the other way round."""
    tasks, known = list(tasks), list(known)
    for task in tasks:
        if task not in known:
            raise InputError(
                f"task {task!r} has a stream but no {what}; there are: {', '.join(known)}."
                f"{nearest(task, known)}"
            )
    for task in known:
        if task not in tasks:
            raise InputError(f"task {task!r} has a {what} but no stream of inputs")


def hold_out(
    streams: Mapping[str, Iterable[Any]], count: int
) -> tuple[dict[str, list[Any]], dict[str, Iterable[Any]]]:
    """Split each stream into its first batches and the others. Raises InputError if none remain."""
    kept: dict[str, list[Any]] = {}
    others: dict[str, Iterable[Any]] = {}
    for task, stream in streams.items():
        opened = iter(stream)
        found = list(islice(opened, count + 1))
        if len(found) <= count:
            raise InputError(
                f"the stream of task {task!r} has {len(found)} batches, of which {count} are to be "
                "held out; give more, or a smaller held_out"
            )
        kept[task] = found[:count]
        once = opened is stream
        others[task] = chain(found[count:], opened) if once else _Rest(stream, count)
    return kept, others


class _Rest:
    """A stream without its first batches, each time that it is read."""

    def __init__(self, stream: Iterable[Any], skip: int) -> None:
        self.stream, self.skip = stream, skip

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.stream), self.skip, None)


def _moved(batch: Any, device: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_moved(value, device) for value in batch)
    raise InputError(
        f"a batch is a tensor or a mapping of tensors, not {type(batch).__name__}; turn arrays "
        "into tensors first"
    )
