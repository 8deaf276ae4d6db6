"""What says which coefficients to keep: accuracy on labelled validation inputs.

Zhang et al., aTLAS, NeurIPS 2024, https://arxiv.org/abs/2407.02880, sections 4.1 and 4.2.

    learning    mean over tasks of  accuracy / accuracy of the task's own expert, if it has one
    negation    - mean accuracy on the tasks to forget, as long as
                accuracy on the control >= floor * the base's

The first call is the base's: it sets the bar.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pluribus.core.errors import InputError
from pluribus.loss import logits_of
from pluribus.loss.negate import Negate
from pluribus.tune._blend import Leaves
from pluribus.tune._examples import CHUNK, Examples, rereadable, set_of
from pluribus.tune._fit import Log, Problem
from pluribus.tune._model import held
from pluribus.tune._trusted import moved

Named = Callable[[Any, str], Tensor]  # scores of inputs of a task


class Validation:
    """Labelled inputs by task, which are read whole each time. Raises InputError for iterators."""

    def __init__(self, given: Mapping[str, Any], device: torch.device | str) -> None:
        self._sets: dict[str, Iterable[Any]] = {}
        self._device = device
        for task, what in given.items():
            found = set_of(task, what, True)
            if found is None:
                rereadable(task, what, "validation")
            self._sets[task] = what if found is None else found

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the user's order."""
        return list(self._sets)

    def accuracy(self, task: str, scores: Named) -> float:
        """Return the share of a task's inputs that are named right."""
        given = self._sets[task]
        batches = given.ordered(CHUNK) if isinstance(given, Examples) else given
        right = count = 0
        for batch in batches:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise InputError(f"task {task!r}: validation takes batches of (inputs, labels)")
            inputs, labels = batch
            named = logits_of(scores(moved(inputs, self._device), task)).argmax(1).cpu()
            right += int((named == labels.cpu()).sum())
            count += len(labels)
        if not count:
            raise InputError(f"task {task!r}: the validation set is empty")
        return right / count


class Judge:
    """Calls `value(accuracies)` on the merged model's accuracy by task."""

    def __init__(self, problem: Problem, validation: Validation) -> None:
        self.problem, self.validation = problem, validation

    def accuracies(self, leaves: Leaves) -> dict[str, float]:
        """Return the accuracy on each task."""
        parameters = self.problem.blend.parameters(leaves)

        def scores(inputs: Any, task: str) -> Tensor:
            return self.problem.forward(parameters, inputs, task)

        with held(self.problem.forward, parameters), torch.no_grad():
            return {task: self.validation.accuracy(task, scores) for task in self.validation.tasks}


def normalised(judge: Judge) -> Callable[[Leaves], float]:
    """Return what judges learning: mean accuracy, over each own expert's where there is one."""
    problem, validation = judge.problem, judge.validation
    own = {
        task: validation.accuracy(task, problem.expert_outputs)
        for task in validation.tasks
        if task in problem.blend.experts
    }

    def value(leaves: Leaves) -> float:
        found = judge.accuracies(leaves)
        # An expert that names nothing right is no measure; its task counts as it is.
        return sum(score / (own.get(task) or 1.0) for task, score in found.items()) / len(found)

    return value


def forgetting(judge: Judge, objective: Negate, log: Log) -> Callable[[Leaves], float | None]:
    """Return what judges negation; it says None, which ends the run, once the control has lost."""
    bar: list[float] = []

    def value(leaves: Leaves) -> float | None:
        found = judge.accuracies(leaves)
        control = found.pop(objective.control)
        if not bar:
            bar.append(objective.floor * control)
        if control < bar[0]:
            log.stopped = (
                f"accuracy on the control {objective.control} fell to {control:.1%}, below "
                f"{objective.floor:g} of the base's, {bar[0]:.1%}"
            )
            return None
        return -sum(found.values()) / len(found)

    return value
