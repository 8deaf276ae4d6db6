"""A small cache of arrays, bounded by bytes, that any thread may use."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np


class Recent:
    """The most recently used arrays, up to `limit` bytes in all.

    A value that several threads ask for at once is loaded by one of them.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._values: OrderedDict[Hashable, tuple[np.ndarray, ...]] = OrderedDict()
        self._gates: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(
        self, key: Hashable, load: Callable[[], tuple[np.ndarray, ...]]
    ) -> tuple[np.ndarray, ...]:
        """Return the arrays kept under `key`, or load and keep them; they must not be changed."""
        with self._lock:
            found = self._find(key)
            if found is not None:
                return found
            gate = self._gates.setdefault(key, threading.Lock())
        with gate:
            with self._lock:
                found = self._find(key)
            if found is not None:
                return found
            try:
                value = load()
            finally:
                with self._lock:
                    self._gates.pop(key, None)
            self._keep(key, value)
            return value

    def _find(self, key: Hashable) -> tuple[np.ndarray, ...] | None:
        found = self._values.get(key)
        if found is not None:
            self._values.move_to_end(key)
        return found

    def _keep(self, key: Hashable, value: tuple[np.ndarray, ...]) -> None:
        size = sum(array.nbytes for array in value)
        if size > self.limit:
            return
        with self._lock:
            if key in self._values:
                return
            self._values[key] = value
            self.held += size
            while self.held > self.limit:
                _, old = self._values.popitem(last=False)
                self.held -= sum(array.nbytes for array in old)
