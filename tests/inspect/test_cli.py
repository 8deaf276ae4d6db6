import json

import pytest
from typer.testing import CliRunner

from pluribus.cli import build
from pluribus.core.errors import InputError


@pytest.fixture
def folders(tmp_path):
    import numpy as np

    from pluribus.core.weights import Weights

    rng = np.random.default_rng(0)
    base = rng.standard_normal((40, 30)).astype(np.float32)
    for name in ("base", "code", "<i>prose"):
        (tmp_path / name).mkdir()
        step = 0 if name == "base" else rng.standard_normal(base.shape) * 0.05
        values = (base + step).astype(np.float32)
        Weights.of({"layers.0.w": values, "layers.1.w": values * 2}).save(
            tmp_path / name / "model.safetensors"
        )
    return [str(tmp_path / name) for name in ("base", "code", "<i>prose")]


def run(*arguments):
    return CliRunner().invoke(build(), ["inspect", *arguments])


def test_text_page_and_json_agree(folders, tmp_path):
    page = tmp_path / "report.html"
    text = run(*folders, "--html", str(page))
    assert text.exit_code == 0, text.output
    told = json.loads(run(*folders, "--json", "--threads", "1", "--memory", "8MB").stdout)
    assert f"{told['model']['cosine'][1][0]:.3f}" in text.stdout
    assert "&lt;i&gt;prose" in page.read_text("utf-8")
    assert "<i>prose" not in page.read_text("utf-8")
    assert str(page) in text.stdout


def test_base_may_be_named(folders):
    base, *experts = folders
    named = json.loads(run("--base", base, *experts, "--json").stdout)
    assert named["base"] == base
    assert named["experts"] == experts
    assert named["model"] == json.loads(run(*folders, "--json").stdout)["model"]


def test_base_alone_is_refused(folders):
    found = run(folders[0])
    assert found.exit_code != 0
    assert "at least one expert" in str(found.exception)


def test_help_has_an_example():
    assert "Example: pluribus inspect base/ code/ prose/" in run("--help").stdout


# -- what costs more is asked for ------------------------------------------------------------------


def test_spectra_on_request(folders):
    assert json.loads(run(*folders, "--json").stdout)["spectra"] is None
    told = json.loads(run(*folders, "--spectra", "--json").stdout)["spectra"]
    assert told["rank"] == 16
    assert set(told["matrices"]) == {"layers.0.w", "layers.1.w"}
    told = json.loads(run(*folders, "--energy", "0.5", "--json").stdout)["spectra"]
    assert told["energy"] == 0.5
    assert told["rank"] is None


def test_lines_on_a_zoo(tmp_path, monkeypatch):
    """The weights of a zoo's experts, scored on its tasks; the zoo is a toy's."""
    import torch

    from pluribus.core.weights import Weights
    from pluribus.tasks import zoo as zoos

    class Toy:
        base = {"layers.0.w": torch.zeros(3, 2), "layers.1.w": torch.zeros(3, 2)}  # noqa: RUF012
        tasks = ("one", "two")

        def score(self, state, task, split, limit):
            if task not in self.tasks:
                raise InputError(f"no task '{task}'")
            return float(state["layers.0.w"][0, self.tasks.index(task)])

    monkeypatch.setattr(zoos, "build", lambda name, seed: {"toy": Toy()}[name])
    for name, place in (("base", None), ("a", 0), ("b", 1)):
        values = {n: v.clone() for n, v in Toy.base.items()}
        if place is not None:
            values["layers.0.w"][0, place] = 1.0
        else:
            values["layers.1.w"] += 0.1
        Weights.of(values).save(tmp_path / f"{name}.safetensors")
    models = [str(tmp_path / f"{name}.safetensors") for name in ("base", "a", "b")]
    told = json.loads(run(*models, "--zoo", "toy", "--points", "3", "--json").stdout)
    lines = told["connectivity"]["lines"]
    assert [p["scores"] for p in lines[2]["points"]] == [
        {"one": 1.0, "two": 0.0},
        {"one": 0.5, "two": 0.5},
        {"one": 0.0, "two": 1.0},
    ]
    assert lines[2]["barrier"] == 0
    assert "no task 'three'" in str(run(*models, "--zoo", "toy", "--score", "three").exception)
    assert "must be a number" in str(run(*models, "--zoo", "toy:x").exception)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--score", "sst3"], "sst3"),
        (["--texts", "nowhere.txt"], "nowhere.txt: no such file of texts"),
        (["--energy", "2"], "energy = 2.0"),
    ],
)
def test_refusals(folders, words, said):
    assert said in str(run(*folders, *words).exception)


