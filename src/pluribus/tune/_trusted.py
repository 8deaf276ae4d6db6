"""Guesses to learn from without labels: two views of each input, and a few that are trusted.

Zhang et al., aTLAS, NeurIPS 2024, https://arxiv.org/abs/2407.02880, section 4.3. The base names a
class for every input once; the k most probable inputs of each class are trusted, with that class as
their label, k = min(floor(N / (10 v)), 100). A batch is three quarters of others, and one of them.

The authors' code marks every input as trusted, so that their loss is the plain cross-entropy with
the first guesses; here only the chosen ones are.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from pluribus.core.errors import InputError, listing
from pluribus.core.random import key
from pluribus.loss import logits_of
from pluribus.loss.ufm import Ufm, masked
from pluribus.tune._examples import Examples, taken, whole
from pluribus.tune._model import Forward, held
from pluribus.tune._streams import Batch

MOST = 100  # trusted inputs of a class
PART = 10  # one in so many inputs is trusted
View = Callable[[Any, Generator], Any]


class Trusted(NamedTuple):
    """Which inputs are trusted, as what, and what the base is sure of."""

    rows: Tensor  # (k,)
    labels: Tensor  # (k,) the classes
    sure: Tensor  # (n,) the class of each input, -1 where the base is not sure
    empty: list[int]  # classes that the base names for no input


def trust(q: Tensor, probabilities: Tensor, sure: float) -> Trusted:
    """Choose the trusted inputs by the base's probabilities, (n, v); `q` are its guesses.

    At least one input of each class that is named anywhere, and none of the others.
    """
    count, classes = probabilities.shape
    most = max(1, min(count // (PART * classes), MOST))
    highest, named = probabilities.max(1)
    rows: list[Tensor] = []
    for c in range(classes):
        own = (named == c).nonzero().flatten()
        rows.append(own[highest[own].argsort(descending=True, stable=True)[:most]])
    chosen = torch.cat(rows)
    return Trusted(
        chosen,
        named[chosen],
        torch.where(q.amax(1) > sure, q.argmax(1), -1),
        [c for c in range(classes) if not len(rows[c])],
    )


class TwoViews:
    """Batches with a weak and a strong view of each input, a quarter of them trusted ones.

    An epoch deals every other input once. Batches are mappings: `weak`, `strong`, `trusted` (b,)
    the trusted label or -1, `index` (b,) the input's number, `sure` (n,) what the base is sure of.
    Raises InputError if there is nothing but trusted inputs.
    """

    def __init__(
        self,
        inputs: Any,
        trusted: Trusted,
        *,
        weak: View,
        strong: View,
        batch_size: int = 128,
        seed: int = 0,
        name: str = "examples",
    ) -> None:
        self.inputs, self.trusted, self.weak, self.strong = inputs, trusted, weak, strong
        self.labels = torch.full_like(trusted.sure, -1)
        self.labels[trusted.rows] = trusted.labels
        self.others = (self.labels < 0).nonzero().flatten()
        if not len(self.others):
            raise InputError(
                f"{name}: all {len(self.labels)} inputs are trusted guesses of the base, so there "
                "is nothing to learn from; give more inputs"
            )
        self.quarter = batch_size // 4
        self.rest = max(1, batch_size - self.quarter)
        self._rng = Generator().manual_seed(key(seed, name, "views"))

    def __len__(self) -> int:
        """Batches of one reading."""
        return -(-len(self.others) // self.rest)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Deal the other inputs in a new order, and trusted ones in turn."""
        again = self._again()
        order = torch.randperm(len(self.others), generator=self._rng)
        for part in order.split(self.rest):
            firm = [next(again) for _ in range(self.quarter if len(self.trusted.rows) else 0)]
            rows = torch.cat([self.others[part], torch.tensor(firm, dtype=torch.int64)])
            inputs = taken(self.inputs, rows)
            yield {
                "weak": self.weak(inputs, self._rng),
                "strong": self.strong(inputs, self._rng),
                "trusted": self.labels[rows],
                "index": rows,
                "sure": self.trusted.sure,
            }

    def _again(self) -> Iterator[int]:
        while True:
            order = torch.randperm(len(self.trusted.rows), generator=self._rng)
            yield from self.trusted.rows[order].tolist()


