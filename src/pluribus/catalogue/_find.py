"""Finding cards: by words, by meaning, by what they need."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from pluribus.catalogue._card import DATA, At, Card, Data, Where
from pluribus.catalogue._systems import cards as all_cards
from pluribus.catalogue.bm25 import Found, Index
from pluribus.catalogue.meaning import Meanings

WEIGHTS = {"name": 5.0, "title": 4.0, "summary": 3.0, "needs": 1.0, "doc": 0.5}
NEAREST = 20  # cards that a search by meaning gives, at most
FUSED = 60  # of reciprocal rank fusion
NEARLY = 0.4  # of the best score
PLANNED = 0.6  # of its score, for what cannot be run yet


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What a card must be. None leaves it open; `data` is the most that may be needed."""

    data: Data | None = None
    trains: bool | None = None
    at: At | None = None
    where: Where | None = None
    built: bool | None = None

    def keep(self, card: Card) -> bool:
        """Whether a card fits."""
        return (
            (self.data is None or DATA.index(card.data) <= DATA.index(self.data))
            and (self.trains is None or card.learns == self.trains)
            and (self.at is None or self.at in card.at)
            and (self.where is None or self.where in card.where)
            and (self.built is None or card.built == self.built)
        )


ANY = Filters()


class Finder:
    """Cards with their indices: built once, searched often."""

    def __init__(self, cards: Sequence[Card], keep: bool = True) -> None:
        from pluribus.tasks.sets import cache_folder

        self.cards = tuple(cards)
        self.index = Index([fields(card) for card in self.cards], WEIGHTS)
        texts = [f"{card.title}. {card.summary} {card.needs}" for card in self.cards]
        self.meanings = Meanings(texts, cache_folder() / "catalogue" if keep else None)

    def search(
        self, query: str = "", filters: Filters = ANY, by_meaning: bool = False
    ) -> list[Card]:
        """Return the cards for a query, the best first; without words all of them by name.

        By words: those that have the most of the query's words, then those that lack one more and
        are nearly as good. By meaning: at most the nearest 20, ranked by meaning and words
        together. Raises ExtraError if the encoder is missing.
        """
        kept = [filters.keep(card) for card in self.cards]
        if not query.strip():
            return [card for card, keep in zip(self.cards, kept, strict=True) if keep]
        found = [one for one in self.index.search(query) if kept[one.number]]
        found.sort(key=self._worth, reverse=True)
        if not by_meaning:
            most = max((one.words for one in found), default=0)
            enough = NEARLY * max((self._worth(one) for one in found), default=0.0)
            ranked = [
                one
                for one in found
                if one.words == most or (one.words == most - 1 and self._worth(one) >= enough)
            ]
            ranked.sort(key=lambda one: -one.words)
            return [self.cards[one.number] for one in ranked]
        cosines = self.meanings.scores(query)
        near = sorted((i for i, keep in enumerate(kept) if keep), key=lambda i: -cosines[i])
        ranks = dict.fromkeys(near, 0.0)
        for ranking in (near, [one.number for one in found]):
            for rank, number in enumerate(ranking):
                ranks[number] += 1 / (FUSED + rank + 1)
        best = sorted(ranks, key=lambda i: -ranks[i])
        return [self.cards[i] for i in best[:NEAREST]]

    def _worth(self, one: Found) -> float:
        return one.score * (1.0 if self.cards[one.number].built else PLANNED)


def fields(card: Card) -> dict[str, str]:
    """Return the texts of a card that are searched."""
    needs = (card.needs, card.data, card.trains, *card.at, *card.where, card.memory)
    return {
        "name": card.name,
        "title": card.title,
        "summary": card.summary,
        "needs": " ".join((*needs, card.inference, card.package)),
        "doc": f"{card.doc} {' '.join(card.parameters)}",
    }


@cache
def finder() -> Finder:
    """Return the finder over all cards."""
    return Finder(all_cards())


def find(words: Sequence[str] = (), filters: Filters = ANY, by_meaning: bool = False) -> list[Card]:
    """Return the cards for some words: see `Finder.search`."""
    return finder().search(" ".join(words), filters, by_meaning)
