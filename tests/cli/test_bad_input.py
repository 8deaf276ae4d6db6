"""Whatever is wrong with the input: one line that says what, where and what to do; nothing is lost.

`refused` checks the rest: exit code, one line, no traceback, every file as it was.
"""

import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from checkpoints import TIES, save, tensors

from pluribus.core.weights import Weights

Q = "model.layers.0.self_attn.q_proj.weight"


def recipe(place, text):
    (place / "r.yml").write_text(text)
    return "r.yml"


# -- the recipe ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "r.yml: there is no recipe in it"),
        ("# nothing yet\n", "r.yml: there is no recipe in it"),
        ("hello", "r.yml: a recipe is keys with values, not str"),
        ("- a\n- b", "r.yml: a recipe is keys with values, not list"),
        ("merge_method: [ties", "r.yml:1: not valid YAML: expected ',' or ']'"),
        ("a: b: c", "r.yml:1: not valid YAML: mapping values are not allowed here"),
        ("merge_method: ties\n\tmodels: []", "r.yml:2: not valid YAML: found character '\\t'"),
        (
            'merge_method: !!python/object/apply:os.system ["touch owned"]',
            "r.yml:1: not valid YAML: could not determine a constructor for the tag",
        ),
        ("merge_method: linear", "exactly one of models, slices and modules is needed; none"),
        ("models: [{model: math}]", "r.yml:1: merge_method is missing"),
        ("merge_method: linear\nmodels: []", "r.yml:2: models: at least one is needed"),
        ("merge_method: linear\nmodels: [{model: 3}]", "a model is a path, an address, org/name, "),
        ("merge_method: linear\nmodels: [{model: ''}]", "models[0].model: an empty model name"),
        (TIES + "merge_method: linear\n", "r.yml:6: 'merge_method' is given twice; it stands on"),
        (TIES + "seed: -1\n", "r.yml:6: seed: Input should be greater than or equal to 0, not -1"),
        (TIES + "dtype: bf61\n", "r.yml:6: dtype: unknown element type 'bf61'"),
        (TIES + "dtype: bf61\n", "Did you mean 'bf16'?"),
        (TIES + "dtype: int8\n", "int8 is not a floating-point type"),
        (TIES.replace("base_model: base\n", ""), "ties needs a base model; give base_model"),
        (
            "merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\n"
            "models: [{model: math}, {model: code}]",
            "slerp takes 1 model(s) beside the base, but 2 are given",
        ),
        (
            "merge_method: fisher\nmodels: [{model: math}, {model: code}]",
            "fisher needs 'fisher' of every model, and math, code has none; write extras: {fisher:",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: math, layer_range: [0, 9]}]}]",
            "layer_range [0, 9] of math, which has 3 layers in model.layers; the last possible end",
        ),
    ],
)
def test_recipes(refused, place, text, said):
    assert said in refused("merge", recipe(place, text), "out")
    assert not (place / "owned").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("models:", "modelz:", "r.yml:3: modelz: unknown key 'modelz'; there are: merge_method, "),
        ("models:", "modelz:", "Did you mean 'models'?"),
        ("base_model", "base_modle", "r.yml:2: base_modle: unknown key 'base_modle'"),
        ("base_model", "base_modle", "Did you mean 'base_model'?"),
        ("weight: 0.5", "weigth: 0.5", "r.yml:5: models: parameters of code: ties has no paramete"),
        ("weight: 0.5", "weigth: 0.5", "Did you mean 'weight'?"),
        ("merge_method: ties", "merge_method: teis", "no merge method is called 'teis'"),
        ("merge_method: ties", "merge_method: teis", "Did you mean 'ties'?"),
        ("model: math", "model: mth", "mth: no such file or folder. Did you mean 'math'?"),
        ("base_model: base", "base_model: bass", "bass: no such file or folder. Did you mean 'bas"),
        (
            "density: 0.5, weight: 1.0",
            "density: 0, weight: 1.0",
            "ties: density = (0.0, 0.5): Input should be greater than 0",
        ),
        (
            "density: 0.5, weight: 1.0",
            "density: 1.5, weight: 1.0",
            "Input should be less than or equal to 1",
        ),
        (
            "density: 0.5, weight: 0.5",
            "density: high, weight: 0.5",
            "r.yml:4: ties: density: 'high' is not a number",
        ),
        ("weight: 1.0", "weight: .nan", "weight: nan is not a finite number"),
        ("weight: 0.5", "weight: -1", "negative weights need normalize: false"),
        ("{density: 0.5, weight: 1.0}", "[1, 2]", "parameters are names with their values"),
    ],
)
def test_typing_errors(refused, place, old, new, said):
    assert said in refused("merge", recipe(place, TIES.replace(old, new, 1)), "out")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("trim(density=0.2) >> elct >> mean", "no step is called 'elct'"),
        ("trim(density=0.2) >> elct >> mean", "Did you mean 'elect'?"),
        ("trim(densty=0.2) >> mean", "trim has no parameter 'densty'"),
        ("trim(density=0) >> mean", "trim: density = 0: Input should be greater than 0"),
        ("trim(density=0.2 >> mean", "cannot be read: '(' was never closed"),
        ("trim(0.2) >> mean", "parameters of trim go by name, as in trim(parameter=0.2)"),
        ("trim >> elect", "combines nothing: end it with mean, sum or the like"),
        ("mean >> trim >> sum", "a chain combines once"),
        ("trim(density=open('owned', 'w')) >> mean", "is not a number, text, true/false"),
        ("__import__(name='os') >> mean", "no step is called '__import__'"),
        ("[].append >> mean", "'[].append' is not a step; write name or name(parameter=value)"),
    ],
)
def test_chains(refused, place, method, said):
    text = f'merge_method: "{method}"\nbase_model: base\nmodels: [{{model: math}}, {{model: code}}]'
    assert said in refused("merge", recipe(place, text), "out")
    assert not (place / "owned").exists()


