"""The choices of a space one by one, for algorithms that set them in a network.

A decision is one index out of `count`. Its path is the id that pyglove gives it: `ops[0]`, or
`op[=1/3].kernel` for one that exists only where `op` takes candidate 1. A choice of all of them is
a mapping from path to index (or, in a mixture, to a weight for each candidate); decisions that the
others make void are absent or ignored.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from pluribus.core.errors import InputError
from pluribus.core.shapes import Bool, Float
from pluribus.search._pyglove import pg
from pluribus.search.space import Space

Choice = Mapping[str, int]
Mixture = Mapping[str, Tensor]


@dataclass(frozen=True)
class Decision:
    """One index to be chosen."""

    path: str
    count: int
    parent: tuple[str, int] | None = None  # exists only where that decision takes that index
    earlier: tuple[str, ...] = ()  # the decisions of the same `manyof` that come before it
    later: int = 0  # how many come after it
    distinct: bool = False  # differs from the earlier ones
    ordered: bool = False  # is not below the one before it

    def active(self, choice: Choice) -> bool:
        """Whether the choices so far let it exist."""
        return self.parent is None or choice.get(self.parent[0]) == self.parent[1]

    def allowed(self, choice: Choice) -> Bool[Tensor, " c"]:
        """Return which indices the earlier choices of its group leave, so that a rest remains."""
        free = torch.ones(self.count, dtype=torch.bool)
        taken = [choice[path] for path in self.earlier]
        if self.distinct:
            free[taken] = False
        if self.ordered:
            if taken:
                free[: taken[-1]] = False
            if self.distinct:
                free[self.count - self.later :] = False
        return free


def decisions(space: Space) -> dict[str, Decision]:
    """Return a space's decisions by path, each after those it depends on.

    Raises InputError, naming the path, for a placeholder that is no choice among candidates.
    """
    found: dict[str, Decision] = {}
    groups: dict[int, list[str]] = {}
    for point in space.spec.decision_points:
        path = str(point.id)
        if not isinstance(point, pg.geno.Choices):
            kind = "a float" if isinstance(point, pg.geno.Float) else type(point).__name__
            raise InputError(
                f"{path} is {kind}, and weights can only be shared among candidates of oneof or "
                "manyof; give it a value, or use an algorithm that trains each point alone"
            )
        parent = None
        if point.parent_choice is not None:
            parent = (str(point.parent_choice.id), _index(point))
        if not point.is_subchoice:
            found[path] = Decision(path, len(point.candidates), parent)
            continue
        group = groups.setdefault(id(point.parent_spec), [])
        found[path] = Decision(
            path,
            len(point.candidates),
            parent,
            tuple(group),
            point.parent_spec.num_choices - 1 - len(group),
            point.distinct,
            point.sorted,
        )
        group.append(path)
    return found


def _index(point: Any) -> int:
    """Return the candidate of the parent choice that a decision belongs to."""
    spec = point.parent_spec
    while not isinstance(spec, pg.geno.Space) or spec.index is None:
        spec = spec.parent_spec
    return spec.index


def walk(
    found: Mapping[str, Decision], choose: Callable[[Decision, Bool[Tensor, " c"]], int]
) -> dict[str, int]:
    """Ask `choose(decision, allowed)` for each decision that exists; return the choice."""
    choice: dict[str, int] = {}
    for path, decision in found.items():
        if decision.active(choice):
            choice[path] = choose(decision, decision.allowed(choice))
    return choice


def drawn(found: Mapping[str, Decision], rng: Generator) -> dict[str, int]:
    """Draw each decision uniformly from what is allowed."""

    def choose(decision: Decision, allowed: Bool[Tensor, " c"]) -> int:
        return int(torch.multinomial(allowed.double(), 1, generator=rng))

    return walk(found, choose)


def heaviest(found: Mapping[str, Decision], weights: Mapping[str, Float[Tensor, " c"]]) -> Choice:
    """Return the choice with the largest weight at each decision in turn; the first of equals."""

    def choose(decision: Decision, allowed: Bool[Tensor, " c"]) -> int:
        return int(weights[decision.path].detach().cpu().masked_fill(~allowed, -torch.inf).argmax())

    return walk(found, choose)


def everything(found: Mapping[str, Decision]) -> Iterator[dict[str, int]]:
    """Yield every choice; for small spaces."""

    def extend(choice: dict[str, int], rest: list[Decision]) -> Iterator[dict[str, int]]:
        if not rest:
            yield choice
            return
        first, *others = rest
        if not first.active(choice):
            yield from extend(choice, others)
            return
        for index in first.allowed(choice).nonzero()[:, 0].tolist():
            yield from extend({**choice, first.path: index}, others)

    yield from extend({}, list(found.values()))


def dna_of(space: Space, choice: Choice) -> Any:
    """Return the point (a `pg.DNA`) of a choice. Raises InputError if there is none."""
    try:
        return pg.DNA.from_dict(dict(choice), space.spec)
    except (ValueError, KeyError) as error:
        raise InputError(f"{dict(choice)} is no point of {space}: {error}") from None


def choice_of(space: Space, dna: Any) -> dict[str, int]:
    """Return the choice that a point makes, by path."""
    return {str(path): index for path, index in space.fitted(dna).to_dict().items()}
