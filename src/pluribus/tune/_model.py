"""How a merged model is run: `forward(parameters, inputs, task) -> outputs`.

Any function of that form will do. `ModuleForward` makes one of a module and a head for each task.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pluribus.core.errors import InputError, MismatchError, listing, nearest

Head = Callable[[Any], Tensor] | Mapping[str, Tensor]


class Forward(Protocol):
    """Runs a model whose tensors are given, on one task's inputs."""

    def __call__(self, parameters: Mapping[str, Tensor], inputs: Any, task: str, /) -> Any:
        """Return the outputs, such as class scores (b, v)."""
        ...


class ModuleForward:
    """A module as a `Forward`: tensors are put in its parameters' places, and taken out again.

    `heads` maps tasks to what comes after the module: a function or module, or a linear layer as
    {"weight", "bias"}; None: the module's own outputs. `call(module, inputs, task)` runs the module
    in another way than `module(inputs)` (a mapping as keywords, a tuple as arguments). The module
    is in evaluation mode while it runs, and its own weights are never changed.

    Within `holding` the tensors stay in place, which a model with gradient checkpointing needs: it
    runs parts of itself again during the backward pass.
    """

    def __init__(
        self,
        module: nn.Module,
        heads: Mapping[str, Head] | None = None,
        call: Callable[[nn.Module, Any, str], Any] | None = None,
    ) -> None:
        self.module, self.heads, self.call = module, heads, call
        self._slots = _slots(module)
        self._inside = False

    def __call__(self, parameters: Mapping[str, Tensor], inputs: Any, task: str) -> Any:
        """See `Forward`. Raises InputError for a task without a head."""
        if self._inside:
            return self._run(inputs, task)
        with self.holding(parameters):
            return self._run(inputs, task)

    @contextmanager
    def holding(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Keep these tensors in the module's places. Raises MismatchError if they don't fit."""
        before = []
        modes = [(part, part.training) for part in self.module.modules()]
        self._check(parameters)
        self.module.eval()
        self._inside = True
        try:
            for name, tensor in parameters.items():
                places = self._slots.get(name)
                for part, attribute, table in places or ():
                    own = getattr(part, table)
                    before.append((own, attribute, own[attribute]))
                    own[attribute] = tensor
            yield
        finally:
            for own, attribute, tensor in reversed(before):
                own[attribute] = tensor
            for part, training in modes:
                part.training = training
            self._inside = False

    def _check(self, parameters: Mapping[str, Tensor]) -> None:
        state = self.module.state_dict(keep_vars=True)
        for name, tensor in parameters.items():
            if name not in state:
                raise MismatchError(
                    f"{type(self.module).__name__} has no tensor {name!r}.{nearest(name, state)}"
                )
            if tensor.shape != state[name].shape:
                raise MismatchError(
                    f"{name!r} has shape {list(tensor.shape)}, but {list(state[name].shape)} in "
                    f"{type(self.module).__name__}"
                )
        known = {id(tensor) for name, tensor in state.items() if name in parameters}
        lacking = [n for n, t in state.items() if n not in parameters and id(t) not in known]
        if lacking:
            raise MismatchError(
                f"the models lack {listing(lacking)}, which {type(self.module).__name__} has"
            )

    def _run(self, inputs: Any, task: str) -> Any:
        if self.call is not None:
            outputs = self.call(self.module, inputs, task)
        elif isinstance(inputs, Mapping):
            outputs = self.module(**inputs)
        elif isinstance(inputs, tuple | list):
            outputs = self.module(*inputs)
        else:
            outputs = self.module(inputs)
        if self.heads is None:
            return outputs
        if task not in self.heads:
            raise InputError(
                f"there is no head for task {task!r}; heads: {', '.join(self.heads)}."
                f"{nearest(task, self.heads)}"
            )
        head = self.heads[task]
        if isinstance(head, Mapping):
            return torch.nn.functional.linear(outputs, head["weight"], head.get("bias"))
        return head(outputs)

    def parameter_names(self) -> set[str]:
        """Return the names of the tensors that are parameters, not buffers."""
        return {name for name, _ in self.module.named_parameters(remove_duplicate=False)}

    def normalises_by_batch(self) -> bool:
        """Return whether the module keeps running statistics of batches."""
        return any(isinstance(p, nn.modules.batchnorm._BatchNorm) for p in self.module.modules())


def _slots(module: nn.Module) -> dict[str, list[tuple[nn.Module, str, str]]]:
    """Return where each tensor of the state dict is kept; a shared one in several places."""
    found: dict[str, list[tuple[nn.Module, str, str]]] = {}
    by_tensor: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for table in ("_parameters", "_buffers"):
            for attribute, tensor in getattr(part, table).items():
                if tensor is None:
                    continue
                name = f"{path}.{attribute}" if path else attribute
                places = by_tensor.setdefault(id(tensor), [])
                if (part, attribute, table) not in places:
                    places.append((part, attribute, table))
                found[name] = places
    return found


@contextmanager
def held(forward: Forward, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Hold tensors in place if the forward can; otherwise do nothing."""
    holding = getattr(forward, "holding", None)
    if holding is None:
        yield
    else:
        with holding(parameters):
            yield
