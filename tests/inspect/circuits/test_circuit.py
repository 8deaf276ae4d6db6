"""Discovery, what a circuit keeps, overlap, repairs; and models that are refused."""

import json
import math
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package

import head_models  # type: ignore[import-not-found]
import torch

from pluribus.core.errors import (
    FormatError,
    InputError,
    MismatchError,
    MissingError,
    RecipeError,
)
from pluribus.inspect.circuits import (
    Circuit,
    Effects,
    HeadModel,
    Stage,
    discover,
    encode,
    evaluate,
    force_attention,
    overlap,
    path_patch,
    recipe,
    render,
    tasks,
)
from pluribus.inspect.circuits.circuit import head_of, name_of, of_sets
from pluribus.inspect.circuits.patching import top

STAGES = (
    Stage("movers"),
    Stage("middle", "q", "movers", "all"),
    Stage("early", "v", "movers", "all", "S2"),
)


@pytest.fixture(scope="module")
def heads():
    return HeadModel(head_models.llama(vocabulary=1500, layers=5))


@pytest.fixture(scope="module")
def prompts():
    return tasks.IOI.fitting(head_models.tokenizer(), 0, 10)


@pytest.fixture(scope="module")
def circuit(heads, prompts):
    return discover(
        heads, tasks.IOI, prompts, stages=STAGES, top_share=0.15, seed=5, model="tiny",
        allow_small_gap=True,
    )  # fmt: skip


def test_stages_by_hand(heads, prompts, circuit):
    """Each stage is path patching to the heads of the one before."""
    movers = path_patch(heads, prompts, allow_small_gap=True).values
    assert list(circuit.stage("movers").heads) == top(movers, 0.15)
    assert len(circuit.stage("movers").heads) == 3
    expected = [(layer, head, "q") for layer, head in top(movers, 0.15) if layer]
    assert list(circuit.stage("middle").receivers) == expected
    middle = path_patch(heads, prompts, expected, allow_small_gap=True).values
    found = torch.tensor(
        [[math.nan if v is None else v for v in row] for row in circuit.stage("middle").effects]
    )
    torch.testing.assert_close(found, middle, equal_nan=True)
    union = {head for stage in circuit.stages for head in stage.heads}
    assert set(circuit.heads) == union
    assert circuit.prompts == 10
    assert circuit.accuracy == evaluate(heads, prompts).accuracy
    assert any("answers 0% of ioi" in note for note in circuit.warnings)
    for stage in circuit.stages:
        assert all(0 <= share <= 1 for share in stage.frequency)


def test_frequencies_are_shares_of_draws():
    """Two prompts, of which each has a head of its own; half of draws keep the first alone."""
    from pluribus.inspect.circuits.circuit import _found

    clean, corrupt = torch.zeros(2), torch.tensor([-1.0, -1.0])
    differences = torch.tensor([[[-1.0, 0.0], [0.0, -0.9]]])
    found = _found(Stage("a"), Effects(differences, clean, corrupt), 0.5, seed=0)
    assert found.heads == ((0, 0),)
    assert found.frequency[0] == pytest.approx(0.75, abs=0.08)  # not when the second came twice
    assert found.effect((0, 0)) == pytest.approx(0.5)


def test_json_both_ways(circuit, tmp_path):
    circuit.save(tmp_path / "c.json")
    again = Circuit.load(tmp_path / "c.json")
    assert again == circuit
    told = json.loads((tmp_path / "c.json").read_text())
    assert told["top"] == 0.15
    assert told["stages"][2]["position"] == "S2"
    assert told["heads"] == [name_of(head) for head in circuit.heads]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "broken.json"),
        ("[]", "not a circuit of format 1"),
        ('{"format": 2}', "format: 2"),
        ('{"format": 1}', "damaged: KeyError"),
    ],
)
def test_damaged_files(tmp_path, text, said):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=said):
        Circuit.load(path)
    with pytest.raises(MissingError, match="no such circuit"):
        Circuit.load(tmp_path / "absent.json")


