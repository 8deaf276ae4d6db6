"""A place of a network that holds all candidates and runs the chosen one, or a mixture.

    o(x) = o_i(x)                      for a choice i
    o(x) = sum_i p_i o_i(x)            for weights p over the candidates (DARTS, eq. 2)

Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019,
https://arxiv.org/abs/1806.09055. All switches of a network read one `Setting`; where the same
placeholder stands at several places, they share its choice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pluribus.core.errors import InputError, MismatchError


@dataclass
class Setting:
    """What a network of all points is set to while it runs."""

    choice: Mapping[str, int | Tensor] = field(default_factory=dict)
    checking: bool = False  # run all candidates and compare their shapes

    def of(self, path: str) -> int | Tensor:
        """Return the index or the weights of a decision."""
        try:
            return self.choice[path]
        except KeyError:
            raise InputError(
                f"nothing was chosen for {path}; there are choices for: {', '.join(self.choice)}"
            ) from None


class Switch(nn.Module):
    """All candidates of one decision."""

    def __init__(self, path: str, candidates: Sequence[nn.Module], setting: Setting) -> None:
        super().__init__()
        self.path = path
        self.candidates = nn.ModuleList(candidates)
        self.setting = setting

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Run what is chosen. Raises MismatchError, when checking, if the shapes differ."""
        if self.setting.checking:
            return self._compared([each(*inputs, **named) for each in self.candidates])
        chosen = self.setting.of(self.path)
        if isinstance(chosen, int):
            return self.candidates[chosen](*inputs, **named)
        weighted = [p * each(*inputs, **named) for p, each in zip(chosen, self.candidates)]  # noqa: B905
        return torch.stack(weighted).sum(0)

    def _compared(self, outputs: list[Any]) -> Tensor:
        told = []
        for number, (each, output) in enumerate(zip(self.candidates, outputs, strict=True)):
            if not isinstance(output, Tensor):
                raise MismatchError(
                    f"{self.path}: candidate {number} ({type(each).__name__}) returned a "
                    f"{type(output).__name__}; a switch mixes tensors"
                )
            told.append(f"{number} ({type(each).__name__}) {list(output.shape)}")
        if len({output.shape for output in outputs}) > 1:
            raise MismatchError(
                f"{self.path}: the candidates return different shapes: {', '.join(told)}; "
                "make them agree, or search with an algorithm that trains each point alone"
            )
        return outputs[0]


@dataclass(frozen=True)
class SwitchFactory:
    """Stands in a program where a candidate stood; makes a switch of all of them."""

    path: str
    candidates: tuple[Callable[..., nn.Module], ...]
    setting: Setting

    def __call__(self, *arguments: Any, **named: Any) -> Switch:
        """Make every candidate with these arguments. Raises InputError if one is no module."""
        made = [candidate(*arguments, **named) for candidate in self.candidates]
        for number, module in enumerate(made):
            if not isinstance(module, nn.Module):
                raise InputError(
                    f"{self.path}: candidate {number} made a {type(module).__name__}, expected a "
                    "torch module; only choices among module factories and sizes share weights"
                )
        return Switch(self.path, made, self.setting)
