"""The Python of docs/scaling.md runs and says what is so; all strategies are told of."""

import re
from pathlib import Path

from pluribus.decode.scaling import STRATEGIES, VERIFIERS
from pluribus.decode.scaling.strategies import facts

PAGE = Path(__file__).parents[3] / "docs" / "scaling.md"
TEXT = PAGE.read_text("utf-8")


def test_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    [code] = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), names)
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("8 ")
    points = {tuple(line.split()[:2]): line.split()[2] for line in told[1:13]}
    assert points["best", "8"] == "1.0"
    assert len(points) == 12
    assert "round" in told[-1]
    assert names["found"].chosen.finished


def test_every_strategy_and_verifier_is_told_of():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 11
    for name in STRATEGIES:
        [row] = [row for row in rows if f"`{name}`" in row.split("|")[2]]
        needs, steps = (cell.strip() for cell in row.split("|")[3:5])
        known = facts(STRATEGIES[name])
        if name != "tree_of_thoughts":  # which takes one, and works as well without
            wanted = {"required": "yes", "optional": "if you have one", "none": "no"}
            assert needs == wanted[known.verifier], name
        assert (steps == "yes") == known.continues, name
    for name in VERIFIERS:
        assert f"`{name}`" in TEXT
