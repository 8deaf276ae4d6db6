"""A module around another that answers for it: what it lacks is looked for in `base`."""

from typing import Any

from torch import nn

OWN = ("base", "_modules", "_parameters", "_buffers")


class Around(nn.Module):
    """Keeps a model as `base`; config, device, dtype and the like are the base's."""

    base: nn.Module

    def __getattr__(self, name: str) -> Any:
        """Look for what is not ours in the base."""
        modules = self.__dict__.get("_modules", {})
        if name in modules:  # the usual case, and quicker than asking above
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in OWN or name.startswith("__"):
                raise
            return getattr(super().__getattr__("base"), name)
