"""Search by words: BM25 over fields of different weight, with words that are still being typed.

Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009, section 3.6 (BM25F).

    tf(w, c)  = sum_f weight_f count(w in field f of c)
    len(c)    = sum_f weight_f length_f(c)
    idf(w)    = ln(1 + (C - n_w + 1/2) / (n_w + 1/2))
    score     = sum_w idf(w) tf (k1 + 1) / (tf + k1 (1 - b + b len / mean len))

A word of the query that no card has stands for the words that begin with it.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

K1, B = 1.5, 0.75


class Found(NamedTuple):
    """One document for a query."""

    number: int  # of the document
    score: float
    words: int  # how many of the query's words it has


def words(text: str) -> list[str]:
    """Return the words of a text: lower case, split at all but letters and digits, no plural s."""
    return [_stem(word) for word in re.findall(r"[^\W_]+", text.lower())]


def _stem(word: str) -> str:
    plural = len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))
    return word[:-1] if plural else word


class Index:
    """Documents, each a mapping of fields to texts, ready to be searched."""

    def __init__(self, documents: Sequence[Mapping[str, str]], weights: Mapping[str, float]):
        self.counts: list[Counter[str]] = []
        for document in documents:
            counted: Counter[str] = Counter()
            for field, text in document.items():
                for word, count in Counter(words(text)).items():
                    counted[word] += count * weights[field]  # type: ignore[assignment]
            self.counts.append(counted)
        lengths = [sum(counted.values()) for counted in self.counts]
        mean = sum(lengths) / max(len(lengths), 1) or 1.0
        self.norms = [K1 * (1 - B + B * length / mean) for length in lengths]
        self.holders: dict[str, list[int]] = {}
        for number, counted in enumerate(self.counts):
            for word in counted:
                self.holders.setdefault(word, []).append(number)

    def search(self, query: str) -> list[Found]:
        """Return the documents with any word of a query, the best first."""
        scores: dict[int, float] = {}
        matched: Counter[int] = Counter()
        for word in dict.fromkeys(words(query)):
            own: dict[int, float] = {}
            for known in self._meant(word):
                idf = self._idf(known)
                for number in self.holders[known]:
                    tf = self.counts[number][known]
                    gain = idf * tf * (K1 + 1) / (tf + self.norms[number])
                    own[number] = max(own.get(number, 0.0), gain)
            for number, gain in own.items():
                scores[number] = scores.get(number, 0.0) + gain
                matched[number] += 1
        found = [Found(number, score, matched[number]) for number, score in scores.items()]
        return sorted(found, key=lambda one: (-one.score, one.number))

    def _meant(self, word: str) -> list[str]:
        if word in self.holders:
            return [word]
        return [known for known in self.holders if known.startswith(word)]

    def _idf(self, word: str) -> float:
        n = len(self.holders[word])
        return math.log(1 + (len(self.counts) - n + 0.5) / (n + 0.5))
