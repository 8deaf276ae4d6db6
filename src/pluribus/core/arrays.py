"""One arithmetic for numpy and torch: mergers are written once and run on either.

On a CPU the driver hands numpy blocks to a merger (no torch import, single-threaded ufuncs, the
same bits everywhere); on a GPU it hands torch tensors. `namespace(x)` gives the functions of the
array API standard for whichever it is.
"""

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import array_namespace as namespace

from pluribus.core.shapes import Bool, Float, Int

if TYPE_CHECKING:
    import torch

    Array = np.ndarray | torch.Tensor
elif "torch" in sys.modules:  # tests check annotations with torch loaded; users pay nothing
    Array = np.ndarray | sys.modules["torch"].Tensor
else:
    Array = np.ndarray

__all__ = ["Array", "Bool", "Float", "Int", "column", "is_torch", "like", "namespace", "per_expert"]


def is_torch(array: Any) -> bool:
    """Return whether `array` is a torch tensor, without importing torch."""
    return not isinstance(array, np.ndarray) and type(array).__module__.split(".")[0] == "torch"


def like(values: Any, other: Any) -> Any:
    """Return `values` as an array of the kind, device and floating type of `other`."""
    if not is_torch(other):
        return np.asarray(values, other.dtype)
    import torch

    return torch.as_tensor(np.asarray(values), dtype=other.dtype, device=other.device)


def per_expert(value: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    """Spread a shared value over `count` experts, or check that there is one for each.

    Raises InputError if the lengths differ.
    """
    if not isinstance(value, tuple):
        return (value,) * count
    if len(value) != count:
        from pluribus.core.errors import InputError

        raise InputError(f"{len(value)} values were given for {count} experts: {value}")
    return value


def column(value: float | tuple[float, ...], experts: Array) -> Array:
    """Return per-expert values as a (t, 1) array that broadcasts over `experts` (t, n)."""
    values = np.asarray(per_expert(value, experts.shape[0]))
    return like(values, experts).reshape(-1, *(1,) * (experts.ndim - 1))
