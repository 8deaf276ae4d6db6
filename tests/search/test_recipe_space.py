"""Spaces of merge recipes: the tags, the objectives, scales by one merge, and the best recipe."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from pluribus import Weights
from pluribus import recipe as recipes
from pluribus.core.errors import InputError, MissingError, RecipeError
from pluribus.report import save
from pluribus.search import plot, recipe_space, run, tags
from pluribus.search.objective import ZooObjective, objective_of
from pluribus.search.scales import Scales, only_scales
from pluribus.tasks import zoo as zoos

TASKS = ("identity", "rot90", "inverted")
SMALL = {"width": 32, "depth": 1, "epochs": 6, "train": 256, "val": 80, "test": 40, "threads": 1}
HEAD = "objective: {zoo: demo8}\nbase_model: base\n"
MODELS = "models: [{model: identity}, {model: rot90}]\n"


@pytest.fixture(autouse=True)
def small_zoo(monkeypatch, tmp_path_factory):
    """The zoo demo8 at a size that takes a second."""
    monkeypatch.setenv("PLURIBUS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    made = zoos.build("demo8", 0, **SMALL)
    monkeypatch.setattr("pluribus.search.objective._zoos", {("demo8", 0): made})
    return made


def read(text):
    return recipe_space.of(tags.read(text))


# -- tags ------------------------------------------------------------------------------------------


def test_tags_by_hand():
    made = read(
        HEAD
        + """
models: !manyof {k: 2, of: [{model: identity}, {model: rot90}, {model: inverted}]}
<<: !oneof
  - {merge_method: task_arithmetic}
  - merge_method: ties
    parameters: {density: !float [0.1, 1], lambda: 3}
