"""The two beds of the claim `mhr`: 24 small tasks each, of images and of texts.

Images: five classes of Fashion-MNIST (18 tasks) or of scikit-learn's digits (6) under one of six
transforms. Texts: five classes of banking77 (15 tasks), five kinds of question of trec (5), four
topics of ag_news (4), on MiniLM as it was published, whose last layer is adapted; those below are
run once for each text. Labels are permuted. Six tasks, some of each set, are kept for few-shot
learning.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pluribus.claims import OnStep
from pluribus.claims._minilm_tail import Tail, encoder_of, lower
from pluribus.core.shapes import Float
from pluribus.tasks import zoo as zoos
from pluribus.tasks.encoders import minilm
from pluribus.tasks.views import TRANSFORMS, Sizes, Split, TaskData, flipped, generator, vision6
from pluribus.tasks.zoos import text6

VIEWS = {**TRANSFORMS, "flipped": flipped}
CLASSES = 5  # of each task, at most
TRAIN, HELD, TEST = 64, 60, 150  # inputs of each task
SHOTS = 8  # of each class
TEXTS = {"banking77": (15, 4), "trec": (5, 1), "ag_news": (4, 1)}  # tasks, few-shot ones of them
TEXT_SIZES = Sizes(train=9000, val=3000, test=3000)  # of the sets they are dealt from
LENGTH, LOWER = 24, 5  # tokens; of MiniLM's six layers, run once

Tasks = tuple[dict[str, TaskData], dict[str, TaskData]]  # that train together; for few-shot


@dataclass(frozen=True)
class Bed:
    """A frozen model and its tasks, and how long to learn them."""

    name: str
    model: Callable[[int, OnStep | None], nn.Module]  # with an attribute `width`
    tasks: Callable[[int], Tasks]
    targets: str  # layers that get adapters
    steps: int
    few_steps: int


def images(seed: int) -> Tasks:
    """Deal the image tasks."""
    rng = generator(seed, "mhr", "tasks")
    plain = vision6(seed, classes=None)
    sources = {"clothes": plain["identity"], "digits": plain["digits"]}
    held = torch.randint(4, (len(VIEWS),), generator=rng).tolist()
    known, new = {}, {}
    for number in range(4 * len(VIEWS)):
        turn, which = divmod(number, len(VIEWS))
        view = list(VIEWS)[which]
        source = "digits" if turn == 3 else "clothes"
        name = f"{source}-{view}-{turn}"
        chosen = torch.randperm(10, generator=rng)[:CLASSES]
        few = held[which] == turn
        made = {}
        for split, count in (("train", TRAIN), ("val", HELD), ("test", TEST)):
            whole = _only(sources[source].split(split), chosen)
            if split == "train" and few:
                x, y = whole.shots(SHOTS, rng)
            else:
                x, y = whole.at(torch.randperm(len(whole.y), generator=rng)[:count])
            made[split] = Split(VIEWS[view](x[:, 0])[:, None].contiguous(), y)
        classes = tuple(str(label) for label in chosen.tolist())
        (new if few else known)[name] = TaskData(name, **made, classes=classes)
    return known, new


def _only(split: Split, chosen: Tensor) -> Split:
    """Return the examples of some classes, labelled by their place among the chosen."""
    place = torch.full((int(split.y.max()) + 1,), -1)
    place[chosen] = torch.arange(len(chosen))
    kept = place[split.y] >= 0
    return Split(split.x[kept], place[split.y[kept]])


def _vision6(seed: int, on_step: OnStep | None) -> nn.Module:
    return zoos.build("vision6", seed, on_step=on_step).module()


def texts(seed: int) -> Tasks:
    """Deal the text tasks; inputs are hidden states with the mask as a last column."""
    rng = generator(seed, "mhr", "texts")
    encoder = encoder_of()
    known, new = {}, {}
    for source, (count, fresh) in TEXTS.items():
        whole = text6._task(source, seed, TEXT_SIZES, LENGTH)
        few = set(torch.randperm(count, generator=rng)[:fresh].tolist())
        for number in range(count):
            chosen = torch.randperm(len(whole.classes), generator=rng)[:CLASSES]
            made = {}
            for split, most in (("train", TRAIN), ("val", HELD), ("test", TEST)):
                found = _only(whole.split(split), chosen)
                if split == "train" and number in few:
                    x, y = found.shots(SHOTS, rng)
                else:
                    x, y = found.at(torch.randperm(len(found.y), generator=rng)[:most])
                made[split] = Split(_hidden(encoder, x), y)
            name = f"{source}-{number}"
            names = tuple(whole.classes[i] for i in chosen.tolist())
            (new if number in few else known)[name] = TaskData(name, **made, classes=names)
    return known, new


def _hidden(encoder: minilm.MiniLM, ids: Tensor) -> Tensor:
    """Return (b, s, d + 1)."""
    made: Mapping[str, Tensor] = lower(encoder, ids, LOWER)
    return torch.cat([made["hidden"], made["attention_mask"][:, :, None].float()], 2)


class Joined(Tail):
    """The last layers of MiniLM, on hidden states whose last column is the mask."""

    def __init__(self, encoder: minilm.MiniLM, first: int) -> None:
        super().__init__(encoder, first)
        self.width = encoder.width

    def forward(self, x: Float[Tensor, "b s e"]) -> Float[Tensor, "b d"]:  # type: ignore[override]
        """Return the features."""
        return super().forward(x[:, :, :-1], x[:, :, -1].long())


def _tail(seed: int, on_step: OnStep | None) -> nn.Module:
    return Joined(encoder_of(), LOWER).eval()


IMAGES = Bed("images", _vision6, images, r"blocks\.\d+\.(attention\.(qkv|out)|up|down)", 250, 30)
TEXT = Bed(
    "texts",
    _tail,
    texts,
    r"layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)",
    100,
    30,
)
