"""Loading files, documents that use each other, running, resuming, dry runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from pluribus.core.errors import MissingError, OutputError, RecipeError
from pluribus.core.weights import Weights
from pluribus.engine.driver import Options
from pluribus.recipe import dry_run, dry_run_text, load, plan, run


@pytest.fixture
def root(tmp_path):
    """Return a folder with three models."""
    for i, name in enumerate("abc"):
        tiny.model(tmp_path / name, seed=i, base=0 if i else None, layers=2)
    return tmp_path


TWO = """
name: soup
merge_method: linear
models: [{model: a}, {model: b}]
---
merge_method: task_arithmetic
base_model: a
models:
  - {model: soup, parameters: {weight: 2.0}}
  - {model: c}
"""


def test_paths_start_at_the_recipe(root, tmp_path, monkeypatch):
    (root / "r.yml").write_text("merge_method: linear\nmodels: [{model: a}, {model: ./b}]\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert plan(load(root / "r.yml"))


def test_paths_may_start_at_the_working_directory(root, monkeypatch):
    (root / "recipes").mkdir()
    (root / "recipes" / "r.yml").write_text("merge_method: linear\nmodels: [{model: a}]\n")
    monkeypatch.chdir(root)
    assert plan(load("recipes/r.yml"))


def test_text_and_mappings_are_recipes_too(root):
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"
    (one,) = load(text, folder=root)
    (two,) = load({"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]})
    assert one.plain() == two.plain()


def test_a_recipe_that_is_not_there(root):
    (root / "recipe.yml").write_text("a: 1")
    with pytest.raises(MissingError, match=r"no such recipe\. Did you mean 'recipe\.yml'"):
        load(root / "recpe.yml")
    with pytest.raises(MissingError, match="no such recipe"):
        load("recpe.yml")
    (root / "empty.yml").write_text("# nothing\n")
    with pytest.raises(RecipeError, match="there is no recipe in it"):
        load(root / "empty.yml")


def test_a_model_that_is_not_there(root):
    with pytest.raises(MissingError, match="no such file"):
        plan(load("merge_method: linear\nmodels: [{model: ./nowhere}]", folder=root))


# -- several documents -----------------------------------------------------------------------------


def test_a_merge_of_a_merge(root):
    recipes = load(TWO, folder=root)
    result = run(recipes, root / "out")
    a, b, c = (tiny.arrays(Weights.open(root / n)) for n in "abc")
    for name, got in tiny.arrays(Weights.open(root / "out")).items():
        soup = (a[name] + b[name]) / 2
        np.testing.assert_allclose(
            got, a[name] + 2 * (soup - a[name]) + c[name] - a[name], atol=1e-6
        )
    assert result.out == root / "out"
    assert (root / "out.stages" / "soup" / "model.safetensors").is_file()


def test_the_same_in_memory(root):
    recipes = load(TWO, folder=root)
    run(recipes, root / "out")
    memory = run(recipes, None).weights
    disk = Weights.open(root / "out")
    for name in disk:
        assert memory.source(name).load().tobytes() == disk.source(name).load().tobytes()


def test_order_of_documents_does_not_matter(root):
    first, second = TWO.split("---")
    recipes = load(f"{second}---{first}", folder=root)
    assert [recipe.name for recipe in recipes] == ["soup", None]


def test_an_intermediate_is_made_again_only_if_it_changed(root):
    stage = root / "kept" / "soup" / "model.safetensors"
    run(load(TWO, folder=root), root / "out", stages_dir=root / "kept")
    made = stage.stat().st_mtime_ns
    changed_end = TWO.replace("weight: 2.0", "weight: 3.0")
    run(load(changed_end, folder=root), root / "out2", stages_dir=root / "kept")
    assert stage.stat().st_mtime_ns == made
    changed_start = TWO.replace("{model: b}", "{model: b, parameters: {weight: 0.2}}")
    run(load(changed_start, folder=root), root / "out3", stages_dir=root / "kept")
    assert stage.stat().st_mtime_ns != made
    with pytest.raises(OutputError, match="exists already"):
        run(load(changed_start, folder=root), root / "out2", stages_dir=root / "kept")


def test_a_finished_output_needs_no_intermediates(root):
    import shutil

    recipes = load(TWO, folder=root)
    run(recipes, root / "out")
    shutil.rmtree(root / "out.stages")
    again = run(recipes, root / "out")
    assert again.resumed
    assert not (root / "out.stages").exists()
    tiny.model(root / "b", seed=9, layers=2)  # an input changed: not the same plan
    with pytest.raises(OutputError, match="exists already"):
        run(recipes, root / "out")


def test_all_documents_named(root):
    text = TWO.replace("merge_method: task", "name: last\nmerge_method: task")
    recipes = load(text, folder=root)
    assert [recipe.name for recipe in recipes] == ["soup", "last"]
    run(recipes, root / "out")
    assert (root / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TWO + "---\nname: soup\nmerge_method: linear\nmodels: [{model: a}]", "called soup"),
        (TWO + "---\nmerge_method: linear\nmodels: [{model: a}]", "2 documents have no name"),
        (
            "name: x\nmerge_method: linear\nmodels: [{model: y}]\n---\n"
            "name: y\nmerge_method: linear\nmodels: [{model: x}]",
            "use each other: x -> y -> x|use each other: y -> x -> y",
        ),
        ("name: x\nmerge_method: linear\nmodels: [{model: x}]", "use each other: x -> x"),
    ],
)
def test_documents_that_do_not_fit_together(root, text, message):
    with pytest.raises(RecipeError, match=message):
        load(text, folder=root)


def test_a_mistake_in_the_last_document_is_found_before_the_first_runs(root):
    text = TWO.replace("weight: 2.0", "wieght: 2.0")
    with pytest.raises(RecipeError, match="Did you mean 'weight'"):
        run(load(text, folder=root), root / "out")
    assert not (root / "out.stages").exists()


def test_a_later_document_may_align_vocabularies_of_an_earlier_result(root):
    tiny.model(root / "wide", seed=4, layers=2, words=[*tiny.WORDS, "more"])
    text = TWO.replace("{model: c}", "{model: wide}\ntokenizer_source: union")
    planned = plan(load(text, folder=root))
    assert planned[-1].plan.specs["lm_head.weight"].shape[0] == 15
    run(load(text, folder=root), root / "out")
    assert json.loads((root / "out" / "config.json").read_text())["vocab_size"] == 15


# -- outputs ---------------------------------------------------------------------------------------

ONE = "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"


def test_files_beside_the_tensors(root):
    run(load(ONE + "dtype: float16\n", folder=root), root / "out")
    names = {path.name for path in (root / "out").iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "pluribus.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    record = json.loads((root / "out" / "pluribus.json").read_text())
    assert record["recipe"]["merge_method"] == "linear"
    again = load(record["recipe"], folder=root)
    assert plan(again)[0].plan.digest() == record["plan"]


def test_one_file(root):
    run(load(ONE, folder=root), root / "out.safetensors")
    assert len(Weights.open(root / "out.safetensors")) == len(tiny.shapes(2, 14))
    assert not list(root.glob("out.safetensors.config*"))


def test_a_chat_template_alone_changes_the_output(root):
    run(load(ONE, folder=root), root / "out")
    chatty = load(ONE + "chat_template: chatml\n", folder=root)
    with pytest.raises(OutputError, match="exists already"):
        run(chatty, root / "out")
    run(chatty, root / "out", Options(overwrite=True))
    assert "im_start" in (root / "out" / "chat_template.jinja").read_text()
    config = json.loads((root / "out" / "tokenizer_config.json").read_text())
    assert "im_start" in config["chat_template"]
    assert config["bos_token"] == "<s>"


def test_chat_template_auto_is_the_most_common(root):
    for name, text in (("a", "one {{ x }}"), ("b", "two {{ x }}"), ("c", "two {{ x }}")):
        (root / name / "chat_template.jinja").write_text(text)
    text = (
        "merge_method: linear\nmodels: [{model: a}, {model: b}, {model: c}]\nchat_template: auto\n"
    )
    run(load(text, folder=root), root / "out")
    assert (root / "out" / "chat_template.jinja").read_text() == "two {{ x }}"


def test_an_input_is_not_overwritten(root):
    with pytest.raises(OutputError, match="is an input of this recipe"):
        run(load(ONE, folder=root), root / "a", Options(overwrite=True))


def test_random_methods_repeat_and_follow_the_seed(root):
    text = "merge_method: dare_linear\nbase_model: a\nmodels: [{model: b}, {model: c}]\n"
    text += "parameters: {density: 0.5}\n"

    def merged(more: str = "", **options) -> bytes:
        weights = run(load(text + more, folder=root), None, Options(**options)).weights
        return b"".join(weights.source(name).load().tobytes() for name in weights)

    assert merged() == merged(threads=1, memory=1 << 20)
    assert merged() != merged("seed: 5\n")
    assert merged("seed: 5\n") == merged("seed: 5\n")


def test_lenient_notes_become_warnings(root):
    recipes = load(ONE + "jnk: 1\n", folder=root, lenient=True)
    result = run(recipes, None)
    assert any("unknown key 'jnk'" in note for note in result.warnings)


def test_lora_on_a_model(root):
    from pluribus.core.source import ArraySource

    (root / "lora").mkdir()
    rng = np.random.default_rng(0)
    a = rng.standard_normal((2, tiny.HIDDEN)).astype(np.float32)
    b = rng.standard_normal((tiny.HIDDEN, 2)).astype(np.float32)
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    sources = {
        f"{stem}.lora_A.weight": ArraySource.of(a, "F32"),
        f"{stem}.lora_B.weight": ArraySource.of(b, "F32"),
    }
    Weights(sources).save(root / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (root / "lora" / "adapter_config.json").write_text(json.dumps(config))
    text = "merge_method: passthrough\nmodels: [{model: a+lora}]\n"
    got = run(load(text, folder=root), None).weights
    name = "model.layers.0.self_attn.q_proj.weight"
    before = tiny.arrays(Weights.open(root / "a"))[name]
    np.testing.assert_allclose(tiny.arrays(got)[name], before + 2 * b @ a, atol=1e-5)


# -- dry runs --------------------------------------------------------------------------------------


def test_dry_run_reads_no_weights(root):
    tiny.model(root / "broken", seed=7, layers=2)
    path = root / "broken" / "model.safetensors"
    size = path.stat().st_size
    data = bytearray(path.read_bytes())
    data[-200:] = b"\xff" * 200  # NaN in the last tensor: a run refuses it
    path.write_bytes(data)
    assert path.stat().st_size == size
    told = dry_run(load(TWO.replace("{model: c}", "{model: broken}"), folder=root))
    assert json.loads(json.dumps(told)) == told
    soup, last = told["recipes"]
    assert soup["name"] == "soup"
    assert last["tensors"] == len(tiny.shapes(2, 14))
    assert last["bytes_read"] == 3 * last["bytes_written"]
    text = dry_run_text(told)
    assert "linear -> soup" in text
    assert "layer 1" in text
    assert "(base: a)" in text


def test_dry_run_of_a_vocabulary_union_counts_rows(root):
    tiny.model(root / "wide", seed=4, layers=2, words=[*tiny.WORDS, "more"])
    text = "merge_method: linear\nmodels: [{model: a}, {model: wide}]\ntokenizer_source: union\n"
    told = dry_run(load(text, folder=root))
    assert told["recipes"][0]["tokenizer"]["rows"] == 15
    assert "a: 14 rows kept, 1 substituted" in dry_run_text(told)


# -- examples --------------------------------------------------------------------------------------

EXAMPLES = [
    path
    for path in sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yml"))
    if "merge_method:" in path.read_text("utf-8")
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Return a folder with every model that the examples name."""
    root = tmp_path_factory.mktemp("zoo")
    for seed, name in enumerate(("base", "math", "code")):
        tiny.model(root / name, seed=seed, base=0 if seed else None)
    tiny.model(root / "chat", seed=3, base=0, special=())
    tiny.tokenizer(root / "chat", tiny.WORDS[:-2], ("<|im_start|>", "<|im_end|>"))
    for seed, name in enumerate(("one", "two", "three")):
        tiny.model(root / name, seed=seed, layers=32)
    return root


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(zoo, path):
    recipes = load(path.read_text("utf-8"), folder=zoo)
    result = run(recipes, None)
    assert result.bytes_written > 0
    assert plan(recipes)[-1].warnings == ()
