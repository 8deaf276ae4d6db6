"""An inspection as text for a terminal and as a page."""

from collections.abc import Mapping

import numpy as np

from pluribus.inspect import render_more as more
from pluribus.inspect.inspection import Inspection
from pluribus.inspect.tally import Tally
from pluribus.report import (
    aligned,
    bars,
    beside,
    clean,
    grouped_bars,
    heatmap,
    lines,
    section,
    table,
)
from pluribus.report import (
    page as html_page,
)

MOST = 400  # tensors listed in a page; all of them are in the JSON

_EXPERTS = [
    "expert",
    "norm",
    "norm/base",
    "unchanged",
    "eff. density",
    "TALL mask",
    "energy in top",
]
_FORMS = {
    "norm": ".4g", "norm/base": ".4f", "unchanged": ".1%", "eff. density": ".2f",
    "TALL mask": ".1%", "energy in top": ".1%", "cosine": ".3f", "opposite": ".1%",
    "opposite in tops": ".1%", "overlap": ".3f", "any conflict": ".1%", "catastrophic": ".1%",
    "selfish": ".1%", "shared": ".1%", "universal": ".1%", "size": ",",
}  # fmt: skip


def terminal(found: Inspection) -> str:
    """Return the findings for a terminal: overview, experts, pairs, layers, what to try."""
    model, top = found.model, f"{found.density:.0%}"
    parts = [
        f"base {clean(found.base)}: {len(found.tensors)} tensors, {model.size / 1e6:,.1f} M "
        f"parameters, {found.blocks} blocks",
        aligned(_EXPERTS, _expert_rows(found, model), _FORMS),
    ]
    if len(found.experts) > 1:
        head = ["pair", "cosine", "opposite", "overlap", "opposite in tops"]
        parts.append(aligned(head, _pair_rows(found, model), _FORMS))
        parts.append(
            f"parameters where some pair pulls in opposite directions: {model.clash:.1%} of those "
            f"that two or more change, {model.kept_clash:.1%} of those in any top {top}\n"
            f"TALL masks (lambda {found.mask_lambda:g}): {model.catastrophic:.1%} catastrophic "
            f"(needed by none), {model.selfish:.1%} selfish (by one), {model.shared:.1%} shared, "
            f"{model.universal:.1%} universal (by all)"
        )
    parts.append(aligned(*sums("layer", found.layers, found)))
    if len(found.kinds) > 1:
        parts.append(aligned(*sums("kind", found.kinds, found)))
    parts += more.texts(found, more.short(found.experts))
    parts += [f"warning: {clean(note)}" for note in found.warnings]
    if found.trials is not None:
        parts.append(more.tried(found.trials))
    why = "\n".join(f"  - {reason}" for reason in found.advice.reasons)
    parts.append(f"first to try ({found.advice.basis}): {found.advice.text}\n{why}")
    return "\n\n".join(parts)


def page(found: Inspection, title: str = "") -> str:
    """Return the findings as a page."""
    model, labels, top = found.model, more.short(found.experts), f"{found.density:.0%}"
    many = len(labels) > 1
    told = (
        f"base {found.base}; {len(found.tensors)} tensors, {model.size / 1e6:,.1f} M parameters; "
        f"{found.bytes_read / 1e9:.2f} GB read in {found.seconds:.1f} s"
    )
    parts = [
        more.first_to_try(found),
        section(
            "Experts",
            "Task vectors are expert minus base. Effective density is 1 if all differences are "
            "equally large, 0.64 for normally distributed ones, near 0 if a few carry the update. "
            f"The last columns: share of parameters in the expert's TALL mask, and share of the "
            f"squared norm in its largest {top} of every tensor.",
            table(_EXPERTS, _expert_rows(found, model), _FORMS),
        ),
    ]
    if many:
        parts += _relations(found, labels, top)
    parts += _by_layer(found, labels, top)
    parts += more.atlas(found, labels)
    parts += more.sections(found, labels)
    parts.append(_by_tensor(found))
    names = ", ".join(labels)
    return html_page(title or f"Inspection of {names}", parts, subtitle=told)


def _relations(found: Inspection, labels: list[str], top: str) -> list[str]:
    model = found.model
    text = (
        f"{model.clash:.1%} of the parameters that two experts or more change are pulled both "
        f"ways, and {model.kept_clash:.1%} of those in any expert's top {top}. Independent experts "
        "disagree in sign on 50 % of what they share: only more than that is opposition."
    )
    classes = {
        "catastrophic (needed by none)": model.catastrophic,
        "selfish (by one)": model.selfish,
        "shared (by several)": model.shared - model.universal,
        "universal (by all)": model.universal,
    }
    chance = found.density / (2 - found.density)
    square = (labels, labels)
    return [
        section(
            "How the experts relate",
            text,
            beside(
                heatmap("Cosine between task vectors", *square, model.cosine.tolist()),
                heatmap(
                    "Opposite signs, where both changed", *square, model.conflict.tolist(), low=0
                ),
            ),
            beside(
                heatmap(
                    f"Overlap of the largest {top} (Jaccard; {chance:.2f} by chance)",
                    *square, model.overlap.tolist(), low=0,
                ),
                heatmap(
                    f"Opposite signs, where both are among the largest {top}",
                    *square, model.kept_conflict.tolist(), low=0,
                ),
            ),
        ),
        section(
            "Who needs what",
            f"TALL masks at lambda {found.mask_lambda:g} against the sum of task vectors: a "
            "parameter is in an expert's mask if the expert's own difference outweighs its "
            "distance to the sum.",
            bars("Parameters by the number of masks they are in", classes, form=".1%"),
            *([_masks_by_layer(found)] if found.blocks > 1 else []),
        ),
    ]  # fmt: skip


