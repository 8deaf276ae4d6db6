"""What a router looks at: one vector for each input, from the shared model alone.

    "output"        the model's own output, (b, d) or the mean over places of (b, ..., d)
    "hidden"        a transformers model's last hidden state, mean over tokens that are not padding
    "module:NAME"   the output of a module inside, mean over places
    "spread:NAME"   the same output's standard deviation over places

several of them joined by "+", one behind the other, from one pass; or any function of
(model, *inputs) to (b, d). Early layers often tell tasks apart that late ones have made alike, and
cost less: the pass ends where the last of the modules has run, if only modules are named.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pluribus.core.errors import InputError, MismatchError, nearest
from pluribus.core.shapes import Float

Features = Callable[..., Float[Tensor, "b d"]]

KINDS = ("output", "hidden", "module:NAME", "spread:NAME")


def features_of(what: Features | str) -> Features:
    """Return the function of that name. Raises InputError for an unknown name."""
    return Looked(what) if isinstance(what, str) else what


class Looked:
    """Named features. Raises InputError for a name that is none or a module that isn't there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sources = tuple(name.split("+"))
        for source in self.sources:
            kind, colon, path = source.partition(":")
            if colon and kind in ("module", "spread"):
                if not path:
                    raise InputError(f"features {name!r}: name the module, as in {kind}:encoder.0")
            elif source not in ("output", "hidden"):
                raise InputError(f"features {name!r}: expected one of {', '.join(KINDS)}")
        if {"output", "hidden"} <= set(self.sources):
            raise InputError(f"features {name!r}: output and hidden take a pass each; give one")
        inside = (source.partition(":")[2] for source in self.sources if ":" in source)
        self.paths = tuple(dict.fromkeys(inside))
        self.early = all(":" in source for source in self.sources)  # the pass may end inside

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Float[Tensor, "b d"]:
        """See `Features`. Of a module that runs several times, the first output counts."""
        modules = dict(model.named_modules())
        seen: dict[str, Any] = {}
        handles = []
        try:
            for path in self.paths:
                if path not in modules:
                    raise InputError(
                        f"features: there is no module {path!r}.{nearest(path, modules)}"
                    )
                handles.append(modules[path].register_forward_hook(self._keep(seen, path)))
            try:
                out = _body(model, self.sources)(*args, **kwargs)
            except _Seen:
                out = None
        finally:
            for handle in handles:
                handle.remove()
        if silent := [path for path in self.paths if path not in seen]:
            raise MismatchError(f"features: module {silent[0]} did not run")
        mask = kwargs.get("attention_mask")
        found = [self._vector(source, seen, out, model, mask) for source in self.sources]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _keep(self, seen: dict[str, Any], path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            seen.setdefault(path, out[0] if isinstance(out, tuple) else out)
            if self.early and len(seen) == len(self.paths):
                raise _Seen

        return hook

    @staticmethod
    def _vector(
        source: str, seen: dict[str, Any], out: Any, model: nn.Module, mask: Tensor | None
    ) -> Float[Tensor, "b d"]:
        kind, _, path = source.partition(":")
        if kind == "output":
            return pooled(out, mask)
        if kind == "hidden":
            if getattr(out, "last_hidden_state", None) is None:
                raise MismatchError(
                    f"{type(model).__name__} has no last hidden state; take other features"
                )
            return pooled(out.last_hidden_state, mask)
        return (pooled if kind == "module" else spread)(seen[path], mask)


class _Seen(Exception):
    """Ends a pass whose rest nobody needs."""


def _body(model: nn.Module, sources: tuple[str, ...]) -> Any:
    """Return what has to run: of a transformers model, all but the head if nobody needs that."""
    return getattr(model, "base_model", model) if "hidden" in sources else model


def pooled(out: Any, mask: Tensor | None = None) -> Float[Tensor, "b d"]:
    """Return (b, d): the mean over all axes between the first and the last, where `mask` is set.

    Of maps (b, d, h, w), the mean over places.
    """
    places, kept = _places(out, mask)
    return places[:, 0] if kept is None else _mean(places, kept)[:, 0]


def spread(out: Any, mask: Tensor | None = None) -> Float[Tensor, "b d"]:
    """Return (b, d): the standard deviation over the places that `pooled` takes the mean of.

    The root of the mean square; of one place, 0. Raises MismatchError if there are no places.
    """
    places, kept = _places(out, mask)
    if kept is None:
        raise MismatchError(
            f"an output of shape {list(out.shape)} has no places to be spread over; take module: "
            "instead of spread:"
        )
    return _mean((places - _mean(places, kept)).square(), kept)[:, 0].sqrt()


def _mean(places: Tensor, kept: Tensor) -> Float[Tensor, "b 1 d"]:
    return (places * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)


def _places(out: Any, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return (b, p, d) and which places count (b, p, 1), as numbers; None for one without axis."""
    if not isinstance(out, Tensor):
        raise MismatchError(
            f"a {type(out).__name__} is no tensor of features; say which module has them "
            "(features='module:NAME')"
        )
    if out.ndim < 2:
        raise MismatchError(f"features of shape {list(out.shape)} have no row for each input")
    if out.ndim == 2:
        return out[:, None], None
    if out.ndim == 4:
        out = out.flatten(2).transpose(1, 2)
    if mask is None or out.ndim != 3:
        out = out.flatten(1, -2)
        return out, out.new_ones(1, out.shape[1], 1).expand(len(out), -1, -1)
    return out, mask.to(out.dtype)[..., None]
