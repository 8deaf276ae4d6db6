"""The claim `hogwild` at toy size: its lists, and who sees whom."""

import pytest
import torch

pytest.importorskip("transformers")

from pluribus.claims import hogwild
from pluribus.decode.hogwild import Reader


def test_lists_name_every_letter_once_more():
    ids, learned = hogwild.documents(torch.Generator().manual_seed(0), 20)
    assert ids.shape == learned.shape == (20, 27)
    for row, rest in zip(ids.tolist(), learned, strict=True):
        letters = row[1:13]
        assert row[0] == hogwild.START
        assert sorted(set(letters)) == sorted(letters)
        after = [token for token in row[13:] if token != hogwild.SEP]
        assert row[13] == hogwild.SEP
        assert row.count(hogwild.SEP) == 2
        assert sorted(after) == sorted(letters)
        last = len(row) - 1 - row[::-1].index(hogwild.SEP)
        assert rest.nonzero().flatten().tolist() == list(range(last + 1, 27))


def test_figures(monkeypatch):
    monkeypatch.setattr(hogwild, "PROBLEMS", 4)
    monkeypatch.setattr(hogwild, "STEPS", 3)
    model = hogwild.trained(0, steps=3)
    monkeypatch.setattr(hogwild, "trained", lambda seed, on_step: model)
    seen = []

    def noted(reader, given, workers, rng, *, see):
        seen.append((workers, see))
        return [given[0], given[1], given[1], 99] if see else [given[0]]

    with monkeypatch.context() as patch:
        patch.setattr(hogwild, "write", noted)
        out = hogwild.measure(0)
    assert (out["shared"], out["shared_twice"], out["single"]) == (2.0, 1.0, 1.0)
    assert out["independent x 1.15"] == pytest.approx(1.15)
    assert seen == [(2, True)] * 4 + [(2, False)] * 4 + [(1, False)] * 4


def test_workers_apart_are_two_that_write_alone():
    """Without sight, a worker's words are those of one alone with the same draws."""
    reader = Reader(hogwild.trained(0, steps=2))
    given = list(range(12))

    class Greedy:
        def __init__(self, temperature):
            pass

        def draw(self, logits, rng):
            return int(logits.argmax())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pluribus.decode.hogwild.Sampling", Greedy)
        rng = torch.Generator()
        apart = hogwild.write(reader, given, 2, rng, see=False)
        alone = hogwild.write(reader, given, 1, rng, see=False)
        shared = hogwild.write(reader, given, 2, rng, see=True)
    assert apart[0::2] == apart[1::2] == alone
    assert len(shared) == 2 * hogwild.TAKES