def test_overlap_by_hand(circuit):
    found = of_sets({(0, 1), (1, 0), (2, 2)}, {(1, 0), (2, 2), (2, 3), (0, 0)}, 12)
    assert found.shared == [(1, 0), (2, 2)]
    assert found.jaccard == pytest.approx(2 / 5)
    assert found.overlap == pytest.approx(2 / 3)
    assert found.chance == pytest.approx(4 / 12)
    same = overlap(circuit, circuit)
    assert (same.jaccard, same.overlap) == (1, 1)
    one = overlap(circuit, circuit, "movers")
    assert one.shared == sorted(circuit.stage("movers").heads)
    other = Circuit.from_dict(circuit.to_dict() | {"layers": 4})
    with pytest.raises(MismatchError, match="5 x 4 and 4 x 4"):
        overlap(circuit, other)
    with pytest.raises(InputError, match="no stage 'last'"):
        overlap(circuit, circuit, "last")


def test_head_names():
    assert head_of("20.10") == (20, 10)
    assert name_of((20, 10)) == "20.10"
    for wrong in ("20", "20.x", "a.1", "-1.0", ""):
        with pytest.raises(InputError, match="names no head"):
            head_of(wrong)


# -- refused ---------------------------------------------------------------------------------------


def test_small_gaps_are_noise(heads, prompts):
    same = [
        tasks.Prompt(p.clean, p.clean, p.answer, p.alternative, p.spans) for p in prompts.prompts
    ]
    drawn = encode(head_models.tokenizer(), same)
    with pytest.raises(InputError, match=r"less than 0.5 apart.*allow_small_gap"):
        path_patch(heads, drawn)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"receivers": [(0, 1, "q")]}, "layer 0, below which"),
        ({"receivers": [(1, 1, "q")], "senders": [(2, 0)]}, "above the lowest receiver"),
        ({"receivers": [(1, 1, "o")]}, "side is q, k or v"),
        ({"receivers": []}, "receivers are 'logits' or"),
        ({"receivers": [(1, 9, "q")]}, "head 1.9 does not exist"),
        ({"position": "S2"}, "give position END"),
        ({"senders": [(5, 0)]}, "head 5.0 does not exist"),
        ({"freeze_others": True}, "receivers with side q"),
    ],
)
def test_paths_that_are_refused(heads, prompts, given, said):
    with pytest.raises(InputError, match=said):
        path_patch(heads, prompts, **given, allow_small_gap=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"top_share": 0.0}, "top is 0.0"),
        ({"stages": STAGES[1:]}, "needs stage 'movers' before it"),
        ({"stages": ()}, "at least one stage"),
    ],
)
def test_discoveries_that_are_refused(heads, prompts, given, said):
    with pytest.raises(InputError, match=said):
        discover(heads, tasks.IOI, prompts, **given, allow_small_gap=True)


def test_models_that_are_refused():
    from transformers import (
        BertConfig,
        BertModel,
        BloomConfig,
        BloomForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    with pytest.raises(InputError, match="no transformers model"):
        HeadModel(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="no causal language model"):
        HeadModel(BertModel(BertConfig(**small, intermediate_size=16)))
    with pytest.raises(InputError, match="computes attention by itself"):
        HeadModel(BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=50)))
    gemma = {"intermediate_size": 16, "num_key_value_heads": 1, "head_dim": 8}
    with pytest.raises(InputError, match="which is not carried over"):
        HeadModel(Gemma2ForCausalLM(Gemma2Config(**small, **gemma)))
    window = {"intermediate_size": 16, "num_key_value_heads": 1, "sliding_window": 4}
    with pytest.raises(InputError, match="sliding_window"):
        HeadModel(MistralForCausalLM(MistralConfig(**small, **window)))


def test_the_model_is_as_it_was_when_refused():
    from transformers import MistralConfig, MistralForCausalLM

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    model = MistralForCausalLM(
        MistralConfig(**small, intermediate_size=16, num_key_value_heads=1, sliding_window=4)
    )
    with pytest.raises(InputError):
        HeadModel(model)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())


# -- repairs ---------------------------------------------------------------------------------------


