"""Inventories saved and read again, and what mhr refuses."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from pluribus.core.errors import FormatError, InputError, MismatchError, MissingError, OutputError
from pluribus.core.optional import optional
from pluribus.route import mhr

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))  # collected without a package
sys.path.insert(0, str(Path(__file__).parent))
from layers import Conv1D
from skills import inputs, net, stir, wrapped

peft = optional("peft", "hf", "to compare with")
pytestmark = pytest.mark.filterwarnings(  # peft asks transformers by the old name
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


def test_save_and_load(tmp_path):
    model = wrapped()
    model.new_task("z", adapt="z")
    model.new_task("own", adapt="mu")
    stir(model, seed=4)
    model.save(tmp_path / "inventory.safetensors")
    x, names = inputs(), ["own", "z", "a", "b", "c", "own"]
    expected = model(x, task_ids=names)
    for again in (mhr.load(tmp_path / "inventory.safetensors", net()), wrapped(tasks=["other"])):
        again.load(tmp_path / "inventory.safetensors")
        assert again.names == model.names
        assert torch.equal(again(x, task_ids=names), expected)
    assert list(tmp_path.iterdir()) == [tmp_path / "inventory.safetensors"]
    with pytest.raises(OutputError, match="exists already"):
        model.save(tmp_path / "inventory.safetensors")
    model.save(tmp_path / "inventory.safetensors", overwrite=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skills": 4}, "skills is 3 in the file, but 4 here"),
        ({"heads": 4}, "heads is 2 in the file, but 4 here"),
        ({"rank": 1}, "rank is 2 in the file, but 1 here"),
        ({"granularity": "model"}, "granularity is 'layer' in the file"),
        ({"targets": "up"}, "they differ in down"),
    ],
)
def test_an_inventory_of_another_form_is_refused(changes, message, tmp_path):
    wrapped().save(tmp_path / "one")
    other = wrapped(**changes)
    before = other(inputs(), task_ids="a")
    with pytest.raises(MismatchError, match=message):
        other.load(tmp_path / "one")
    assert torch.equal(other(inputs(), task_ids="a"), before)


def test_files_that_are_no_inventories(tmp_path):
    from safetensors.torch import save_file

    model = wrapped()
    with pytest.raises(MissingError, match="no such inventory"):
        model.load(tmp_path / "none")
    (tmp_path / "text").write_text("words")
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        model.load(tmp_path / "text")
    save_file({"w": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(FormatError, match="not an inventory"):
        mhr.load(tmp_path / "other", net())
    model.save(tmp_path / "one")
    base = net()
    torch.nn.init.ones_(base.up.bias)
    with pytest.raises(MismatchError, match="this base has other tensors"):
        mhr.load(tmp_path / "one", base)
    assert all(p.requires_grad for p in base.parameters())
    assert not base.up._forward_hooks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "up: 3 heads do not divide the layer's 8 inputs; the largest .* fits is 2"),
        ({"targets": "down", "heads": 6}, "down: 6 heads do not divide the layer's 4 outputs"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"skills": 0}, "skills is 0; it must be at least 1"),
        ({"heads": 0}, "heads is 0; it must be at least 1"),
        ({"mode": ("relaxed", "straight_through")}, "never used together"),
        ({"targets": "sideways"}, "matches no module; .* such as up, down"),
        ({"targets": "("}, "is no regular expression"),
        ({"granularity": "fine"}, "expected one of layer, module, block, stack, model"),
        ({"tasks": ()}, "at least one"),
        ({"tasks": ("a", "a")}, "named twice: a"),
    ],
)
def test_bad_settings(changes, message):
    base = net()
    with pytest.raises(InputError, match=message):
        wrapped(base, **changes)
    assert not base.up._forward_hooks
    assert all(p.requires_grad for p in base.parameters())


def test_layers_of_other_kinds_are_refused():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 8)
            self.old = Conv1D(6, 8)
            self.attention = nn.MultiheadAttention(8, 2)

    with pytest.raises(InputError, match="matches table: a Embedding is no linear layer"):
        wrapped(Mixed(), targets="table")
    with pytest.raises(InputError, match="reads without calling it"):
        wrapped(Mixed(), targets=r"attention\.out_proj")
    assert wrapped(Mixed(), targets="old").inventories[0].inputs == 8


def test_bad_calls():
    model = wrapped()
    x = inputs()
    with pytest.raises(InputError, match="the batch has no task ids"):
        model(x)
    with pytest.raises(
        InputError, match=r"no task 'bb'; .* Did you mean 'b'\? Or add it: model.new"
    ):
        model(x, task_ids=["bb"] * 6)
    with pytest.raises(InputError, match="no task number 3; there are 3, from 0"):
        model(x, task_ids=torch.tensor([0, 1, 2, 3, 0, 1]))
    with pytest.raises(InputError, match="no task number -1"):
        model(x, task_ids=[-1] * 6)
    with pytest.raises(InputError, match="neither a name nor a whole number"):
        model(x, task_ids=torch.rand(6))
    for nothing in ([], torch.tensor(0)):
        with pytest.raises(InputError, match="no task id is given"):
            model(x, task_ids=nothing)
    with pytest.raises(MismatchError, match="given 6 rows, but 4 task ids"):
        model(x, task_ids=list("abca"))
    with pytest.raises(InputError, match="a routed layer has no one weight to merge"):
        model.materialise(None)
    with pytest.raises(InputError, match="no task 'd'"):
        model.collapse("d")
    with pytest.raises(InputError, match="nothing to train as 'mu'"):
        model.trainable("mu")
    with pytest.raises(InputError, match="expected all, z or mu"):
        model.trainable("everything")
    with pytest.raises(InputError, match="task 'a' is there already"):
        model.new_task("a")
    with pytest.raises(InputError, match="expected one of mhr, z, mu"):
        model.new_task("new", adapt="lora")
    with pytest.raises(InputError, match="cannot generate"):
        model.generate(x, task_ids="a")
    import copy

    with pytest.raises(InputError, match=r"call model\.copy"):
        copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.diagnostics()  # its logits are large
