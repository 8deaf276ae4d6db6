"""Stacks: from a file to a model, as system folders of `tasks`, and what is refused."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from pluribus.core.errors import InputError, MismatchError, MissingError, RecipeError
from pluribus.decode import EFT, Fused
from pluribus.decode.stack import STACKS, build, open_reference, read
from pluribus.tasks import openers
from pluribus.tasks.language import CausalLM

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from members import ids, moved, tiny, tokenizer  # type: ignore[import-not-found]

STACK = """models: {ref: large, tuned: tuned, base: small}
fuser: {kind: eft, weights: {tuned: 0.8}}
prompts: {tuned: "Review: {prompt}"}
"""


@pytest.fixture
def place(tmp_path):
    base = tiny(1)
    for name, model in {"large": tiny(0), "small": base, "tuned": moved(base, 2)}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "stack.yml").write_text(STACK)
    return tmp_path


@pytest.fixture
def wired(monkeypatch):
    points = {
        name: EntryPoint(name, "pluribus.decode.stack:STACKS", "pluribus.openers")
        for name in ("fused.json", "stack.yml")
    }
    monkeypatch.setattr(openers, "_known", lambda: points)


def by_hand(place):
    from transformers import AutoModelForCausalLM

    models = {
        role: AutoModelForCausalLM.from_pretrained(place / name)
        for role, name in {"ref": "large", "tuned": "tuned", "base": "small"}.items()
    }
    return Fused(models, EFT(weights={"tuned": 0.8}))


def test_a_file_becomes_a_model(place, monkeypatch):
    expected = by_hand(place)(ids()).logits
    fused, words = build(read(place / "stack.yml"))
    assert torch.equal(fused(ids()).logits, expected)
    assert fused.prompts == {"tuned": "Review: {prompt}"}
    assert fused.vocabulary_checked
    assert words.get_vocab() == tokenizer().get_vocab()
    for reference in (place, place / "stack.yml", str(place / "stack.yml")):
        assert torch.equal(open_reference(reference).model(ids()).logits, expected)
    fused.save_pretrained(place / "saved")
    assert torch.equal(open_reference(place / "saved").model(ids()).logits, expected)
    plain = open_reference(place / "large").model
    assert not isinstance(plain, Fused)


def test_equal_references_are_one_model(place):
    (place / "same.yml").write_text(
        "models: {ref: small, tuned: tuned, base: small}\nfuser: {kind: eft}\ndtype: bfloat16\n"
    )
    fused = build(read(place / "same.yml")).model
    assert len(fused.members) == 2
    assert fused.dtype == torch.bfloat16
    assert fused(ids()).logits.dtype == torch.float32


def test_it_answers_as_any_model_does(place, wired):
    """`tasks` scores choices with a cache and positions of its own, and lets it write."""
    build(read(place / "stack.yml")).model.save_pretrained(place / "saved")
    questions, choices = (
        ["Review: a fine film\nSentiment:", "Answer:"],
        [" yes no", " maybe", " no"],
    )
    slow = by_hand(place)
    words = tokenizer()
    for reference in (place, place / "saved"):
        system = CausalLM.open(reference)
        assert isinstance(system.model, Fused)
        found, cut = system.choice_scores(questions, choices)
        assert cut == 0
        for row, question in enumerate(questions):
            start = words(question)["input_ids"]
            for column, choice in enumerate(choices):
                whole = words(question + choice)["input_ids"]
                with torch.no_grad():
                    logits = slow(torch.tensor([whole])).logits[0]
                terms = [logits[i - 1, whole[i]] for i in range(len(start), len(whole))]
                assert whole[: len(start)] == start
                expected = float(torch.stack(terms).mean())
                assert float(found[row, column]) == pytest.approx(expected, abs=1e-4)
        texts, _ = system.write(questions, 5, [])
        given = words(questions[0], return_tensors="pt")["input_ids"]
        made = slow.generate(given, max_new_tokens=5, do_sample=False)
        assert texts[0] == words.decode(made[0, given.shape[1] :], skip_special_tokens=True).lstrip(
            "\n "
        )
    first = CausalLM.open(place).digest()
    (place / "stack.yml").write_text(STACK.replace("0.8", "0.7"))
    assert CausalLM.open(place).digest() != first


def test_zoos_are_not_written_about(place):
    with pytest.raises(MismatchError, match="leave --zoo out"):
        STACKS.of_zoo(place, None, "stack", "cpu")  # type: ignore[arg-type]


def test_what_is_a_stack(place):
    assert STACKS.takes(place)
    assert STACKS.takes(place / "stack.yml")
    (place / "merge.yml").write_text("merge_method: linear\nmodels: [{model: small}]\n")
    (place / "broken.yml").write_text("models: {")
    for other in ("merge.yml", "broken.yml", "gone.yml", "large"):
        assert not STACKS.takes(place / other)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (("fuser:", "fusor:"), RecipeError, "stack.yml: unknown key 'fusor'.*'fuser'"),
        (("kind: eft", "kind: eff"), RecipeError, "no fuser is called 'eff'.*Did you mean 'eft'"),
        (("kind: eft, ", ""), RecipeError, "a fuser needs a kind"),
        (("weights: {tuned: 0.8}", "weight: 1"), RecipeError, "eft has no parameter 'weight'"),
        (("{tuned: 0.8}", ".nan"), RecipeError, "weights is nan"),
        (("ref: large, ", ""), RecipeError, "say ref='base'"),
        (("large", "larg"), MissingError, "larg"),
        (("tuned: tuned", "tuned: [a, b]"), RecipeError, "stack.yml:1: models.tuned"),
        (('{tuned: "Review: {prompt}"}', "{tuned: Review}"), RecipeError, "where the prompt goes"),
        (('{tuned: "Review', '{turned: "Review'), RecipeError, "template for 'turned'"),
        (("fuser:", "device: {tund: cpu}\nfuser:"), RecipeError, "device names 'tund'"),
        (("fuser:", "device: gpu\nfuser:"), InputError, "expected cpu, cuda or cuda:N"),
        (("fuser:", "dtype: int8\nfuser:"), InputError, "'int8' is no element type"),
        (("fuser:", "align: none\nfuser:"), RecipeError, "align"),
    ],
)
def test_stacks_that_are_refused(place, change, error, said):
    path = place / "stack.yml"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(error, match=said):
        build(read(path))


def test_tokens_that_differ_are_refused(place):
    words = tokenizer()
    words.add_tokens(["<more>"])
    words.save_pretrained(place / "tuned")
    with pytest.raises(MismatchError, match="has 1 tokens that 'ref' lacks, such as '<more>'"):
        build(read(place / "stack.yml"))


def test_files_that_are_no_stack(place):
    (place / "merge.yml").write_text("merge_method: linear\nmodels: [{model: small}]\n")
    with pytest.raises(RecipeError, match="is no stack: a stack has 'models' by role"):
        open_reference(place / "merge.yml")
    with pytest.raises(RecipeError, match="no such stack"):
        open_reference(place / "gone.yml")
    (place / "two.yml").write_text(STACK + "---\n" + STACK)
    with pytest.raises(RecipeError, match="holds 2 documents"):
        read(place / "two.yml")
