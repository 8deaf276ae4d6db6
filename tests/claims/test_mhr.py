"""The tasks of the claim: who trains, who is kept, and what an image and its label are."""

import os

import pytest
import torch

from pluribus.claims.mhr import CLASSES, SHOTS, TRAIN, VIEWS, tasks
from pluribus.tasks.views import vision6

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
