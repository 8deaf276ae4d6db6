"""A search space: an object with placeholders, or a function that asks for choices as it runs.

Peng et al., "PyGlove: Symbolic Programming for Automated Machine Learning", NeurIPS 2020,
https://arxiv.org/abs/2101.08809. The placeholders are pyglove's own:

    oneof(candidates)   manyof(k, candidates, distinct, sorted)   permutate(candidates)
    floatv(low, high)   (its `scale="log"` is heeded by cma and tpe; the others draw evenly)

A point is a `pg.DNA`: a tree of indices and floats. Placeholders nest: a candidate may hold more.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import xxhash

from pluribus.core.errors import InputError, nearest
from pluribus.search import torch_glue as glue
from pluribus.search._pyglove import pg

oneof, manyof, permutate, floatv = pg.oneof, pg.manyof, pg.permutate, pg.floatv
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Space:
    """Everything that can be made of an object with placeholders. `space(...)` makes one."""

    def __init__(
        self,
        value: Any = None,
        *,
        function: Callable[[], Any] | None = None,
        where: Callable[[Any], bool] | None = None,
        text: str | None = None,
    ) -> None:
        self.value, self.function, self._where = value, function, where
        if isinstance(value, pg.DNASpec):
            self.spec = value
        elif function is not None:
            self._context = pg.hyper.trace(function, where=where)
            self.spec = self._context.dna_spec
        else:
            self._template = pg.template(value, where)
            self.spec = self._template.dna_spec()
        self._text = text

    @property
    def constant(self) -> bool:
        """Whether there is nothing to choose."""
        return not self.spec.decision_points

    @property
    def size(self) -> int:
        """Number of points, or -1 for a space with floats."""
        return self.spec.space_size

    @cached_property
    def decisions(self) -> dict[str, str]:
        """What each placeholder offers, by its path."""
        return {str(point.id): _offer(point) for point in self.spec.decision_points}

    @cached_property
    def digest(self) -> str:
        """Name of the space: equal for equal placeholders, candidates and constants."""
        told = self.spec.to_json_str() + "\n" + self._constants()
        return xxhash.xxh3_128(ADDRESS.sub("", told).encode()).hexdigest()

    def decode(self, dna: Any) -> Any:
        """Return the ordinary object at a point; of a traced function, what it returns there.

        Raises InputError for a point of another space, and what the objects raise for values that
        they refuse.
        """
        dna = self.fitted(dna)
        if self.value is not None and self.value is self.spec:
            return dna
        if self.function is not None:
            with self._context.apply(dna):
                return self.function()
        return glue.lower(self._template.decode(dna))

    def symbolic(self, dna: Any) -> Any:
        """Return the symbolic value at a point, with the placeholders that the space leaves."""
        return self._template.decode(self.fitted(dna))

    def encode(self, value: Any) -> Any:
        """Return the point (a `pg.DNA`) at which the space gives this object.

        Raises InputError if it gives it nowhere.
        """
        if self.function is not None or self.value is self.spec:
            raise InputError("a point of a traced function or of a DNASpec can't be told from it")
        try:
            return self._template.encode(glue.lift(value)).use_spec(self.spec)
        except (ValueError, KeyError) as error:
            raise InputError(f"{value!r} is not in the space: {_first_line(error)}") from None

    def fitted(self, dna: Any) -> Any:
        """Return a point with this space attached; InputError for a point of another."""
        try:
            return dna if dna.spec is self.spec else dna.use_spec(self.spec)
        except ValueError as error:
            raise InputError(f"{dna} is not a point of this space: {_first_line(error)}") from None

    def point(self, dna: Any) -> dict[str, Any]:
        """Return the choices made at a point: values of floats, labels of candidates.

        A candidate's label is the number or text itself, and of a mapping, list or object what in
        it is no placeholder, in short.
        """
        labels = self._labels
        told = self.fitted(dna).to_dict(key_type="dna_spec", multi_choice_key="parent")
        out: dict[str, Any] = {}
        for point, choice in told.items():
            names = labels.get(str(point.id))
            if isinstance(point, pg.geno.Float) or names is None:
                out[str(point.id)] = choice
            elif isinstance(choice, list):
                out[str(point.id)] = [names[one] for one in choice]
            else:
                out[str(point.id)] = names[choice]
        return out

    @cached_property
    def _labels(self) -> dict[str, list[Any]]:
        """Labels of the candidates of each choice, by its path."""
        out: dict[str, list[Any]] = {}
        if self.value is None or self.value is self.spec:
            for point in self.spec.decision_points:
                if isinstance(point, pg.geno.Choices):
                    whole = point.parent_spec if point.is_subchoice else point
                    names = whole.literal_values or range(len(whole.candidates))
                    out[str(whole.id)] = [_plain(name) for name in names]
            return out

        def walk(template: Any, spec: Any) -> None:
            pairs = zip(template.hyper_primitives, spec.elements, strict=True)
            for (_, primitive), element in pairs:
                if not isinstance(element, pg.geno.Choices):
                    continue
                out[str(element.id)] = [_label(one) for one in primitive.candidates]
                single = element.num_choices == 1
                for place in range(element.num_choices):
                    own = element if single else element.subchoice(place)
                    for inner, below in zip(
                        primitive.candidate_templates, own.candidates, strict=True
                    ):
                        walk(inner, below)

        walk(self._template, self.spec)
        return out

    def split(self, outer: Callable[[Any], bool]) -> "Space":
        """Return the space of the placeholders that `outer` picks; its points are spaces again."""
        if self.value is self.spec:
            raise InputError("a bare DNASpec can't be split: give the object with its placeholders")
        return Space(self.value, function=self.function, where=outer)

    def _constants(self) -> str:
        if self._text is not None:
            return self._text
        if self.function is not None:
            try:
                return inspect.getsource(self.function)
            except (OSError, TypeError):
                return getattr(self.function, "__qualname__", "")
        if self.value is self.spec:
            return ""
        return pg.format(self.value, compact=True, strip_object_id=True)

    def __repr__(self) -> str:
        size = "infinite" if self.size < 0 else f"{self.size} points"
        return f"Space({size}, {', '.join(self.decisions) or 'no placeholder'})"


def space(what: Any, changes: Mapping[str, Any] | None = None) -> Space:
    """Make a search space.

    `what` is an object with placeholders (mappings, lists, dataclasses, `symbolic(Ties)(...)`,
    pg.Object), a dataclass, a function without arguments that calls `oneof(...)` and the like as it
    runs, a pg.DNASpec, or a space (returned as it is). `changes` replaces values by path, for
    objects that can't hold placeholders themselves: `space(Ties(), {"density": floatv(0.1, 1)})`.

    Raises InputError for a path that is not there, a tensor or a module in the tree, or a candidate
    that its field refuses.
    """
    if isinstance(what, Space):
        if changes:
            raise InputError("changes go to the object that a space is made of, not to the space")
        return what
    if isinstance(what, pg.DNASpec):
        return Space(what)
    if isinstance(what, type):
        if not dataclasses.is_dataclass(what):
            raise InputError(f"{what!r}: give an object with placeholders, not a class")
        what = glue.symbolic(what)()
    elif callable(what) and not dataclasses.is_dataclass(what) and not isinstance(what, pg.Object):
        if changes:
            raise InputError("a function has its placeholders inside: changes don't apply to it")
        return _traced(what)
    value = glue.lift(what)
    for path, change in (changes or {}).items():
        value = _changed(value, path, glue.lift(change, path))
    if isinstance(value, pg.Object | pg.Dict | pg.List):
        glue.check(value)
    return Space(value)


def _traced(function: Callable[[], Any]) -> Space:
    needed = [
        name
        for name, p in inspect.signature(function).parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise InputError(
            f"a function that makes a space takes no arguments, but this needs {', '.join(needed)};"
            " bind them with functools.partial"
        )
    return Space(function=function)


def _changed(value: Any, path: str, change: Any) -> Any:
    if not path:
        return change
    try:
        return value.rebind({path: change})
    except (KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
        known: list[str] = []

        def note(where: Any, node: Any, parent: Any) -> Any:
            known.append(str(where))
            return pg.TraverseAction.ENTER

        if isinstance(value, pg.Object | pg.Dict | pg.List):
            pg.traverse(value, note)
        paths = [name for name in known if name]
        raise InputError(
            f"nothing stands at {path!r} ({_first_line(error)}); there are: "
            f"{', '.join(paths[:12])}{' ...' if len(paths) > 12 else ''}.{nearest(path, paths)}"
        ) from None


def _offer(point: Any) -> str:
    if isinstance(point, pg.geno.Float):
        scale = f", {point.scale}" if point.scale else ""
        return f"float [{point.min_value:g}, {point.max_value:g}{scale}]"
    if isinstance(point, pg.geno.Choices):
        literals: Sequence[Any] = point.literal_values or range(len(point.candidates))
        shown = ", ".join(ADDRESS.sub("", str(_plain(literal))) for literal in literals[:6])
        return f"one of {len(literals)}: {shown}{', ...' if len(literals) > 6 else ''}"
    return "custom"


def _label(candidate: Any) -> Any:
    """Return a candidate in short: of structures the constants, without what is their default."""
    if candidate is None or isinstance(candidate, bool | int | float | str):
        return candidate
    if isinstance(candidate, pg.hyper.Choices):
        return f"{candidate.num_choices} of {len(candidate.candidates)}"
    if isinstance(candidate, pg.hyper.Float):
        return f"{candidate.min_value:g} to {candidate.max_value:g}"
    if isinstance(candidate, glue.Glue):
        named = type(candidate).__name__.removesuffix("Symbol")
        return named if not pg.is_deterministic(candidate) else _short(glue.lower(candidate))
    if isinstance(candidate, Mapping):
        told = []
        for key, value in candidate.items():
            if isinstance(value, pg.hyper.HyperValue):
                continue
            inner = _label(value)
            told.append(f"{key} {inner}" if isinstance(inner, int | float) else str(inner))
        return ", ".join(filter(None, told))
    if isinstance(candidate, list | tuple):
        return ", ".join(str(_label(one)) for one in candidate)
    return _short(candidate)


def _short(value: Any) -> str:
    named = getattr(value, "__name__", None)
    return str(named) if callable(value) and named else ADDRESS.sub("", repr(value))


def _plain(choice: Any) -> Any:
    if isinstance(choice, str):
        return choice[1:-1] if len(choice) > 1 and choice[0] == choice[-1] == "'" else choice
    return choice


def _first_line(error: Exception) -> str:
    return (str(error.args[0]) if error.args else type(error).__name__).splitlines()[0]
