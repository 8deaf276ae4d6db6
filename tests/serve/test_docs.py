"""The page's file is read, its Python runs against a server, and its tables name what there is."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from server_help import tiny, tokenizer  # type: ignore[import-not-found]
from serving import background  # type: ignore[import-not-found]

from pluribus.serve import Limits, Served, read
from pluribus.serve.chat import HELP
from pluribus.serve.protocol import HARMLESS, Chat, Completion
from pluribus.serve.recipes import Hogwild, Scale

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "serve.md"
TEXT = PAGE.read_text("utf-8")


def block(language):
    [found] = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return found


def test_the_file_is_read(tmp_path):
    (tmp_path / "server.yml").write_text(block("yml"))
    page = read(tmp_path / "server.yml")
    example = read(ROOT / "examples" / "serve" / "stack.yml")
    names = ["merged", "quick", "fused", "far", "together", "voted", "best"]
    assert list(page.models) == list(example.models) == names
    assert page.limits == example.limits


def test_python_runs(monkeypatch, capsys):
    monkeypatch.setenv("PLURIBUS_KEY", "k")
    members = {name: Served(name, tiny(3), tokenizer()) for name in ("merged", "fused")}
    with background(members, keys=("k",)) as url:
        code = block("python").replace("http://127.0.0.1:8000/v1", url)
        names: dict = {}
        exec(compile(code, str(PAGE), "exec"), names)
        names["client"].close()
    assert names["answer"].choices[0].message.content in capsys.readouterr().out


def test_tables_and_commands():
    for name in Limits.model_fields:
        assert f"`{name}`" in TEXT
    for name in ("n", "temperature", "top_p", "seed", "stop", "stream", "logprobs", "ignore_eos"):
        assert f"`{name}`" in TEXT
        assert name in Chat.model_fields or name in Completion.model_fields
    assert HARMLESS
    for field in {*Hogwild.model_fields, *Scale.model_fields}:
        assert f"`{field}`" in TEXT
    for name in HELP:
        assert name.split()[0] in TEXT or name.startswith("/help")
    told = re.search(r"`max_choices`.*?\| (\d+) \|", TEXT)
    assert told
    assert int(told[1]) == Limits().max_choices