def test_weights_that_sum_to_zero(refused, place):
    text = (
        "merge_method: linear\nmodels: [{model: math, parameters: {weight: 1}},"
        "{model: code, parameters: {weight: -1}}]"
    )
    said = refused("merge", recipe(place, text), "out")
    assert "linear: weights (1.0, -1.0) sum to zero; set normalize: false" in said


def test_no_recipe(refused, place):
    (place / "binary.yml").write_bytes(b"\xff\xfe\x00\x81")
    assert refused("merge", "tise.yml", "out") == (
        "tise.yml: no such recipe. Did you mean 'ties.yml'?"
    )
    assert refused("merge", "base", "out") == "base: is a folder; a recipe is a YAML file"
    assert refused("merge", ".", "out") == ".: is a folder; a recipe is a YAML file"
    assert refused("merge", "binary.yml", "out") == "binary.yml: not a text file in UTF-8"
    assert "not a text file" in refused("merge", "base/model.safetensors", "out")
    assert "File name too long" in refused("merge", "r" * 300, "out")


def test_aliases_that_explode(refused, place):
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    said = refused("merge", recipe(place, "\n".join(bomb)), "out")
    assert said == "r.yml: its aliases stand for more than 200000 values"


def test_recipes_that_need_each_other(refused, place):
    text = (
        "name: a\nmerge_method: linear\nmodels: [{model: b}]\n---\n"
        "name: b\nmerge_method: linear\nmodels: [{model: a}]\n"
    )
    assert "recipes use each other: " in refused("merge", recipe(place, text), "out")


# -- model files -----------------------------------------------------------------------------------


