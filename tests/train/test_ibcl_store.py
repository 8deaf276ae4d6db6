"""A knowledge base on disk comes back bit for bit, and damage is told."""

import json
import os
from functools import partial

import pytest
import torch
from torch import nn

from pluribus.core.errors import (
    FormatError,
    InputError,
    MismatchError,
    MissingError,
    OutputError,
)
from pluribus.core.weights import Weights
from pluribus.train.continual import CredalBase, store

NET = partial(nn.Linear, 4, 1)


def data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 4, generator=rng)
    return x, (x[:, seed % 4] > 0).long()


def base_of(tasks: int, **settings) -> CredalBase:
    base = CredalBase(NET, **{"epochs": 2, "lr": 1e-2, "d_thr": 0.004, **settings})
    for number in range(tasks):
        base.learn(f"task {number}", data(number))
    return base


@pytest.fixture
def kept(tmp_path):
    base = base_of(2)
    base.save(tmp_path / "kb")
    return base, tmp_path / "kb"


def equal(one: CredalBase, other: CredalBase) -> None:
    assert one.learned == other.learned
    assert one.settings() == other.settings()
    assert one.cost() == other.cost()
    for p, q in zip(one.points, other.points, strict=True):
        for name in p.mu:
            assert torch.equal(p.mu[name], q.mu[name])
            assert torch.equal(p.sigma[name], q.sigma[name])


def test_round_trip_and_what_follows_it(kept):
    base, folder = kept
    found = CredalBase.load(folder, NET)
    equal(base, found)
    assert found.network.features == (4,)
    wanted = {"task 0": 0.4, "task 1": 0.6}
    assert torch.equal(base.model(wanted)[0]["weight"], found.model(wanted)[0]["weight"])
    for one in (base, found):  # going on gives the same as never having stopped
        one.learn("task 2", data(2))
    equal(base, found)


def test_the_reuse_map_is_in_the_text(kept):
    base, folder = kept
    told = json.loads((folder / "knowledge.json").read_text())
    assert told["reuse"] == {task: list(points) for task, points in base.reuse.items()}
    assert told["settings"]["prior_stds"] == [0.2, 0.25, 0.3]
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]


def test_an_empty_base_is_kept_too(tmp_path):
    CredalBase(NET, steps=7, kl_weight="elbo").save(tmp_path / "kb")
    found = CredalBase.load(tmp_path / "kb", NET)
    assert (found.tasks, found.points) == ((), ())
    assert found.inference.steps == 7


def test_saving_again_replaces_the_points(kept):
    base, folder = kept
    base.learn("task 2", data(2))
    base.save(folder)
    equal(base, CredalBase.load(folder, NET))
    assert len(list(folder.glob("*.safetensors"))) == 1


def test_an_interrupted_save_leaves_the_old_state(kept, monkeypatch):
    base, folder = kept
    before = base.learned
    base.learn("task 2", data(2))
    real = os.replace

    def killed(source, target):
        if str(target).endswith("knowledge.json"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(OutputError, match="No space left"):
        base.save(folder)
    monkeypatch.undo()
    assert CredalBase.load(folder, NET).learned == before
    assert not list(folder.glob("*.partial"))
    base.save(folder)
    equal(base, CredalBase.load(folder, NET))


def test_a_folder_with_other_things_is_not_written_to(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(OutputError, match="holds something else"):
        base_of(0).save(tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        base_of(0).save(tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# -- damage ----------------------------------------------------------------------------------------


def rewrite(folder, change):
    told = json.loads((folder / "knowledge.json").read_text())
    change(told)
    (folder / "knowledge.json").write_text(json.dumps(told))


def retensor(folder, change):
    path = next(folder.glob("*.safetensors"))
    weights = Weights.open(path)
    tensors = {name: weights[name].clone() for name in weights}
    change(tensors)
    Weights.of(tensors).save(path)


def test_files_that_are_not_there(tmp_path, kept):
    with pytest.raises(MissingError, match=r"knowledge\.json: no such file"):
        CredalBase.load(tmp_path / "nowhere", NET)
    next(kept[1].glob("*.safetensors")).unlink()
    with pytest.raises(MissingError, match="not there"):
        CredalBase.load(kept[1], NET)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told.update(version=9), "version 9"),
        (lambda told: told.pop("tasks"), "not a knowledge base"),
        (lambda told: told["tasks"][0].update(points=[99, 0, 0]), "names point 99 of"),
        (lambda told: told["tasks"][0].pop("task"), "not a knowledge base"),
        (lambda told: told.update(file="../else.safetensors"), "plain file name"),
        (lambda told: told.update(points=999), "has no point"),
    ],
)
def test_text_that_was_changed(kept, change, said):
    rewrite(kept[1], change)
    with pytest.raises(FormatError, match=said):
        CredalBase.load(kept[1], NET)


@pytest.mark.parametrize("std", [0.0, -0.5])
def test_a_deviation_that_is_not_above_zero_is_refused_on_load(kept, std):
    retensor(kept[1], lambda tensors: tensors["0.sigma.bias"].fill_(std))
    with pytest.raises(InputError, match="bias: a standard deviation is"):
        CredalBase.load(kept[1], NET)


def test_points_that_were_changed(kept):
    retensor(kept[1], lambda tensors: tensors["0.mu.bias"].add_(1))
    with pytest.raises(FormatError, match="not as it was written"):
        CredalBase.load(kept[1], NET)
    path = next(kept[1].glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FormatError):
        CredalBase.load(kept[1], NET)


def test_text_that_is_no_json(kept):
    (kept[1] / "knowledge.json").write_text("{")
    with pytest.raises(FormatError, match="not a knowledge base"):
        CredalBase.load(kept[1], NET)


def test_another_network_is_refused(kept):
    with pytest.raises(MismatchError, match=r"weight is \[1, 4\] in one posterior, but \[1, 5\]"):
        CredalBase.load(kept[1], partial(nn.Linear, 5, 1))


def test_settings_that_cannot_be(kept):
    rewrite(kept[1], lambda told: told["settings"].update(d_thr=-1))
    with pytest.raises(InputError, match="d_thr"):
        CredalBase.load(kept[1], NET)
    rewrite(kept[1], lambda told: told["settings"].update(d_thr=1, colour="red"))
    with pytest.raises(FormatError, match="colour"):
        CredalBase.load(kept[1], NET)


def test_the_digest_counts_names_and_values():
    one = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert store._digest(one) == store._digest(dict(reversed(one.items())))
    assert store._digest(one) != store._digest({"a": torch.zeros(2), "b": torch.ones(2)})
