"""A composite of a zoo's experts as a system that `evaluate` scores."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pluribus.route.routed import Routed
from pluribus.route.store import digest
from pluribus.tasks.systems import ZooSystem

CHUNK = 256  # inputs at a time


@dataclass(frozen=True, kw_only=True)
class RoutedZooSystem(ZooSystem):
    """A composite under the zoo's heads; the task picks the head, the router the parts."""

    routed: Routed = field(repr=False)
    state: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The zoo's name and seed, and how many parts an input may have."""
        return {**super().settings, "routed": True, "top_k": self.routed.top_k}

    def digest(self) -> str:
        """Return the digest of base, parts and router."""
        return digest(self.routed)

    def scores(self, task: str, inputs: Tensor) -> Tensor:
        """See `ZooSystem.scores`."""
        device = next(self.routed.base.parameters()).device
        with torch.inference_mode():
            found = [self.routed(x.to(device), task=task) for x in inputs.split(CHUNK)]
        return torch.cat(found).cpu()
