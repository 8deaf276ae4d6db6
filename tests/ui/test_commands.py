"""Forms become lists of arguments that the command line takes, and nothing else does."""

import pytest
import typer
import yaml

from pluribus import catalogue, recipe
from pluribus.cli import build
from pluribus.core.errors import InputError
from pluribus.ui import commands
from pluribus.ui.forms import FORMS

COMMANDS = typer.main.get_command(build()).commands
VALUES = {"text": "value", "lines": "one\ntwo", "number": "1", "flag": "yes"}


def parsed(words):
    """What the command line makes of them; raises for what it does not take."""
    name, *words = words
    command = COMMANDS[name]
    if words[0] in getattr(command, "commands", {}):
        command, name, words = command.commands[words[0]], words[0], words[1:]
    return command.make_context(name, words)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_form_is_a_command_line(form, tmp_path):
    values = {field.name: field.default or VALUES[field.kind] for field in form.fields}
    context = parsed(commands.arguments(form, values, tmp_path))
    for option, place in form.outputs:
        if option:
            told = context.params[option.removeprefix("--")] if option != "--html" else None
            told = told or context.params.get("html") or context.params.get("page")
            assert str(told) == str(tmp_path / place)
    least = {field.name: values[field.name] for field in form.fields if field.required}
    parsed(commands.arguments(form, least, tmp_path))


def test_worked_by_hand(tmp_path):
    form = commands.form("inspect")
    found = commands.arguments(form, {"base": " b ", "experts": "x\n\n y z \n"}, tmp_path)
    assert found == ["inspect", f"--html={tmp_path}/report.html", "--", "b", "x", "y z"]
    values = {"base": "b", "experts": "x", "density": "0.5"}
    assert "--density=0.5" in commands.arguments(form, values, tmp_path)
    merge = commands.arguments(commands.form("merge"), {"recipe": "r", "dry_run": "yes"}, tmp_path)
    assert merge == ["merge", "--dry-run", "--", "r", f"{tmp_path}/merged"]


@pytest.mark.parametrize("value", ["--help", "-x", "; rm -rf x", "$(id)", "`id`", "a b'\"", "@f"])
def test_values_stay_values(value, tmp_path):
    """They stand behind `--` or inside `--option=`, as one argument each."""
    found = commands.arguments(commands.form("merge"), {"recipe": value}, tmp_path)
    assert found == ["merge", "--", value, f"{tmp_path}/merged"]
    context = COMMANDS["merge"].make_context("merge", found[1:])
    assert str(context.params["recipe"]) == value
    seeds = commands.arguments(commands.form("claims"), {"claim": "x", "seeds": value}, tmp_path)
    assert f"--seeds={value}" in seeds


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("merge", {}, "Recipe (a YAML file): is missing"),
        ("merge", {"recipe": " \n "}, "is missing"),
        ("merge", {"recipe": "a\nb"}, "one line, not 2"),
        ("merge", {"recipe": "x" * 5000}, "at most 4000 characters"),
        ("merge", {"recipe": "a\x00b"}, "cannot be printed"),
        ("inspect", {"base": "b", "experts": "x\n" * 100}, "in 64 lines"),
        ("inspect", {"base": "b", "experts": "x", "density": "much"}, "'much' is no number"),
    ],
)
def test_values_that_are_refused(name, values, said, tmp_path):
    with pytest.raises(InputError) as error:
        commands.arguments(commands.form(name), values, tmp_path)
    assert said in str(error.value)


def test_only_what_is_listed_can_be_started():
    for name in ("serve", "ui", "", "merge; id", "../merge"):
        with pytest.raises(InputError, match="cannot be started from a page"):
            commands.form(name)
    with pytest.raises(InputError, match="Did you mean 'merge'"):
        commands.form("merg")


def test_a_merge_methods_own_form_writes_a_recipe(models, tmp_path):
    """It plans, and a path means what it meant where the server was started."""
    form = commands.method_form(catalogue.card("ties"))
    values = {
        "base": "base.safetensors",
        "experts": "one.safetensors\ntwo.safetensors",
        "parameter:density": "0.5",
        "parameter:lambda": "0.8",
        "parameter:agg": "sum",
        "parameter:normalize": "False",
    }
    place = tmp_path / "run"
    place.mkdir()
    found = commands.prepared(form, values, place, models)
    written = yaml.safe_load((place / "recipe.yml").read_text())
    assert written == {
        "merge_method": "ties",
        "base_model": str(models / "base.safetensors"),
        "models": [{"model": str(models / f"{name}.safetensors")} for name in ("one", "two")],
        "parameters": {"density": 0.5, "lambda": 0.8, "normalize": False, "agg": "sum"},
    }
    assert found == ["merge", "--memory=512MB", "--", f"{place}/recipe.yml", f"{place}/merged"]
    assert recipe.plan(recipe.load(place / "recipe.yml"))


def test_parameters_with_few_values_are_choices(models):
    form = commands.method_form(catalogue.card("ties"))
    fields = {field.label: field for field in form.fields}
    assert fields["agg"].choices == ("mean", "sum", "max")
    assert fields["agg"].hint == "default: mean"
    assert fields["normalize"].choices == ("True", "False")
    assert fields["density"].kind == "text"
    assert fields["density"].hint == "float | one per expert = 1.0"
    values = {"base": "b", "experts": "x", "parameter:agg": "most"}
    with pytest.raises(InputError, match="agg: 'most' is none of mean, sum, max"):
        commands.recipe(form, "ties", values, models)


def test_a_recipe_of_hostile_names_is_only_names(models):
    form = commands.method_form(catalogue.card("ties"))
    name = "x'\": {evil: [1]} # !!python/object:os.system"
    values = {"base": name, "experts": name, "parameter:density": "{"}
    with pytest.raises(InputError, match=r"density: '\{' is no value"):
        commands.recipe(form, "ties", values, models)
    del values["parameter:density"]
    written = yaml.safe_load(commands.recipe(form, "ties", values, models))
    assert written == {"merge_method": "ties", "base_model": name, "models": [{"model": name}]}
