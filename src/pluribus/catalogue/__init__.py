"""Every system and method as a card: what it buys and needs, what was measured, how to run it.

    catalogue.card("ties").rows()                         # label and text
    catalogue.find(["sign", "conflict"])                  # by words, the best first
    catalogue.find(["forget less"], Filters(data="none"), by_meaning=True)

Cards of built methods come from their code and from stored records; a planned system has a file in
`catalogue/systems`, and nobody keeps a list.
"""

from pluribus.catalogue import records
from pluribus.catalogue._card import AT, DATA, PLACES, STAGES, WHERE, Card
from pluribus.catalogue._find import Filters, Finder, find, finder
from pluribus.catalogue._show import beside, compared, markdown, system_table, table, tuners
from pluribus.catalogue._systems import cards as _cards
from pluribus.core.errors import RecipeError, nearest

__all__ = [
    "AT",
    "DATA",
    "PLACES",
    "STAGES",
    "WHERE",
    "Card",
    "Filters",
    "Finder",
    "beside",
    "card",
    "cards",
    "compared",
    "find",
    "finder",
    "markdown",
    "methods",
    "records",
    "system_table",
    "table",
    "tuners",
]


def cards() -> list[Card]:
    """Return all cards by name."""
    return list(_cards())


def methods() -> list[Card]:
    """Return the cards of merge and tuning methods, by name."""
    return [one for one in _cards() if one.facts is not None and one.package in ("merge", "tune")]


def card(name: str) -> Card:
    """Return one card; - and _ are the same in a name. Raises RecipeError with the nearest name."""
    known = {one.name: one for one in _cards()}
    plain = {key.replace("-", "_"): one for key, one in known.items()}
    found = known.get(name) or plain.get(name.replace("-", "_"))
    if found is None:
        raise RecipeError(
            f"no method is called {name!r}; there are: {', '.join(known)}.{nearest(name, known)}"
        )
    return found
