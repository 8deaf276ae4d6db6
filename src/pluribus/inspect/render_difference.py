"""A difference of two checkpoints as text for a terminal and as a page."""

from pluribus.core.errors import listing
from pluribus.inspect.change import Sum
from pluribus.inspect.difference import Difference
from pluribus.report import aligned, bars, clean, heatmap, notes, section, table
from pluribus.report import page as html_page

MOST = 400  # tensors listed in a page; all of them are in the JSON
SHOWN = 12  # in a terminal
_SUM = ["size", "changed", "change/norm", "largest", "low rank"]
_TENSOR = ["tensor", "layer", "kind", "shape", "type", "changed", "change/norm", "largest", "rank"]
_FORMS = {
    "size": ",", "changed": ".1%", "change/norm": ".3%", "largest": ".3g",
}  # fmt: skip


def terminal(found: Difference) -> str:
    """Return the findings for a terminal: what happened, where, which tensors most."""
    parts = [
        f"from {clean(found.before)}\nto   {clean(found.after)}",
        "\n".join(f"- {clean(one)}" for one in (*found.verdicts, *found.notes)),
    ]
    if found.model.differing:
        for head, sums in (("layer", found.layers), ("kind", found.kinds)):
            parts.append(aligned([head, *_SUM], _sum_rows(sums), _FORMS))
        rows = _tensor_rows(found)
        parts.append(aligned(_TENSOR, rows[:SHOWN], _FORMS))
        if len(rows) > SHOWN:
            parts[-1] += f"\n({len(rows) - SHOWN} more; --html or --json list all)"
    for names, did in ((found.removed, "removed"), (found.added, "added")):
        if names:
            parts.append(f"{did}: {clean(listing((f'{n} ({s})' for n, s in names.items()), 8))}")
    if found.settings:
        rows = [[key, _brief(old), _brief(new)] for key, old, new in found.settings]
        parts.append(aligned(["config.json", "before", "after"], rows))
    if found.files:
        parts.append(aligned(["file", "what happened"], [list(pair) for pair in found.files]))
    return "\n\n".join(parts)


def page(found: Difference, title: str = "") -> str:
    """Return the findings as a page."""
    told = (
        f"from {found.before} to {found.after}; {found.bytes_read / 1e9:.2f} GB read in "
        f"{found.seconds:.1f} s"
    )
    parts = [section("What happened", notes((*found.verdicts, *found.notes)))]
    if found.model.differing:
        parts += _where(found)
        rows = _tensor_rows(found)
        note = [] if len(rows) <= MOST else [f"The {MOST} that changed most, of {len(rows)}."]
        parts.append(section("By tensor", *note, table(_TENSOR, rows[:MOST], _FORMS)))
    beside = [
        [name, spec, did]
        for names, did in ((found.removed, "removed"), (found.added, "added"))
        for name, spec in names.items()
    ]
    if beside:
        parts.append(
            section("Added and removed", table(["tensor", "what", "happened"], beside[:MOST]))
        )
    if found.settings or found.files:
        rows = [[key, _brief(old), _brief(new)] for key, old, new in found.settings]
        inner = [table(["config.json", "before", "after"], rows)] if rows else []
        if found.files:
            inner.append(table(["file", "what happened"], [list(pair) for pair in found.files]))
        parts.append(section("Configuration and tokenizer", *inner))
    return html_page(title or f"What changed in {found.after}", parts, subtitle=told)


def _where(found: Difference) -> list[str]:
    ratios = {name: one.ratio for name, one in found.layers.items()}
    kinds = list(found.kinds)
    places = list(found.layers)
    cells = {(place, kind): [] for place in places for kind in kinds}
    for change in found.tensors.values():
        cells[found.place(change), change.kind].append(change)
    values = [
        [Sum.of(cells[place, kind]).ratio if cells[place, kind] else None for kind in kinds]
        for place in places
    ]
    high = max((v for row in values for v in row if v is not None and v < 1e6), default=1.0)
    parts = []
    if len(places) > 1 and len(kinds) > 1:
        parts.append(
            heatmap(
                "Change over norm, by layer and kind",
                places, kinds, values, form=".1%", low=0, high=high or 1.0,
            )
        )  # fmt: skip
    return [
        section(
            "Where it changed",
            "The length of the change over that of the tensors before; the deeper the colour, the "
            "further from where it was.",
            *parts,
            bars("By layer", ratios, form=".2%"),
            table(["layer", *_SUM], _sum_rows(found.layers), _FORMS),
            bars("By kind", {name: one.ratio for name, one in found.kinds.items()}, form=".2%"),
            table(["kind", *_SUM], _sum_rows(found.kinds), _FORMS),
        )
    ]


def _sum_rows(sums: dict[str, Sum]) -> list[list]:
    return [
        [
            name, one.size, one.share, one.ratio, one.largest,
            f"{one.low_rank} of {one.matrices}" if one.matrices else "–",
        ]
        for name, one in sums.items()
    ]  # fmt: skip


def _tensor_rows(found: Difference) -> list[list]:
    order = sorted(found.tensors.values(), key=lambda one: (-one.resized, -one.ratio))
    rows = []
    for one in order:
        if one.same and not any(one.non_finite):
            continue
        shape = "×".join(map(str, one.shape)) or "scalar"
        if one.resized:
            shape += f" → {'×'.join(map(str, one.new_shape)) or 'scalar'}"
        kind = one.dtype if one.dtype == one.new_dtype else f"{one.dtype} → {one.new_dtype}"
        rank = str(one.rank) if one.rank is not None else "dense" if one.judged else "–"
        rows.append(
            [
                one.name, "–" if one.layer is None else str(one.layer), one.kind, shape, kind,
                one.share if one.compared else None, one.ratio if one.compared else None,
                one.largest, rank,
            ]
        )  # fmt: skip
    return rows


def _brief(value: object) -> str:
    shown = "absent" if value is None else str(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
