"""Folders that are no checkpoint but a system of their own, such as composites: who opens them.

An opener is found by the file that marks its folders, through the entry points of the group
`pluribus.openers`: `"routed.json" = "pluribus.route.system:COMPOSITES"`. So this package knows none
of those that stand on it, and other packages can add theirs. An opener of files has `takes(path)`.
"""

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pluribus.tasks.systems import ZooSystem
    from pluribus.tasks.zoo import Zoo


class Opener(Protocol):
    """Opens folders of one kind."""

    def language(self, folder: str | Path, device: str) -> tuple[Any, Any]:
        """Return a language model, called as transformers models are, and its tokenizer."""
        ...

    def of_zoo(self, folder: str | Path, zoo: "Zoo", label: str, device: str) -> "ZooSystem":
        """Return a system that answers for a zoo's tasks."""
        ...


def opener(reference: Any) -> Opener | None:
    """Return who opens what a reference names; None: it is a checkpoint, or a recipe to merge."""
    if not isinstance(reference, str | Path):
        return None
    path = Path(reference).expanduser()
    for marker, point in _known().items():
        if (path / marker).is_file():
            return point.load()
    if path.is_file() and path.suffix in (".yml", ".yaml"):
        for point in _known().values():
            takes = getattr(point.load(), "takes", None)
            if takes is not None and takes(path):
                return point.load()
    return None


@cache
def _known() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group="pluribus.openers")}
