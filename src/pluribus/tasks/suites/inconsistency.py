"""Pairs of statements that can both be true, or cannot: a control for thinking in words.

After Liu et al., ICML 2025, https://arxiv.org/abs/2410.21333: to explain a conflict first makes
people worse at seeing it. Statements are made from five templates; a pair in conflict and one
without differ in a word or two.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from pluribus.core.errors import InputError
from pluribus.tasks.suites import Item, item_suite

THINGS = ("lamps", "chairs", "boxes", "doors", "cups", "coats")
PLACES = ("hall", "kitchen", "office", "garage", "attic", "shop")
COLOURS = ("red", "green", "blue", "white", "black", "yellow")
PEOPLE = (
    *("Anna", "Ben", "Carla", "David", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jakob"),
    *("Karin", "Liam", "Mona", "Nils", "Olga", "Pavel", "Rosa", "Samir", "Tessa", "Viktor"),
)
TRIES = 1000
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")

Made = tuple[str, str]


def universal(chance: random.Random, conflict: bool) -> Made:
    """All are of one colour; one, there or elsewhere, is of another."""
    thing, (here, there) = chance.choice(THINGS), chance.sample(PLACES, 2)
    one, other = chance.sample(COLOURS, 2)
    return (
        f"All the {thing} in the {here} are {one}.",
        f"One of the {thing} in the {here if conflict else there} is {other}.",
    )


def order(chance: random.Random, conflict: bool) -> Made:
    """One is taller than another, who is taller than the first, or than a third."""
    one, other, third = chance.sample(PEOPLE, 3)
    return f"{one} is taller than {other}.", f"{other} is taller than {one if conflict else third}."


def count(chance: random.Random, conflict: bool) -> Made:
    """Exactly so many; at least a number that is more, or not."""
    thing, place, number = chance.choice(THINGS), chance.choice(PLACES), chance.randint(3, 8)
    least = number + chance.randint(1, 3) if conflict else number - chance.randint(0, 2)
    return (
        f"There are exactly {number} {thing} in the {place}.",
        f"There are at least {least} {thing} in the {place}.",
    )


def only(chance: random.Random, conflict: bool) -> Made:
    """Open on one day alone; someone shopped there on another, or on that day."""
    place, (day, other) = chance.choice(PLACES), chance.sample(DAYS, 2)
    person = chance.choice(PEOPLE)
    return (
        f"People are let into the {place} only on a {day}.",
        f"{person} was let into the {place} on a {other if conflict else day}.",
    )


def unless(chance: random.Random, conflict: bool) -> Made:
    """Who has the key is at work; the one with the key, or another, is not."""
    place, (one, other) = chance.choice(PLACES), chance.sample(PEOPLE, 2)
    return (
        f"Everybody with a key to the {place} is at work, and {one} has a key to the {place}.",
        f"{one if conflict else other} is not at work.",
    )


TEMPLATES: tuple[Callable[[random.Random, bool], Made], ...] = (
    universal,
    order,
    count,
    only,
    unless,
)
USED = {"easy": 2, "medium": 4, "hard": 5}  # templates
FILLERS = {"easy": 0, "medium": 0, "hard": 3}  # statements on other matters between the two


@item_suite("inconsistency", kind="control", traits=("symbolic_steps",))
@dataclass(frozen=True, kw_only=True)
class Inconsistency:
    """Can two statements be true at the same time?"""

    def make(self, n: int, seed: int, difficulty: str) -> list[Item]:
        """See `Suite`."""
        items: list[Item] = []
        seen: set[tuple[str, str]] = set()
        for number in range(n):
            chance = random.Random(f"inconsistency/{seed}/{number}")
            conflict = number % 2 == 1
            template = TEMPLATES[: USED[difficulty]][number // 2 % USED[difficulty]]
            first, second = _new(template, chance, conflict, seen)
            between = [
                f"{chance.choice(PEOPLE)} once had a bicycle from {1950 + chance.randrange(60)}."
                for _ in range(FILLERS[difficulty])
            ]
            told = "\n".join([first, *between, second])
            items.append(
                Item(
                    prompt=f"{told}\n\nCan all of these statements be true at the same time?\n"
                    "Answer Yes or No.",
                    answer="No" if conflict else "Yes",
                    choices=("Yes", "No"),
                    meta={"template": template.__name__, "statements": (first, second)},
                    id=f"inconsistency/{seed}/{number}",
                )
            )
        return items


def _new(
    template: Callable[[random.Random, bool], Made],
    chance: random.Random,
    conflict: bool,
    seen: set[tuple[str, str]],
) -> Made:
    """Return a pair that was not seen, and add it. Raises InputError if none is found."""
    for _ in range(TRIES):
        made = template(chance, conflict)
        if made not in seen:
            seen.add(made)
            return made
    raise InputError(
        f"after {len(seen)} pairs no new one was found in {TRIES:,} tries; ask for fewer items"
    )
