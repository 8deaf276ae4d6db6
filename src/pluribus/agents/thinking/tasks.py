"""A task to measure: problems with answers, and what kind of task it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pluribus.agents.thinking.modes import choice
from pluribus.core.errors import InputError, nearest
from pluribus.decode.scaling.answers import final
from pluribus.decode.scaling.interface import Problem
from pluribus.tasks.suites import TRAITS, Item, facts, suite


@dataclass(frozen=True)
class Task:
    """Problems of one kind. `traits` are the card's yes or no, by name; none is no card."""

    name: str
    problems: tuple[Problem, ...]
    traits: Mapping[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise InputError for a task that nothing could be measured on."""
        if not self.problems:
            raise InputError(f"the task {self.name} has no problem; give some")
        for place, problem in enumerate(self.problems, 1):
            if problem.answer is None:
                raise InputError(
                    f"problem {place} of {self.name} has no answer, so nothing can be judged right"
                )
        if len({problem.answer for problem in self.problems}) < 2:
            raise InputError(
                f"all {len(self.problems)} problems of {self.name} have the answer "
                f"{self.problems[0].answer!r}: a model that always says so is right; give problems "
                "with two answers or more"
            )
        check_traits(self.traits)

    @classmethod
    def of(
        cls, name: str, problems: Sequence[Problem], traits: Mapping[str, bool] | None = None
    ) -> "Task":
        """Return a task of these problems. Raises InputError, see the class."""
        return cls(name, tuple(problems), dict(traits or {}))

    @classmethod
    def of_suite(cls, name: str, n: int = 200, seed: int = 0, difficulty: str = "medium") -> "Task":
        """Return a task of one of `pluribus.tasks.suites`.

        Raises RecipeError for a suite that is none, InputError for one with images: models here
        read texts.
        """
        items = suite(name, n=n, seed=seed, difficulty=difficulty)
        traits = {trait: trait in facts(name).traits for trait in TRAITS}
        return cls(name, tuple(problem(item) for item in items), traits)


def problem(item: Item) -> Problem:
    """Return an item of a suite as a problem of text. Raises InputError for one with images."""
    if item.media:
        raise InputError(
            f"{item.id} shows {len(item.media)} images, which needs an endpoint for vision; models "
            "of pluribus.agents read text alone, so take another suite"
        )
    extract = choice(item.choices) if item.choices else final
    return Problem(question=item.prompt, answer=item.answer, id=item.id, extract=extract)


def check_traits(traits: Mapping[str, bool]) -> None:
    """Raise InputError for a trait that is none, or a card that lacks some."""
    for name in traits:
        if name not in TRAITS:
            raise InputError(
                f"no trait is called {name!r}; a card has {', '.join(TRAITS)}."
                + nearest(name, TRAITS)
            )
    if traits and (missing := [name for name in TRAITS if name not in traits]):
        raise InputError(f"the card says nothing of {', '.join(missing)}; say yes or no to each")
