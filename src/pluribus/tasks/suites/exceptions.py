"""Labels with exceptions: a rule that nearly holds, and a number plate that always does.

After Liu et al., ICML 2025, https://arxiv.org/abs/2410.21333: ten vehicles have one feature that
goes with the label for eight of them, three that tell nothing, and a plate of their own. They are
shown one at a time; the label is guessed, then told; this is repeated in new orders until a pass
without a mistake, 15 passes at most. Who looks for rules goes on erring; who remembers plates is
done after two passes. `passes` runs it with any agent; the items of the suite ask for one vehicle
after one pass was told, so that they can be answered at once.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pluribus.core.errors import InputError
from pluribus.core.merger import PositiveInt
from pluribus.tasks.suites import Item, item_suite

LABELS = ("A", "B")
FEATURES = (
    ("size", ("small", "large")),
    ("colour", ("red", "blue")),
    ("roof", ("open", "closed")),
    ("tyres", ("narrow", "wide")),
)
PLATE = "BCDFGHJKLMNPRSTVWXZ"
MOST = 15  # passes
EXCEPTIONS = {"easy": 1, "medium": 2, "hard": 3}  # vehicles of ten that the rule misses

Vehicle = tuple[str, ...]  # size, colour, roof, tyres, plate
Told = Sequence[tuple[Vehicle, str]]  # what was seen with its label, oldest first
Agent = Callable[[Told, Vehicle], str | None]


@dataclass(frozen=True)
class Vehicles:
    """Ten vehicles and their labels. `rule` is the feature that nearly tells the label."""

    vehicles: tuple[Vehicle, ...]
    labels: tuple[str, ...]
    rule: int


def draw(chance: random.Random, exceptions: int = 2) -> Vehicles:
    """Return ten vehicles, five of each label; the rule misses so many of them.

    A feature that is not the rule has each of its values equally often with either label.
    """
    labels = [LABELS[0]] * 5 + [LABELS[1]] * 5
    rule = chance.randrange(len(FEATURES))
    columns: list[list[int]] = []
    for number in range(len(FEATURES)):
        if number == rule:
            missed = chance.sample(range(10), exceptions)
            turned = chance.randrange(2)
            bits = [(label == "B") ^ (i in missed) ^ turned for i, label in enumerate(labels)]
        else:
            ones = chance.choice((2, 3))
            bits = [1] * ones + [0] * (5 - ones)
            bits = chance.sample(bits, 5) + chance.sample(bits, 5)
        columns.append([int(bit) for bit in bits])
    plates: list[str] = []
    while len(plates) < 10:
        plate = "".join(chance.choices(PLATE, k=3)) + f"{chance.randrange(1000):03d}"
        if plate not in plates:
            plates.append(plate)
    order = chance.sample(range(10), 10)
    vehicles = tuple(
        (*(FEATURES[f][1][columns[f][i]] for f in range(len(FEATURES))), plates[i]) for i in order
    )
    return Vehicles(vehicles, tuple(labels[i] for i in order), rule)


def passes(agent: Agent, drawn: Vehicles, seed: int, most: int = MOST) -> int:
    """Return the number of passes up to one without a mistake, that one included; else most + 1.

    The agent is given all that it has seen, and a vehicle; None is a mistake. Orders are by the
    seed, the same for every agent. Raises InputError for most < 1.
    """
    if most < 1:
        raise InputError(f"{most} passes were allowed; give at least 1")
    chance = random.Random(f"exceptions/passes/{seed}")
    told: list[tuple[Vehicle, str]] = []
    for number in range(1, most + 1):
        right = True
        for i in chance.sample(range(len(drawn.vehicles)), len(drawn.vehicles)):
            right &= agent(tuple(told), drawn.vehicles[i]) == drawn.labels[i]
            told.append((drawn.vehicles[i], drawn.labels[i]))
        if right:
            return number
    return most + 1


def described(vehicle: Vehicle) -> str:
    """Return a vehicle in words."""
    size, colour, roof, tyres, plate = vehicle
    return f"A {size} {colour} vehicle with {_roof(roof)} and {tyres} tyres, plate {plate}"


def _roof(roof: str) -> str:
    return f"{'an' if roof == 'open' else 'a'} {roof} roof"


def prompt(told: Told, vehicle: Vehicle) -> str:
    """Return the question for one vehicle after all that was told."""
    seen = "".join(f"\n{described(one)}: {label}" for one, label in told)
    before = f"Seen so far:{seen}\n\n" if told else ""
    return (
        f"Each vehicle belongs to group A or to group B. {before}"
        f"Which group does this one belong to?\n{described(vehicle)}\n"
        "Answer A or B."
    )


@item_suite("exceptions", kind="hurts people", traits=("implicit_pattern", "exceptions_dominate"))
@dataclass(frozen=True, kw_only=True)
class Exceptions:
    """Which group does a vehicle belong to that was seen once before?"""

    asked: PositiveInt = 2  # vehicles asked for, of each ten: an exception and one by the rule

    def make(self, n: int, seed: int, difficulty: str) -> list[Item]:
        """See `Suite`; raises InputError if more is asked than there is."""
        if self.asked > 10:
            raise InputError(f"{self.asked} vehicles of ten were asked for; give 10 at most")
        items: list[Item] = []
        number = 0
        while len(items) < n:
            chance = random.Random(f"exceptions/{seed}/{number}")
            drawn = draw(chance, EXCEPTIONS[difficulty])
            order = chance.sample(range(10), 10)
            told = [(drawn.vehicles[i], drawn.labels[i]) for i in order]
            items += [
                Item(
                    prompt=prompt(told, drawn.vehicles[i]),
                    answer=drawn.labels[i],
                    choices=LABELS,
                    meta={"vehicles": drawn, "asked": i, "exception": i in exceptions_of(drawn)},
                    id=f"exceptions/{seed}/{number}/{place}",
                )
                for place, i in enumerate(self._chosen(drawn, chance))
            ]
            number += 1
        return items[:n]

    def _chosen(self, drawn: Vehicles, chance: random.Random) -> list[int]:
        """Return vehicles to ask for, exceptions and others in turn."""
        odd = chance.sample(sorted(exceptions_of(drawn)), len(exceptions_of(drawn)))
        even = chance.sample([i for i in range(10) if i not in odd], 10 - len(odd))
        turns = [one for pair in zip(odd, even, strict=False) for one in pair]
        return [*turns, *even[len(odd) :]][: self.asked]


def exceptions_of(drawn: Vehicles) -> set[int]:
    """Return the vehicles that the rule misses."""
    value = FEATURES[drawn.rule][1][1]
    said = [vehicle[drawn.rule] == value for vehicle in drawn.vehicles]
    wrong = {i for i, one in enumerate(said) if one != (drawn.labels[i] == "B")}
    return wrong if len(wrong) < 5 else set(range(10)) - wrong
