"""Ways of adding every row's own low-rank updates to a layer's output: y + sum_p w_p b_p a_p x.

    fused    each row by its own factors, read where they are (`kernels.low_rank_rows`)
    by row   in two batched products, of gathered factors
    packed   each part on its own rows, padded to as many as the part with most has
    in turn  the same one after another, where a part's rows lie side by side; nothing is padded
    whole    all parts in use on all rows

All are one formula; which is taken goes by the time each should take.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.autograd import forward_ad

from pluribus.core.shapes import Float
from pluribus.kernels.low_rank_rows import Updates
from pluribus.route._packed import Packed

# What a way takes, in microseconds: to begin, which "in turn" does for each part, for a product,
# for a value that is copied to another place, and for a value of a factor that is read. Fitted by
# `benchmarks/route_ways.py`, in float32 with two threads; only what is the quicker matters.
COSTS = {
    "fused": {"begin": 2.5, "product": 1.36e-5, "moved": 0.0, "read": 7.1e-5},
    "by row": {"begin": 22.0, "product": 1.24e-5, "moved": 2.7e-4, "read": 0.0},
    "packed": {"begin": 17.0, "product": 9.5e-6, "moved": 1.6e-4, "read": 1.1e-5},
    "in turn": {"begin": 13.0, "product": 1.15e-5, "moved": 0.0, "read": 6.5e-5},
    "whole": {"begin": 36.0, "product": 6.7e-6, "moved": 3.4e-4, "read": 1.7e-4},
}
# A layer's share of what only the others need once a batch: sorting rows, and tables of places.
SHARE = 20.0


def added(
    x: Float[Tensor, "b s c"],
    y: Float[Tensor, "b s R"],
    first: Float[Tensor, "m r c"],
    second: Float[Tensor, "m r R"],
    packed: Packed,
) -> Float[Tensor, "b s R"]:
    """Return y + sum_p w_p (x first_p^T) second_p, in the quickest way. May write into y.

    The factors are contiguous, as banks keep them.
    """
    way = packed.ways.get((x.shape, second.shape)) or _noted(x, first, second, packed)
    if isinstance(way, Updates):
        if _fusible(x, y, first, second, packed.table):
            return _fused(x, y, first, second, way)
        way = quickest(x, second, packed, fusible=False)
    packed.copied = True
    return WAYS[way](x, y, first, second, packed)


def quickest(x: Tensor, second: Tensor, packed: Packed, *, fusible: bool = True) -> str:
    """Return the way of adding that should take the shortest time."""
    sizes = packed.used, packed.filled, packed.count, packed.straight, packed.runs is not None
    return _quickest(fusible, *x.shape, *second.shape, *sizes)


def _noted(x: Tensor, first: Tensor, second: Tensor, packed: Packed) -> str | Updates:
    """Note which way is the quickest, or what the kernel needs, for other layers of these sizes."""
    way: str | Updates = quickest(x, second, packed)
    if way == "fused":
        way = packed.updates(x.shape[1], first.shape[1])
    packed.ways[x.shape, second.shape] = way
    return way


def counts(
    rows: int,
    places: int,
    inputs: int,
    members: int,
    rank: int,
    outputs: int,
    used: int,
    filled: int,
    own: int,
    straight: bool,
    runs: bool,
) -> dict[str, tuple[int, int, int, int]]:
    """Return how often each way that is open begins, its products, values it moves and reads."""
    each = rank * (inputs + outputs)
    around = 0 if straight else places * (filled * (inputs + outputs) + own * outputs)
    moved = rows * places * (used * rank + outputs)
    found = {
        "fused": (1, own * places * each, 0, used * each),
        "by row": (1, own * places * each, own * each, 0),
        "packed": (1, filled * places * each, around, members * each),
        "whole": (1, rows * used * places * each, moved, used * each),
    }
    return found | {"in turn": (used, own * places * each, 0, used * each)} if runs else found


@lru_cache(1024)
def _quickest(fusible: bool, *sizes: int) -> str:
    times = costs(*sizes)
    times["fused"] -= SHARE
    if not fusible:
        del times["fused"]
    return min(times, key=times.__getitem__)


def costs(*sizes: int) -> dict[str, float]:
    """Return the time that each way should take for the arguments of `counts`, in microseconds."""
    return {
        way: sum(cost * n for cost, n in zip(COSTS[way].values(), found, strict=True))
        for way, found in counts(*sizes).items()  # type: ignore[arg-type]
    }


def _fusible(x: Tensor, y: Tensor, first: Tensor, second: Tensor, table: Tensor) -> bool:
    """Whether the kernel may have these: float32 in the processor's memory, and nobody follows."""
    return (
        type(x) is type(y) is Tensor
        and x.dtype is y.dtype is first.dtype is second.dtype is torch.float32
        and x.is_cpu
        and y.is_cpu
        and first.is_cpu
        and second.is_cpu
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not (torch.is_grad_enabled() and _learns(x, y, first, second, table))
        and not torch.compiler.is_compiling()
    )


