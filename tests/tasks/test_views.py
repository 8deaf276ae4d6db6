import numpy as np
import pytest
import torch

from pluribus.tasks import views
from pluribus.tasks.sets import DataError, images
from pluribus.tasks.views import Sizes, crops, generator, textures

SQUARE = torch.tensor([[[0.0, 0.1], [0.2, 0.3]]])
GRID = torch.arange(16.0).reshape(1, 4, 4) / 16


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (views.identity, [[0.0, 0.1], [0.2, 0.3]]),
        (views.rot90, [[0.1, 0.3], [0.0, 0.2]]),
        (views.rot180, [[0.3, 0.2], [0.1, 0.0]]),
        (views.inverted, [[1.0, 0.9], [0.8, 0.7]]),
        (views.flipped, [[0.2, 0.3], [0.0, 0.1]]),
        (views.transposed, [[0.0, 0.2], [0.1, 0.3]]),
        (views.shuffled, [[0.2, 0.0], [0.3, 0.1]]),
    ],
)
def test_view_by_hand(view, expected):
    before = SQUARE.clone()
    torch.testing.assert_close(view(SQUARE), torch.tensor([expected]))
    assert torch.equal(before, SQUARE)


def test_shuffled_moves_whole_quadrants():
    expected = torch.tensor([[8, 9, 0, 1], [12, 13, 4, 5], [10, 11, 2, 3], [14, 15, 6, 7]]) / 16
    torch.testing.assert_close(views.shuffled(GRID)[0], expected)


def test_over_keeps_the_brighter_pixel():
    wall = torch.tensor([[[0.5, 0.0], [0.0, 0.5]]])
    torch.testing.assert_close(views.over(SQUARE, wall), torch.tensor([[[0.5, 0.1], [0.2, 0.5]]]))


def test_resized_keeps_constants_and_interpolates():
    torch.testing.assert_close(
        views.resized(torch.full((2, 8, 8), 0.4), 28), 0.4 * torch.ones(2, 28, 28)
    )
    ramp = views.resized(torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]), 4)[0, 0]
    torch.testing.assert_close(ramp, torch.tensor([0.0, 0.25, 0.75, 1.0]))


def test_grey_scales_and_averages_colours():
    plain = np.array([[[0, 16]]], np.uint8)
    torch.testing.assert_close(views.grey(plain, 16), torch.tensor([[[0.0, 1.0]]]))
    colour = np.array([[[[0, 255, 255]]]], np.uint8)
    torch.testing.assert_close(views.grey(colour, 255), torch.tensor([[[2 / 3]]]))


def test_crops_are_squares_of_the_photos():
    photos = torch.arange(2 * 5 * 6.0).reshape(2, 5, 6)
    cut = crops(photos, 200, 3, generator(0, "t", "crops"))
    every = {
        tuple(photos[i, a : a + 3, b : b + 3].flatten().tolist())
        for i in range(2)
        for a in range(3)
        for b in range(4)
    }
    assert {tuple(square.flatten().tolist()) for square in cut} == every


def test_textures_are_dim_and_differ():
    drawn = textures(3, 8, generator(0, "t", "textures"))
    assert drawn.min() >= 0
    assert drawn.max() <= 0.6
    assert not torch.equal(drawn[0], drawn[1])


def rows(tensor):
    return {row.numpy().tobytes() for row in tensor}


def test_no_image_crosses_from_one_pool_to_another():
    number = np.arange(1797, dtype=">u2").view(np.uint8).reshape(1797, 1, 2)
    marked = np.zeros((1797, 2, 2), np.uint8)
    marked[:, :1] = number
    found = images("digits")._replace(x_train=marked[:1437], x_test=marked[1437:])
    deck = views._deck(found, 2, 0, "digits")
    seen = {name: rows(x) for name, (x, _) in deck.pools.items()}
    assert [len(s) for s in seen.values()] == [1077, 360, 360]
    assert len(set.union(*seen.values())) == 1797


def test_tasks_of_a_set_share_its_pools():
    tasks = views.demo8(0, Sizes(200, 100, 100))
    deal = {name: rows(tasks["identity"].split(name).x) for name in ("train", "val", "test")}
    turned = tasks["rot180"]
    for split in ("val", "test"):
        back = views.rot180(turned.split(split).x.reshape(-1, 8, 8)).flatten(1)
        assert not rows(back) & deal["train"]


def test_demo8_needs_no_folder_and_deals_what_was_asked(own_folders):
    tasks = views.demo8(0, Sizes(50, 20, 30))
    assert list(tasks) == [
        *("identity", "rot90", "inverted", "flipped", "shuffled"),
        *("background", "rot180", "transposed"),
    ]
    for task in tasks.values():
        assert [len(task.split(s).y) for s in ("train", "val", "test")] == [50, 20, 30]
        assert task.train.x.shape == (50, 64)
        assert task.train.x.dtype == torch.float32
        assert 0 <= task.train.x.min() < task.train.x.max() <= 1
        assert task.classes == tuple("0123456789")


def test_labels_belong_to_their_images():
    found = images("digits")
    label = {
        (x / 16).astype(np.float32).tobytes(): int(y)
        for x, y in zip(found.x_train, found.y_train, strict=True)
    }
    task = views.demo8(0)["flipped"]
    back = views.flipped(task.train.x.reshape(-1, 8, 8))
    dealt = [label[image.contiguous().numpy().tobytes()] for image in back]
    assert dealt == task.train.y.tolist()


def test_same_seed_same_bits_and_another_seed_another_deal():
    first, again, other = (views.demo8(seed, Sizes(40, 40, 40)) for seed in (3, 3, 4))
    for name in first:
        for split in ("train", "val", "test"):
            assert torch.equal(first[name].split(split).x, again[name].split(split).x)
        assert not torch.equal(first[name].train.x, other[name].train.x)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    views.demo8(0, Sizes(10, 10, 10))
    assert torch.equal(before, torch.get_rng_state())


def test_merge8_has_the_pages_sizes(real_data):
    tasks = views.merge8(0)
    assert len(tasks) == 8
    for name, task in tasks.items():
        sizes = [len(task.split(s).y) for s in ("train", "val", "test")]
        assert sizes == ([1077, 360, 360] if name.startswith("digits") else [1500, 500, 500])
        assert task.train.x.shape[1] == 784
    assert tasks["background"].train.x.mean() > tasks["identity"].train.x.mean()


def test_merge8_without_data_says_so(own_folders):
    with pytest.raises(DataError, match=r"no image set 'mnist': looked for vision/mnist\.npz"):
        views.merge8(0)
