"""What kernels need to find only once for all blocks of a tensor."""

import threading
from collections.abc import Callable
from typing import Any


class Once:
    """Remembers, in each thread, what was last made of a merger and the result of its fold.

    All blocks of a tensor share that result, so what follows from it need not be found again.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make, self._last = make, threading.local()

    def __call__(self, merger: Any, folded: Any, *more: Any) -> Any:
        """Return what is made of them, the same object while they are the same objects."""
        known = getattr(self._last, "known", None)
        if known is None or known[0] is not merger or known[1] is not folded:
            known = self._last.known = (merger, folded, self._make(merger, folded, *more))
        return known[2]