def test_repairs_are_files(heads, tmp_path):
    drawn = tasks.COLORED_OBJECTS_NATURAL.fitting(head_models.tokenizer(), 0, 6)
    made = recipe.Repair(
        circuit_repair=1, task="colored_objects_natural", heads=["2.1", "1.3"],
        look_at=["wrong1", "wrong2"], prompts=6, random_sets=2,
    )  # fmt: skip
    recipe.save(made, tmp_path / "repair.yml")
    again = recipe.load(tmp_path / "repair.yml")
    assert again.model_dump() == made.model_dump()
    done = recipe.apply(again, heads, drawn)
    assert done.none.difference.tolist() == pytest.approx(
        evaluate(heads, drawn).difference.tolist(), abs=1e-4
    )
    plain = force_attention(heads, drawn, [(2, 1), (1, 3)], ["wrong1", "wrong2"])
    assert done.repaired.difference.tolist() == pytest.approx(plain.difference.tolist(), abs=1e-4)
    assert len(done.random) == 2
    told = done.to_dict()
    assert told["heads"] == ["2.1", "1.3"]
    assert told["new_mistakes"] == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("circuit_repair: 1\ntask: ioi\nheads: [a]\nlook_at: [IO]\n", "write LAYER.HEAD"),
        ("circuit_repair: 1\ntask: io\nheads: ['1.1']\nlook_at: [IO]\n", "Did you mean 'ioi'"),
        ("circuit_repair: 1\ntask: ioi\nheads: []\nlook_at: [IO]\n", "r.yml:3: heads"),
        ("circuit_repair: 2\ntask: ioi\nheads: ['1.1']\nlook_at: [IO]\n", "r.yml:1"),
        ("circuit_repair: 1\ntask: ioi\nheds: ['1.1']\nlook_at: [IO]\n", "heads"),
        ("models: {}\n", "circuit_repair"),
        ("", "no recipe"),
        ("a: [", "r.yml"),
    ],
)
def test_repairs_that_are_refused(tmp_path, text, said):
    path = tmp_path / "r.yml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=said):
        recipe.load(path)


def test_numbers_that_yaml_reads_as_such(tmp_path):
    """24.10 without quotes is 24.1 to YAML, another head: numbers are refused."""
    path = tmp_path / "r.yml"
    start = "circuit_repair: 1\ntask: ioi\nlook_at: [IO]\n"
    path.write_text(start + "heads: ['24.4', '24.10']\n")
    assert recipe.load(path).chosen() == [(24, 4), (24, 10)]
    path.write_text(start + "heads: [24.10]\n")
    with pytest.raises(RecipeError, match="put heads in quotes"):
        recipe.load(path)


# -- pages -----------------------------------------------------------------------------------------


def test_the_page(circuit):
    import re
    from xml.etree import ElementTree

    made = render.html(circuit)
    drawn = re.search(r'<svg class="chart[^>]*aria-label="Circuit of ioi">.*?</svg>', made, re.S)
    assert drawn
    root = ElementTree.fromstring(drawn[0])  # well-formed
    nodes = {text.text for text in root.iter("text")}
    assert {name_of(head) for head in circuit.heads} <= nodes
    titles = [title.text or "" for title in root.iter("title")]
    assert sum(" to logits: " in one for one in titles) == len(circuit.stage("movers").heads)
    assert sum("(middle)" in one for one in titles) == len(circuit.stage("middle").heads) * len(
        circuit.stage("middle").receivers
    )
    # later layers stand higher
    places = {
        group.find("text").text: float(group.find("circle").get("cy"))  # type: ignore[union-attr]
        for group in root.iter("g")
    }
    by_layer = sorted((head[0], places[name_of(head)]) for head in circuit.heads)
    assert [y for _, y in by_layer] == sorted((y for _, y in by_layer), reverse=True)
    assert made.count("Effects by layer and head") >= 3
    assert "<script>alert" not in render.html(
        Circuit.from_dict(circuit.to_dict() | {"task": "<script>alert", "model": "<script>alert"})
    )


def test_the_terminal(circuit):
    told = render.terminal(circuit)
    assert "tiny; " in told
    assert "warning: the model answers 0% of ioi" in told
    first = circuit.stage("movers").heads[0]
    assert any(line.split()[:2] == ["movers", name_of(first)] for line in told.splitlines())
    assert "overlap (of the smaller)" in render.compared(
        circuit, circuit, overlap(circuit, circuit)
    )


def test_stages_without_receivers(heads, prompts):
    """Heads of the first layer have none below them."""
    stages = (Stage("movers"), Stage("next", "q", "movers"), Stage("last", "k", "next", "negative"))
    found = discover(
        HeadModel(head_models.llama(vocabulary=1500, layers=1)),
        tasks.IOI,
        prompts,
        stages=stages,
        allow_small_gap=True,
    )
    assert [stage.stage.name for stage in found.stages] == ["movers"]
    assert "stage next: movers has no head above others" in found.warnings
    assert "stage last: next has no negative head above others" in found.warnings