parameters: {lambda: !oneof [0.5, 1.0]}
"""
    )
    assert made.space.decisions == {
        "models[0]": "one of 3: {model='identity'}, {model='rot90'}, {model='inverted'}",
        "models[1]": "one of 3: {model='identity'}, {model='rot90'}, {model='inverted'}",
        "parameters.lambda": "one of 2: 0.5, 1.0",
        "<<": made.space.decisions["<<"],
        "<<[=1/2].parameters.density": "float [0.1, 1]",
    }
    import pyglove as pg

    dna = pg.DNA([[0, 2], 1, (1, 0.25)])
    assert made.recipe(made.space.decode(dna)).plain() == {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "identity"}, {"model": "inverted"}],
        # What the recipe itself sets goes before what the chosen part sets.
        "parameters": {"density": 0.25, "lambda": 1.0},
    }


def test_float_forms_and_permutations():
    value = tags.read(
        "a: !float {low: 1.0e-4, high: 1, scale: log}\nb: !permutate [1, 2]\nc: !float [0, 2]"
    )
    assert (value["a"].min_value, value["a"].max_value, value["a"].scale) == (1e-4, 1.0, "log")
    assert value["b"].num_choices == 2
    assert value["c"].max_value == 2.0


def test_plain_yaml_merges_as_ever():
    text = "x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}"
    assert tags.read(text) == {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}}


def test_parts_may_hold_parts():
    value = {"<<": {"m": 1, "<<": {"m": 0, "p": {"a": 1, "b": 1}}}, "p": {"b": 2}}
    assert tags.settled(value) == {"m": 1, "p": {"a": 1, "b": 2}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "a: 1\nb: !float [1]",
            r"space:2: !float takes two numbers, the lower one first, not \[1\]",
        ),
        ("a: !float [2, 1]", "space:1: !float takes two numbers, the lower"),
        ("a: !float [true, 1]", "two numbers"),
        ("a: !float 3", "!float takes two numbers"),
        ("a: !float {low: 0, high: 1, scale: log}", "log or rlog over numbers above 0"),
        ("a: !float {lo: 0, high: 1}", "unknown key 'lo' of !float.*Did you mean 'low'"),
        ("a: !oneof 3", "!oneof takes a list of values"),
        ("a: !oneof []", "!oneof takes a list of values"),
        ("a: !manyof [1, 2]", "!manyof takes k and of"),
        ("a: !manyof {k: 3, of: [1, 2]}", "cannot take 3 different ones of 2"),
        ("a: !manyof {k: x, of: [1, 2]}", "takes a number k"),
        ("a: !onof [1]", "unknown tag '!onof'.*Did you mean '!oneof'"),
        ("a: !!python/name:os.system ''", "unknown tag"),
        ("a: 1\na: 2", "space:2: 'a' is given twice"),
        ("a: [1", "not valid YAML"),
        ("", "there is nothing in it"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
    ],
)
def test_mistakes_name_their_line(text, told):
    with pytest.raises(RecipeError, match=told):
        tags.read(text)


# -- refused before a trial ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("merge_method: !oneof [linear, tise]\n" + MODELS, "with merge_method = 'tise'.*'ties'"),
        (
            "merge_method: ties\nparameters: {density: !float [0, 1]}\n" + MODELS,
            "at the first point of the space the merge can't run.*density = 0",
        ),
        (
            "merge_method: !oneof [ties, linear]\nparameters: {density: 0.5}\n" + MODELS,
            "with merge_method = 'linear'.*no parameter 'density'.*go together: <<: !oneof",
        ),
        (
            "merge_method: linear\nmodels: !manyof {k: 1, of: [{model: identity}, {model: rot9}]}",
            r"with models = \{model='rot9'\}.*no model 'rot9'.*'rot90'",
        ),
        ("merge_method: linear\nmodles: []\n" + MODELS, "unknown key 'modles'"),
    ],
)
def test_recipes_that_could_not_run(text, told):
    with pytest.raises(RecipeError, match=told):
        read(HEAD + text)


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ({}, "needs zoo or tasks; neither is given"),
        ({"zoo": "demo8", "tasks": ["sst2"]}, "both are given"),
        ({"zoo": "demo8", "sead": 1}, "unknown key 'sead'.*Did you mean 'seed'"),
        ({"zoo": "demo8", "seed": -1}, "seed is -1; give 0 or more"),
        ({"zoo": "demo8", "limit": "x"}, "limit is a whole number, not 'x'"),
        ({"zoo": "demo8", "minimise": "sise"}, "'sise' can't be minimised"),
        ("demo8", "objective is a mapping"),
    ],
)
def test_objectives_that_say_nothing(objective, told):
    with pytest.raises(RecipeError, match=told):
        objective_of(objective)


def test_what_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"no task is called 'sst3'.*sst2"):
        objective_of({"tasks": "sst3"})
    with pytest.raises(InputError, match="tasks is empty"):
        objective_of({"tasks": []})
    with pytest.raises(InputError, match=r"no zoo is called 'demo9'.*demo8"):
        recipe_space.of({"objective": {"zoo": "demo9"}, "merge_method": "linear", "models": []})
    with pytest.raises(RecipeError, match="nothing says how a merge is scored"):
        recipe_space.of({"merge_method": "linear"})
    (tmp_path / "space.yml").write_text("a: 1")
    with pytest.raises(MissingError, match=r"spcae\.yml: no such file\. Did you mean 'space\.yml'"):
        recipe_space.load(tmp_path / "spcae.yml")


# -- scores ----------------------------------------------------------------------------------------


def test_the_score_is_the_zoo_s_own(small_zoo):
    """Against a merge written out: base + 0.4 * sum of two updates."""
    made = read(
        HEAD + MODELS + "merge_method: task_arithmetic\nparameters: {lambda: !oneof [0.4, 1.0]}"
    )
    study = run(made.space, made.evaluate, "sweep")
    base, experts = small_zoo.base, small_zoo.experts
    state = {
        name: base[name]
        + 0.4 * ((experts["identity"][name] - base[name]) + (experts["rot90"][name] - base[name]))
        for name in base
    }
    expected = small_zoo.normalised(state, "val")
    trial = study.trials[0]
    assert trial.scores["score"] == pytest.approx(100 * sum(expected.values()) / 8)
    assert trial.metrics["inverted"] == pytest.approx(100 * expected["inverted"])
    assert trial.metrics["experts"] == 2
    assert trial.metrics["bytes"] == sum(t.numel() * 4 for t in base.values())
    assert trial.report["recipe"]["parameters"] == {"lambda": 0.4}


def test_fewer_experts_can_be_asked_for():
    text = """
