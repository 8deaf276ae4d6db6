"""What a router looks at: one vector for each input, from the shared model alone.

    "output"        the model's own output, (b, d) or the mean over places of (b, ..., d)
    "hidden"        a transformers model's last hidden state, mean over tokens that are not padding
    "module:NAME"   the output of a module inside, mean over places

several of them joined by "+", one behind the other, from one pass; or any function of
(model, *inputs) to (b, d). Early layers often tell tasks apart that late ones have made alike.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pluribus.core.errors import InputError, MismatchError, nearest
from pluribus.core.shapes import Float

Features = Callable[..., Float[Tensor, "b d"]]
KINDS = ("output", "hidden", "module:NAME")


def features_of(what: Features | str) -> Features:
    """Return the function of that name. Raises InputError for an unknown name."""
    return Looked(what) if isinstance(what, str) else what


class Looked:
    """Named features. Raises InputError for a name that is none or a module that isn't there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sources = tuple(name.split("+"))
        for source in self.sources:
            if source not in ("output", "hidden") and not source.removeprefix("module:"):
                raise InputError(f"features {name!r}: name the module, as in module:encoder.0")
            if source not in ("output", "hidden") and not source.startswith("module:"):
                raise InputError(f"features {name!r}: expected one of {', '.join(KINDS)}")
        if {"output", "hidden"} <= set(self.sources):
            raise InputError(f"features {name!r}: output and hidden take a pass each; give one")

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Float[Tensor, "b d"]:
        """See `Features`."""
        modules = dict(model.named_modules())
        seen: dict[str, Any] = {}
        handles = []
        try:
            for source in self.sources:
                if not source.startswith("module:"):
                    continue
                path = source.removeprefix("module:")
                if path not in modules:
                    raise InputError(
                        f"features: there is no module {path!r}.{nearest(path, modules)}"
                    )
                handles.append(modules[path].register_forward_hook(_keep(seen, source)))
            out = _body(model, self.sources)(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if "output" in self.sources:
            seen["output"] = out
        if "hidden" in self.sources:
            seen["hidden"] = getattr(out, "last_hidden_state", None)
            if seen["hidden"] is None:
                raise MismatchError(
                    f"{type(model).__name__} has no last hidden state; take other features"
                )
        if silent := [source for source in self.sources if source not in seen]:
            raise MismatchError(f"features: {silent[0]} did not run")
        mask = kwargs.get("attention_mask")
        found = [pooled(seen[source], mask) for source in self.sources]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _keep(seen: dict[str, Any], source: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        seen[source] = out[0] if isinstance(out, tuple) else out

    return hook


def _body(model: nn.Module, sources: tuple[str, ...]) -> Any:
    """Return what has to run: of a transformers model, all but the head if nobody needs that."""
    return getattr(model, "base_model", model) if "hidden" in sources else model


def pooled(out: Any, mask: Tensor | None = None) -> Float[Tensor, "b d"]:
    """Return (b, d): the mean over all axes between the first and the last, where `mask` is set.

    Of maps (b, d, h, w), the mean over places.
    """
    if not isinstance(out, Tensor):
        raise MismatchError(
            f"a {type(out).__name__} is no tensor of features; say which module has them "
            "(features='module:NAME')"
        )
    if out.ndim == 2:
        return out
    if out.ndim < 2:
        raise MismatchError(f"features of shape {list(out.shape)} have no row for each input")
    if out.ndim == 4:
        return out.mean((2, 3))
    if mask is None or out.ndim != 3:
        return out.flatten(1, -2).mean(1)
    kept = mask.to(out.dtype)[..., None]
    return (out * kept).sum(1) / kept.sum(1).clamp(min=1)
