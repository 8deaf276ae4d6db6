"""What an adapter holds of the updates it stands for, module by module."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Action = Literal["lora", "saved", "skipped", "unchanged"]


@dataclass(frozen=True, kw_only=True)
class ModuleReport:
    """One tensor. `energy` is the squared norm of the update, `kept` the share of it that is held.

    `kept` is 1 - |update - held|^2 / |update|^2, measured on what was written.
    """

    name: str
    action: Action
    shape: tuple[int, ...]
    rank: int = 0
    energy: float = 0.0
    kept: float = 1.0
    max_error: float = 0.0  # largest absolute error of an element


@dataclass(frozen=True)
class AdapterReport:
    """All tensors of a merge or an extraction."""

    modules: tuple[ModuleReport, ...]

    def __getitem__(self, name: str) -> ModuleReport:
        """Return the report of the tensor called `name`."""
        return next(module for module in self.modules if module.name == name)

    def only(self, *actions: str) -> tuple[ModuleReport, ...]:
        """Return the tensors that were treated in one of these ways."""
        return tuple(module for module in self.modules if module.action in actions)

    @property
    def kept(self) -> float:
        """Share of the whole update's squared norm that the adapter holds."""
        total = sum(module.energy for module in self.modules)
        held = sum(module.energy * module.kept for module in self.modules)
        return held / total if total else 1.0

    @property
    def max_error(self) -> float:
        """Largest absolute error of an element of any tensor that the adapter changes."""
        return max((m.max_error for m in self.only("lora", "saved")), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and text, for JSON."""
        modules = [asdict(module) | {"shape": list(module.shape)} for module in self.modules]
        return {"kept": self.kept, "max_error": self.max_error, "modules": modules}
