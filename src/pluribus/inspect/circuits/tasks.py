"""Tasks whose circuits can be looked for, drawn from templates and lists of words.

    ioi                      When Ann and Ben went to the lake, Ben gave a ring to        -> Ann
    colored_objects          the paper's format: Q: On the desk, I see ... What color ... -> Red
    colored_objects_natural  On the desk, there is a red cup, ... The cup is              -> red
    color_to_object          On the desk are a red cup and a blue pen. The red thing ...  -> cup
    the_other                Two friends, Ann and Ben, met ... One was Ben and the other was -> Ann
    greater_than             The war lasted from the year 1732 to the year 17             -> 4 ... 9
    greater_than_pairs       the same for tokenizers that have 42 as one token
    capitals                 The capital of Italy is the city of                          -> Rome

Merullo et al., ICLR 2024, for the first two; greater-than after Hanna et al. 2023. Words that a
tokenizer splits are drawn again by `PromptTask.fitting`.
"""

import random
from collections.abc import Sequence

from pluribus.core.errors import InputError, nearest
from pluribus.inspect.circuits.prompts import MOVERS, Prompt, PromptTask, Spans, Stage


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Mary John Tom James Paul Mark Anna Kate Laura Sarah David Peter Alice Emma Jack Henry "
    "Lucy Simon Helen Martin George Susan Robert Linda Daniel Rachel Michael Karen Kevin "
    "Julia"
)
PLACES = _words("store park school office garden beach station restaurant market library")
THINGS = _words("ring drink book letter ball key gift bottle card basket")
IOI_TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} gave a {thing} to",
    "When {a} and {b} arrived at the {place}, {s} gave a {thing} to",
    "After {a} and {b} went to the {place}, {s} gave a {thing} to",
    "While {a} and {b} were at the {place}, {s} gave the {thing} to",
    "When {a} and {b} came to the {place}, {s} handed the {thing} to",
)
OTHER_TEMPLATES = (
    "There were two people at the {place}, {a} and {b}. One of them was {s}, and the other was",
    "Two friends, {a} and {b}, met at the {place}. One was {s} and the other was",
    "Two guests came to the {place}, {a} and {b}. One guest was {s}, and the other guest was",
)
COLORS = _words("red orange yellow green blue brown purple black")
OBJECTS = _words(
    "pencil notebook pen cup plate jug mug puzzle necklace bracelet lamp book bowl key ring hat bag"
)
SURFACES = _words("table desk floor")
SEEN = ("there is", "you see", "I see")
COUNTRIES = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin",
    "England": "London", "Japan": "Tokyo", "Russia": "Moscow", "China": "Beijing",
    "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna", "Ireland": "Dublin",
    "Poland": "Warsaw", "Portugal": "Lisbon", "Norway": "Oslo", "Sweden": "Stockholm",
    "Cuba": "Havana", "Peru": "Lima", "Canada": "Ottawa", "Turkey": "Ankara",
    "Hungary": "Budapest", "Thailand": "Bangkok", "Kenya": "Nairobi", "Iran": "Tehran",
}  # fmt: skip
CAPITAL_TEMPLATES = (
    "The capital of {country} is the city of",
    "{country}'s capital is the city of",
    "The government of {country} sits in its capital, the city of",
)
EVENTS = _words("war siege reign journey drought dispute expedition trial")


def get(name: str) -> PromptTask:
    """Return a task by name. Raises InputError with the nearest one."""
    if name not in TASKS:
        known = ", ".join(TASKS)
        raise InputError(f"there is no task {name!r}; there are {known}." + nearest(name, TASKS))
    return TASKS[name]


def _ioi(rng: random.Random) -> Prompt:
    return _two_names(rng, IOI_TEMPLATES)


