"""Where an assembled mixture sends tokens: for each file of texts, layer by layer.

    share of expert e = mean over tokens of its weight, 0 where it is not chosen

Padding is left out.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pluribus import report
from pluribus.core.errors import FormatError, InputError
from pluribus.core.optional import optional
from pluribus.route.moe.gates import OnStep
from pluribus.route.recipe import tokens as batches
from pluribus.tasks.device import usable


@dataclass(frozen=True)
class Routes:
    """Shares of experts, (groups, layers, t); each layer's sum to 1."""

    experts: tuple[str, ...]
    groups: tuple[str, ...]
    shares: list[list[list[float]]]

    def to_dict(self) -> dict[str, Any]:
        """Return group -> layer by layer -> expert -> share."""
        return {
            group: [dict(zip(self.experts, row, strict=True)) for row in layers]
            for group, layers in zip(self.groups, self.shares, strict=True)
        }

    def mean(self) -> list[list[float]]:
        """Return shares over all layers, (groups, t)."""
        return [torch.tensor(layers).mean(0).tolist() for layers in self.shares]

    def html(self, title: str, rows: Sequence[Sequence[Any]] = ()) -> str:
        """Return a page: the mixture's experts, and where each group's tokens go."""
        sections = []
        if rows:
            sections.append(report.section("The mixture", "", report.table(["", ""], rows)))
        sections.append(
            report.section(
                "Who takes the tokens",
                "Mean weight of each expert for the tokens of each group, over all layers. "
                f"Chance alone gives {1 / len(self.experts):.2f}.",
                report.heatmap(
                    "Share", list(self.groups), list(self.experts), self.mean(), low=-1, high=1
                ),
            )
        )
        for group, layers in zip(self.groups, self.shares, strict=True):
            names = [f"layer {number}" for number in range(len(layers))]
            drawn = report.heatmap("Share", names, list(self.experts), layers, low=-1, high=1)
            sections.append(report.section(f"Tokens of {group}", "Layer by layer.", drawn))
        return report.page(title, sections)


def routes(
    folder: str | os.PathLike[str],
    texts: Mapping[str, Sequence[str]],
    experts: Sequence[str],
    *,
    limit: int = 50,
    max_length: int = 128,
    device: str = "cpu",
    on_step: OnStep | None = None,
) -> Routes:
    """Run texts by group through a saved mixture and note who is chosen.

    At most `limit` texts of each group. Raises InputError without texts, FormatError for a folder
    that transformers does not read.
    """
    if not texts:
        raise InputError("there are no texts whose routes could be shown; give experts data")
    usable(device)
    hf = optional("transformers", "hf", "running a mixture of experts")
    try:
        model = hf.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        tokenizer = hf.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise FormatError(f"{Path(folder)}: cannot be opened ({error})") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to(device).eval()
    scorers = [module for module in model.modules() if hasattr(module, "top_k") and _scores(module)]
    shares = []
    for number, found in enumerate(texts.values()):
        sums = torch.zeros(len(scorers), len(experts))
        for batch in batches(list(found)[:limit], tokenizer, max_length):
            sums += weights(model, scorers, batch, len(experts))
        shares.append((sums / sums.sum(1, keepdim=True)).tolist())
        if on_step is not None:
            on_step("routes", number + 1, len(texts))
    return Routes(tuple(experts), tuple(texts), shares)


def _scores(module: nn.Module) -> bool:
    return "weight" in dict(module.named_parameters(recurse=False))


def weights(
    model: nn.Module, scorers: Sequence[nn.Module], batch: Mapping[str, Tensor], count: int
) -> Tensor:
    """Return the sum of each expert's weights over a batch's tokens, (l, t), padding left out."""
    device = next(model.parameters()).device
    mask = batch["attention_mask"].bool().flatten()
    found = torch.zeros(len(scorers), count)
    with ExitStack() as stack, torch.no_grad():
        for number, scorer in enumerate(scorers):

            def note(_: nn.Module, __: Any, out: tuple[Tensor, ...], at: int = number) -> None:
                each, picked = out[1].cpu(), out[2].cpu()
                found[at].index_add_(0, picked[mask].flatten(), each[mask].flatten().float())

            stack.callback(scorer.register_forward_hook(note).remove)
        model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
    return found
