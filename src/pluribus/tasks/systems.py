"""What can be evaluated: anything that makes predictions for a task's rows.

`Classifier` wraps a callable, `ZooSystem` the weights of a zoo, `CausalLM` a language model. Their
predictions are indices of classes, or texts where a task's answers are written freely.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.tasks.task import Example, Examples, Task

if TYPE_CHECKING:
    from torch import Tensor

    from pluribus.tasks.zoo import Zoo

OnStep = Callable[[str, int, int], None]  # what is done, rows done, rows in all


class Predictions(NamedTuple):
    """One prediction a row, and what a reader of the score should know."""

    values: list[Any]
    notes: tuple[str, ...] = ()


class Asked(NamedTuple):
    """A task's rows to predict, with where worked examples may come from."""

    task: Task
    rows: Sequence[Example]
    examples: Examples
    seed: int


@runtime_checkable
class System(Protocol):
    """Something that is evaluated."""

    @property
    def label(self) -> str:
        """What tables call it."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides its predictions beside its weights."""
        ...

    def digest(self) -> str | None:
        """Return a digest of its weights, or None if it has none that can be seen."""
        ...

    def predict(self, asked: Asked, on_step: OnStep | None) -> Predictions:
        """Predict every row. Raises InputError for a task it cannot do."""
        ...


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A callable from a batch of inputs to class scores (b, v), as an array or a tensor.

    Images arrive as float32 in [0, 1], (b, h, w) or (b, c, h, w), texts as a list of `Text`; give
    `prepare` to make another batch of a list of inputs. The class with the highest score counts,
    the first one of equals. `weights` are what the digest is of.
    """

    forward: Callable[[Any], Any]
    label: str = "classifier"
    prepare: Callable[[Sequence[Any]], Any] | None = None
    weights: Mapping[str, "Tensor"] | None = field(default=None, repr=False)
    batch_size: int = 256

    @property
    def settings(self) -> Mapping[str, Any]:
        """Nothing: a callable hides what decides."""
        return {}

    def digest(self) -> str | None:
        """Return the digest of `weights`, or of the module's state if `forward` is one."""
        weights = self.weights
        if weights is None and hasattr(self.forward, "state_dict"):
            weights = self.forward.state_dict()  # pyright: ignore[reportFunctionMemberAccess]
        return None if weights is None else digest_of(weights)

    def predict(self, asked: Asked, on_step: OnStep | None) -> Predictions:
        """Return the index of the best class of every row."""
        import torch

        classes = asked.examples.classes
        if not classes:
            raise InputError(
                f"{asked.task.name} asks for written answers; {self.label} only tells classes apart"
            )
        prepare = self.prepare or _batch
        values: list[int] = []
        with torch.inference_mode():
            for start in range(0, len(asked.rows), self.batch_size):
                rows = asked.rows[start : start + self.batch_size]
                scores = self.forward(prepare([row.input for row in rows]))
                if tuple(scores.shape) != (len(rows), len(classes)):
                    raise MismatchError(
                        f"{self.label} returned scores of shape {list(scores.shape)} for "
                        f"{len(rows)} rows of {asked.task.name}, which has {len(classes)} classes; "
                        f"expected [{len(rows)}, {len(classes)}]"
                    )
                check_scores(scores, self.label, asked.task.name)
                values += scores.argmax(1).tolist()
                if on_step is not None:
                    on_step(asked.task.name, len(values), len(asked.rows))
        return Predictions(values)


@dataclass(frozen=True, kw_only=True)
class ZooSystem:
    """Weights of a zoo's encoder, under the zoo's own heads."""

    zoo: "Zoo"
    state: Mapping[str, "Tensor"] = field(repr=False)
    label: str = "merged"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The zoo's name and seed."""
        return {"zoo": self.zoo.name, "zoo_seed": self.zoo.seed}

    @cached_property
    def _digest(self) -> str:
        return digest_of({name: self.state[name] for name in self.state})

    def digest(self) -> str:
        """Return the digest of the encoder's weights."""
        return self._digest

    def scores(self, task: str, inputs: "Tensor") -> "Tensor":
        """Return the class scores (b, v) of a task's inputs."""
        return self.zoo.logits(self.state, task, inputs)

    def predict(self, asked: Asked, on_step: OnStep | None) -> Predictions:
        """Return the index of the best class of every row.

        Raises InputError for another zoo's task, NonFiniteError for scores that are NaN.
        """
        import torch

        prefix, _, name = asked.task.name.rpartition("/")
        if asked.task.family != "zoo" or prefix != self.zoo.name:
            raise InputError(
                f"{self.label} is of the zoo {self.zoo.name}, and {asked.task.name} is no task of "
                f"it; its tasks are {', '.join(f'{self.zoo.name}/{t}' for t in self.zoo.tasks)}"
            )
        inputs = torch.stack([row.input for row in asked.rows])
        scores = self.scores(name, inputs)
        check_scores(scores, self.label, asked.task.name)
        values = scores.argmax(1).tolist()
        if on_step is not None:
            on_step(asked.task.name, len(values), len(values))
        return Predictions(values)


def check_scores(scores: Any, label: str, task: str) -> None:
    """Raise NonFiniteError if class scores hold NaN, of which none is the greatest."""
    broken = int((scores != scores).reshape(len(scores), -1).any(1).sum())
    if broken:
        raise NonFiniteError(
            f"{label}: its scores are NaN for {broken} of {len(scores)} rows of {task}; its "
            "weights hold NaN or values that overflow. Repair the model, or leave it out"
        )


def zoo_tasks(zoo: "Zoo") -> list[Task]:
    """Return a zoo's tasks, called ZOO/TASK."""

    def load(name: str) -> Examples:
        data = zoo.tasks[name]
        train, test = (
            [Example(x, y) for x, y in zip(split.x, split.y.tolist(), strict=True)]
            for split in (data.train, data.test)
        )
        return Examples(test, train, data.classes)

    return [
        Task(name=f"{zoo.name}/{name}", load=partial(load, name), family="zoo")
        for name in zoo.tasks
    ]


def digest_of(weights: Mapping[str, "Tensor"]) -> str:
    """Return one digest of tensors and their names, whatever their order."""
    from pluribus.tasks.cache import digest

    named = ((name, weights[name].detach().cpu()) for name in sorted(weights))
    return digest(part for pair in named for part in pair)


def _batch(inputs: Sequence[Any]) -> Any:
    import torch

    first = inputs[0]
    if isinstance(first, tuple):
        return list(inputs)
    if not isinstance(first, np.ndarray):
        return torch.stack(list(inputs))
    images = torch.from_numpy(np.stack(inputs))
    if images.dtype == torch.uint8:
        images = images.float() / 255
    return images.permute(0, 3, 1, 2) if images.ndim == 4 else images
