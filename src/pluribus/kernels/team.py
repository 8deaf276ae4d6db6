"""Compiled functions on the threads of the OpenMP library that the process has loaded, torch's.

torch's operators leave their threads awake for the next one. A kernel between two of them that
brings threads of its own has to share the processors with those; on the same threads it begins
within two microseconds. Where no such library is found, functions run on the caller's thread.

Inside a function `me()` is the number of its thread among `size()`, and `meet()` waits for all.
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import llvmlite.binding as llvm
import numba as nb
from numba.core.ccallback import CFunc
from numba.core.types import CPointer, ExternalFunction, int32, void, voidptr

from pluribus.kernels.chunks import Stored

SIGNATURE = void(CPointer(voidptr))

me = ExternalFunction("pluribus_team_me", int32())
size = ExternalFunction("pluribus_team_size", int32())
meet = ExternalFunction("pluribus_team_meet", void())

OPENMP = {  # our names of what the library offers
    "pluribus_team_me": "omp_get_thread_num",
    "pluribus_team_size": "omp_get_num_threads",
    "pluribus_team_meet": "GOMP_barrier",
}
ALONE: dict[str, tuple[Any, Callable[[], Any]]] = {
    "pluribus_team_me": (int32(), lambda: 0),
    "pluribus_team_size": (int32(), lambda: 1),
    "pluribus_team_meet": (void(), lambda: None),
}


@lru_cache
def _begin() -> Callable[[int, int, int, int], None] | None:
    """Name the library's functions to the compiler; return what runs a team, None without one."""
    import torch  # noqa: F401 (loads the library)

    try:
        loaded = ctypes.CDLL(None)
        found = {ours: getattr(loaded, theirs) for ours, theirs in OPENMP.items()}
        run = loaded.GOMP_parallel
    except (AttributeError, TypeError):  # of an older library; of Windows
        for ours, (signature, function) in ALONE.items():
            llvm.add_symbol(ours, _kept(nb.cfunc(signature)(function)).address)
        return None
    for ours, function in found.items():
        llvm.add_symbol(ours, ctypes.cast(function, ctypes.c_void_p).value)
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    run.restype = None
    return run


_compiled: list[Any] = []


def _kept(function: Any) -> Any:
    """Keep compiled code for as long as the process lives."""
    _compiled.append(function)
    return function


def compiled(work: Callable[[Any], None], **options: Any) -> Callable[[int, int, int], None]:
    """Compile `work(pointers)`, once and for the disk; return what runs it on a team.

    That takes the address of the pointers, how many threads there should be at most, and 0.
    """
    team = _begin()
    signature = SIGNATURE.args, SIGNATURE.return_type
    function: Any = CFunc(work, signature, {}, {"error_model": "numpy", **options})
    function._cache = Stored(work)
    function.compile()
    address = _kept(function).address
    if team is None:
        alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
        return lambda job, _threads, _flags: alone(job)
    return partial(team, address)
