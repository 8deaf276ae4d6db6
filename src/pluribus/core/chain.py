"""Merge methods composed of named steps: `trim(density=0.2) >> elect() >> mean()`.

A step maps an array of task vectors, one row an expert, to another one:

    each      (t, n) -> (t, n)    trim, band, drop, elect, scale; after the combiner t is 1
    combine   (t, n) -> (n,)      mean, average, sum, max: one of them, or a whole merger as head
    update    (1, n) -> (1, n)    lines, consensus: they look at the combined update

and the chain returns base + update. A step is called as `step(values, *, at, base, experts,
**folds)` and takes of the keywords those it names. What it must know beforehand it asks for through
`folds()`, as a merger does, but its folds see `of(values, *, at, base, experts, **folds)`: the
values that leave the step before it. A `Chain` is a merger: the driver, recipes and other mergers
take it as one.

The text form is the same line of Python, read without evaluating anything.
"""

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar

from pluribus.core.arrays import Array, namespace
from pluribus.core.errors import InputError, RecipeError, listing, nearest
from pluribus.core.merger import (
    FACTS,
    At,
    Facts,
    Stage,
    _checked,
    _composable,
    accepted,
    call,
    facts,
    stages,
)
from pluribus.core.method import method_of
from pluribus.core.registry import MERGERS, STEPS

Kind = Literal["each", "combine", "update"]
STEP = "__pluribus_step__"
LONGEST = 10_000  # characters of a chain's text
S = TypeVar("S", bound=type)


@dataclass(frozen=True)
class StepFacts:
    """What is known about a step without running it."""

    name: str
    kind: Kind
    paper: str
    summary: str
    random: bool
    ordered: bool
    idempotent: bool  # whether task vectors that are all zero give zero


def step(
    name: str,
    *,
    kind: Kind,
    paper: str = "",
    random: bool = False,
    ordered: bool = False,
    idempotent: bool = True,
) -> Callable[[S], S]:
    """Register a step's facts, and make its construction check its parameters.

    Goes above `@dataclass(frozen=True, kw_only=True)`, as `merger` does.
    """

    def decorate(cls: S) -> S:
        doc = inspect.getmodule(cls)
        summary = ((doc.__doc__ if doc else None) or cls.__doc__ or "").strip().split("\n")[0]
        setattr(cls, STEP, StepFacts(name, kind, paper, summary, random, ordered, idempotent))
        _checked(cls, name)
        _composable(cls)
        return cls

    return decorate


class Seen(NamedTuple):
    """A fold's values behind the steps of a chain that come first."""

    chain: "Chain"
    part: int
    of: Callable[..., Array]

    def __call__(self, base: Array, experts: Array, *, at: At, **folded: Any) -> Array:
        """Run the earlier parts on a block, then let the fold pick its values."""
        own = self.chain._own(self.part, folded)
        if _is_merger(self.chain.parts[self.part]):
            return self.of(base, experts, **accepted(self.of, {"at": at, **own}))
        values, _ = self.chain._values(self.part, base, experts, at, folded)
        known = {"at": at, "base": base, "experts": experts, **own}
        return self.of(values, **accepted(self.of, known))


