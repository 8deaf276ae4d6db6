"""Rows of arguments and outputs: counting them, taking some, and putting them together again."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pluribus.core.errors import InputError


def rows_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the batch size: the first axis of the first tensor. Raises InputError if it is 0."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            if not len(value):
                raise InputError("the batch is empty; give at least one row")
            return len(value)
    raise InputError("no tensor is among the inputs, so nobody knows the batch")


def taken(
    args: Sequence[Any], kwargs: Mapping[str, Any], places: Tensor, rows: int
) -> tuple[tuple, dict[str, Any]]:
    """Return some rows of every tensor that has a row for each input; the rest as it is."""
    return tuple(_some(v, places, rows) for v in args), {
        key: _some(value, places, rows) for key, value in kwargs.items()
    }


def _some(value: Any, places: Tensor, rows: int) -> Any:
    if isinstance(value, Tensor):
        return value[places] if value.ndim and len(value) == rows else value
    if isinstance(value, Mapping):
        return {key: _some(one, places, rows) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_some(one, places, rows) for one in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(
        f"rows with different mixtures run one after another here, and a {type(value).__name__} "
        "cannot be split among them; give rows of one mixture at a time"
    )


def splits(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether rows can be taken of all arguments."""
    return all(map(_splits, args)) and all(map(_splits, kwargs.values()))


def _splits(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_splits, value.values()))
    if isinstance(value, tuple | list):
        return all(map(_splits, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def shapes_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple | None:
    """Return what tells batches of one shape; None if rows cannot be taken of all arguments."""
    found: list[Any] = []
    for name, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor):
            found.append((name, value.shape))
        elif value is not None and not isinstance(value, bool | int | float | str):
            return None
    return tuple(found)


def own_rows(output: Any, places: Tensor, rows: int) -> Any:
    """Return some rows of an output, as plain containers and without attention caches."""
    if isinstance(output, Tensor):
        return output[places] if output.ndim and len(output) == rows else output
    if isinstance(output, Mapping):
        kept = {key: value for key, value in output.items() if not _is_cache(value)}
        return {key: own_rows(value, places, rows) for key, value in kept.items()}
    if isinstance(output, tuple | list):
        return [own_rows(value, places, rows) for value in output if not _is_cache(value)]
    return output


def joined(outputs: Sequence[Any], places: Sequence[Tensor], rows: int) -> Any:
    """Return outputs of some rows each as one output of all, in the batch's order."""
    first = outputs[0]
    if isinstance(first, Tensor):
        if not first.ndim:
            raise InputError("a loss over the batch cannot be put together from parts of it")
        out = first.new_empty(rows, *first.shape[1:])
        for place, some in zip(places, outputs, strict=True):
            out = out.index_copy(0, place, some)
        return out
    if isinstance(first, Mapping):
        kept = [key for key in first if not _is_cache(first[key]) or len(outputs) == 1]
        made = {key: joined([o[key] for o in outputs], places, rows) for key in kept}
        return made if type(first) is dict else type(first)(**made)
    if isinstance(first, tuple | list):
        found = [joined(list(group), places, rows) for group in zip(*outputs, strict=True)]
        return type(first)(found)
    if _is_cache(first) and len(outputs) == 1:
        first.batch_select_indices(places[0].argsort())
        return first
    if first is None or _is_cache(first):
        return None  # attention caches of rows that ran apart are not one cache
    raise InputError(
        f"outputs of type {type(first).__name__} cannot be put together; give rows of one mixture "
        "at a time"
    )


def close(found: Any, expected: Any) -> bool:
    """Whether two outputs have the same shapes and nearly the same values for their precision."""
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return False
        slack = 1e-4 if torch.finfo(_real(expected)).eps < 1e-4 else 1e-2
        found, expected = found.detach().float(), expected.detach().float()
        size = float(expected.abs().max()) if expected.numel() else 0.0
        return torch.allclose(found, expected, rtol=10 * slack, atol=slack * max(size, 1e-6))
    if isinstance(expected, Mapping):
        return all(key in found and close(found[key], expected[key]) for key in expected)
    if isinstance(expected, tuple | list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == expected


def _real(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.is_floating_point() else torch.float32


def _is_cache(value: Any) -> bool:
    return type(value).__name__.endswith("Cache")


def remember(out: Any, table: Tensor) -> None:
    """Note in an output's attention cache how its rows were routed."""
    if isinstance(out, Mapping):
        for value in out.values():
            if _is_cache(value):
                value.routed_by = table.detach()


def begun_as(args: Sequence[Any], kwargs: Mapping[str, Any], rows: int) -> Tensor | None:
    """Return how the rows of a cache among the arguments were routed; None: there is none.

    Rows that were repeated since, as several answers to one question are, lie side by side.
    """
    for value in (*args, *kwargs.values()):
        table = getattr(value, "routed_by", None) if _is_cache(value) else None
        if table is not None and len(table) and rows % len(table) == 0:
            times = rows // len(table)
            return table if times == 1 else table.repeat_interleave(times, 0)
    return None
