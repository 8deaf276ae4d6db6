"""The documentation does what it says: Python runs, recipes plan, commands parse."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "recipe"))  # tests are collected without a package
import tiny  # noqa: E402

from pluribus import Weights, recipe  # noqa: E402
from pluribus.cli import build  # noqa: E402
from pluribus.compress import _recipe  # noqa: E402
from pluribus.route import moe  # noqa: E402
from pluribus.route import recipe as route_recipe  # noqa: E402
from pluribus.route.transfer import _recipe as transfer_recipe  # noqa: E402
from pluribus.tune import TUNERS  # noqa: E402
from pluribus.tune import _recipe as tune_recipe  # noqa: E402

ROUTE_RECIPES = {  # by command
    "build": route_recipe.load,
    "moe": moe.load,
    "transfer": transfer_recipe.load,
}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNNABLE = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{n}.md" for n in ("guide", "routing", "skills", "tuning")),
]
COMMANDS = typer.main.get_command(build()).commands
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(pluribus [^`\n]+)`")


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """The fenced blocks of some languages, each with its line."""
    text = page.read_text("utf-8")
    return [
        (text.count("\n", 0, found.start()) + 1, found[2])
        for found in FENCE.finditer(text)
        if found[1] in languages
    ]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `base`, `math`, `code`, `chat`, the same in `models/`."""
    tiny.model(tmp_path / "base")
    tiny.model(tmp_path / "math", seed=1, base=0)
    tiny.model(tmp_path / "code", seed=2, base=0)
    tiny.model(tmp_path / "chat", seed=3, words=[*tiny.WORDS, "hello"])
    (tmp_path / "models").mkdir()
    for name in ("base", "math", "code", "chat"):
        (tmp_path / "models" / name).symlink_to(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- python ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_python_runs(page, models, capsys):
    found = blocks(page, "python")
    assert found
    names: dict[str, object] = {}
    for line, code in found:  # line numbers in a traceback are the page's
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_the_printed_results_are_true(models, capsys):
    """Comments after `print` in the guide that give a value."""
    names: dict[str, object] = {}
    checked = 0
    for _, code in blocks(ROOT / "docs" / "guide.md", "python"):
        exec(code, names)
        for shown, said in re.findall(r"^print\((.*)\)  # ([WF][^:\n]*)", code, re.MULTILINE):
            assert str(eval(shown, names)) == said
            checked += 1
    assert checked == 2


def test_adding_a_method_as_contributing_says(models, monkeypatch):
    """The file of CONTRIBUTING.md is found by its name, passes its test, and merges models."""
    import pluribus.merge
    from pluribus import Pool, merge
    from pluribus.core.registry import MERGERS

    page = ROOT / "CONTRIBUTING.md"
    method, test = (code for _, code in blocks(page, "python"))
    path, where = re.findall(r"`(src/\S+\.py|tests/\S+\.py)`, (?:named|with)", page.read_text())
    assert (Path(path).parent, where) == (Path("src/pluribus/merge"), "tests/merge/test_median.py")
    (models / "more").mkdir()
    (models / "more" / Path(path).name).write_text(method)
    monkeypatch.setattr(
        pluribus.merge, "__path__", [*pluribus.merge.__path__, str(models / "more")]
    )
    try:
        assert "median" in MERGERS
        names: dict[str, object] = {}
        exec(compile(test, str(page), "exec"), names)
        runs = [value for name, value in names.items() if name.startswith("test_")]
        assert runs
        for run in runs:
            run()
        merged = merge(Pool("base", ["math", "code", "base"]), "median")
        stack = torch.stack([Weights.open(m)["lm_head.weight"] for m in ("math", "code", "base")])
        torch.testing.assert_close(merged["lm_head.weight"], stack.median(0).values)
    finally:
        sys.modules.pop("pluribus.merge.median", None)
        vars(pluribus.merge).pop("median", None)


# -- recipes ---------------------------------------------------------------------------------------


def recipes() -> list[object]:
    return [
        pytest.param(code, id=f"{page.name}:{line}")
        for page in PAGES
        for line, code in blocks(page, "yaml")
    ]


@pytest.mark.parametrize("text", recipes())
def test_recipes_plan(text, models):
    if text.startswith("method:"):
        (models / "bank.yml").write_text(text)
        assert _recipe.load(Path("bank.yml")).experts
        return
    if text.startswith("tune_method:"):
        told = yaml.safe_load(text)
        assert TUNERS.build(told["tune_method"], tune_recipe.of(told).parameters)
        return
    if text.startswith("parts:"):
        assert route_recipe.of(yaml.safe_load(text)).models
        return
    planned = recipe.plan(recipe.load(text, folder=models))
    assert planned[-1].plan.jobs
    assert not [note for each in planned for note in each.warnings if "unknown" in note]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "recipes").glob("*.yml")), ids=lambda path: path.name
)
def test_example_recipes_are_read(path):
    if path.name != "bank.yml":
        assert recipe.load(path)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "tune").glob("*.yml")), ids=lambda path: path.name
)
def test_example_tunings_are_read(path):
    told = tune_recipe.load(path)
    assert TUNERS.build(told.tune_method, told.parameters)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "route").glob("*.yml")), ids=lambda path: path.name
)
def test_example_composites_are_read(path):
    """Each under the command that its first line names."""
    for command, load in ROUTE_RECIPES.items():
        if f"pluribus route {command} " in path.read_text("utf-8"):
            assert load(path)
            return
    pytest.fail(f"{path.name} names no command")


# -- commands --------------------------------------------------------------------------------------


def lines() -> list[object]:
    """Every command line in the documentation: in fenced and indented blocks, and in the text."""
    found = {}
    for page in [*PAGES, *sorted((ROOT / "examples").rglob("*.yml"))]:
        text = page.read_text("utf-8")
        text = text.replace("\\\n", " ")  # one command over several lines
        for line in [line for _, code in blocks(page, "", "sh") for line in code.splitlines()]:
            if line.startswith("pluribus "):
                found[line] = page.name
        for line in re.findall(r"^(?:    |# ).*?(pluribus [a-z-]+ .*)$", text, re.MULTILINE):
            found[line] = page.name
        for line in INLINE.findall(text):
            found[line] = page.name
    return [pytest.param(line, id=f"{page}: {line}") for line, page in found.items()]


@pytest.mark.parametrize("line", lines())
def test_commands_parse(line):
    name, *words = shlex.split(line, comments=True)[1:]
    if name == "--debug":
        name, *words = words
    if name in ("--help", "--version", "COMMAND"):
        return
    assert name in COMMANDS, f"there is no command {name}"
    command = COMMANDS[name]
    if words and words[0] in getattr(command, "commands", {}):
        command, name, words = command.commands[words[0]], words[0], words[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    known |= {option for parameter in command.params for option in parameter.secondary_opts}
    assert {word for word in words if word.startswith("--")} <= known | {"--help"}
    if words and not {"--help", "..."} & set(words):  # alone, a command is only spoken of
        command.make_context(name, words)