def test_other_architectures_name_the_first_tensors(folders, tmp_path):
    import numpy as np

    from pluribus.core.weights import Weights

    Weights.of({"layers.0.v": np.ones((40, 30), np.float32)}).save(tmp_path / "x.safetensors")
    said = str(run(folders[0], str(tmp_path / "x.safetensors")).exception)
    assert "lacks layers.0.w, layers.1.w" in said
    assert "Did you mean 'layers.0.v'?" in said


def language_models(folder):
    """A base and two experts with a tokenizer of words, written as Hugging Face folders."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<end>", "<?>", "the", "number", "is", "here", *map(str, range(10))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<?>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<?>")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    out = []
    for seed in range(3):
        torch.manual_seed(seed)
        place = folder / f"m{seed}"
        LlamaForCausalLM(config).save_pretrained(place)
        tokenizer.save_pretrained(place)
        out.append(str(place))
    return out


def reviews(folder, monkeypatch):
    """Rows of their words under the name of a task."""
    from pluribus.tasks import texts

    monkeypatch.setenv("PLURIBUS_DATA", str(folder))
    rows = [
        {"text": f"the number {i % 10} is here", "label": ["negative", "positive"][i % 2],
         "split": "train" if i < 4 else "test"}
        for i in range(20)
    ]  # fmt: skip
    texts.write(folder / "text" / "sst2.jsonl.gz", rows)


def test_lines_on_named_tasks(tmp_path, monkeypatch):
    """The ends and the middle score what `pluribus eval` scores of the same weights."""
    pytest.importorskip("transformers")
    from pluribus.core.weights import Weights
    from pluribus.interpolate import interpolate
    from pluribus.tasks import named
    from pluribus.tasks.evaluate import evaluate
    from pluribus.tasks.language import CausalLM

    reviews(tmp_path, monkeypatch)
    folders = language_models(tmp_path)[:2]
    words = ["--score", "sst2", "--points", "3", "--limit", "8", "--json"]
    (line,) = json.loads(run(*folders, *words).stdout)["connectivity"]["lines"]
    one, other = (Weights.open(folder) for folder in folders)
    for point, weights in zip(
        line["points"], (one, interpolate([one, other], [0.5, 0.5]), other), strict=True
    ):
        report = evaluate(CausalLM.open(weights), named.get("sst2"), limit=8)
        assert point["scores"] == {"sst2": report.score}


def test_trials_of_language_models(tmp_path, monkeypatch):
    """A merge in memory finds the base's configuration and tokenizer, and scores as if saved."""
    pytest.importorskip("transformers")
    from pluribus import Pool, merge
    from pluribus.tasks import named
    from pluribus.tasks.evaluate import evaluate
    from pluribus.tasks.language import CausalLM

    reviews(tmp_path, monkeypatch)
    folders = language_models(tmp_path)
    words = ["--score", "sst2", "--limit", "8", "--try", "2", "--no-lines", "--json"]
    told = json.loads(run(*folders, *words).stdout)["trials"]["tried"]
    assert len(told) == 2
    for one in told:
        out = tmp_path / one["method"].partition("(")[0]
        merge(Pool(folders[0], folders[1:]), one["method"], out)
        report = evaluate(CausalLM.open(out), named.get("sst2"), limit=8)
        assert one["scores"] == {"sst2": report.score}


def test_texts_run_through_language_models(tmp_path):
    pytest.importorskip("transformers")
    folders = language_models(tmp_path)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"the number {i} is here {i} {i}" for i in range(6)))
    told = json.loads(run(*folders, "--texts", str(texts), "--json").stdout)["similarity"]
    assert told["inputs"] == 6
    assert list(told["blocks"]) == ["model.layers.0", "model.layers.1"]
    assert told["blocks"]["model.layers.1"][1][1] == pytest.approx(1)
    texts.write_text("one\ntwo\n")
    assert "at least four" in str(run(*folders, "--texts", str(texts)).exception)
