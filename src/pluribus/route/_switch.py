"""Put one part's tensors in the places of the base's own, so that it runs as that expert alone.

    written   origin + delta goes into the base's storage; copies of the origins wait beside it
    kept      each expert's tensors are made once and stay, for the last `limit` experts that were
              used; the base's tensors are pointed at them, and nothing is copied

Both put the origins back bit for bit.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pluribus.core.errors import InputError
from pluribus.route.parts import Bottleneck, Delta, LowRank, Masked, Part


@dataclass(frozen=True)
class Kept:
    """An expert's own tensors by name, and what the base's were when they were made."""

    tensors: dict[str, Tensor]
    made_of: dict[str, tuple[int, int]]  # address and version of the base's tensor


class Switch:
    """Switches a base's tensors in place; `name` is the part that stands there now."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.limit = 0
        self.name: str | None = None
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._copies: dict[str, Tensor] = {}  # of origins, where experts are written
        self._pointed: dict[str, Tensor] = {}  # origins themselves, where experts are kept
        self._stands: tuple[str, ...] = ()

    def keep(self, limit: int) -> None:
        """Keep the tensors of at most that many experts from now on; 0 keeps none."""
        if limit < 0:
            raise InputError(f"keep is {limit}; give the number of experts to keep, 0 for none")
        if self.name is not None:
            raise InputError(f"the base is switched to {self.name}; call switch(None) first")
        self.limit = limit
        while len(self._kept) > limit:
            self._kept.popitem(last=False)

    def to(self, name: str | None, part: Part) -> list[str]:
        """Let a part stand in the base (None: none), and return the tensors that changed."""
        before = self._stands
        if self.limit:
            self._point_back()
            if name is not None:
                self._pointed = self._point(self.ready(name, lambda: part))
        else:
            self._write(part)
        self._stands, self.name = tuple(part), name
        return sorted({*before, *part})

    # -- kept ------------------------------------------------------------------------------------

    @contextmanager
    def standing(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """Let an expert's tensors stand in the base inside the block."""
        origins = self._point(tensors)
        try:
            yield
        finally:
            self._point(origins)

    def ready(self, name: str, part: Callable[[], Part]) -> dict[str, Tensor]:
        """Return an expert's tensors, made anew if they aren't kept or the base has changed."""
        own = self.base.state_dict(keep_vars=True)
        found = self._kept.pop(name, None)
        if found is None or any(_mark(own[n]) != mark for n, mark in found.made_of.items()):
            tensors = {}
            with torch.no_grad():
                for place, delta in _deltas(name, part()).items():
                    origin = own[place].detach()
                    tensors[place] = torch.empty_like(origin)
                    _add(origin, delta, tensors[place])
            found = Kept(tensors, {place: _mark(own[place]) for place in tensors})
            while len(self._kept) >= self.limit:
                self._kept.popitem(last=False)
        self._kept[name] = found
        return found.tensors

    def _point(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Point the base's tensors at others, and return what they pointed at."""
        own = self.base.state_dict(keep_vars=True)
        before = {place: own[place].data for place in tensors}
        sharing: dict[int, list[Tensor]] = {}  # tensors by where they lie, as tied ones lie at one
        for tensor in own.values():
            sharing.setdefault(tensor.data_ptr(), []).append(tensor)
        for place, tensor in tensors.items():
            for one in sharing[before[place].data_ptr()]:
                if one.shape == tensor.shape:
                    one.data = tensor
        return before

    def _point_back(self) -> None:
        self._point(self._pointed)
        self._pointed = {}

    # -- written ---------------------------------------------------------------------------------

    def _write(self, part: Part) -> None:
        deltas = _deltas(self.name, part)
        state = self.base.state_dict()
        with torch.no_grad():
            for place, delta in deltas.items():
                origin = self._copies.get(place)
                if origin is None:
                    origin = self._copies[place] = state[place].clone()
                _add(origin, delta, state[place])
            for place in self._stands:
                if place not in deltas:
                    state[place].copy_(self._copies[place])
        if not part:
            self._copies.clear()


def _mark(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor._version


def _deltas(name: str | None, part: Part) -> dict[str, Delta]:
    found = {place: delta for place, delta in part.items() if not isinstance(delta, Bottleneck)}
    if len(found) < len(part):
        raise InputError(f"part {name} has adapters behind modules, which cannot be written")
    return found


def _add(origin: Tensor, delta: Delta, out: Tensor) -> None:
    """Write origin plus delta to a tensor of the same shape and type."""
    if isinstance(delta, LowRank) and origin.dtype == delta.a.dtype:
        flat = origin.view(len(origin), -1)
        torch.addmm(flat, delta.b, delta.a, out=out.view(flat.shape))
    elif (
        isinstance(delta, Masked)
        and origin.dtype == delta.vector.dtype
        and out.is_contiguous()
        and delta.vector.is_contiguous()
    ):
        delta.write(origin, out)
    else:
        out.copy_(origin + delta.delta(origin))
