"""The Python of docs/continual.md runs, in the order of the page, and finds what it says."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "continual.md"


def test_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(found) == 2
    names: dict[str, object] = {}
    for code in found:
        exec(compile(code, str(PAGE), "exec"), names)
    learner, again = names["learner"], names["again"]
    assert [alarm.expert for alarm in learner.alarms if alarm.kind != "same"] == [0, 1, 0]
    assert (names["labels"] == names["y"]).float().mean() > 0.8
    assert (names["experts"] == 1).float().mean() > 0.8
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(learner.predict(x), again.predict(x))
    assert "2 kept, 2 of them learned" in capsys.readouterr().out
