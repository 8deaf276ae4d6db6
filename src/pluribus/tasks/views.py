"""Eight ways to look at an image, and the classification tasks dealt from them.

`merge8` is the bed of the tall-masks page: MNIST (28x28) as it is, rot90, inverted, flipped, with
its quadrants shuffled, over photographs (pixelwise max), and scikit-learn's digits upsampled to
28x28, upright and rotated by 180 degrees. `demo8` looks at the embedded 8x8 digits alone, so that
it needs no file; its last two views are rot180 and transposed.

A view maps images (b, h, w) in [0, 1] to the same. All views of a set look at the same images:
those are dealt once per seed into training and validation, and test images come from the set's own
test split, so no image that one task trains on is validated or tested on in another.

Differs from the page: backgrounds are 28x28 crops of CIFAR-10 (grey), not of scikit-learn's two
sample photographs, which the package doesn't carry; in `demo8` they are smooth random textures.
The digits are 1797 in all, so their tasks have fewer than 1500/500/500 images: 1077/360/360.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from pluribus.core.random import key
from pluribus.core.shapes import Float, Int, UInt8
from pluribus.tasks.sets import ImageSet, images

Images = Float[Tensor, "b h w"]
View = Callable[[Images], Images]


class Split(NamedTuple):
    """Inputs, flattened and in float32, and their class indices."""

    x: Float[Tensor, "b d"]
    y: Int[Tensor, " b"]


@dataclass(frozen=True, eq=False)
class TaskData:
    """One classification task; the three splits share no image."""

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]

    def split(self, name: str) -> Split:
        """Return the split called train, val or test."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]


class Sizes(NamedTuple):
    """The most images a task takes for each split."""

    train: int
    val: int
    test: int


def generator(seed: int, name: str, purpose: str) -> Generator:
    """Return a fresh generator whose stream depends on its three arguments alone."""
    return Generator().manual_seed(key(seed, name, purpose))


def identity(x: Images) -> Images:
    """Return the images as they are."""
    return x


def rot90(x: Images) -> Images:
    """Turn a quarter, counter-clockwise: the last column becomes the first row."""
    return x.rot90(1, (1, 2))


def rot180(x: Images) -> Images:
    """Turn upside down."""
    return x.rot90(2, (1, 2))


def inverted(x: Images) -> Images:
    """Swap black and white."""
    return 1 - x


def flipped(x: Images) -> Images:
    """Mirror top to bottom."""
    return x.flip(1)


def transposed(x: Images) -> Images:
    """Mirror about the main diagonal."""
    return x.transpose(1, 2)


def shuffled(x: Images) -> Images:
    """Move each quadrant one place clockwise."""
    h, w = x.shape[1] // 2, x.shape[2] // 2
    top = torch.cat((x[:, h:, :w], x[:, :h, :w]), 2)
    bottom = torch.cat((x[:, h:, w:], x[:, :h, w:]), 2)
    return torch.cat((top, bottom), 1)


def over(x: Images, background: Images) -> Images:
    """Lay images over a background of the same size: the brighter pixel wins."""
    return torch.maximum(x, background)


