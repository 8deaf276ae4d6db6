"""The Python of docs/thinking.md runs and says what is so; all suites are told of."""

import re
from pathlib import Path

from pluribus.tasks.suites import SUITES, facts

PAGE = Path(__file__).parents[3] / "docs" / "thinking.md"
TEXT = PAGE.read_text("utf-8")


def test_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    [code] = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), names)
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("cot ")
    assert int(told[0].split()[1]) <= 40
    assert told[2].startswith("aggregate")
    assert "near aggregate" in told[-3]
    assert told[-2] == "True"
    assert told[-1] == "[2, 2, 2, 2, 2, 2] 8.0"  # 16 passes, which is never, against 2
    assert (tmp_path / "policy.json").is_file()


def test_every_suite_is_told_of():
    rows = [line for line in TEXT.splitlines() if line.startswith("| `")]
    assert len(rows) == len(SUITES)
    for name in SUITES:
        [row] = [row for row in rows if row.startswith(f"| `{name}`")]
        hurts = row.split("|")[3].strip()
        assert hurts == {"hurts people": "yes", "control": "control"}[facts(name).kind]
