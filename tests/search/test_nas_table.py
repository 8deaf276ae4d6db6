"""The table of 729 cells: complete, in order, and what training a cell gives."""

import importlib.util
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pluribus import search
from pluribus.claims import _cells, _child, pyglove
from pluribus.claims._cells import Table, row, space
from pluribus.search.supernet import supernet

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("nas_table", ROOT / "benchmarks/nas_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table():
    return _cells.table()


@pytest.fixture(scope="module")
def points():
    return list(space().spec.iter_dna())


def test_rows_are_the_points_in_the_order_of_the_space(points):
    assert [row(dna) for dna in points] == list(range(729))
    assert points[int("012210", 3)].to_numbers() == [0, 1, 2, 2, 1, 0]
    found = space().decode(points[int("012210", 3)])
    assert found == {
        "ops": [_cells.Conv3, _cells.Conv1, _cells.Pool3],
        "wires": [_cells.Both, _cells.Second],
        "end": _cells.Plain,
    }


def test_table_is_whole(table):
    assert isinstance(table, Table)
    for column in table[:5]:
        assert column.shape == (729,)
        assert (column > 0).all()
    assert table.made_with["train_images"] == 5000
    assert table.val.min() > 0.1  # better than chance
    assert 0.7 < table.val.max() < 0.9
    assert np.corrcoef(table.val, table.test)[0, 1] > 0.8
    size = (ROOT / "src/pluribus/claims/data" / _cells.TABLE).stat().st_size
    assert size < 30_000


def test_parameters_and_flops_by_hand(table, points):
    """Conv3 has 9 c^2 weights, Conv1 c^2, each with 2c of batch norm; two operations a weight."""
    around = 9 * 8 + 16 + 8 * 16 + 32 + 16 * 10 + 10
    fixed = 2 * (9 * 8 * 49 + 8 * 16 * 16 + 160)  # stem on 7x7, reduction on 4x4, head
    for dna in points[::7]:
        weights = [{0: 9, 1: 1, 2: 0}[choice] for choice in dna.to_numbers()[:3]]
        norms = sum(2 * (8 + 16) for w in weights if w)
        expected = around + norms + sum(w * (64 + 256) for w in weights)
        assert table.parameters[row(dna)] == expected
        flops = sum(2 * w * (64 * 49 + 256 * 16) for w in weights)
        assert table.flops[row(dna)] == fixed + flops


def test_a_network_of_all_cells_holds_each_of_them():
    net = supernet(space(), _cells.build, torch.randn(2, 1, 14, 14))
    assert len(net.decisions) == 6
    assert all(decision.count == 3 for decision in net.decisions.values())


@pytest.mark.slow
@pytest.mark.skipif("PLURIBUS_DATA" not in os.environ, reason="PLURIBUS_DATA is not set")
@pytest.mark.parametrize("number", [0, 364, 728])
def test_training_a_cell_again_gives_its_row(script, table, points, number):
    """To the bit on one machine; elsewhere sums go in another order."""
    torch.set_num_threads(1)
    dna = points[number]
    told = script.measure(dna, space(), _cells.training(), _cells.fashion()["test"])
    assert told["parameters"] == table.parameters[number]
    assert told["flops"] == table.flops[number]
    assert abs(told["val_right"] / 5000 - table.val[number]) < 0.03


# -- the script ------------------------------------------------------------------------------------


def test_script_goes_on_after_a_half_written_line(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "measure", lambda dna, *rest: {"row": row(dna)})
    small = search.space({name: search.oneof([1, 2, 3]) for name in "abc"})
    monkeypatch.setattr(script._cells, "space", lambda: small)
    monkeypatch.setattr(script._cells, "training", lambda: None)
    monkeypatch.setattr(script._cells, "fashion", lambda: {"test": None})
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"row": 0}\n{"row": 3}\n{"row": 5, "val_ri')
    assert script.fill(path, 0.0, 0, 3) == 7  # no time: 9 of this part, 0 and 3 are there
    assert path.read_text() == '{"row": 0}\n{"row": 3}\n'
    assert script.fill(path, math.inf, 0, 3) == 0
    rows = [json.loads(line)["row"] for line in path.read_text().splitlines()]
    assert rows[:3] == [0, 3, 6]
    assert sorted(rows) == list(range(0, 27, 3))
    with pytest.raises(SystemExit, match="9 of 729 cells"):
        script.pack([path], tmp_path / "table.npz")


# -- the claim's own arithmetic --------------------------------------------------------------------


def test_sign_test_by_hand():
    assert pyglove.sign_test(4, 1) == pytest.approx((5 + 1) / 32)
    assert pyglove.sign_test(0, 3) == 1.0
    assert pyglove.sign_test(63, 37) == pytest.approx(0.0060, abs=1e-4)


def test_lines_are_counted_in_the_source():
    assert 0 < _child.changed() <= 10
