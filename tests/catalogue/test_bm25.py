"""BM25 against a case worked by hand and a slow, obvious version."""

import math
from collections import Counter

import pytest

from pluribus.catalogue.bm25 import K1, B, Index, words

WEIGHTS = {"title": 2.0, "body": 1.0}
DOCUMENTS = [
    {"title": "Merge signs", "body": "vote on signs of updates"},
    {"title": "Route inputs", "body": "a gate votes for experts, and experts vote back"},
    {"title": "Prune", "body": "channels"},
]


def test_words():
    assert words("Dare_TIES: 3 signs' axis, Loss-less") == [
        "dare",
        "tie",
        "3",
        "sign",
        "axis",
        "loss",
        "less",
    ]


def test_worked_by_hand():
    """One word in one of two equally long documents: tf 1, idf ln 2, the length factor 1."""
    index = Index([{"body": "sign"}, {"body": "gate"}], {"body": 1.0})
    (found,) = index.search("sign")
    assert found.number == 0
    assert found.score == pytest.approx(math.log(2) * 1 * (K1 + 1) / (1 + K1))


def slow(query, documents):
    counted = []
    for document in documents:
        counts = Counter()
        for field, text in document.items():
            for word in words(text):
                counts[word] += WEIGHTS[field]
        counted.append(counts)
    mean = sum(sum(c.values()) for c in counted) / len(counted)
    scores = []
    for counts in counted:
        total = 0.0
        for word in words(query):
            n = sum(word in other for other in counted)
            idf = math.log(1 + (len(counted) - n + 0.5) / (n + 0.5))
            tf = counts[word]
            norm = K1 * (1 - B + B * sum(counts.values()) / mean)
            total += idf * tf * (K1 + 1) / (tf + norm)
        scores.append(total)
    return scores


@pytest.mark.parametrize("query", ["vote", "signs vote", "experts merge channels"])
def test_equals_the_slow_version(query):
    found = {one.number: one.score for one in Index(DOCUMENTS, WEIGHTS).search(query)}
    for number, score in enumerate(slow(query, DOCUMENTS)):
        assert found.get(number, 0.0) == pytest.approx(score, abs=1e-12)


def test_counts_words_and_orders():
    found = Index(DOCUMENTS, WEIGHTS).search("signs vote")
    assert [(one.number, one.words) for one in found] == [(0, 2), (1, 1)]


def test_a_word_that_is_still_typed_stands_for_those_that_begin_so():
    index = Index(DOCUMENTS, WEIGHTS)
    assert [one.number for one in index.search("chan")] == [2]
    assert index.search("chan") == index.search("channels")
    assert [one.number for one in index.search("ex")] == [1]


def test_nothing():
    assert Index(DOCUMENTS, WEIGHTS).search("zebra") == []
    assert Index(DOCUMENTS, WEIGHTS).search("  ") == []
    assert Index([], WEIGHTS).search("vote") == []
