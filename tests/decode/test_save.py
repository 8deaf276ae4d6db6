"""A fused model as a folder: the same logits bit for bit, by copies or references."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from pluribus.core.errors import FormatError, InputError, MismatchError, MissingError, OutputError
from pluribus.decode import DynamicFusion, Fused, Product, StaticFusion, Unadapted
from pluribus.decode._save import MANIFEST

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from members import ids, moved, tiny, tokenizer, trio  # type: ignore[import-not-found]


@pytest.fixture
def fused():
    words = tokenizer()
    made = Fused(trio(), DynamicFusion(), dict.fromkeys(("large", "base", "expert"), words))
    made.set_prompts({"expert": "Review: {prompt}"})
    return made


def test_the_same_logits_bit_for_bit(fused, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected = fused(ids()).logits
    fused.save_pretrained(tmp_path / "fused")
    for again in (
        Fused.from_pretrained(tmp_path / "fused"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "fused"),
    ):
        assert isinstance(again, Fused)
        assert torch.equal(again(ids()).logits, expected)
        assert again.roles == fused.roles
        assert again.fuser == fused.fuser
        assert again.prompts == fused.prompts
        assert again.vocabulary_checked
        settings = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(again.generate(ids(), **settings), fused.generate(ids(), **settings))
    words = AutoTokenizer.from_pretrained(tmp_path / "fused")
    assert words.get_vocab() == tokenizer().get_vocab()


def test_half_precision_stays(tmp_path):
    from transformers import LlamaForCausalLM

    for role, model in trio().items():
        model.save_pretrained(tmp_path / role)
    members = {
        role: LlamaForCausalLM.from_pretrained(tmp_path / role, dtype=torch.bfloat16)
        for role in ("large", "base", "expert")
    }
    fused = Fused(members, StaticFusion())
    expected = fused(ids()).logits
    fused.save_pretrained(tmp_path / "fused")
    again = Fused.from_pretrained(tmp_path / "fused")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(ids()).logits, expected)
    wide = Fused.from_pretrained(tmp_path / "fused", dtype=torch.float32)
    assert wide.dtype == torch.float32
    wide.save_pretrained(tmp_path / "wide")
    again = Fused.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    assert torch.equal(again(ids()).logits, expected)


def test_a_shared_model_is_written_once(tmp_path):
    base = tiny(1)
    fused = Fused({"large": base, "base": base, "expert": moved(base, 2)}, StaticFusion())
    fused.save_pretrained(tmp_path / "fused")
    assert len(list((tmp_path / "fused" / "members").iterdir())) == 2
    again = Fused.from_pretrained(tmp_path / "fused")
    assert len(again.members) == 2
    assert torch.equal(again(ids()).logits, fused(ids()).logits)


def test_fused_models_inside(tmp_path):
    outer = Fused({"a": Fused(trio(), StaticFusion()), "b": tiny(5)}, Product())
    outer.save_pretrained(tmp_path / "outer")
    again = Fused.from_pretrained(tmp_path / "outer")
    assert torch.equal(again(ids()).logits, outer(ids()).logits)


def test_references_are_checked(tmp_path):
    members = trio()
    members["large"].save_pretrained(tmp_path / "large")
    fused = Fused(members, StaticFusion())
    fused.save_pretrained(tmp_path / "fused", references={"large": tmp_path / "large"})
    assert len(list((tmp_path / "fused" / "members").iterdir())) == 2
    again = Fused.from_pretrained(tmp_path / "fused")
    assert torch.equal(again(ids()).logits, fused(ids()).logits)
    tiny(7, layers=3).save_pretrained(tmp_path / "large")
    with pytest.raises(MismatchError, match="other tensors than the member that was saved"):
        Fused.from_pretrained(tmp_path / "fused")
    os.rename(tmp_path / "large", tmp_path / "gone")
    with pytest.raises(MissingError, match="not there any more"):
        Fused.from_pretrained(tmp_path / "fused")


def test_digests_tell_fusers_apart(fused):
    from pluribus.route.store import digest

    before = digest(fused)
    fused.fuser = StaticFusion(alpha=0.5)
    assert digest(fused) != before
    fused.fuser = DynamicFusion()
    assert digest(fused) == before


def test_places_that_are_refused(fused, tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="exists and is no fused model"):
        fused.save_pretrained(tmp_path / "notes", overwrite=True)
    with pytest.raises(OutputError, match="no such folder to write into"):
        fused.save_pretrained(tmp_path / "no" / "fused")
    with pytest.raises(InputError, match="references names 'other'"):
        fused.save_pretrained(tmp_path / "fused", references={"other": "x"})
    fused.save_pretrained(tmp_path / "fused")
    with pytest.raises(OutputError, match="exists already"):
        fused.save_pretrained(tmp_path / "fused")
    before = (tmp_path / "fused" / MANIFEST).read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(fused.members[0]), "save_pretrained", full)
        with pytest.raises(OutputError, match="No space left"):
            fused.save_pretrained(tmp_path / "fused", overwrite=True)
    assert (tmp_path / "fused" / MANIFEST).read_bytes() == before
    fused.fuser = StaticFusion()
    fused.save_pretrained(tmp_path / "fused", overwrite=True)
    assert Fused.from_pretrained(tmp_path / "fused").fuser == StaticFusion()
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "fused"}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda told: told.pop("fuser"), FormatError, "not the manifest"),
        (lambda told: told.update(version=9), FormatError, "version 9 of the format"),
        (lambda told: told.update(format="other"), FormatError, "another format"),
        (lambda told: told["roles"].update(large=7), FormatError, "not a whole fused model"),
        (lambda told: told["members"].__setitem__(0, "x"), FormatError, "a folder and a digest"),
        (lambda told: told["members"][1].update(digest="0"), MismatchError, "other tensors"),
    ],
)
def test_folders_that_are_refused(fused, tmp_path, change, error, said):
    fused.save_pretrained(tmp_path / "fused")
    where = tmp_path / "fused" / MANIFEST
    told = json.loads(where.read_text())
    change(told)
    where.write_text(json.dumps(told))
    with pytest.raises(error, match=said):
        Fused.from_pretrained(tmp_path / "fused")


def test_what_cannot_be_written_down(tmp_path):
    class Mine:
        def check_roles(self, roles):
            pass

        def __call__(self, logits):
            return Product()(logits)

    fused = Fused(trio(), Mine())
    assert fused(ids()).logits.shape == (3, 9, 330)
    with pytest.raises(InputError, match="a Mine cannot be written down"):
        fused.save_pretrained(tmp_path / "fused")
    with pytest.raises(MissingError, match="no fused model in it"):
        Fused.from_pretrained(tmp_path)
    assert Unadapted(1) == Unadapted(1)
