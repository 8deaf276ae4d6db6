"""One registry per family: the key is the file's name, found on lookup, imported lazily.

Outsiders join through entry points: `name = "module:Class"` in the group `pluribus.merge`.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from pluribus.core.errors import RecipeError, nearest


class Registry(Mapping[str, type]):
    """The classes of one family by name. Iterating imports nothing; indexing imports one file."""

    def __init__(self, package: str, attribute: str, kind: str = "method") -> None:
        self.package, self.attribute, self.kind = package, attribute, kind

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        """What other packages have installed; the installed ones do not change while we run."""
        return {point.name: point for point in entry_points(group=self.package)}

    def _package(self) -> ModuleType:
        return importlib.import_module(self.package)

    def _own(self) -> set[str]:
        files = pkgutil.iter_modules(self._package().__path__)
        return {file.name for file in files if not file.ispkg and not file.name.startswith("_")}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._own() | set(self._points)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._points or name in self._own()

    def __getitem__(self, name: str) -> type:
        """Return the class registered as `name`. Raises RecipeError with the nearest name."""
        if name in self._points:
            return self._points[name].load()
        if name not in self:
            raise RecipeError(
                f"no {self.kind} is called {name!r}; there are: {', '.join(self)}."
                + nearest(name, self)
            )
        module = importlib.import_module(f"{self.package}.{name}")
        for value in vars(module).values():
            found = getattr(value, self.attribute, None) if isinstance(value, type) else None
            if found is not None and found.name == name:
                return value
        raise RecipeError(f"{module.__file__} defines no {self.kind} called {name!r}")

    def build(self, name: str, parameters: Mapping[str, Any]) -> Any:
        """Construct the method called `name`; `lambda` is read as its field `scale`.

        Raises RecipeError for an unknown name, InputError for a bad parameter.
        """
        cls = self[name]
        values = dict(parameters)
        if "lambda" in values:
            if "scale" in values:
                raise RecipeError(f"{name}: lambda and scale are the same parameter; give one")
            values["scale"] = values.pop("lambda")
        return cls(**values)


MERGERS = Registry("pluribus.merge", "__pluribus_facts__", "merge method")
STEPS = Registry("pluribus.merge.steps", "__pluribus_step__", "step")
