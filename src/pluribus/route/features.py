"""What a router looks at: one vector for each input, from the shared model alone.

    "output"        the model's own output, (b, d) or the mean over places of (b, ..., d)
    "hidden"        a transformers model's last hidden state, mean over tokens that are not padding
    "module:NAME"   the output of a module inside, mean over places

or any function of (model, *inputs) to (b, d). Text in a saved composite names one of the first.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pluribus.core.errors import InputError, MismatchError, nearest
from pluribus.core.shapes import Float

Features = Callable[..., Float[Tensor, "b d"]]
KINDS = ("output", "hidden", "module:NAME")


def features_of(what: Features | str) -> Features:
    """Return the function of that name. Raises InputError for an unknown name."""
    if not isinstance(what, str):
        return what
    if what == "output":
        return Output()
    if what == "hidden":
        return Hidden()
    if what.startswith("module:"):
        return Inside(what.removeprefix("module:"))
    raise InputError(f"features {what!r}: expected one of {', '.join(KINDS)}")


class Output:
    """The model's own output."""

    name = "output"

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Float[Tensor, "b d"]:
        """See `Features`."""
        return pooled(model(*args, **kwargs))


class Hidden:
    """The last hidden state of a transformers model."""

    name = "hidden"

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Float[Tensor, "b d"]:
        """See `Features`."""
        body = getattr(model, "base_model", model)  # without the head, which nobody needs here
        out = body(*args, **kwargs)
        state = getattr(out, "last_hidden_state", None)
        if state is None:
            raise MismatchError(
                f"{type(model).__name__} has no last hidden state; take other features"
            )
        mask = kwargs.get("attention_mask")
        return pooled(state, mask)


class Inside:
    """The output of a module inside."""

    def __init__(self, path: str) -> None:
        self.path, self.name = path, f"module:{path}"

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Float[Tensor, "b d"]:
        """See `Features`."""
        modules = dict(model.named_modules())
        if self.path not in modules:
            raise InputError(
                f"features: there is no module {self.path!r}.{nearest(self.path, modules)}"
            )
        found: list[Any] = []
        handle = modules[self.path].register_forward_hook(lambda _m, _a, out: found.append(out))
        try:
            model(*args, **kwargs)
        finally:
            handle.remove()
        if not found:
            raise MismatchError(f"features: {self.path} did not run")
        out = found[-1]
        return pooled(out[0] if isinstance(out, tuple) else out, kwargs.get("attention_mask"))


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
