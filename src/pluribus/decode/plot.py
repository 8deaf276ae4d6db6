"""Fusion weights for people: a line for each role over the tokens, as a chart or a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from pluribus import report
from pluribus.core.errors import InputError
from pluribus.report import Html


def plot_weights(
    tokens: Sequence[str], weights: Mapping[str, Any], title: str = "Weight of each role"
) -> Html:
    """Draw the weight with which each token was chosen, one line a role.

    `weights` are numbers by role, one a token: a row of `generate(...).fusion_weights`, or those of
    a `Score`. Raises InputError for another number of them than there are tokens.
    """
    series = {role: [float(value) for value in row] for role, row in weights.items()}
    for role, row in series.items():
        if len(row) != len(tokens):
            raise InputError(f"{role!r} has {len(row)} weights for {len(tokens)} tokens")
    places = [shown(token) for token in tokens]
    return report.lines(title, places, series, form=".2f", x_label="token", y_label="weight")


def page(
    title: str, prompt: str, tokens: Sequence[str], weights: Mapping[str, Any], fuser: Any
) -> str:
    """Return a page with what was written, and the weights of each token."""
    told = report.table(
        ["token", *weights],
        [
            [shown(token), *(float(row[i]) for row in weights.values())]
            for i, token in enumerate(tokens)
        ],
        dict.fromkeys(weights, ".3f"),
        caption="Weight with which each token was chosen",
    )
    means = [
        [role, sum(map(float, row)) / max(len(row), 1), max(map(float, row), default=0.0)]
        for role, row in weights.items()
    ]
    parts = [report.section("Prompt", prompt), report.section("Written", "".join(tokens))]
    if weights and tokens:
        parts += [
            report.section(
                "Weights",
                f"Combined by {fuser!r}.",
                plot_weights(tokens, weights),
                report.table(["role", "mean weight", "largest"], means, {"mean weight": ".3f"}),
            ),
            report.section("Token by token", told),
        ]
    return report.page(title, parts, subtitle=f"{len(tokens)} tokens")


def shown(token: str) -> str:
    """Return a token with its spaces and line breaks to be seen."""
    return token.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5") or "\u2205"
