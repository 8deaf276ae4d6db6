"""The beds of the claim: who is a source, who a target, and what is computed once."""

import os

import pytest
import torch
from torch import nn

from pluribus.claims import scalearn as claim
from pluribus.claims._mhr_beds import VIEWS
from pluribus.route.transfer import Examples, SingleAdapter, Target
from pluribus.tasks.encoders import minilm
from pluribus.tasks.views import Split, vision6

data = pytest.mark.skipif(
    not os.environ.get("PLURIBUS_DATA"), reason="needs fashion_mnist: $PLURIBUS_DATA is not set"
)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_tail_goes_on_where_the_lower_layers_stopped():
    torch.manual_seed(0)
    encoder = minilm.MiniLM(
        vocabulary=50, positions=12, width=16, depth=3, heads=2, inner=24, scale=12.0
    ).eval()
    ids = torch.randint(1, 50, (90, 9), generator=rng())
    for row, length in enumerate(torch.randint(1, 10, (90,), generator=rng()).tolist()):
        ids[row, length:] = minilm.PADDING
    seen = claim.lower(encoder, ids, 2)
    with torch.no_grad():
        expected = encoder(ids)
        found = claim.Tail(encoder, 2)(**seen)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert seen["attention_mask"].sum(1).tolist() == (ids != 0).sum(1).tolist()


def test_a_subset_is_relabelled():
    split = Split(torch.arange(20.0)[:, None], torch.arange(20) % 4)
    found = claim.subset(split, torch.tensor([3, 1]), 6, rng())
    assert len(found.y) == 6
    assert found.y.tolist() == [{3: 0, 1: 1}[int(x) % 4] for x in found.x[:, 0]]


def test_texts_of_many_classes_keep_eight():
    y = torch.arange(77).repeat(5)
    splits = {name: Examples({"x": y[:, None]}, y) for name in ("train", "val", "test")}
    few, count = claim.few_texts(splits, 77, rng())
    assert count == 8
    assert len(few.train.y) == claim.TEXT_LABELS
    assert few.val is not None
    assert len(few.val.y) == 8 * 5
    assert sorted(set(few.val.y.tolist())) == list(range(8))
    chosen = sorted(set(few.val.x["x"][:, 0].tolist()))  # type: ignore[index]
    for some in (few.train, few.val):
        assert [chosen[label] for label in some.y.tolist()] == some.x["x"][:, 0].tolist()


def test_a_method_is_judged_at_the_rate_that_validation_prefers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8))
    x = torch.randn(60, 4, generator=rng())
    some = Examples(x, (x[:, 0] > 0).long())
    made = SingleAdapter(layers="2", bottleneck=3, lr=1e-2)
    sources = {"a": claim.source(model, Target(some, some), 2, made, "texts", 0)}
    few = Target(some, some, some)
    runs = claim.compared(model, sources, few, 2, ("scalearn", "single_adapter"), 12, 16, 0)
    assert list(runs) == ["scalearn", "single_adapter"]
    alone = [
        claim.run(model, sources, few, 2, "single_adapter", 12, 16, 0, rate)
        for rate in claim.RATES["single_adapter"]
    ]
    assert runs["single_adapter"].val == max(
        (one.val for one in alone), key=lambda score: (score.accuracy, -score.loss)
    )
    assert claim.matrices(claim.run(model, sources, few, 2, "adapter_fusion", 1, 16, 0)) == 3 * 64


@data
def test_the_image_tasks_are_dealt_as_said():
    known, new = claim.image_tasks(0)
    assert len(known) == 8
    assert len(new) == 4
    assert sorted(name.split("-")[1] for name in known if "clothes" in name) == sorted(VIEWS)
    assert sum(name.startswith("digits") for name in new) == 1
    for name, task in known.items():
        count = len(task.train.y)
        assert count == claim.SOURCE if "clothes" in name else 400 < count < 700
    again, _ = claim.image_tasks(0)
    assert all(torch.equal(again[n].train.x, known[n].train.x) for n in known)  # type: ignore[arg-type]


@data
def test_no_test_image_of_a_target_is_trained_on():
    plain = vision6(0, claim.SIZES, classes=None)["identity"]
    _, new = claim.image_tasks(0)
    name, task = next((n, t) for n, t in new.items() if n.startswith("clothes"))
    view = VIEWS[name.split("-")[1]]

    def pool(split: str) -> set[bytes]:
        return {image.numpy().tobytes() for image in view(plain.split(split).x[:, 0]).contiguous()}

    assert task.test is not None
    seen = {image[0].numpy().tobytes() for image in task.test.x}  # type: ignore[union-attr]
    assert seen <= pool("test")
    assert not seen & pool("train")