@dataclass(frozen=True)
class Chain:
    """Steps in their order, or a merger and steps that change its update. It is a merger itself."""

    parts: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        _check_order(self.parts)
        object.__setattr__(self, FACTS, _facts_of(self.parts))

    @classmethod
    def of(cls, what: Any) -> "Chain":
        """Return a chain of one merger or step, of a chain's text, or `what` if it is a chain."""
        if isinstance(what, Chain):
            return what
        return parse(what) if isinstance(what, str) else cls((what,))

    def __rshift__(self, other: Any) -> "Chain":
        if isinstance(other, str):  # the rest of a chain: steps only
            return Chain(self.parts + _parts(other, head=False))
        return Chain(self.parts + (other.parts if isinstance(other, Chain) else (other,)))

    def __str__(self) -> str:
        return " >> ".join(text(part) for part in self.parts)

    def folds(self) -> Sequence[Stage]:
        """Ask for the folds of every part, each on the output of the parts before it."""
        out = []
        for k, part in enumerate(self.parts):
            for stage in stages(part):
                out.append(
                    {f"{k}_{key}": replace(f, of=Seen(self, k, f.of)) for key, f in stage.items()}
                )
        return out

    def __call__(self, base: Array, experts: Array, *, at: At, **folded: Any) -> Array:
        """Merge one block. Raises InputError for a chain that combines nothing."""
        values, whole = self._finished(base, experts, at, folded)
        update = values[0]
        if whole is None:
            return base + update
        # Where the steps left the head's update as it was, its result stands bit for bit.
        return namespace(base).where(update == whole - base, whole, base + update)

    def update(self, base: Array, experts: Array, *, at: At, **folded: Any) -> Array:
        """Return what the chain adds to the base, without the rounding of the addition."""
        return self._finished(base, experts, at, folded)[0][0]

    def _finished(
        self, base: Array, experts: Array, at: At, folded: Mapping[str, Any]
    ) -> tuple[Array, Array | None]:
        if not _combined(self.parts):
            raise InputError(
                f"the chain '{self}' combines nothing: end it with one of "
                f"{listing(_names('combine'))}"
            )
        return self._values(len(self.parts), base, experts, at, folded)

    def _own(self, part: int, folded: Mapping[str, Any]) -> dict[str, Any]:
        """Return the folds of one part under its own names; a head also gets further inputs."""
        prefix = f"{part}_"
        own = {k.removeprefix(prefix): v for k, v in folded.items() if k.startswith(prefix)}
        if part == 0 and _is_merger(self.parts[0]):
            own = {k: v for k, v in folded.items() if not k[:1].isdigit()} | own
        return own

    def _values(
        self, stop: int, base: Array, experts: Array, at: At, folded: Mapping[str, Any]
    ) -> tuple[Array, Array | None]:
        """Return what leaves the first `stop` parts, and the result of a head merger."""
        first, whole = 0, None
        if _is_merger(self.parts[0]):
            whole = call(self.parts[0], base, experts, at, self._own(0, folded))
            values, first = (whole - base)[None], 1
        else:
            values = experts - base
        for k in range(first, stop):
            part = self.parts[k]
            known = {"at": at, "base": base, "experts": experts, **self._own(k, folded)}
            values = part(values, **accepted(type(part).__call__, known))
            if getattr(part, STEP).kind == "combine":
                values = values[None]
        return values, whole


def update_of(method: Any, base: Array, experts: Array, at: At, folded: Mapping[str, Any]) -> Array:
    """Return merged - base for one block: exact from a chain, a difference from other mergers."""
    if isinstance(method, Chain):
        return method.update(base, experts, at=at, **folded)
    return call(method, base, experts, at, folded) - base


# -- order and facts -------------------------------------------------------------------------------


def _is_merger(part: Any) -> bool:
    return hasattr(part, FACTS)


def _combined(parts: Sequence[Any]) -> bool:
    return any(_is_merger(part) or getattr(part, STEP).kind == "combine" for part in parts)


def _names(kind: Kind) -> list[str]:
    return [name for name in STEPS if getattr(STEPS[name], STEP).kind == kind]


def _check_order(parts: Sequence[Any]) -> None:
    """Raise InputError unless the parts can follow each other so."""
    combiner = None
    for k, part in enumerate(parts):
        if isinstance(part, type):
            raise InputError(f"{part.__name__} is a class; write {part.__name__}() in a chain")
        if _is_merger(part):
            if k:
                raise InputError(
                    f"{facts(part).name} is a whole merge method: it can only begin a chain"
                )
            combiner = facts(part).name
            continue
        about = getattr(part, STEP, None)
        if about is None:
            raise InputError(f"{part!r} is neither a step nor a merge method")
        if about.kind == "combine":
            if combiner is not None:
                raise InputError(
                    f"a chain combines once: {about.name} comes after {combiner}, where one "
                    "model is left"
                )
            combiner = about.name
        elif about.kind == "update" and combiner is None:
            raise InputError(
                f"{about.name} changes the combined update: put it after one of "
                f"{listing(_names('combine'))}, or after a merge method"
            )


def _facts_of(parts: Sequence[Any]) -> Facts:
    heads = [facts(part) for part in parts if _is_merger(part)]
    steps = [getattr(part, STEP) for part in parts if not _is_merger(part)]
    papers = dict.fromkeys(about.paper for about in [*heads, *steps] if about.paper)
    return Facts(
        name="chain",
        paper=", ".join(papers),
        summary="Named steps, one after another.",
        grain=heads[0].grain if heads else "element",  # steps work on any run of elements
        base="required" if steps or not heads else heads[0].base,
        experts=heads[0].experts if heads else (1, None),
        ordered=any(about.ordered for about in [*heads, *steps]),
        random=any(about.random for about in [*heads, *steps]),
        needs=tuple(need for head in heads for need in head.needs),
        idempotent=all(about.idempotent for about in [*heads, *steps]),
    )