def header(change):
    """Return a function that rewrites the header of a safetensors file."""

    def rewrite(data):
        size = struct.unpack("<Q", data[:8])[0]
        table = json.loads(data[8 : 8 + size])
        change(table)
        head = json.dumps(table).encode()
        return struct.pack("<Q", len(head)) + head + data[8 + size :]

    return rewrite


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: b"", "0 bytes is too short for a safetensors file"),
        (lambda data: data[:100], "in a file of 100; it is truncated or not a safetensors file"),
        (lambda data: data[:-100], "it is truncated; copy or download it again"),
        (lambda data: data + b"more", "it is longer than its header says"),
        (lambda data: struct.pack("<Q", 1 << 60) + data[8:], "claims a header of 11529215046068"),
        (lambda data: struct.pack("<Q", 5) + b"hello", "the header is not valid JSON"),
        (
            header(lambda table: table[Q].update(shape=[999, 999])),
            f"tensor '{Q}' is BF16[999, 999], which is 1996002 bytes, but its data_offsets",
        ),
        (header(lambda table: table[Q].update(shape=[-1, 2])), f"tensor '{Q}' has an impossible s"),
        (header(lambda table: table[Q].update(dtype="F99")), f"tensor '{Q}' has unknown dtype 'F9"),
        (header(lambda table: table.update(twin=table[Q])), "overlaps the tensor before it"),
        (
            header(lambda table: table.update({f"{Q}s": table.pop(Q)})),
            f"math lacks {Q}. Only models with the same tensors can be merged",
        ),
    ],
)
def test_broken_files(refused, place, change, said):
    path = place / "math" / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    got = refused("merge", "ties.yml", "out")
    assert said in got
    assert "math" in got


def test_other_names_shapes_and_layers(refused, place):
    values = tensors(1)
    save(place / "wide.safetensors", values | {Q: np.zeros((16, 99), np.float32)}, "F32")
    save(place / "extra.safetensors", values | {"model.extra.weight": values[Q]}, "F32")
    for name, said in {
        "wide": f"tensor {Q!r} is F32[16, 99] in wide.safetensors, but BF16[16, 16] in code",
        "extra": "code lacks model.extra.weight; base lacks model.extra.weight",
    }.items():
        text = TIES.replace("model: math", f"model: {name}.safetensors")
        assert said in refused("merge", recipe(place, text), "out")


def test_missing_shards_and_lying_indexes(refused, place):
    index = place / "math" / "model.safetensors.index.json"
    for table, said in {
        "{": "not a checkpoint index",
        '{"weight_map": {"a": "../../etc/passwd"}}': "'../../etc/passwd' of 'a' is not a plain",
        '{"weight_map": {"a": "gone.safetensors"}}': "gone.safetensors: named by the index, but",
        '{"weight_map": {"a": "model.safetensors"}}': "the index says that model.safetensors holds",
    }.items():
        index.write_text(table)
        assert said in refused("merge", "ties.yml", "out")


def test_folders_without_a_model(refused, place):
    (place / "math" / "model.safetensors").unlink()
    assert "math: no checkpoint in it; looked for model.safetensors.index.json, " in refused(
        "merge", "ties.yml", "out"
    )
    (place / "math" / "a.txt").write_text("hello")
    text = TIES.replace("model: math", "model: math/a.txt")
    assert "a.txt: not a checkpoint that can be read here; formats: " in refused(
        "merge", recipe(place, text), "out"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "math/config.json: not valid JSON"),
        ("[1]", "math/config.json: not a configuration but list"),
        ('{"architectures": ["Other"]}', "math is Other, but base is LlamaForCausalLM; merging"),
        ('{"architectures": 3, "model_type": "o"}', "math is o, but base is LlamaForCausalLM"),
    ],
)
def test_configurations(refused, place, text, said):
    (place / "math" / "config.json").write_text(text)
    assert said in refused("merge", "ties.yml", "out")


class Evil:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return (os.system, ("touch owned",))


