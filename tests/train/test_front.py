"""Models for preferences out of checkpoints, and the recipes that replay them."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from pluribus import recipe as recipes
from pluribus.core.dtypes import dtype, narrow
from pluribus.core.errors import InputError, MissingError, RecipeError
from pluribus.core.merger import facts
from pluribus.core.pool import Pool
from pluribus.core.refs import ModelRef
from pluribus.core.registry import MERGERS
from pluribus.core.source import ArraySource, TensorSpec
from pluribus.core.weights import Weights
from pluribus.train.continual import CheckpointFront, prefer, sweep
from pluribus.train.continual.front import _methods, _written
from pluribus.train.continual.preference import read, shares

SHAPES = {"model.embed.weight": (11, 8), "model.layers.0.up.weight": (12, 8), "model.norm": (8,)}
NAMES = ("maths", "code", "chat")


def save(path, seed, kind, count=3):
    rng, about = np.random.default_rng(seed), dtype(kind)
    start = np.random.default_rng(0)
    sources = {}
    for name, shape in SHAPES.items():
        values = start.standard_normal(shape, np.float32)
        values = values + np.float32(0.1 * bool(seed)) * rng.standard_normal(shape, np.float32)
        sources[name] = ArraySource(narrow(values, about), TensorSpec(about.name, shape))
    path.mkdir(parents=True, exist_ok=True)
    Weights(sources).save(path / "model.safetensors")


@pytest.fixture
def models(tmp_path):
    """Folders `base`, `maths`, `code` (bfloat16) and `chat` (float32)."""
    save(tmp_path / "base", 0, "bfloat16")
    for seed, name in enumerate(NAMES, 1):
        save(tmp_path / name, seed, "float32" if name == "chat" else "bfloat16")
    return tmp_path


@pytest.fixture
def front(models):
    return CheckpointFront.open(models / "base", {name: models / name for name in NAMES})


def equal(one, other):
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


def state(tensors):
    return {name: torch.tensor(values) for name, values in tensors.items()}


# -- models ----------------------------------------------------------------------------------------


def test_worked_by_hand():
    pool = Pool(
        state({"w": [1.0, 2.0]}), {"a": state({"w": [3, 2.0]}), "b": state({"w": [1, 6.0]})}
    )
    front = CheckpointFront(pool)
    wanted = {"a": 0.75, "b": 0.25}
    assert front.model(wanted)["w"].tolist() == [2.5, 3.0]
    assert front.mean(wanted)["w"].tolist() == [2.5, 3.0]
    doubled = CheckpointFront(pool, total=2.0)  # whole task vectors, each times lambda = 1
    assert doubled.model({"a": 0.5, "b": 0.5})["w"].tolist() == [3.0, 6.0]
    assert doubled.weights(wanted) == {"a": 1.5, "b": 0.5}
    ties = CheckpointFront(pool, "ties(density=0.5, normalize=False)")
    assert ties.model(wanted)["w"].tolist() == [2.5, 3.0]


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_one_task_alone_is_its_expert_and_an_even_preference_the_average(models, method):
    experts = {name: models / name for name in NAMES}
    front = CheckpointFront.open(models / "base", experts, method)
    code = Weights.open(models / "code")
    found = front.model({"code": 1.0}, out_dtype="float32")
    for name in found:
        torch.testing.assert_close(found[name], code[name].float(), rtol=0, atol=1e-6)
    even = front.model(dict.fromkeys(NAMES, 1 / 3), out_dtype="float32")
    stack = [Weights.open(models / name)["model.norm"].double() for name in NAMES]
    torch.testing.assert_close(even["model.norm"], (sum(stack) / 3).float(), rtol=1e-6, atol=1e-6)


def test_sweep_ends_at_the_expert(front):
    found = list(front.sweep("code", 3, rest={"maths": 3, "chat": 1}))
    assert [list(preference.values()) for preference, _ in found] == [
        [0.75, 0.0, 0.25],
        [0.375, 0.5, 0.125],
        [0.0, 1.0, 0.0],
    ]
    equal(found[1][1], front.model(found[1][0]))


def test_a_model_goes_to_disk(front, tmp_path):
    written = front.model({"maths": 1.0}, tmp_path / "out")
    equal(written, front.model({"maths": 1.0}))
    assert (tmp_path / "out" / "model.safetensors").is_file()


# -- recipes ---------------------------------------------------------------------------------------

METHODS = [
    "task_arithmetic",
    "linear",
    "linear(normalize=False)",
    "ties(density=0.4)",
    "ties(density=(0.2, 0.5, 1.0), scale=0.8)",
    "dare_ties(density=0.5)",
    "dare_linear(density=0.6, rescale=False)",
    "breadcrumbs(density=0.7, gamma=0.1)",
    "della(density=0.5)",
    "multislerp",
    "magmax",
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [0, 7])
def test_the_recipe_replays_the_model_bit_for_bit(models, method, seed):
    experts = {name: models / name for name in NAMES}
    front = CheckpointFront.open(models / "base", experts, method, seed=seed)
    wanted = {"maths": 0.7, "code": 0.2, "chat": 0.1}
    loaded = recipes.load(front.recipe(wanted))
    again = recipes.load(loaded[-1].to_yaml())  # through the text that `pluribus merge` reads
    equal(front.model(wanted), recipes.run(again, None).weights)
    assert [entry.parameters["weight"] for entry in again[-1].models] == [0.7, 0.2, 0.1]


def test_recipes_of_random_methods_keep_their_seed(models):
    experts = {name: models / name for name in NAMES}
    even = dict.fromkeys(NAMES, 1 / 3)
    one, other = (
        CheckpointFront.open(models / "base", experts, "dare_ties(density=0.5)", seed=seed)
        for seed in (0, 1)
    )
    assert not torch.equal(one.model(even)["model.norm"], other.model(even)["model.norm"])
    assert other.recipe(even)["seed"] == 1


def test_a_recipe_holds_from_any_folder(models, monkeypatch, tmp_path):
    monkeypatch.chdir(models)
    front = CheckpointFront.open("base", {"maths": "maths", "code": "code"})
    wanted = {"maths": 0.5, "code": 0.5}
    expected, recipe = front.model(wanted), front.recipe(wanted)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    equal(expected, recipes.run(recipes.load(recipe), None).weights)


def test_a_pool_of_files_knows_its_paths(models):
    experts = {name: models / name / "model.safetensors" for name in NAMES}
    front = CheckpointFront(Pool(models / "base", experts))
    wanted = dict.fromkeys(NAMES, 1 / 3)
    assert front.recipe(wanted)["models"][1]["model"] == str(experts["code"])
    equal(front.model(wanted), recipes.run(recipes.load(front.recipe(wanted)), None).weights)


def test_references_are_written_in_full(models, monkeypatch):
    monkeypatch.chdir(models)
    assert _written("maths") == str(models / "maths")
    assert _written("org/name") == "org/name"
    assert _written("maths+code@v1") == {
        "model": {"path": str(models / "maths")},
        "lora": {"path": str(models / "code"), "revision": "v1"},
    }
    assert _written(ModelRef.of({"model": {"path": "code", "revision": "v1"}})) == {
        "model": {"path": str(models / "code"), "revision": "v1"}
    }
    assert _written(Weights.open("chat")) == str(models / "chat")
    assert _written({"w": torch.zeros(1)}) is None
    assert _written(torch.nn.Linear(1, 1)) is None


def test_total_and_settings_stand_in_the_recipe(models):
    experts = {name: models / name for name in NAMES}
    front = CheckpointFront.open(
        models / "base", experts, "task_arithmetic(scale=0.5)", total=3 * 0.4
    )
    recipe = front.recipe(dict.fromkeys(NAMES, 1 / 3))
    assert recipe["parameters"] == {"scale": 0.5}
    assert [entry["parameters"]["weight"] for entry in recipe["models"]] == pytest.approx([0.4] * 3)
    equal(front.model(dict.fromkeys(NAMES, 1 / 3)), recipes.run(recipes.load(recipe), None).weights)


def test_models_in_memory_have_no_recipe(models):
    kept = {name: models / name for name in NAMES}
    held = {"code": dict(Weights.open(models / "code"))}
    front = CheckpointFront(Pool(models / "base", {**kept, **held}))
    with pytest.raises(InputError, match=r"where code can be read.*CheckpointFront\.open"):
        front.recipe({"maths": 1.0})
    base = dict(Weights.open(models / "base"))
    with pytest.raises(InputError, match="where the base can be read"):
        CheckpointFront(Pool(base, kept)).recipe({"maths": 1.0})


def test_every_method_with_weights_takes_a_preference(models):
    pool = Pool(models / "base", {name: models / name for name in NAMES})
    for name in _methods():
        high = facts(MERGERS[name]).experts[1]
        if high is None or high >= len(NAMES):
            assert "model.norm" in CheckpointFront(pool, name).model({"maths": 0.6, "chat": 0.4})


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"maths": 0.7, "code": 0.4}, "sum to 1.1"),
        ({"maths": 1.2, "code": -0.2}, "share of code is -0.2.*negative weight"),
        ({"math": 1.0}, "Did you mean 'maths'"),
        ({"maths": 0.0}, "all shares"),
        ({"maths": math.inf}, "share of maths is inf"),
    ],
)
def test_preferences_that_are_refused(front, wanted, said):
    for ask in (front.model, front.recipe, front.weights):
        with pytest.raises(InputError, match=said):
            ask(wanted)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("slerp(t=0.5)", "slerp.* takes no weight an expert.*task_arithmetic"),
        ("model_stock", "takes no weight"),
        ("trim(density=0.2) >> elect >> mean", "takes no weight"),
        ("fisher", "needs fisher for every expert"),
    ],
)
def test_methods_that_are_refused(models, method, said):
    pool = Pool(models / "base", {name: models / name for name in NAMES})
    with pytest.raises(InputError, match=said):
        CheckpointFront(pool, method)


def test_a_total_that_means_nothing_is_refused(models):
    pool = Pool(models / "base", {name: models / name for name in NAMES})
    for total in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="total = "):
            CheckpointFront(pool, total=total)
    with pytest.raises(InputError, match="divides its weights by their sum"):
        CheckpointFront(pool, "linear", total=2.0)
    assert CheckpointFront(pool, "linear(normalize=False)", total=2.0).total == 2


def test_settings_that_no_recipe_can_hold(models):
    pool = Pool(models / "base", {name: models / name for name in NAMES})
    front = CheckpointFront(pool, "ties(density=(0.2, 0.5))")
    with pytest.raises(RecipeError, match=r"density = \(0\.2, 0\.5\)"):
        front.recipe({"maths": 1.0})


def test_models_that_are_not_there(models):
    with pytest.raises(MissingError, match="nowhere"):
        CheckpointFront.open(models / "base", {"maths": models / "nowhere"})


# -- preferences -----------------------------------------------------------------------------------


def test_prefer_shares_out_what_is_left():
    assert prefer("b", 0.4, "abc") == {"a": 0.3, "b": 0.4, "c": 0.3}
    assert prefer("a", 0.5, "abc", rest={"b": 1, "c": 3}) == {"a": 0.5, "b": 0.125, "c": 0.375}
    assert prefer("a", 1, ["a"]) == {"a": 1.0}
    found = sweep("a", 5, "ab")
    assert [preference["a"] for preference in found] == [0, 0.25, 0.5, 0.75, 1]
    assert all(sum(preference.values()) == 1 for preference in found)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: prefer("d", 0.5, "abc"), "there is no task 'd'"),
        (lambda: prefer("a", 1.5, "abc"), "strength = 1.5"),
        (lambda: prefer("a", math.nan, "abc"), "strength = nan"),
        (lambda: prefer("a", 0.5, "a"), "only task"),
        (lambda: prefer("a", 0.5, "abc", {"x": 1}), "names 'x'"),
        (lambda: prefer("a", 0.5, "abc", {"b": 0}), "all shares"),
        (lambda: sweep("a", 1, "ab"), "at least 2"),
    ],
)
def test_knobs_that_are_refused(ask, said):
    with pytest.raises(InputError, match=said):
        ask()


def test_shares_sum_to_one():
    found = shares({"a": 0.1, "b": 0.2, "c": 0.7}, "abc")
    assert found == (0.1, 0.2, 0.7)
    assert shares({"a": 2, "b": 6}, "abc", normalise=True) == (0.25, 0.75, 0.0)


def test_words_of_the_command_line():
    models, wanted = read(["maths=hub/m@v1:0.7", "code=https://host:8080/c:0.3"])
    assert models == {"maths": "hub/m@v1", "code": "https://host:8080/c"}
    assert wanted == {"maths": 0.7, "code": 0.3}
    for word in ("maths", "maths=x", "=x:0.5", "maths=:0.5", "maths=x:much", "a/b=x:1"):
        with pytest.raises(InputError):
            read([word])
    with pytest.raises(InputError, match="given twice"):
        read(["a=x:0.5", "a=y:0.5"])


def test_methods_stay_as_they_were(front):
    before = dataclasses.replace(front.method)
    front.model({"maths": 1.0})
    assert front.method == before
