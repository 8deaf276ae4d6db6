"""Recipe text: YAML documents read safely and strictly, with the line of every key.

Plain `yaml.safe_load` keeps the last of two equal keys, and lets a few bytes of aliases stand for
billions of nodes; here both are errors, before anything is built from them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from pluribus.core.errors import RecipeError

LONGEST = 4_000_000  # characters of a recipe's text
NODES = 200_000  # values of one document once its aliases are spelled out

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """One YAML document: its value, and the line (from 1) on which each key or item stands."""

    value: Any
    lines: Mapping[Path, int] = field(default_factory=dict)

    def line(self, path: Sequence[Any]) -> int | None:
        """Return the line of the deepest part of `path` that the document has."""
        known: Path = ()
        for part in path:
            if (*known, part) in self.lines:
                known = (*known, part)
        return self.lines.get(known)


def documents(text: str, where: str = "recipe") -> list[Document]:
    """Return the documents of a YAML text; empty ones are left out.

    Raises RecipeError with file and line for text that is not YAML, a key given twice, and a
    document that its aliases make too large.
    """
    if len(text) > LONGEST:
        raise RecipeError(f"{where}: a recipe may have {LONGEST} characters, not {len(text)}")
    loader: yaml.SafeLoader | None = None
    found = []
    try:
        loader = yaml.SafeLoader(text)  # refuses characters that no YAML holds
        while loader.check_node():
            node = loader.get_node()
            assert node is not None
            lines: dict[Path, int] = {}
            _check(node, where, {}, set())
            _note(node, (), lines)
            value = loader.construct_document(node)
            if value is not None:
                found.append(Document(value, lines))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{where}{line}: not valid YAML: {problem}") from None
    except RecipeError:
        raise
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"{where}: not a usable YAML document ({error})") from None
    finally:
        if loader is not None:
            loader.dispose()
    return found


def _check(node: yaml.Node, where: str, sizes: dict[int, int], above: set[int]) -> int:
    """Return how many values a node stands for; raise RecipeError for twins and bombs."""
    if id(node) in above:
        raise RecipeError(f"{where}:{node.start_mark.line + 1}: an alias that contains itself")
    if id(node) in sizes:
        return sizes[id(node)]
    size, inner = 1, {*above, id(node)}
    if isinstance(node, yaml.SequenceNode):
        size += sum(_check(item, where, sizes, inner) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{where}:{line}: a key must be plain text")
            if key.value in seen and key.value != "<<":
                raise RecipeError(
                    f"{where}:{line}: {key.value!r} is given twice; it stands on line "
                    f"{seen[key.value]} already"
                )
            seen[key.value] = line
            size += 1 + _check(item, where, sizes, inner)
    if size > NODES:
        raise RecipeError(f"{where}: its aliases stand for more than {NODES} values")
    sizes[id(node)] = size
    return size


def _note(node: yaml.Node, path: Path, lines: dict[Path, int]) -> None:
    """Note the line of every key and item."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _note(item, (*path, i), lines)
    elif isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            lines[(*path, key.value)] = key.start_mark.line + 1
            _note(item, (*path, key.value), lines)


class _Dumper(yaml.SafeDumper):
    """Writes lists of plain values on one line."""


def _flow(dumper: yaml.SafeDumper, values: Sequence[Any]) -> yaml.Node:
    plain = all(isinstance(v, int | float | str | bool) for v in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=plain)


_Dumper.add_representer(list, _flow)


def dump(value: Any) -> str:
    """Write plain values as YAML, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
