"""The Python of docs/preferences.md runs, in the order of the page."""

import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "recipe"))  # tests are collected without a package
import tiny  # noqa: E402

PAGE = ROOT / "docs" / "preferences.md"


def test_python_runs(tmp_path, monkeypatch, capsys):
    tiny.model(tmp_path / "base")
    tiny.model(tmp_path / "math", seed=1, base=0)
    tiny.model(tmp_path / "code", seed=2, base=0)
    monkeypatch.chdir(tmp_path)
    found = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(found) == 2
    names: dict[str, object] = {}
    for code in found:
        exec(compile(code, str(PAGE), "exec"), names)
    front, again = names["front"], names["again"]
    model = front.model({"maths": 0.7, "code": 0.3})
    assert all(torch.equal(model[name], again[name]) for name in model)
    assert (tmp_path / "mathsy" / "model.safetensors").is_file()
    told = capsys.readouterr().out
    assert "weighted" in told
    assert "never change" in told
    assert names["base"].tasks == ("shoes", "bags")