def _masks_by_layer(found: Inspection) -> str:
    rows = list(found.layers.values())
    classes = {
        "catastrophic": [row.catastrophic for row in rows],
        "selfish": [row.selfish for row in rows],
        "shared": [row.shared - row.universal for row in rows],
        "universal": [row.universal for row in rows],
    }
    return grouped_bars(
        "The same by layer", list(found.layers), classes, form=".0%", stacked=True, x_label="layer"
    )


def _by_layer(found: Inspection, labels: list[str], top: str) -> list[str]:
    if len(found.layers) < 2:
        return []
    rows = list(found.layers.values())
    places = list(found.layers)
    ratios = {label: [row.ratio[i] for row in rows] for i, label in enumerate(labels)}
    parts = [
        lines(
            "Length of the task vector, relative to the base", places, ratios,
            form=".3g", x_label="layer", y_label="norm / norm of the base",
        )
    ]  # fmt: skip
    if len(labels) > 1:
        shares = {
            "mean cosine": [more.mean(row.cosine) for row in rows],
            f"mean overlap of the largest {top}": [more.mean(row.overlap) for row in rows],
            "opposite signs there": [more.mean(row.kept_conflict) for row in rows],
        }
        parts.append(lines("Agreement between experts", places, shares, x_label="layer"))
    head, body, forms = sums("layer", found.layers, found)
    return [section("By layer", *parts, table(head, body, forms))]


def _by_tensor(found: Inspection) -> str:
    several = len(found.experts) > 1
    head = ["tensor", "layer", "kind", "size", "norm/base (most)", "unchanged (least)"]
    if several:
        head += ["cosine", "overlap", "opposite in tops", "any conflict", "catastrophic", "selfish"]
    rows = []
    for name, tally in found.tensors.items():
        layer = found.depth[name]
        row: list = [
            name, "–" if layer is None else str(layer), found.kind[name], tally.size,
            _reach(tally.ratio, np.nanmax), _reach(tally.unchanged, np.nanmin),
        ]  # fmt: skip
        if several:
            row += [
                more.mean(tally.cosine), more.mean(tally.overlap), more.mean(tally.kept_conflict),
                tally.kept_clash, tally.catastrophic, tally.selfish,
            ]  # fmt: skip
        rows.append(row)
    left_out = ""
    if len(rows) > MOST:
        left_out = f"The {MOST} largest of {len(rows)} tensors; the JSON output holds all."
        rows = sorted(rows, key=lambda row: -row[3])[:MOST]
    forms = {**_FORMS, "norm/base (most)": ".4f", "unchanged (least)": ".1%"}
    lead = "Cosine, overlap and opposite signs are means over pairs of experts."
    told = [*([lead] if several else []), *([left_out] if left_out else [])]
    return section("By tensor", *told, table(head, rows, forms))


def _expert_rows(found: Inspection, tally: Tally) -> list[list]:
    columns = (
        tally.norm, tally.ratio, tally.unchanged, tally.density, tally.mask_share, tally.kept_energy
    )  # fmt: skip
    return [
        [label, *(float(column[i]) for column in columns)]
        for i, label in enumerate(more.short(found.experts))
    ]


def _pair_rows(found: Inspection, tally: Tally) -> list[list]:
    rows, labels = [], more.short(found.experts)
    for i, one in enumerate(labels):
        for j in range(i):
            matrices = (tally.cosine, tally.conflict, tally.overlap, tally.kept_conflict)
            figures = (float(matrix[i, j]) for matrix in matrices)
            rows.append([f"{labels[j]} – {one}", *figures])
    return rows


def sums(
    first: str, tallies: Mapping[str, Tally], found: Inspection
) -> tuple[list[str], list[list], dict[str, str]]:
    """Return head, rows and forms of a table of sums: one row a layer or kind."""
    labels = more.short(found.experts)
    ratios = [f"norm/base {label}" for label in labels]
    several = len(labels) > 1
    head = [first, "size", *ratios]
    if several:
        head += ["cosine", "overlap", "opposite in tops", "any conflict", "catastrophic", "selfish"]
    rows = []
    for label, tally in tallies.items():
        row: list = [label, tally.size, *map(float, tally.ratio)]
        if several:
            row += [
                more.mean(tally.cosine), more.mean(tally.overlap), more.mean(tally.kept_conflict),
                tally.kept_clash, tally.catastrophic, tally.selfish,
            ]  # fmt: skip
        rows.append(row)
    return head, rows, {**_FORMS, **dict.fromkeys(ratios, ".4f")}


def _reach(values: np.ndarray, how) -> float | None:
    return None if np.isnan(values).all() else float(how(values))
