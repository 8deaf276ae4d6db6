"""`pluribus hogwild`, its view, and the Python of docs/hogwild.md."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1]))  # tests are collected without a package

from members import tiny, tokenizer  # type: ignore[import-not-found]
from rich.console import Console

from pluribus.cli import main
from pluribus.cli._columns import Columns
from pluribus.decode.hogwild import HogwildResult

PAGE = Path(__file__).parents[3] / "docs" / "hogwild.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    tiny(1, positions=2048).save_pretrained(made)
    tokenizer().save_pretrained(made)
    return made


def run(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    out = capsys.readouterr()
    return stop.value.code, out.out, out.err


def test_workers_write(folder, capsys):
    given = ("hogwild", folder, "a film", "--workers", 3, "--max-steps", 5, "--seed", 2)
    code, out, err = run(capsys, *given)
    assert (code, err) == (0, "")
    assert "**Alice [1]:** Let me propose" in out
    assert "\nanswer: " in out
    assert "5 steps, 15 tokens of 3" in out
    code, out, _ = run(capsys, *given, "--json", "--answer-tokens", 0)
    told = json.loads(out)
    assert (code, told["steps"], told["tokens"], told["answer"]) == (0, 5, 15, None)
    assert set(told["per_worker"]) == {"Alice", "Bob", "Carol"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere", "x"], "nowhere"),
        (["{folder}", " "], "the problem is empty"),
        (["{folder}", "x", "--top-p", "0"], "top_p 0"),
        (["{folder}", "word " * 900], "the model takes 2048"),
    ],
)
def test_bad_input(folder, capsys, args, said):
    code, out, err = run(capsys, "hogwild", *(arg.format(folder=folder) for arg in args))
    assert (code, out) == (1, "")
    assert said in err
    assert "Traceback" not in err


def test_columns():
    console = Console(width=60, height=12, file=io.StringIO(), force_terminal=True)
    with Columns(["Ada", "Ben"], console=console) as view:
        view.add(0, "one two\n" * 20 + "the newest [bold]words[/]")
        view.add(1, "mine")
        console.print(view.picture())
    shown = console.file.getvalue()
    assert "the newest [bold]words[/]" in shown
    assert "Ada" in shown
    assert "mine" in shown
    quiet = Console(width=60, file=io.StringIO(), force_terminal=False)
    with Columns(["Ada"], console=quiet) as view:
        view.add(0, "words")
    assert quiet.file.getvalue() == ""


def test_python_of_the_page_runs():
    [code] = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    names = {"model": tiny(1, positions=2048), "tokenizer": tokenizer()}
    exec(compile(code, str(PAGE), "exec"), names)
    assert isinstance(names["result"], HogwildResult)
    assert names["logits"].shape == (2, 330)
    assert names["one"].n() == 0