def _learns(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


def free(*tensors: Tensor) -> bool:
    """Whether nobody maps them or needs a gradient, so that the first may be written into."""
    if torch.is_grad_enabled() and _learns(*tensors):
        return False
    return not any(is_functorch_wrapped_tensor(t) for t in tensors)


def _fused(x: Tensor, y: Tensor, first: Tensor, second: Tensor, updates: Updates) -> Tensor:
    x, y = x.contiguous(), y.contiguous()
    updates.add(
        x.data_ptr(),
        y.data_ptr(),
        first.data_ptr(),
        second.data_ptr(),
        x.size(2),
        y.size(2),
        torch.get_num_threads(),
    )
    return y


def _by_row(x: Tensor, y: Tensor, first: Tensor, second: Tensor, packed: Packed) -> Tensor:
    places = packed.places
    h = torch.bmm(x, first[places.parts].flatten(1, 2).transpose(1, 2))
    if not packed.plain:
        weights = places.weights.to(h.dtype).flatten()[places.slots]
        h = h * weights.repeat_interleave(first.shape[1], 1)[:, None]
    second = second[places.parts].flatten(1, 2)
    return y.baddbmm_(h, second) if free(y, h) else torch.baddbmm(y, h, second)


def _packed(x: Tensor, y: Tensor, first: Tensor, second: Tensor, packed: Packed) -> Tensor:
    places = packed.places
    parts, most = places.rows.shape
    if places.owners is not None:
        first, second = first[places.owners], second[places.owners]
    # Picked rows lie as those of x do, which may be transposed: a view is not always possible.
    picked = x if packed.straight else x.index_select(0, places.rows.flatten())
    h = torch.bmm(picked.reshape(parts, most * x.shape[1], -1), first.transpose(1, 2))
    if not packed.plain:
        weights = places.weights.to(h.dtype)[:, :, None, None]
        h = (h.view(parts, most, x.shape[1], -1) * weights).view(h.shape)
    if packed.straight:
        flat = y.reshape(h.shape[0], h.shape[1], -1)
        found = flat.baddbmm_(h, second) if free(flat, h) else torch.baddbmm(flat, h, second)
        return found.view(y.shape)
    found = torch.bmm(h, second).view(parts * most, x.shape[1], -1)
    if not packed.even:
        found[-1] = 0  # what stands there is of a row that was read for nothing
    for column in places.slots.unbind(1):
        own = found.index_select(0, column)
        y = y.add_(own) if free(y, own) else y + own
    return y


def _in_turn(x: Tensor, y: Tensor, first: Tensor, second: Tensor, packed: Packed) -> Tensor:
    assert packed.runs is not None
    pieces, done = [], 0
    in_place = y.is_contiguous() and free(y, x, packed.table)
    for part, start, end in packed.runs:
        h = x[start:end].flatten(0, 1) @ first[part].t()
        if not packed.plain:
            weights = packed.table[start:end, part].to(h.dtype).repeat_interleave(x.shape[1])
            h = h * weights[:, None]
        own = y[start:end].flatten(0, 1)
        if in_place:
            own.addmm_(h, second[part])
            continue
        pieces += [y[done:start], torch.addmm(own, h, second[part]).unflatten(0, (end - start, -1))]
        done = end
    return torch.cat([*pieces, y[done:]]) if pieces else y


def _whole(x: Tensor, y: Tensor, first: Tensor, second: Tensor, packed: Packed) -> Tensor:
    used, table = packed.in_use
    if used is not None:
        first, second = first[used], second[used]
    weights = table.to(x.dtype)[:, None, :, None]
    h = (x @ first.flatten(0, 1).t()).unflatten(2, first.shape[:2]) * weights
    flat = torch.addmm(y.flatten(0, 1), h.flatten(2).flatten(0, 1), second.flatten(0, 1))
    return flat.unflatten(0, y.shape[:2])


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Packed], Tensor]] = {
    "by row": _by_row,
    "packed": _packed,
    "in turn": _in_turn,
    "whole": _whole,
}
