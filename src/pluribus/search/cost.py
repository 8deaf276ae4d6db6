"""What a point costs: parameters, arithmetic, time, bytes, or a table of the user's.

Each is a function of the object under search, for `run(cost=...)`; `build` turns the object into
what is measured (a module, or for `Size` also a mapping of tensors) where it isn't one itself.

    Parameters  sum of the sizes of the module's parameters, shared ones once
    Flops       of one forward pass, as torch counts them: a multiplication and an addition are two
    Latency     median seconds of 20 passes after 5 to warm up, on a fixed number of threads
    Size        bytes of all parameters and buffers, shared ones once
    Table       of (choice, cost), e.g. measured on a device that isn't here

    absolute(Q, T) = Q + beta |T / T0 - 1|,  beta < 0      (TuNAS, https://arxiv.org/abs/2008.06120)

is a reward that keeps a cost T near a target T0, for algorithms with one objective.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pluribus.core.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

Build = Callable[[Any], Any]
Inputs = Callable[[], Any]  # makes the tensor, or the tuple of them, that a module is called with


def parameters(module: "nn.Module") -> int:
    """Return the number of parameters of a module; shared ones count once."""
    return sum(tensor.numel() for tensor in module.parameters())


def size(what: Any) -> int:
    """Return the bytes of a module's parameters and buffers, or of a mapping of tensors.

    Tensors that share their memory count once.
    """
    tensors = what if isinstance(what, Mapping) else what.state_dict(keep_vars=True)
    seen: dict[Any, int] = {}
    for tensor in tensors.values():
        seen[_memory(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def flops(module: "nn.Module", *inputs: "Tensor") -> int:
    """Return the floating-point operations of one forward pass, by `torch.utils.flop_counter`."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


def latency(
    module: "nn.Module",
    *inputs: "Tensor",
    threads: int = 1,
    warmups: int = 5,
    runs: int = 20,
) -> float:
    """Return the median seconds of a forward pass without gradients, in evaluation mode.

    The module's mode and the number of threads are put back. On a CUDA device each pass is waited
    for. Raises InputError for fewer than one run or thread.
    """
    import torch

    if runs < 1 or threads < 1 or warmups < 0:
        raise InputError(
            f"latency: runs = {runs}, threads = {threads} and warmups = {warmups}; give at least "
            "1, 1 and 0"
        )
    on_gpu = any(tensor.is_cuda for tensor in inputs)
    before, training = torch.get_num_threads(), module.training
    seconds = []
    torch.set_num_threads(threads)
    module.eval()
    try:
        with torch.inference_mode():
            for _ in range(warmups + runs):
                if on_gpu:
                    torch.cuda.synchronize()
                began = time.perf_counter()
                module(*inputs)
                if on_gpu:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
        module.train(training)
    return statistics.median(seconds[warmups:])


def absolute(reward: float, cost: float, target: float, beta: float = -0.07) -> float:
    """Return reward + beta |cost / target - 1|. Raises InputError for a target of 0 or less."""
    if not target > 0:
        raise InputError(f"target = {target}: give the cost to aim at, above 0")
    return reward + beta * abs(cost / target - 1)


# -- as functions of the object under search -------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """Number of parameters of `build(obj)`."""

    build: Build | None = None
    name: str = field(default="parameters", kw_only=True)

    def __call__(self, value: Any) -> int:
        """Count them."""
        return parameters(_module(self.build, value))


@dataclass(frozen=True)
class Size:
    """Bytes of `build(obj)`, a module or a mapping of tensors."""

    build: Build | None = None
    name: str = field(default="size", kw_only=True)

    def __call__(self, value: Any) -> int:
        """Count them."""
        made = value if self.build is None else self.build(value)
        return size(made if isinstance(made, Mapping) else _module(None, made))


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward pass of `build(obj)` on `inputs()`."""

    inputs: Inputs
    build: Build | None = None
    name: str = field(default="flops", kw_only=True)

    def __call__(self, value: Any) -> int:
        """Count them."""
        return flops(_module(self.build, value), *_tuple(self.inputs()))


@dataclass(frozen=True)
class Latency:
    """Median seconds of a forward pass of `build(obj)` on `inputs()`; it differs between runs."""

    inputs: Inputs
    build: Build | None = None
    threads: int = field(default=1, kw_only=True)
    warmups: int = field(default=5, kw_only=True)
    runs: int = field(default=20, kw_only=True)
    name: str = field(default="latency", kw_only=True)

    def __call__(self, value: Any) -> float:
        """Measure it."""
        module, inputs = _module(self.build, value), _tuple(self.inputs())
        how = {"threads": self.threads, "warmups": self.warmups, "runs": self.runs}
        return latency(module, *inputs, **how)


@dataclass(frozen=True)
class Table:
    """Costs by choice: the entry at `key(obj)`, or the sum of those at several keys."""

    costs: Mapping[Any, float]
    key: Callable[[Any], Any] | None = None
    name: str = field(default="cost", kw_only=True)

    def __call__(self, value: Any) -> float:
        """Look it up. Raises InputError for a choice that the table lacks."""
        chosen = value if self.key is None else self.key(value)
        keys = chosen if isinstance(chosen, list) else [chosen]
        for one in keys:
            if one not in self.costs:
                told = ", ".join(map(str, list(self.costs)[:8]))
                raise InputError(
                    f"the table of costs has no {one!r}; it has: {told}."
                    + nearest(str(one), map(str, self.costs))
                )
        return float(sum(self.costs[one] for one in keys))


def _module(build: Build | None, value: Any) -> "nn.Module":
    from torch import nn

    made = value if build is None else build(value)
    if not isinstance(made, nn.Module):
        raise InputError(
            f"a cost measures a module, not {type(made).__name__}: give build=, a function that "
            "makes the module of an object of the space"
        )
    return made


def _tuple(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _memory(tensor: "Tensor") -> Any:
    if tensor.device.type == "meta" or not tensor.numel():
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.numel() * tensor.element_size())