def test_a_pickle_that_would_run_code(refused, place):
    (place / "math" / "model.safetensors").unlink()
    path = place / "math" / "pytorch_model.bin"
    torch.save({"model.norm.weight": Evil()}, path)
    assert (
        f"pytorch_model.bin: its pickle asks for '{os.system.__module__}.system', which a state "
        "dict does not need and which is not run here; load it where you trust it and save it "
        "again as safetensors"
    ) in refused("merge", "ties.yml", "out")
    path.write_bytes(pickle.dumps(Evil()))
    assert "a pickle from before PyTorch 1.6" in refused("merge", "ties.yml", "out")
    assert not (place / "owned").exists()


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("who", ["base", "math"])
def test_nan_and_infinity_name_tensor_and_model(cli, place, bad, who):
    values = tensors(1)
    values[Q][3, 4] = bad
    save(place / who / "model.safetensors", values, "bfloat16")
    got = cli("merge", "ties.yml", "out")
    assert got.code == 1
    assert got.err == (
        f"pluribus: {who}: tensor {Q!r} holds NaN or infinite values; repair that model, or go on "
        "with allow_nonfinite (--allow-nonfinite)\n"
    )
    assert not (place / "out").exists()
    assert cli("merge", "ties.yml", "out", "--allow-nonfinite").code == 0
    merged = Weights.open("out")
    broken = {name for name in merged if not bool(merged[name].isfinite().all())}
    assert broken <= {Q}
    if who == "base" and np.isnan(bad):
        assert broken == {Q}


# -- tokenizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["union", "base", "math"])
def test_a_tokenizer_that_is_not_there(refused, place, source):
    said = refused("merge", recipe(place, TIES + f"tokenizer_source: {source}\n"), "out")
    assert "has no tokenizer: looked for tokenizer.json, vocab.json" in said
    assert "Copy the tokenizer files there, or leave tokenizer" in said


def test_other_tokenizer_troubles(refused, place):
    assert "tokenizer source unoin: unoin: no such file or folder. Did you mean 'union'?" in (
        refused("merge", recipe(place, TIES + "tokenizer_source: unoin\n"), "out")
    )
    text = TIES.replace("model: math", "model: math/model.safetensors")
    assert "is a bare file without a tokenizer" in refused(
        "merge", recipe(place, text + "tokenizer_source: union\n"), "out"
    )
    assert "chat_template 'chatm' is not a template" in refused(
        "merge", recipe(place, TIES + "chat_template: chatm\n"), "out"
    )
    (place / "math" / "tokenizer.json").write_text("{")
    (place / "base" / "tokenizer.json").write_text("{")
    assert "tokenizer.json cannot be read as a tokenizer" in refused(
        "merge", recipe(place, TIES + "tokenizer_source: union\n"), "out"
    )


# -- places of models ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("base/mth", "base/mth: no such file or folder"),  # not asked for at a hub
        ("base/mth", "The hub's repository of that name is hf://base/mth"),
        ("ftp://there/it", "addresses that are read begin with http, https or hf"),
        ("base+adaptor", "adaptor: no such file or folder"),
        ("base+math", "math/adapter_config.json: no such file; a LoRA is a folder saved by PEFT"),
        ("nowhere/at/all", "nowhere/at/all: no such file or folder"),
        ("~/no-such-model-here", "no-such-model-here: no such file or folder"),
    ],
)
def test_places(refused, place, given, said):
    text = TIES.replace("model: math", f"model: {given}")
    assert said in refused("merge", recipe(place, text), "out")


def test_a_hub_without_a_network(refused, place, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(place / "cache"))
    text = TIES.replace("model: math", "model: org/name@v2")
    said = refused("merge", recipe(place, text), "out")
    assert "HF_HUB_OFFLINE is set, and its revision v2 is not whole in " in said
    assert "hf download org/name" in said


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--memory lots", "'lots' is not a size; write for example 512MB, 5GB or 2GiB"),
        ("--memory -5GB", "'-5GB' is not a size"),
        ("--memory nanGB", "'nanGB' is not a size"),
        ("--memory 0", "memory budget 0 bytes: give at least 1MB"),
        ("--max-shard-size 0", "max_shard_size = 0 bytes: give for example 5GB"),
        ("--max-shard-size big", "'big' is not a size"),
        ("--device gpu", "device 'gpu': expected cpu, cuda or cuda:N"),
        ("--device meta", "device 'meta' holds no values"),
    ],
)
@pytest.mark.parametrize("more", ["", " --dry-run"])
def test_options(refused, options, said, more):
    assert said in refused("merge", "ties.yml", "out", *(options + more).split())


