"""Eight real image sets as tasks of one shape: colour, 32x32, values in [0, 1].

Greyscale sets get three equal channels; smaller images are scaled up bilinearly. A quarter of each
set's training images is set aside for validation, by a shuffle drawn from the seed, and test images
are the set's own.

The eight: MNIST and USPS (the same classes, written and scanned differently), Fashion-MNIST,
notMNIST, CIFAR-10, GTSRB (43 traffic signs), Omniglot (which of 8 alphabets a character is from,
other drawers in the test), and three kinds of blood cells. The last stands in the place that
PneumoniaMNIST could have: that set's training images are 90 % and its test images 62 % of one
class, which would measure the shift of the classes more than the merge.

GTSRB's training images come in tracks of near-equal frames, so its validation score is optimistic.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pluribus.core.errors import InputError, nearest
from pluribus.core.shapes import Float, UInt8
from pluribus.tasks.sets import images
from pluribus.tasks.views import Sizes, Split, TaskData, generator

SETS = (
    *("mnist", "fashion_mnist", "notmnist", "usps"),
    *("cifar10", "gtsrb", "omniglot", "blood_cells"),
)
SIDE = 32


def colour(x: UInt8[np.ndarray, "b h w *c"], peak: int) -> Float[Tensor, "b 3 32 32"]:
    """Return stored pixels in [0, 1], in three channels, scaled to 32x32."""
    scaled = torch.from_numpy(x).float() / peak
    planes = scaled.movedim(3, 1) if scaled.ndim == 4 else scaled[:, None].expand(-1, 3, -1, -1)
    if planes.shape[2:] != (SIDE, SIDE):
        planes = interpolate(planes, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return planes.contiguous()


def vision8(seed: int, sizes: Sizes, only: tuple[str, ...] = SETS) -> dict[str, TaskData]:
    """Return the eight tasks, or some of them. Raises DataError for a set that isn't there."""
    for name in only:
        if name not in SETS:
            raise InputError(
                f"no task '{name}' among the eight: {', '.join(SETS)}.{nearest(name, SETS)}"
            )
    return {name: _task(name, seed, sizes) for name in only}


def _task(name: str, seed: int, sizes: Sizes) -> TaskData:
    found = images(name)
    count = len(found.y_train)
    order = torch.randperm(count, generator=generator(seed, name, "train"))
    held = -(-count // 4)
    rows = {
        "train": order[held:][: sizes.train],
        "val": order[:held][: sizes.val],
        "test": torch.randperm(len(found.y_test), generator=generator(seed, name, "test")),
    }
    rows["test"] = rows["test"][: sizes.test]
    splits = []
    for split, picked in rows.items():
        x, y = (found.x_test, found.y_test) if split == "test" else (found.x_train, found.y_train)
        chosen = picked.numpy()
        splits.append(Split(colour(x[chosen], found.peak), torch.from_numpy(y[chosen]).long()))
    train, val, test = splits
    return TaskData(name, train, val, test, found.classes)
