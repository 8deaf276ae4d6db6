"""Image classification: ten small sets, the suite of multi-task merging."""

from functools import partial

from pluribus.tasks.sets import IMAGES, images
from pluribus.tasks.task import Example, Examples, Task

SETS = (
    *("mnist", "fashion_mnist", "notmnist", "usps", "digits"),
    *("cifar10", "gtsrb", "pneumoniamnist", "omniglot", "blood_cells"),
)


def load(name: str) -> Examples:
    """Return the images (h, w) or (h, w, c), uint8 as stored, with the indices of their classes."""
    found = images(name)
    train, test = (
        [Example(image, int(label)) for image, label in zip(x, y, strict=True)]
        for x, y in ((found.x_train, found.y_train), (found.x_test, found.y_test))
    )
    return Examples(test, train, found.classes)


TASKS = [
    Task(name=name, load=partial(load, name), family="image", data=(name, IMAGES)) for name in SETS
]
GROUPS = {"vision10": SETS}
