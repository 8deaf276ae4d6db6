"""YAML with placeholders: `!oneof`, `!float`, `!manyof` and `!permutate` in place of values.

    !oneof [a, b]                      one of these; they may hold placeholders themselves
    !float [0.1, 1.0]                  any number between; {low: 1e-4, high: 1, scale: log} too
    !manyof {k: 2, of: [a, b, c]}      k of these, in the order given; `distinct: false` lets one be
                                       taken twice, `sorted: false` makes their order a choice
    !permutate [a, b, c]               all of these in some order
    <<: !oneof [{...}, {...}]          a mapping that becomes part of the one it stands in, below
                                       what that sets itself: choices that belong together

Everything else is YAML as recipes are read: safe, strict, with the line of what is wrong.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import yaml

from pluribus.core.errors import RecipeError, nearest
from pluribus.recipe.text import LONGEST, _check
from pluribus.search.space import floatv, manyof, oneof, permutate

TAGS = ("!oneof", "!float", "!manyof", "!permutate")
PART = "<<"


def read(text: str, where: str = "space") -> Any:
    """Return the value of the one YAML document in a text, with pyglove's placeholders in it.

    Raises RecipeError with file and line.
    """
    if len(text) > LONGEST:
        raise RecipeError(f"{where}: a space may have {LONGEST} characters, not {len(text)}")
    loader = None
    try:
        loader = _Loader(text)
        loader.where = where
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(f"{where}: there is nothing in it")
        _check(node, where, {}, set())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{where}{line}: not valid YAML: {problem}") from None
    except RecursionError:
        raise RecipeError(f"{where}: nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def settled(value: Any) -> Any:
    """Return a point's value with the parts named `<<` in their places.

    Mappings that stand on both sides are joined key by key; what a mapping sets itself goes first.
    """
    if isinstance(value, Mapping):
        own = {key: settled(inner) for key, inner in value.items() if key != PART}
        return _joined(settled(value[PART]), own) if PART in value else own
    return [settled(inner) for inner in value] if isinstance(value, list) else value


def _joined(below: Any, above: dict[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _joined(out[key], value) if both else value
    return out


class _Loader(yaml.SafeLoader):
    """Knows the tags, and keeps `<<` with a tag as a key of its own."""

    where = "space"

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge plain `<<`; one with a tag is chosen later."""
        later = []
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge" and value.tag in TAGS:
                key.tag = "tag:yaml.org,2002:str"
                later.append((key, value))
        node.value = [pair for pair in node.value if pair not in later]
        super().flatten_mapping(node)
        node.value += later

    def fault(self, node: yaml.Node, said: str) -> RecipeError:
        """Return an error with the line of a node."""
        return RecipeError(f"{self.where}:{node.start_mark.line + 1}: {said}")


def _sequence(loader: _Loader, node: yaml.Node, tag: str) -> list[Any]:
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise loader.fault(node, f"{tag} takes a list of values, such as {tag} [a, b]")
    return loader.construct_sequence(node, deep=True)


def _oneof(loader: _Loader, node: yaml.Node) -> Any:
    return oneof(_sequence(loader, node, "!oneof"))


def _permutate(loader: _Loader, node: yaml.Node) -> Any:
    return permutate(_sequence(loader, node, "!permutate"))


def _float(loader: _Loader, node: yaml.Node) -> Any:
    example = "!float [0.1, 1.0] or !float {low: 1.0e-4, high: 1.0, scale: log}"
    ends: list[Any]
    scale = None
    if isinstance(node, yaml.SequenceNode):
        ends = loader.construct_sequence(node, deep=True)
    elif isinstance(node, yaml.MappingNode):
        given = _mapping(loader, node, ("low", "high", "scale"))
        ends, scale = [given.get("low"), given.get("high")], given.get("scale")
    else:
        raise loader.fault(node, f"!float takes two numbers: {example}")
    numbers = all(isinstance(end, Real) and not isinstance(end, bool) for end in ends)
    if len(ends) != 2 or not numbers or not ends[0] < ends[1]:
        raise loader.fault(
            node, f"!float takes two numbers, the lower one first, not {ends}: {example}"
        )
    if scale not in (None, "linear", "log", "rlog") or (scale in ("log", "rlog") and ends[0] <= 0):
        raise loader.fault(
            node, f"scale {scale!r} is linear, or log or rlog over numbers above 0: {example}"
        )
    return floatv(float(ends[0]), float(ends[1]), scale=scale)


def _manyof(loader: _Loader, node: yaml.Node) -> Any:
    example = "!manyof {k: 2, of: [a, b, c]}"
    if not isinstance(node, yaml.MappingNode):
        raise loader.fault(node, f"!manyof takes k and of: {example}")
    given = _mapping(loader, node, ("k", "of", "distinct", "sorted"))
    k, of = given.get("k"), given.get("of")
    distinct, ordered = given.get("distinct", True), given.get("sorted", True)
    if not isinstance(of, list) or not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise loader.fault(node, f"!manyof takes a number k and a list of: {example}")
    if distinct and k > len(of):
        raise loader.fault(node, f"!manyof cannot take {k} different ones of {len(of)}")
    return manyof(k, of, distinct=bool(distinct), sorted=bool(ordered))


def _mapping(loader: _Loader, node: yaml.MappingNode, known: tuple[str, ...]) -> dict[str, Any]:
    given: dict[Any, Any] = loader.construct_mapping(node, deep=True)
    for key in given:
        if key not in known:
            raise loader.fault(
                node,
                f"unknown key {key!r} of {node.tag}; there are: {', '.join(known)}."
                + nearest(str(key), known),
            )
    return given


def _unknown(loader: _Loader, node: yaml.Node) -> Any:
    raise loader.fault(
        node, f"unknown tag {node.tag!r}; there are: {', '.join(TAGS)}." + nearest(node.tag, TAGS)
    )


for _tag, _make in zip(TAGS, (_oneof, _float, _manyof, _permutate), strict=True):
    _Loader.add_constructor(_tag, _make)
_Loader.add_constructor(None, _unknown)  # type: ignore[arg-type]
