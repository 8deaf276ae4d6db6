"""The Python of docs/fused.md runs in its order, and its stack is one."""

import re
from pathlib import Path

import torch

from pluribus.decode.stack import read

PAGE = Path(__file__).parents[2] / "docs" / "fused.md"
TEXT = PAGE.read_text("utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    torch.manual_seed(0)
    [code] = blocks("python")
    exec(compile(code, str(PAGE), "exec"), names)
    prompt, drafted = names["prompt"], names["drafted"]
    plain = names["up"].generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(drafted.sequences, plain)
    assert torch.equal(names["again"](prompt).logits, names["fused"](prompt).logits)
    assert "<svg" in names["chart"]
    assert names["score"].log_probs.shape == (3,)


def test_the_stack_is_read(tmp_path):
    [text] = blocks("yml")
    (tmp_path / "stack.yml").write_text(text)
    assert list(read(tmp_path / "stack.yml").models) == ["large", "base", "expert"]


def test_every_fuser_is_told_of():
    from pluribus.decode import FUSERS

    for name in FUSERS:
        assert f"`{name}`" in TEXT
