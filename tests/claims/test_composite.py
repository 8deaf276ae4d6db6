"""The measurement of composites, on a small zoo."""

import pytest
import torch

from pluribus.claims import composite
from pluribus.claims._page import tables
from pluribus.claims.composite import CLAIM, Bed
from pluribus.tasks import zoo as zoos


@pytest.fixture
def small(monkeypatch):
    """A zoo of digits and beds that take seconds."""
    sizes = {"train": 60, "val": 30, "test": 40}

    def build(name, seed, on_step=None, make=zoos.build):
        return make(
            "demo8",
            seed,
            width=24,
            depth=2,
            base_steps=5,
            epochs=2,
            threads=1,
            cache=False,
            **sizes,
        )

    monkeypatch.setattr(zoos, "build", build)
    bed = Bed("demo8", "task_arithmetic(scale=0.2)", "module:blocks.0", 2, 1e-2, 8)
    monkeypatch.setattr(composite, "BEDS", {"images": bed, "texts": bed})
    monkeypatch.setattr(composite, "DENSITY", 1.0)
    monkeypatch.setattr(composite, "ROUTER", {"epochs": 2})
    monkeypatch.setattr(composite, "SCALES", (0.1, 0.3))
    monkeypatch.setattr(composite, "REPEATS", 1)
    return build("demo8", 0), bed


def test_parts_of_full_rank_with_the_task_given_are_the_specialists(small):
    zoo, bed = small
    routed = composite.low_rank(zoo, bed)
    for task, expert in zoo.experts.items():
        x = zoo.tasks[task].split("test")[0]
        wanted, ground = (zoo.logits(state, task, x) for state in (expert, zoo.base))
        off = (routed(x, task=task, weights=task) - wanted).norm() / (wanted - ground).norm()
        assert float(off) < 0.02  # half precision's; at a fifth of the rank 0.05
    assert composite.composite_score(zoo, routed, true=True) == pytest.approx(100, abs=2)


def test_all_figures_that_the_claim_compares_are_measured(small):
    figures = composite.measure(0)
    assert {check.left for check in CLAIM.checks} <= set(figures)
    assert {check.right for check in CLAIM.checks if check.right} <= set(figures)
    found = tables({"figures": figures})
    assert list(found) == ["images", "texts"]
    row = found["images"]["masks, routed"]
    assert set(row) == {"accuracy", "storage", "time"}
    assert found["images"]["average"]["storage"] == pytest.approx(12.5)
    assert row["storage"] > found["images"]["masks, task given"]["storage"] > 25  # base and vector
    static = [figures[f"images/{name}/accuracy"] for name in composite.STATIC]
    assert figures["images_best_static"] in static


def test_a_batch_takes_rows_of_all_tasks_in_turn(small):
    zoo, _ = small
    x, names = composite.mixed(zoo)
    assert len(x) == len(names) == composite.BATCH
    assert names[:9] == [*zoo.tasks, next(iter(zoo.tasks))]
    for row in (0, 9, 31):
        assert torch.equal(x[row], zoo.tasks[names[row]].split("test")[0][row])