objective: {zoo: demo8, minimise: experts}
base_model: base
merge_method: task_arithmetic
models: !oneof
  - !manyof {k: 1, of: &all [{model: identity}, {model: rot90}]}
  - !manyof {k: 2, of: *all}
parameters: {lambda: !float [0.1, 1.0]}
"""
    made = read(text)
    study = run(made.space, made.evaluate, "nsga2", 6, list(made.objective.minimise))
    assert {trial.scores["experts"] for trial in study.trials} <= {1.0, 2.0}
    assert [o.name for o in study.objectives] == ["score", "experts"]


# -- scales ----------------------------------------------------------------------------------------


WEIGHTED = """
merge_method: task_arithmetic
models:
  - {model: identity, parameters: {weight: !float [0, 1]}}
  - {model: rot90, parameters: {weight: !float [0, 1]}}
"""


@pytest.mark.parametrize(
    ("text", "scales"),
    [
        (WEIGHTED, True),
        (WEIGHTED + "parameters: {lambda: !float [0.1, 1]}", True),
        (MODELS + "merge_method: ties\nparameters: {lambda: !float [0.1, 1]}", True),
        (MODELS + "merge_method: ties\nparameters: {density: !float [0.1, 1]}", False),
        (MODELS + "merge_method: linear\nparameters: {normalize: !oneof [true, false]}", False),
        (WEIGHTED + "dtype: bfloat16", False),
        (WEIGHTED + "parameters: {normalize: true}", False),
        (WEIGHTED.replace("task_arithmetic", "ties"), False),
        (MODELS + "merge_method: dare_linear\nparameters: {lambda: !float [0.1, 1]}", False),
        (
            MODELS + "merge_method: dare_linear\nseed: 1\nparameters: {lambda: !float [0.1, 1]}",
            True,
        ),
    ],
)
def test_which_spaces_hold_scales_alone(text, scales):
    assert read(HEAD + text).scales is scales


@pytest.mark.parametrize(
    "text",
    [
        WEIGHTED + "parameters: {lambda: !float [0.1, 1]}",
        MODELS + "merge_method: ties\nparameters: {density: 0.3, lambda: !float [0.1, 2]}",
    ],
    ids=["weights", "lambda"],
)
def test_scaling_an_update_is_merging_anew(text):
    """Every point against the engine's own merge; the merges are counted."""
    made = read(HEAD + text)
    objective = ZooObjective(zoo="demo8")
    scales = Scales(objective)
    generator = run(made.space, lambda point: 0.0, "random", 6)
    for trial in generator.trials:
        recipe = made.recipe(generator.value(trial))
        state, expected = scales.state(recipe), objective.state(recipe)
        assert list(state) == list(expected)
        for name in expected:
            torch.testing.assert_close(state[name], expected[name], rtol=1e-5, atol=1e-6)
    experts = 2 if text.startswith(WEIGHTED) else 1
    assert scales.merges == experts + 1  # the updates, and one to check with


def test_a_search_of_scales_merges_once(monkeypatch):
    counted = []

    class Counted(Scales):
        def state(self, recipe):
            counted.append(self)
            return super().state(recipe)

    monkeypatch.setattr("pluribus.search.scales.Scales", Counted)
    made = read(HEAD + MODELS + "merge_method: ties\nparameters: {lambda: !float [0.1, 2]}")
    run(made.space, made.evaluate, "random", 5)
    assert len(counted) == 5
    assert len(set(map(id, counted))) == 1
    assert counted[0].merges == 2


def test_scales_need_a_base():
    recipe = recipes.Recipe.of({"merge_method": "linear", "models": [{"model": "a"}]})
    assert not only_scales({"parameters.lambda": ""}, recipe)


# -- the best recipe -------------------------------------------------------------------------------