# -- text ------------------------------------------------------------------------------------------


def text(part: Any) -> str:
    """Write a merger or step as a chain's text does, with the parameters that are not default."""
    if isinstance(part, Chain):
        return str(part)
    name = facts(part).name if _is_merger(part) else getattr(part, STEP).name
    given = []
    for f in fields(part):
        value = getattr(part, f.name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if default is MISSING or value != default:
            given.append(f"{f.name}={_literal(value)}")
    return f"{name}({', '.join(given)})" if given else name


def _literal(value: Any) -> str:
    if not _is_merger(value):
        return repr(value)
    # A lone name may be a preset of the field that holds it; with brackets it is the method.
    inner = text(value)
    return repr(f"{inner}()" if inner.isidentifier() and facts(value).name == inner else inner)


def parse(source: str) -> Chain:
    """Read a chain's text: names with keyword arguments that are literals, joined by `>>`.

    Raises RecipeError saying what is wrong and where. Nothing is evaluated.
    """
    return Chain(_parts(source, head=True))


def _parts(source: str, *, head: bool) -> tuple[Any, ...]:
    if len(source) > LONGEST:
        raise RecipeError(f"a chain's text may have {LONGEST} characters, not {len(source)}")
    try:
        node: ast.expr = ast.parse(source.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        hint = " The parameter lambda is called scale here." if "lambda" in source else ""
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise RecipeError(f"the chain {source!r} cannot be read: {reason}.{hint}") from None
    links: list[ast.expr] = []
    while isinstance(node, ast.BinOp):
        if not isinstance(node.op, ast.RShift):
            raise RecipeError(f"the chain {source!r}: steps are joined by >>, nothing else")
        links.append(node.right)
        node = node.left
    links.append(node)
    links.reverse()
    parts = []
    for link in links:
        name, values = _link(source, link)
        parts.append(_named(name, values, head=head and not parts))
    return tuple(parts)


def _link(source: str, node: ast.expr) -> tuple[str, dict[str, Any]]:
    """Return the name and parameters of one link of a chain."""
    if isinstance(node, ast.Name):
        return node.id, {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise RecipeError(
            f"the chain {source!r}: '{ast.unparse(node)}' is not a step; write name or "
            "name(parameter=value)"
        )
    name, values = node.func.id, {}
    if node.args:
        raise RecipeError(
            f"the chain {source!r}: parameters of {name} go by name, as in {name}(parameter="
            f"{ast.unparse(node.args[0])})"
        )
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in values:
            raise RecipeError(f"the chain {source!r}: {name} has a parameter twice, or a **")
        try:
            values[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise RecipeError(
                f"the chain {source!r}: {keyword.arg} = {ast.unparse(keyword.value)} is not a "
                "number, text, true/false, none or a list of them"
            ) from None
    return name, values


def _named(name: str, values: Mapping[str, Any], *, head: bool) -> Any:
    """Build a step, or a merger at the head; the head `lines` is the merger, later it is a step."""
    if name in STEPS and not (head and name in MERGERS):
        return STEPS.build(name, values)
    if head and name in MERGERS:
        return MERGERS.build(name, values)
    if name in MERGERS:
        raise RecipeError(f"{name} is a whole merge method: it can only begin a chain")
    known = [*STEPS, *MERGERS] if head else list(STEPS)
    raise RecipeError(
        f"no step is called {name!r}; there are: {', '.join(STEPS)}.{nearest(name, known)}"
    )


def as_merger(what: Any) -> Any:
    """Return the merger that `what` names: a merger, a recipe's mapping, or a chain or its text.

    A single step that combines counts: "sum" is task arithmetic with scale 1. Raises RecipeError or
    InputError.
    """
    chain = Chain.of(what if isinstance(what, str | Chain) else method_of(what))
    if not _combined(chain.parts):
        raise InputError(f"the chain '{chain}' combines nothing: end it with mean, sum or the like")
    alone = len(chain.parts) == 1 and _is_merger(chain.parts[0])
    return chain.parts[0] if alone else chain