def two_views(
    forward: Forward,
    parameters: Mapping[str, Tensor],
    examples: Examples,
    task: str,
    objective: Ufm,
    *,
    views: tuple[View, View] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> TwoViews:
    """Let the base (`parameters`) name all inputs once, and return the batches to learn from.

    `views` are the weak and the strong one; by default the input as it is, and `strong_view` for
    images (b, c, h, w). Raises InputError for other inputs without views.
    """
    if views is None:
        inputs = examples.inputs
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not inputs.is_floating_point():
            shape = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise InputError(
                f"task {task!r}: ufm needs a weak and a strong view of each input. For images (b, "
                f"c, h, w) there are some; these are {shape}: give views=(weak, strong), functions "
                "of (inputs, generator)"
            )
        views = (as_it_is, strong_view)
    scores = []
    with held(forward, parameters), torch.no_grad():
        for inputs in examples.ordered():
            scores.append(logits_of(forward(parameters, moved(inputs, device), task)).float().cpu())
    outputs = torch.cat(scores)
    found = trust(objective.guess(outputs), outputs.softmax(-1), objective.sure)
    weak, strong = views
    return TwoViews(
        examples.inputs,
        found,
        weak=weak,
        strong=strong,
        batch_size=examples.batch_size,
        seed=seed,
        name=task,
    )


def in_two_views(
    forward: Forward,
    parameters: Mapping[str, Tensor],
    streams: Mapping[str, Any],
    objective: Ufm,
    **options: Any,
) -> dict[str, TwoViews]:
    """Return every task's batches with two views; streams of batches are read whole first."""
    return {
        task: two_views(
            forward, parameters, whole(task, given, "a set to guess on"), task, objective, **options
        )
        for task, given in streams.items()
    }


def moved(inputs: Any, device: torch.device | str) -> Any:
    """Return inputs on a device."""
    if isinstance(inputs, Mapping):
        return {name: part.to(device) for name, part in inputs.items()}
    return inputs.to(device)


def as_it_is(inputs: Any, rng: Generator) -> Any:
    """Return the inputs."""
    return inputs


def strong_view(images: Tensor, rng: Generator) -> Tensor:
    """Shift each image by up to an eighth, change its contrast, and blank a square of it.

    Images (b, c, h, w); what is shifted in and blanked is 0. Ours; no flips or turns, which change
    the meaning of digits.
    """
    count, _, height, width = images.shape
    out = torch.zeros_like(images)
    reach = (height // 8, width // 8)
    down, right = (torch.randint(-r, r + 1, (count,), generator=rng).tolist() for r in reach)
    for i, (dy, dx) in enumerate(zip(down, right, strict=True)):
        to = (slice(max(dy, 0), height + min(dy, 0)), slice(max(dx, 0), width + min(dx, 0)))
        of = (slice(max(-dy, 0), height - max(dy, 0)), slice(max(-dx, 0), width - max(dx, 0)))
        out[i, :, to[0], to[1]] = images[i, :, of[0], of[1]]
    gain = 0.6 + 0.8 * torch.rand(count, 1, 1, 1, generator=rng)
    out *= gain.to(out)
    side = max(1, min(height, width) // 4)
    top = torch.randint(height - side + 1, (count,), generator=rng).tolist()
    left = torch.randint(width - side + 1, (count,), generator=rng).tolist()
    for i, (y, x) in enumerate(zip(top, left, strict=True)):
        out[i, :, y : y + side, x : x + side] = 0
    return out


class Guesser:
    """Makes the targets of a batch with two views, and remembers what each input was taken for."""

    def __init__(self, objective: Any) -> None:
        self.objective: Ufm = objective
        self._sure: dict[str, Tensor] = {}

    def __call__(
        self, forward: Forward, parameters: Mapping[str, Tensor], batch: Batch
    ) -> tuple[Any, Tensor]:
        """Return the strong views and the guesses on the weak ones, (b, v); unsure rows are zero.

        Raises InputError for a batch without two views.
        """
        views = batch.inputs
        lacking = [
            n for n in ("weak", "strong") if not isinstance(views, Mapping) or n not in views
        ]
        adaptive = self.objective.threshold == "adaptive"
        if adaptive and not lacking:
            lacking = [name for name in ("index", "sure") if name not in views]
        if lacking:
            raise InputError(
                f"task {batch.task!r}: ufm takes mappings with 'weak' and 'strong' views; these "
                f"lack {listing(lacking)}. Atlas makes them of a set of inputs"
            )
        with torch.no_grad():
            outputs = logits_of(forward(parameters, views["weak"], batch.task))
            q = self.objective.guess(outputs, views.get("trusted"))
            if not adaptive:
                return views["strong"], masked(q, q.new_full(q.shape[1:], self.objective.sure))
            known = self._sure.setdefault(batch.task, views["sure"].clone())
            counts = known[known >= 0].bincount(minlength=q.shape[1])
            bars = self.objective.bars(counts, int((known < 0).sum()))
            highest, named = q.max(1)
            passed = highest > self.objective.top
            known[views["index"][passed]] = named[passed]
            return views["strong"], masked(q, bars.to(q))


def weak_of(batch: Batch) -> Batch:
    """Return the batch with the weak view as its inputs, for looking at the model."""
    views = batch.inputs
    return batch._replace(inputs=views["weak"]) if isinstance(views, Mapping) else batch