def resized(x: Images, side: int) -> Images:
    """Scale to side x side, bilinearly."""
    if x.shape[1:] == (side, side):
        return x
    return interpolate(x[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]


def grey(x: UInt8[np.ndarray, "b h w *c"], peak: int) -> Images:
    """Scale stored pixels to [0, 1] and average colours."""
    scaled = torch.from_numpy(x).float() / peak
    return scaled.mean(3) if scaled.ndim == 4 else scaled


def crops(photos: Images, count: int, side: int, rng: Generator) -> Images:
    """Cut `count` squares out of randomly chosen photographs, at random places."""
    b, h, w = photos.shape
    which = torch.randint(b, (count,), generator=rng)
    top = torch.randint(h - side + 1, (count, 1, 1), generator=rng)
    left = torch.randint(w - side + 1, (count, 1, 1), generator=rng)
    along = torch.arange(side)
    return photos[which[:, None, None], top + along[:, None], left + along]


def textures(count: int, side: int, rng: Generator) -> Images:
    """Draw smooth textures: 4x4 uniform noise in [0, 0.6), scaled up bilinearly."""
    return resized(0.6 * torch.rand(count, 4, 4, generator=rng), side)


def merge8(seed: int, sizes: Sizes = Sizes(1500, 500, 500)) -> dict[str, TaskData]:  # noqa: B008
    """Return the page's eight 28x28 tasks. Needs the sets mnist and cifar10."""
    mnist, digits, photos = images("mnist"), images("digits"), images("cifar10")
    rng = generator(seed, "background", "crops")
    walls = {
        "train": crops(grey(photos.x_train, photos.peak), sizes.train, 28, rng),
        "val": crops(grey(photos.x_train, photos.peak), sizes.val, 28, rng),
        "test": crops(grey(photos.x_test, photos.peak), sizes.test, 28, rng),
    }
    written = _deck(mnist, 28, seed, "mnist")
    printed = _deck(digits, 28, seed, "digits")
    plain: dict[str, View] = {
        "identity": identity,
        "rot90": rot90,
        "inverted": inverted,
        "flipped": flipped,
        "shuffled": shuffled,
    }
    tasks = {name: written.deal(name, view, sizes) for name, view in plain.items()}
    tasks["background"] = written.deal("background", identity, sizes, walls)
    tasks["digits"] = printed.deal("digits", identity, sizes)
    tasks["digits-rot180"] = printed.deal("digits-rot180", rot180, sizes)
    return tasks


def demo8(seed: int, sizes: Sizes = Sizes(1077, 360, 360)) -> dict[str, TaskData]:  # noqa: B008
    """Return eight tasks of the embedded 8x8 digits; no file outside the package is read."""
    rng = generator(seed, "background", "textures")
    walls = {split: textures(count, 8, rng) for split, count in sizes._asdict().items()}
    deck = _deck(images("digits"), 8, seed, "digits")
    plain: dict[str, View] = {
        "identity": identity,
        "rot90": rot90,
        "inverted": inverted,
        "flipped": flipped,
        "shuffled": shuffled,
    }
    tasks = {name: deck.deal(name, view, sizes) for name, view in plain.items()}
    tasks["background"] = deck.deal("background", identity, sizes, walls)
    tasks["rot180"] = deck.deal("rot180", rot180, sizes)
    tasks["transposed"] = deck.deal("transposed", transposed, sizes)
    return tasks


@dataclass(frozen=True, eq=False)
class Deck:
    """The images of one set in three shuffled pools that share none."""

    pools: dict[str, tuple[Images, Int[Tensor, " b"]]]
    classes: tuple[str, ...]

    def deal(
        self, name: str, view: View, sizes: Sizes, walls: dict[str, Images] | None = None
    ) -> TaskData:
        """Return a task that looks at the first images of each pool, as every other task does."""
        splits: list[Split] = []
        for split, most in sizes._asdict().items():
            x, y = self.pools[split]
            seen = view(x[:most])
            if walls is not None:
                seen = over(seen, walls[split][: len(seen)])
            splits.append(Split(seen.flatten(1), y[:most]))
        train, validation, test = splits
        return TaskData(name, train, validation, test, self.classes)


def _deck(found: ImageSet, side: int, seed: int, name: str) -> Deck:
    """Shuffle both splits, and set a quarter of the training images aside for validation."""
    x, y = resized(grey(found.x_train, found.peak), side), torch.from_numpy(found.y_train).long()
    order = torch.randperm(len(x), generator=generator(seed, name, "train"))
    val, train = order[: -(-len(x) // 4)], order[-(-len(x) // 4) :]
    x_test, y_test = resized(grey(found.x_test, found.peak), side), torch.from_numpy(found.y_test)
    test = torch.randperm(len(x_test), generator=generator(seed, name, "test"))
    pools = {
        "train": (x[train], y[train]),
        "val": (x[val], y[val]),
        "test": (x_test[test], y_test.long()[test]),
    }
    return Deck(pools, found.classes)