def _two_names(rng: random.Random, templates: Sequence[str]) -> Prompt:
    """Return a prompt with two names, one of them again: the other is asked for."""
    template = rng.choice(templates)
    io, subject = rng.sample(NAMES, 2)
    a, b = (io, subject) if rng.random() < 0.5 else (subject, io)
    words = {"a": a, "b": b, "place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
    clean = template.format(s=subject, **words)
    corrupt = template.format(s=io, **words)
    first, second = clean.index(io), clean.index(subject)
    again = clean.rindex(subject)
    spans = {
        "IO": (first, first + len(io)),
        "S1": (second, second + len(subject)),
        "S2": (again, again + len(subject)),
    }
    return Prompt(clean, corrupt, f" {io}", f" {subject}", spans, (f" {io}", f" {subject}"))


def _an(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _scene(rng: random.Random, question: str, given: str) -> tuple[str, str, str, Spans, list[str]]:
    """Return a prompt, its twin, both colours and where they stand; `question` has {object}."""
    colors, objects = rng.sample(COLORS, 3), rng.sample(OBJECTS, 3)
    shown = [f"{_an(c)} {o}" for c, o in zip(colors, objects, strict=True)]
    start = f"{given}{shown[0]}, {shown[1]}, and {shown[2]}."
    asked, other = rng.sample(range(3), 2)
    spans: Spans = {}
    at = len(given)
    for number, text in enumerate(shown):
        at = start.index(text, at)
        color = at + text.index(colors[number])
        place = (color, color + len(colors[number]))
        wrong = [n for n in range(3) if n != asked]
        spans["right" if number == asked else f"wrong{wrong.index(number) + 1}"] = place
        if number == asked:
            spans["object"] = (at + len(text) - len(objects[number]), at + len(text))
    clean = start + question.format(object=objects[asked])
    begun = start + question.partition("{object}")[0]
    spans["asked"] = (len(begun), len(begun) + len(objects[asked]))
    corrupt = start + question.format(object=objects[other])
    order = [asked, other, 3 - asked - other]
    return clean, corrupt, objects[asked], spans, [colors[n] for n in order]


def _given(rng: random.Random) -> str:
    return f"On the {rng.choice(SURFACES)}, {rng.choice(SEEN)} "


def _colored(rng: random.Random, before: str, question: str, capital: bool) -> Prompt:
    """Return a question behind one that is solved."""
    solved, _, _, _, found = _scene(rng, question, before + _given(rng))
    answer = found[0].capitalize() if capital else found[0]
    shot = f"{solved} {answer}{'' if capital else '.'}\n"
    clean, corrupt, _, spans, colors = _scene(rng, question, before + _given(rng))
    options = [f" {c.capitalize() if capital else c}" for c in colors]
    places = {name: (first + len(shot), last + len(shot)) for name, (first, last) in spans.items()}
    return Prompt(shot + clean, shot + corrupt, options[0], options[1], places, tuple(options))


def _colored_objects(rng: random.Random) -> Prompt:
    return _colored(rng, "Q: ", " What color is the {object}?\nA:", True)


def _colored_natural(rng: random.Random) -> Prompt:
    return _colored(rng, "", " The {object} is", False)


def _pair(
    clean: str, corrupt: str, options: Sequence[str], spans: Sequence[tuple[str, str]]
) -> Prompt:
    """Return a prompt with the first places of some words as spans."""
    places = {name: (clean.index(word), clean.index(word) + len(word)) for name, word in spans}
    a, b = (f" {option}" for option in options[:2])
    return Prompt(clean, corrupt, a, b, places, (a, b))


def _color_to_object(rng: random.Random) -> Prompt:
    colors, objects = rng.sample(COLORS, 2), rng.sample(OBJECTS, 2)
    shown = [f"{_an(c)} {o}" for c, o in zip(colors, objects, strict=True)]
    asked = rng.randrange(2)
    start = f"On the {rng.choice(SURFACES)} are {shown[0]} and {shown[1]}. The {{}} thing is the"
    return _pair(
        start.format(colors[asked]),
        start.format(colors[1 - asked]),
        (objects[asked], objects[1 - asked]),
        (("right", objects[asked]), ("wrong1", objects[1 - asked]), ("cue", colors[asked])),
    )


def _the_other(rng: random.Random) -> Prompt:
    return _two_names(rng, OTHER_TEMPLATES)


def _greater_than(rng: random.Random) -> Prompt:
    """Tens digits: the answer is the next one, the twin's decade lies below the alternative."""
    century, decade, unit = rng.randrange(11, 20), rng.randrange(3, 9), rng.randrange(2, 10)
    event = rng.choice(EVENTS)
    text = f"The {event} lasted from the year {century}{{}}{unit} to the year {century}"
    below = rng.randrange(0, decade - 1)
    return Prompt(
        text.format(decade),
        text.format(below),
        str(decade + 1),
        str(below + 1),
        {"year": (text.index("{}"), text.index("{}") + 1)},
        (str(decade + 1), str(below + 1)),
        tuple(str(digit) for digit in (decade, *range(decade + 2, 10))),
    )


def _greater_than_pairs(rng: random.Random) -> Prompt:
    century, year = rng.randrange(11, 20), rng.randrange(40, 90)
    event = rng.choice(EVENTS)
    text = f"The {event} lasted from the year {century}{{}} to the year {century}"
    later, below = rng.randrange(year + 1, 100), rng.randrange(10, 25)
    between = rng.randrange(below + 5, year)
    return Prompt(
        text.format(year),
        text.format(below),
        str(later),
        str(between),
        {"year": (text.index("{}"), text.index("{}") + 2)},
        (str(later), str(between)),
        tuple(str(one) for one in range(year + 1, 100) if one != later),
    )


def _capitals(rng: random.Random) -> Prompt:
    one, other = rng.sample(sorted(COUNTRIES), 2)
    template = rng.choice(CAPITAL_TEMPLATES)
    clean = template.format(country=one)
    first = clean.index(one)
    options = (f" {COUNTRIES[one]}", f" {COUNTRIES[other]}")
    spans = {"country": (first, first + len(one))}
    return Prompt(clean, template.format(country=other), *options, spans, options)


def _stages(middle: str, value_at: str, key_at: str) -> tuple[Stage, ...]:
    return (
        MOVERS,
        Stage(middle, "q", "movers", "positive"),
        Stage("induction", "v", middle, "positive", value_at),
        Stage("previous", "k", "induction", "positive", key_at),
    )


_ALL = (
    PromptTask("ioi", "who gets it: the name said once", _ioi, _stages("inhibition", "S2", "S1+1")),
    PromptTask(
        "colored_objects",
        "the color of one of three objects, as a question",
        _colored_objects,
        _stages("gatherers", "asked", "object"),
    ),
    PromptTask(
        "colored_objects_natural",
        "the color of one of three objects, as a sentence",
        _colored_natural,
        _stages("gatherers", "asked", "object"),
    ),
    PromptTask("color_to_object", "the object of a color", _color_to_object),
    PromptTask("the_other", "which of two people is left", _the_other),
    PromptTask("greater_than", "a later decade, in single digits", _greater_than),
    PromptTask("greater_than_pairs", "a later year, in tokens of two digits", _greater_than_pairs),
    PromptTask("capitals", "the capital of a country", _capitals),
)
TASKS = {task.name: task for task in _ALL}
IOI, COLORED_OBJECTS, COLORED_OBJECTS_NATURAL = _ALL[:3]
