"""Ways to look at an image, and the classification tasks dealt from them.

`merge8` is the bed of the tall-masks page: MNIST (28x28) as it is, rot90, inverted, flipped, with
its quadrants shuffled, over photographs (pixelwise max), and scikit-learn's digits upsampled to
28x28, upright and rotated by 180 degrees. `demo8` looks at the embedded 8x8 digits alone, so that
it needs no file; its last two views are rot180 and transposed.

A view maps images (b, h, w) in [0, 1] to the same. All views of a set look at the same images:
those are dealt once per seed into training and validation, and test images come from the set's own
test split, so no image that one task trains on is validated or tested on in another.

Differs from the page: backgrounds are 28x28 crops of CIFAR-10 (grey), not of scikit-learn's two
sample photographs, which the package doesn't carry; in `demo8` they are smooth random textures.
The digits are 1797 in all, so their tasks have fewer than 1500/500/500 images: 1077/360/360; in
`vision6` that is less than the page's 1200, as a quarter is for validation, which the page lacks.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from pluribus.core.errors import InputError
from pluribus.core.random import key
from pluribus.core.shapes import Float, Int, Shaped, UInt8
from pluribus.tasks.sets import ImageSet, images

Images = Float[Tensor, "b h w"]
View = Callable[[Images], Images]


class Split(NamedTuple):
    """Inputs and their class indices; an input may be a vector, an image, token ids."""

    x: Shaped[Tensor, "b ..."]
    y: Int[Tensor, " b"]

    def at(self, rows: Int[Tensor, " a"]) -> "Split":
        """Return some examples, in the given order."""
        return Split(self.x[rows], self.y[rows])

    def first(self, count: int) -> "Split":
        """Return the first `count` examples, or all if there are fewer."""
        return Split(self.x[:count], self.y[:count])

    def batches(self, size: int, rng: Generator) -> Iterator["Split"]:
        """Return an endless stream of batches of exactly `size`, shuffled anew each epoch.

        What doesn't fill a batch at the end of an epoch is left out. Raises InputError at once if
        there are fewer examples than a batch needs.
        """
        if not 1 <= size <= len(self.y):
            raise InputError(
                f"a batch of {size} from {len(self.y)} examples: give a size from 1 to that"
            )
        return self._endless(size, rng)

    def _endless(self, size: int, rng: Generator) -> Iterator["Split"]:
        whole = len(self.y) - len(self.y) % size
        while True:
            for rows in torch.randperm(len(self.y), generator=rng)[:whole].split(size):
                yield self.at(rows)

    def shots(self, count: int, rng: Generator) -> "Split":
        """Return `count` random examples of each class that occurs, class by class.

        Raises InputError if a class that occurs has fewer.
        """
        order = torch.randperm(len(self.y), generator=rng)
        rows = []
        for label in self.y.unique().tolist():
            own = order[self.y[order] == label]
            if not 1 <= count <= len(own):
                raise InputError(
                    f"{count} shots of class {label}: give a number from 1 to {len(own)}, "
                    "which is all there are"
                )
            rows.append(own[:count])
        return self.at(torch.cat(rows))


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

    def to(self, device: torch.device | str) -> "TaskData":
        """Return the task with its splits on a device."""
        splits = (self.train, self.val, self.test)
        train, val, test = (Split(x.to(device), y.to(device)) for x, y in splits)
        return replace(self, train=train, val=val, test=test)


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


def rolled(x: Images) -> Images:
    """Mirror top to bottom, then move the right half to the left."""
    return flipped(x).roll(x.shape[2] // 2, 2)


def resized(x: Images, side: int) -> Float[Tensor, "b y x"]:
    """Scale to side x side, bilinearly."""
    if x.shape[1:] == (side, side):
        return x
    return interpolate(x[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]


def grey(x: UInt8[np.ndarray, "b h w *c"], peak: int) -> Images:
    """Scale stored pixels to [0, 1] and average colours."""
    scaled = torch.from_numpy(x).float() / peak
    return scaled.mean(3) if scaled.ndim == 4 else scaled


def crops(photos: Images, count: int, side: int, rng: Generator) -> Float[Tensor, "a y x"]:
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


TRANSFORMS: dict[str, View] = {
    "identity": identity,
    "rot90": rot90,
    "rot180": rot180,
    "inverted": inverted,
    "rolled": rolled,
}
FEW = (0, 1, 5, 8, 9)  # the classes of Fashion-MNIST that the adamerging page takes


def vision6(
    seed: int,
    sizes: Sizes = Sizes(3000, 600, 600),  # noqa: B008
    classes: Collection[int] | None = FEW,
) -> dict[str, TaskData]:
    """Return the page's six tasks, images (b, 1, 28, 28). Needs the set fashion_mnist.

    Labels are the set's own, 0..9, also where some of its classes are left out.
    """
    clothes = _deck(_only(images("fashion_mnist"), classes), 28, seed, "fashion_mnist")
    digits = _deck(images("digits"), 28, seed, "digits")
    tasks = {name: clothes.deal(name, view, sizes, flat=False) for name, view in TRANSFORMS.items()}
    tasks["digits"] = digits.deal("digits", identity, sizes, flat=False)
    return tasks


def _only(found: ImageSet, classes: Collection[int] | None) -> ImageSet:
    if classes is None:
        return found
    train = np.isin(found.y_train, list(classes))
    test = np.isin(found.y_test, list(classes))
    return found._replace(
        x_train=found.x_train[train],
        y_train=found.y_train[train],
        x_test=found.x_test[test],
        y_test=found.y_test[test],
    )


@dataclass(frozen=True, eq=False)
class Deck:
    """The images of one set in three shuffled pools that share none."""

    pools: dict[str, tuple[Images, Int[Tensor, " b"]]]
    classes: tuple[str, ...]

    def deal(
        self,
        name: str,
        view: View,
        sizes: Sizes,
        walls: dict[str, Images] | None = None,
        *,
        flat: bool = True,
    ) -> TaskData:
        """Return a task that looks at the first images of each pool, as every other task does.

        Inputs are (b, h * w), or (b, 1, h, w) if not `flat`.
        """
        splits: list[Split] = []
        for split, most in sizes._asdict().items():
            x, y = self.pools[split]
            seen = view(x[:most])
            if walls is not None:
                seen = over(seen, walls[split][: len(seen)])
            splits.append(Split(seen.flatten(1) if flat else seen[:, None], y[:most]))
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
