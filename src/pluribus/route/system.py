"""Composites as systems that `evaluate` scores: of language models, and of a zoo's experts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pluribus.core.errors import MismatchError
from pluribus.route import store
from pluribus.route.routed import Routed
from pluribus.tasks.systems import ZooSystem
from pluribus.tasks.zoo import Zoo

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
        return store.digest(self.routed)

    def scores(self, task: str, inputs: Tensor) -> Tensor:
        """See `ZooSystem.scores`."""
        device = next(self.routed.base.parameters()).device
        with torch.inference_mode():
            found = [self.routed(x.to(device), task=task) for x in inputs.split(CHUNK)]
        return torch.cat(found).cpu()


class Composites:
    """Opens folders that `pluribus route build` wrote; see `pluribus.tasks.openers`."""

    def language(self, folder: str | Path, device: str) -> tuple[Routed, Any]:
        """Return the composite and its tokenizer. Raises what `store.load` raises."""
        return store.load(folder, device=device), store.tokenizer_of(folder)

    def of_zoo(self, folder: str | Path, zoo: Zoo, label: str, device: str) -> RoutedZooSystem:
        """Return the composite as a system. Raises MismatchError if it is of another zoo."""
        made = store.manifest(Path(folder).expanduser())["origin"]
        if made != {"zoo": zoo.name, "seed": zoo.seed, "sizes": {}}:
            raise MismatchError(
                f"{label} is not of zoo {zoo.name} with seed {zoo.seed} and the usual sizes; it "
                f"was made of {made or 'models that are no zoo'}"
            )
        routed = store.load(folder, zoo.module(), device=device)
        return RoutedZooSystem(zoo=zoo, routed=routed, label=label)


COMPOSITES = Composites()