def test_the_best_recipe_merges_to_the_weights_that_were_scored(tmp_path, small_zoo):
    made = read(HEAD + MODELS + "merge_method: ties\nparameters: {density: !float [0.1, 1]}")
    study = run(made.space, made.evaluate, "random", 3)
    path = recipe_space.save_best(made, study, tmp_path / "best.yml")
    text = path.read_text()
    assert text.startswith("# pluribus merge best.yml merged/\n# Trial ")
    assert sorted(p.name for p in (tmp_path / "best.models").iterdir()) == [
        *("base.safetensors", "identity.safetensors", "rot90.safetensors")
    ]
    result = recipes.run(recipes.load(path), tmp_path / "merged")
    merged = Weights.open(tmp_path / "merged")
    by_task = small_zoo.normalised({name: merged[name] for name in merged}, "val")
    assert 100 * sum(by_task.values()) / 8 == pytest.approx(study.best.scores["score"], abs=1e-9)
    assert result.out == tmp_path / "merged"


def test_references_are_rewritten_for_the_new_place(tmp_path):
    for name in ("base", "one"):
        Weights.of({"w": torch.ones(3)}).save(_made(tmp_path / "models") / f"{name}.safetensors")
    space = {
        "merge_method": "task_arithmetic",
        "base_model": "models/base.safetensors",
        "models": [{"model": "models/one.safetensors"}],
        "parameters": {"lambda": tags.read("!float [0.1, 1]")},
    }

    class Length(ZooObjective):
        """Scores the scale itself; its models are files."""

        def plan(self, recipe):
            recipes.plan(recipe)

        def save_models(self, recipe, folder):
            return {}

    from pluribus.search import space as space_of

    made = recipe_space.RecipeSpace(space_of(space), Length(zoo="demo8"), tmp_path, "space.yml")
    made.check()
    study = run(made.space, lambda value: value["parameters"]["lambda"], "random", 3)
    out = _made(tmp_path / "deep" / "er") / "best.yml"
    recipe_space.save_best(made, study, out)
    plain = yaml.safe_load(out.read_text())
    assert plain["base_model"] == "../../models/base.safetensors"
    assert plain["models"] == [{"model": "../../models/one.safetensors"}]
    assert plain["parameters"]["lambda"] == study.best.scores["score"]
    recipes.run(recipes.load(out), tmp_path / "merged.safetensors")


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# -- for people ------------------------------------------------------------------------------------


def test_table_and_page(tmp_path):
    text = """
objective: {zoo: demo8, minimise: experts}
base_model: base
models: !oneof
  - !manyof {k: 1, of: &all [{model: identity}, {model: rot90}]}
  - !manyof {k: 2, of: *all}
<<: !oneof
  - {merge_method: task_arithmetic}
  - {merge_method: ties, parameters: {density: !float [0.1, 1]}}
parameters: {lambda: !float [0.1, 1.0]}
"""
    made = read(text)
    scores = iter([0.5, float("nan"), 0.75, 0.25])
    study = run(
        made.space,
        lambda value: {"score": next(scores), "experts": len(value["models"])},
        "random",
        4,
        cost="experts",
    )
    lines = plot.best_table(study, 2).splitlines()
    assert lines[0].split() == ["trial", "score", "experts", "seconds", "choices"]
    assert [line.split()[0] for line in lines[1:]] == ["2", "0"]
    assert "lambda" in lines[1]
    assert plot.against(study) == "experts"
    page = plot.best_page(study, "Search", "by hand")
    save(tmp_path / "page.html", page)
    for told in ("Score against cost", "score against experts", "1 trials failed", "best so far"):
        assert told in page
    json.dumps(study.to_dict()["space"])


def test_chosen_on_one_line():
    import pyglove as pg

    from pluribus.search import Study, Trial, floatv, oneof, space

    made = space(
        {
            "<<": oneof([{"merge_method": "ties", "parameters": {"density": floatv(0.0, 1.0)}}]),
            "models": [{"model": "a", "parameters": {"weight": floatv(0.0, 1.0)}}],
        }
    )
    trial = Trial(0, pg.DNA([(0, 0.25), 0.125]), 0)
    study = Study(made, (), "random", 0, (trial,))
    assert plot.chosen(study, trial) == "ties, density 0.25, [0].weight 0.125"
    assert plot.chosen(study, trial, 10) == "ties, dens…"[:9] + "…"


EXAMPLES = Path(__file__).parents[2] / "examples" / "search"


@pytest.mark.parametrize("name", ["demo8", "weights", "front"])
def test_examples_are_read_and_can_run(name):
    made = recipe_space.load(EXAMPLES / f"{name}.yml")
    assert len(made.space.decisions) >= 2
