"""Who was chosen, for what: a composite's routes over groups of inputs, in text and on a page.

A group is what inputs were given together: a file of texts, or a zoo's task. `strangeness` is the
energy score of `pluribus.route.router`, higher for inputs unlike all that the router learned.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pluribus import report
from pluribus.core.errors import InputError
from pluribus.route.fit import features
from pluribus.route.routed import Routed
from pluribus.route.router import Gate, strangeness

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Explained:
    """How some inputs were routed. Rows of `weights` are inputs, columns `parts`."""

    parts: tuple[str, ...]
    groups: tuple[str, ...]
    group: tuple[int, ...]  # of each input
    weights: Tensor
    strangeness: tuple[float, ...] | None
    shown: tuple[str, ...] = ()  # the inputs, if they are texts

    def mean(self) -> list[list[float]]:
        """Return each group's mean weights, (groups, parts)."""
        return [self._of(number).mean(0).tolist() for number in range(len(self.groups))]

    def chosen(self) -> list[list[int]]:
        """Return how many inputs of each group weigh each part most, (groups, parts)."""
        return [
            torch.bincount(self._of(number).argmax(1), minlength=len(self.parts)).tolist()
            for number in range(len(self.groups))
        ]

    def _of(self, number: int) -> Tensor:
        rows = [i for i, group in enumerate(self.group) if group == number]
        return self.weights[rows]

    def entropy(self) -> list[float]:
        """Return the mean entropy of each group's weights, in nats."""
        chances = self.weights.clamp(min=1e-12)
        each = -(chances * chances.log()).sum(1)
        return [
            float(each[[i for i, g in enumerate(self.group) if g == number]].mean())
            for number in range(len(self.groups))
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        table = zip(self.groups, self.mean(), self.chosen(), self.entropy(), strict=True)
        return {
            "parts": list(self.parts),
            "groups": {
                name: {
                    "inputs": self.group.count(number),
                    "mean_weights": dict(zip(self.parts, mean, strict=True)),
                    "chosen": dict(zip(self.parts, chosen, strict=True)),
                    "entropy": entropy,
                    "strangeness": self._strange(number),
                }
                for number, (name, mean, chosen, entropy) in enumerate(table)
            },
            "inputs": [
                {
                    "group": self.groups[group],
                    "weights": dict(zip(self.parts, row, strict=True)),
                    **({"text": self.shown[i]} if self.shown else {}),
                }
                for i, (group, row) in enumerate(
                    zip(self.group, self.weights.tolist(), strict=True)
                )
            ],
        }

    def _strange(self, number: int) -> float | None:
        if self.strangeness is None:
            return None
        found = [s for s, g in zip(self.strangeness, self.group, strict=True) if g == number]
        return sum(found) / len(found)

    def text(self) -> str:
        """Return a table: a row a group, its mean weights, and the part most often chosen."""
        rows = []
        for number, (name, mean, entropy) in enumerate(
            zip(self.groups, self.mean(), self.entropy(), strict=True)
        ):
            counts = self.chosen()[number]
            top = max(range(len(counts)), key=counts.__getitem__)
            share = counts[top] / max(sum(counts), 1)
            rows.append([name, sum(counts), f"{self.parts[top]} ({share:.0%})", entropy, *mean])
        header = ["inputs of", "count", "mostly", "entropy", *self.parts]
        return report.aligned(header, rows, {"entropy": ".2f", **dict.fromkeys(self.parts, ".2f")})

    def html(self, title: str) -> str:
        """Return a page: mean weights, choices, and how sure the router was."""
        counts = self.chosen()
        shares = [[count / max(sum(row), 1) for count in row] for row in counts]
        groups, parts = list(self.groups), list(self.parts)
        sections = [
            report.section(
                "Who takes part",
                "Mean weight of each part for the inputs of each group. A router that is sure and "
                "right has one deep cell a row.",
                report.heatmap("Mean weight", groups, parts, self.mean(), low=-1, high=1),
            ),
            report.section(
                "Who is chosen",
                "Share of a group's inputs whose largest weight is each part's.",
                report.heatmap("Share of inputs", groups, parts, shares, low=-1, high=1),
            ),
            report.section(
                "How sure the router is",
                "Entropy of the weights in nats: 0 is one part alone, "
                f"{torch.tensor(float(len(parts))).log():.2f} all alike. Strangeness is higher for "
                "inputs unlike all that the router learned from.",
                report.bars("Entropy", dict(zip(groups, self.entropy(), strict=True))),
            ),
        ]
        if self.strangeness is not None:
            told = {name: self._strange(number) for number, name in enumerate(groups)}
            sections.append(report.section("Strangeness", "", report.bars("Mean", told)))
        if self.shown:
            order = range(min(len(self.shown), 200))
            rows = [
                [self.groups[self.group[i]], self.shown[i][:200], *self.weights[i].tolist()]
                for i in order
            ]
            sections.append(
                report.section(
                    "Inputs",
                    "The first 200.",
                    report.table(["group", "text", *parts], rows, dict.fromkeys(parts, ".2f")),
                )
            )
        return report.page(title, sections)


def explain(
    routed: Routed,
    inputs: Mapping[str, Iterable[Any] | Tensor],
    shown: Mapping[str, list[str]] | None = None,
    on_step: OnStep | None = None,
) -> Explained:
    """Route inputs by group; tensors (n, ...), or iterables of batches. Runs no part.

    Raises InputError without a router or without inputs.
    """
    if routed.router is None:
        raise InputError("this composite has no router, so there is nothing to explain")
    if not inputs:
        raise InputError("there are no inputs to route")
    seen = {}
    for number, (name, found) in enumerate(inputs.items()):
        seen[name] = features(routed, found)
        if on_step is not None:
            on_step("routes", number + 1, len(inputs))
    rows = torch.cat([*seen.values()])
    weights = routed.weigh(rows)
    group = [n for n, found in enumerate(seen.values()) for _ in range(len(found))]
    strange = None
    if isinstance(routed.router, Gate):
        strange = tuple(strangeness(routed.router, rows.to(weights.device)).tolist())
    texts = [text for name in inputs for text in (shown or {}).get(name, [])]
    return Explained(
        routed.names, tuple(inputs), tuple(group), weights.cpu(), strange, tuple(texts)
    )


def of_folder(
    folder: str | Path,
    files: list[str],
    limit: int | None,
    device: str = "cpu",
    on_step: OnStep | None = None,
) -> Explained:
    """Explain a saved composite: on files of texts, or on its zoo's test inputs."""
    from pluribus.recipe.lines import read
    from pluribus.route import store
    from pluribus.route.recipe import tokens

    table = store.manifest(Path(folder).expanduser())
    routed = store.load(folder, device=device)
    if table["origin"].get("zoo"):
        zoo = store.zoo_of(table["origin"])
        tasks = files or list(zoo.tasks)
        if unknown := [task for task in tasks if task not in zoo.tasks]:
            raise InputError(f"zoo {zoo.name} has no task {unknown[0]!r}: {', '.join(zoo.tasks)}")
        inputs = {task: zoo.tasks[task].split("test").x[:limit].to(device) for task in tasks}
        return explain(routed, inputs, on_step=on_step)
    if not files:
        raise InputError("give files of texts whose routes are to be explained")
    tokenizer = store.tokenizer_of(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    shown = {Path(f).name: [row["text"] for row in read(f, False)][:limit] for f in files}
    batches = {
        name: [
            {key: value.to(device) for key, value in batch.items()}
            for batch in tokens(texts, tokenizer, 256)
        ]
        for name, texts in shown.items()
    }
    return explain(routed, batches, shown, on_step)
