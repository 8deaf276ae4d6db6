"""Reservoirs are uniform at any time, by class too, and go on as if never interrupted."""

import io

import pytest
import torch
from scipy.stats import chisquare

from pluribus.core.errors import InputError
from pluribus.train.continual.reservoir import ClassReservoir, Reservoir


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(first, first + count)
    return labels[:, None].float().repeat(1, 3), labels


def test_every_row_is_kept_as_often():
    """Chi-square over 2000 runs: 12 rows in batches of 4, 5 kept."""
    counts = torch.zeros(12)
    for seed in range(2000):
        kept, draws = Reservoir(5), rng(seed)
        for first in (0, 4, 8):
            kept.offer(*rows(first, 4), draws)
        counts[kept.kept().y] += 1
    assert counts.sum() == 2000 * 5
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_it_is_uniform_within_a_class_whose_share_shrinks():
    """A second class halves the room of the first, which stays a uniform sample of its rows."""
    counts = torch.zeros(9)
    for seed in range(2000):
        kept, draws = ClassReservoir(6), rng(seed)
        kept.offer(*rows(0, 6), 0, [7] * 6, draws)  # all six are held
        kept.offer(*rows(100, 2), 1, [8] * 2, draws)  # three of them are left
        kept.offer(*rows(6, 3), 0, [7] * 3, draws)
        assert kept.counts() == {7: 3, 8: 2}
        mine = kept.kept().y
        counts[mine[mine < 9]] += 1
    assert counts.sum() == 2000 * 3
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_a_test_that_can_fail():
    """The chi-square sees the last rows of a stream, which a sliding window would keep."""
    counts = torch.tensor([0.0] * 7 + [2000.0] * 5)
    assert chisquare(counts.numpy()).pvalue < 1e-12


def test_what_is_held_comes_in_the_order_of_arrival():
    kept = Reservoir(4)
    for first in range(0, 40, 8):
        kept.offer(*rows(first, 8), rng(first))
    found = kept.kept()
    assert found.y.tolist() == sorted(found.y.tolist())
    assert torch.equal(found.x, found.y[:, None].float().repeat(1, 3))
    assert found.arrival.tolist() == found.y.tolist()
    assert (kept.seen, len(kept)) == (40, 4)


def test_the_highest_priorities_stay():
    kept, draws = Reservoir(3), rng(5)
    kept.offer(*rows(0, 10), draws)
    best = torch.rand(10, dtype=torch.float64, generator=rng(5)).topk(3).indices
    assert kept.kept().y.tolist() == sorted(best.tolist())


def test_owners_and_shares():
    kept = ClassReservoir(10, classes=4)
    assert kept.share == 2
    kept.offer(*rows(0, 6), 3, [0, 0, 0, 1, 1, 2], rng())
    assert kept.counts() == {0: 2, 1: 2, 2: 1}
    kept.offer(*rows(6, 1), 4, [2], rng(1))
    assert kept.kept().owner.tolist()[-1] == 4
    dynamic = ClassReservoir(10)
    dynamic.offer(*rows(0, 10), 0, [0] * 10, rng())
    assert dynamic.counts() == {0: 10}


def test_a_copy_and_a_state_go_on_alike():
    kept = ClassReservoir(6)
    kept.offer(*rows(0, 9), 0, [0, 1, 2] * 3, rng())
    file = io.BytesIO()
    torch.save(kept.state_dict(), file)
    file.seek(0)
    other, third = ClassReservoir.restored(torch.load(file, weights_only=True)), kept.copy()
    for one in (kept, other, third):
        one.offer(*rows(9, 9), 1, [2, 3, 3] * 3, rng(4))
    for one in (other, third):
        assert all(torch.equal(a, b) for a, b in zip(kept.kept(), one.kept(), strict=True))
    plain = Reservoir(2)
    plain.offer(*rows(0, 5), rng())
    again, third = Reservoir.restored(plain.state_dict()), plain.copy()
    for one in (plain, again, third):
        one.offer(*rows(5, 5), rng(3))
    for one in (again, third):
        assert all(torch.equal(a, b) for a, b in zip(plain.kept(), one.kept(), strict=True))


def test_a_copy_is_apart():
    kept = Reservoir(3)
    kept.offer(*rows(0, 3), rng())
    other = kept.copy()
    other.offer(*rows(3, 30), rng(1))
    assert kept.kept().y.tolist() == [0, 1, 2]
    assert kept.seen == 3


def test_rows_do_not_hold_their_batch():
    kept, (x, y) = Reservoir(2), rows(0, 100)
    kept.offer(x, y, rng())
    x.fill_(-1)
    assert (kept.kept().x >= 0).all()


def test_new_owners():
    kept = ClassReservoir(4)
    kept.offer(*rows(0, 4), 0, [0, 0, 1, 1], rng())
    other = kept.reassigned(lambda row: 9, lambda key, label, owner: 5)
    assert other.counts() == {5: 4}
    assert other.kept().owner.tolist() == [9] * 4
    assert kept.counts() == {0: 2, 1: 2}


# -- bad input -------------------------------------------------------------------------------------


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match="capacity = 0"):
        Reservoir(0)
    with pytest.raises(InputError, match="a buffer of 3 rows for 4 classes"):
        ClassReservoir(3, classes=4)


def test_more_classes_than_rows_are_refused_with_nothing_taken():
    kept = ClassReservoir(2)
    kept.offer(*rows(0, 2), 0, [0, 1], rng())
    with pytest.raises(InputError, match="2 rows cannot hold one of each of 3 classes"):
        kept.offer(*rows(2, 1), 0, [2], rng())
    assert kept.counts() == {0: 1, 1: 1}
    assert kept.seen == 2
    few = ClassReservoir(9, classes=1)
    few.offer(*rows(0, 1), 0, [0], rng())
    with pytest.raises(InputError, match="2 classes were seen, but 1 were announced"):
        few.offer(*rows(1, 1), 0, [1], rng())
    assert few.counts() == {0: 1}


def test_nothing_is_held_yet():
    with pytest.raises(InputError, match="empty"):
        Reservoir(3).kept()