def test_a_device_that_is_not_there(refused):
    missing = f"cuda:{torch.cuda.device_count()}"
    said = refused("merge", "ties.yml", "out", "--device", missing)
    assert f"device '{missing}': " in said


def test_the_output_must_be_named(refused):
    assert refused("merge", "ties.yml") == (
        "name the output: pluribus merge RECIPE OUT (or --dry-run to see the plan)"
    )


# -- the output's place ----------------------------------------------------------------------------


def test_outputs_that_exist(refused, place):
    (place / "empty").mkdir()
    (place / "thesis").mkdir()
    (place / "thesis" / "chapter.tex").write_text("years of work")
    said = "exists already; choose another name, or pass --overwrite to replace it once the new "
    for name in ("base", "empty", "thesis", "ties.yml", "."):
        assert said in refused("merge", "ties.yml", name)
    assert "is a folder with other things than a model in it, and --overwrite would" in refused(
        "merge", "ties.yml", "thesis", "--overwrite"
    )
    for name in (".", ".."):  # the inputs are inside
        assert "is an input of this recipe and would be replaced" in refused(
            "merge", "ties.yml", name, "--overwrite"
        )
    assert "/: cannot be an output; name a folder or a .safetensors file" in refused(
        "merge", "ties.yml", "/"
    )


def test_places_that_cannot_hold_an_output(refused):
    assert refused("merge", "ties.yml", "no/such/out") == (
        "no/such: no such folder to write out into; create it"
    )
    assert refused("merge", "ties.yml", "ties.yml/out") == (
        "ties.yml: is no folder to write out into; choose another"
    )
    assert "File name too long" in refused("merge", "ties.yml", "o" * 300)


def test_no_permission_to_write(refused, place):
    (place / "locked").mkdir(mode=0o555)
    if os.access("locked", os.W_OK):
        pytest.skip("root may write everywhere")
    assert "locked/out.partial: Permission denied" in refused("merge", "ties.yml", "locked/out")


@pytest.mark.parametrize(
    ("path", "words", "code", "said"),
    [
        ("ties.yml", "merge ties.yml out", 2, "path 'ties.yml' is not readable"),
        ("bank.yml", "compress bank.yml bank", 2, "path 'bank.yml' is not readable"),
        ("math/model.safetensors", "merge ties.yml out", 1, "Permission denied"),
        ("math/model.safetensors", "inspect base math", 1, "Permission denied"),
        ("base/config.json", "merge ties.yml out", 1, "Permission denied"),
    ],
)
def test_no_permission_to_read(cli, place, path, words, code, said):
    (place / path).chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root may read everything")
    got = cli(*words.split())
    assert got.code == code
    assert path in got.err
    assert said in got.err
    assert got.err.count("\n") == 1


# -- inspect, expand -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("inspect base", "name the base and at least one expert: pluribus inspect BASE EXPERTS..."),
        ("inspect base mth", "mth: no such file or folder. Did you mean 'math'?"),
        ("inspect base math --density 0", "density = 0.0: Input should be greater than 0"),
        ("inspect base math --density 2", "density = 2.0: Input should be less than or equal to 1"),
        ("inspect base math --mask-lambda -1", "mask_lambda = -1.0: Input should be greater than"),
        ("inspect base math --memory 1", "memory budget 1 bytes: give at least 1MB"),
        ("inspect base math --html no/x.html", "no/x.html: no such folder to write a page into"),
        ("inspect base math --html base", "base: is a folder; name a file such as report.html"),
        ("inspect base small.safetensors", "small.safetensors lacks model.embed_tokens.weight"),
    ],
)
def test_inspect(refused, place, words, said):
    save(place / "small.safetensors", {"model.norm.weight": np.ones(16, np.float32)}, "F32")
    assert said in refused(*words.split())
