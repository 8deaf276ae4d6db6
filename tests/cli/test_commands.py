"""What every command owes: help with an example, JSON, quiet progress, exit codes."""

import re
import shlex

import pytest
import typer

from pluribus.cli import build


def leaves(group, before: str = "") -> dict:
    """Return all commands by what is typed: `merge`, `route build`."""
    found = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= leaves(command, f"{before}{name} ")
        else:
            found[f"{before}{name}"] = command
    return found


COMMANDS = leaves(typer.main.get_command(build()))
SILENT = {  # done at once: there is no progress to silence
    "methods",
    "digest",
    "circuits tasks",
    "circuits overlap",
}


def example(name: str) -> list[str]:
    """Return the words of the first example in a command's help."""
    found = re.search(r"Example: pluribus (.*)", COMMANDS[name].help.replace("\n    ", " "))
    assert found, f"{name} --help shows no example"
    return shlex.split(found[1].split(";")[0])


def options(name: str) -> set[str]:
    return {word for param in COMMANDS[name].params for word in param.opts}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_that_parses(name, cli):
    got = cli(*name.split(), "--help")
    assert got.code == 0
    assert got.err == ""
    assert f"Example: pluribus {name}" in got.out
    typed = example(name)
    own, words = typed[: len(name.split())], typed[len(name.split()) :]
    assert " ".join(own) == name
    COMMANDS[name].make_context(name, words)  # raises for an option or argument there is none of


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_quiet(name):
    assert "--json" in options(name)
    assert "--quiet" in options(name) or name in SILENT


def test_all_commands_are_listed(cli):
    got = cli("--help")
    assert got.code == 0
    for name in {one.split()[0] for one in COMMANDS}:
        assert re.search(rf"^  {name} ", got.out, re.MULTILINE)


def test_version(cli):
    from pluribus import __version__

    assert cli("--version") == (0, f"pluribus {__version__}\n", "")


def test_no_command_shows_the_help_and_fails(cli):
    got = cli()
    assert got.code == 2
    assert got.out == ""
    assert got.err.startswith("Usage: pluribus")


@pytest.mark.parametrize(
    ("words", "said", "where"),
    [
        ("merge", "missing argument 'recipe'", "merge"),
        ("merge ties.yml out --overwrit", "no such option: --overwrit", "merge"),
        ("merge ties.yml out --threads 0", "invalid value for '--threads': ", "merge"),
        ("merge ties.yml out --threads two", "invalid value for '--threads': ", "merge"),
        ("merge ties.yml out more", "unexpected extra argument", "merge"),
        ("merge ties.yml --memory", "'--memory' requires an argument", ""),
        ("merg ties.yml out", "no such command 'merg'", ""),
        ("inspect", "missing argument 'models", "inspect"),
        ("demo --seed -3", "invalid value for '--seed': ", "demo"),
        ("--nonsense", "no such option: --nonsense", ""),
    ],
)
def test_bad_usage_is_one_line_and_code_2(refused, words, said, where):
    """The wording is typer's, and differs a little between its releases."""
    got = refused(*words.split(), code=2)
    assert said in got.lower()
    assert got.endswith((f"Try: pluribus {where} --help".replace("  ", " "), "pluribus --help"))


@pytest.mark.parametrize(
    "words",
    [
        "merge ties.yml out",
        "merge ties.yml --dry-run",
        "inspect base math code",
        "compress bank.yml bank",
        "methods",
        "methods sign",
        "methods show ties",
    ],
)
def test_json_is_one_document_and_all_of_stdout(cli, place, words):
    got = cli(*words.split(), "--json")
    assert got.code == 0, got
    assert got.json
    assert got.err == ""


@pytest.mark.parametrize(
    ("words", "title"),
    [
        ("merge ties.yml out", "merging into out"),
        ("verify out", "verifying out"),
        ("inspect base math", "inspecting"),
        ("compress bank.yml bank", "merging the shared part of bank"),
        ("expand bank math math.safetensors", "writing math.safetensors"),
    ],
)
def test_progress_goes_to_stderr_and_can_be_silenced(cli, place, words, title):
    for first in ("merge ties.yml out", "compress bank.yml bank"):
        if words.startswith(("verify", "expand")):
            assert cli(*first.split()).code == 0
    got = cli(*words.split(), "--overwrite" if "expand" in words else "--json", terminal=True)
    assert got.code == 0, got
    assert title in got.err
    assert title not in got.out
    assert title in cli(*words.split(), terminal=True).err
    assert title not in cli(*words.split(), "--quiet", terminal=True).err


def test_without_a_terminal_there_is_no_progress(cli, place):
    assert cli("merge", "ties.yml", "out").err == ""


def test_debug_shows_the_traceback(cli, place, monkeypatch):
    from pluribus.core.errors import MissingError

    monkeypatch.setenv("PLURIBUS_DEBUG", "")
    with pytest.raises(MissingError):
        cli("--debug", "merge", "nope.yml", "out")


def test_a_bug_is_called_one(cli, place, monkeypatch):
    monkeypatch.setattr("pluribus.recipe.load", lambda *_, **__: 1 / 0)
    got = cli("merge", "ties.yml", "out")
    assert got.code == 70
    assert got.err.count("\n") == 1
    assert "internal error: ZeroDivisionError" in got.err
    assert "--debug" in got.err


def test_memory_that_runs_out_is_no_bug(cli, place, monkeypatch):
    def load(*_, **__):
        raise MemoryError

    monkeypatch.setattr("pluribus.recipe.load", load)
    got = cli("merge", "ties.yml", "out")
    assert got.code == 1
    assert "smaller --memory" in got.err


def test_warnings_of_the_library_are_one_line_each(cli, place, monkeypatch):
    import warnings

    def load(*_, **__):
        warnings.warn("two\nlines", stacklevel=1)
        raise ValueError

    monkeypatch.setattr("pluribus.recipe.load", load)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        got = cli("merge", "ties.yml", "out")
    assert got.err.startswith("warning: two lines\npluribus: internal error")
