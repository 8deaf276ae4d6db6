"""A circuit as text and as a page: its graph, its stages, and effects by layer and head."""

from collections.abc import Sequence

from pluribus.inspect.circuits.circuit import Circuit, Found, Overlap, name_of
from pluribus.inspect.circuits.model import Head
from pluribus.report import Html, aligned, clean, heatmap, notes, number, page, section, table
from pluribus.report.html import escape, scrolling

APART, STEP = 42.0, 60.0  # heads of a row, at least; rows
RADIUS = 17.0
LEFT, LOGITS = 74.0, "logits"
HEAD = ["stage", "head", "effect", "kept in", "reaches"]
FORMS = {"effect": "+.3f", "kept in": ".0%"}


def terminal(circuit: Circuit) -> str:
    """Return a circuit for a terminal."""
    parts = [_about(circuit), aligned(HEAD, _rows(circuit), FORMS)]
    parts += [f"warning: {clean(note)}" for note in circuit.warnings]
    return "\n\n".join(parts)


def compared(one: Circuit, other: Circuit, found: Overlap) -> str:
    """Return how much of two circuits is the same, for a terminal."""
    rows = [
        ("heads of " + clean(one.task), len(one.heads)),
        ("heads of " + clean(other.task), len(other.heads)),
        ("shared", len(found.shared)),
        ("overlap (of the smaller)", round(found.overlap, 3)),
        ("jaccard (of the union)", round(found.jaccard, 3)),
        ("overlap by chance", round(found.chance, 3)),
    ]
    shared = ", ".join(name_of(head) for head in found.shared) or "none"
    return aligned(["", "value"], rows) + f"\n\nshared heads: {shared}"


def html(circuit: Circuit) -> str:
    """Return a circuit as a page of its own."""
    parts = [
        *([notes(circuit.warnings, warning=True)] if circuit.warnings else []),
        section(
            "The circuit",
            "Heads by layer, the first at the bottom. An arrow leads from a head that a stage "
            "found to what it was found to reach: the logits, or the queries, keys or values of "
            "other heads. An effect is 1 if patching the head does as much as corrupting the "
            "prompt; negative heads are in the task's way.",
            graph(circuit),
        ),
        section("Heads", table(HEAD, _rows(circuit), FORMS)),
    ]
    for found in circuit.stages:
        parts.append(section(_title(found), _map(circuit, found)))
    title = f"Circuit of {circuit.task}"
    return page(title, parts, subtitle=_about(circuit))


def graph(circuit: Circuit) -> Html:
    """Return the circuit drawn: heads as nodes, layers upward, an arrow for each path found."""
    places, height, width = _places(circuit)
    lines = [_marker()]
    top = 26.0
    lines += _labels(places)
    middle = width / 2
    for k, found in enumerate(circuit.stages):
        ends: list[tuple[float, float, str]] = [(middle, top + 14 - RADIUS, LOGITS)]
        if found.receivers:
            ends = [
                (*places[head], f"{side} of {name_of(head)}")
                for layer, index, side in found.receivers
                for head in _members(circuit, found, layer, index, side)
                if head in places
            ]
        for head in found.heads:
            x, y = places[head]
            for x_end, y_end, name in ends:
                hint = f"{name_of(head)} to {name}: {found.effect(head):+.3f} ({found.stage.name})"
                lines.append(_arrow(x, y, x_end, y_end, k, found.effect(head), hint))
    lines.append(
        f'<rect class="none" x="{middle - 34:.1f}" y="{top - 14:.1f}" width="68" height="28" '
        f'rx="6"/><text x="{middle:.1f}" y="{top + 4:.1f}" text-anchor="middle">{LOGITS}</text>'
    )
    for head, (x, y) in places.items():
        lines.append(_node(circuit, head, x, y))
    small = " small" if width < 608 else ""
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    label = f"Circuit of {circuit.task}"
    drawn = (
        f'<svg class="chart{small}" {size} role="img" aria-label="{escape(label)}">'
        f"{''.join(lines)}</svg>"
    )
    keys = "".join(
        f'<li><svg viewBox="0 0 22 12" aria-hidden="true"><path class="line s{k % 8}" '
        f'd="M0 6H22"/></svg>{escape(found.stage.name)}</li>'
        for k, found in enumerate(circuit.stages)
    )
    return Html(
        f'<figure>{scrolling(drawn, label)}<ul class="key">{keys}'
        "<li>dashed: negative effect</li></ul></figure>"
    )


def _places(circuit: Circuit) -> tuple[dict[Head, tuple[float, float]], float, float]:
    """Return where heads stand, and the drawing's height and width.

    Rows are layers; across, a head's number, moved aside where two would touch.
    """
    layers = sorted({layer for layer, _ in circuit.heads}, reverse=True)
    most = max(sum(layer == own for own, _ in circuit.heads) for layer in layers)
    width = max(640.0, LEFT + APART * most + 40)
    span = width - LEFT - 40
    places: dict[Head, tuple[float, float]] = {}
    for row, layer in enumerate(layers):
        own = [head for head in circuit.heads if head[0] == layer]
        xs = [LEFT + span * (head + 0.5) / circuit.heads_per_layer for _, head in own]
        for i in range(1, len(xs)):
            xs[i] = max(xs[i], xs[i - 1] + APART)
        over = max(0.0, xs[-1] - (width - 40))
        for i in range(len(xs) - 1, -1, -1):
            xs[i] = min(xs[i], width - 40 - APART * (len(xs) - 1 - i)) if over else xs[i]
        for head, x in zip(own, xs, strict=True):
            places[head] = (x, 100 + STEP * row)
    return places, 100 + STEP * (len(layers) - 1) + 30, width


def _labels(places: dict[Head, tuple[float, float]]) -> list[str]:
    rows = {head[0]: y for head, (_, y) in places.items()}
    return [
        f'<text class="soft" x="4" y="{y + 4:.1f}">layer {layer}</text>'
        for layer, y in rows.items()
    ]


def _members(circuit: Circuit, found: Found, layer: int, index: int, side: str) -> list[Head]:
    """Return the heads of the stage before that a receiver stands for: for k and v, of a group."""
    before = circuit.stage(found.stage.of).signed(found.stage.only)
    if side == "q":
        return [head for head in before if head == (layer, index)]
    wide = circuit.heads_per_layer // circuit.groups
    return [head for head in before if head[0] == layer and head[1] // wide == index]


def _marker() -> str:
    ends = "".join(
        f'<marker id="end{k}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        f'markerHeight="8" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path class="f{k}" d="M0 0L8 4L0 8Z"/></marker>'
        for k in range(8)
    )
    return f"<defs>{ends}</defs>"


def _arrow(
    x: float, y: float, x_end: float, y_end: float, stage: int, effect: float, hint: str
) -> str:
    """Return a curve from one place to another, stopping outside of the node there."""
    from_y, to_y = y - RADIUS, y_end + RADIUS + 2
    bend = max(24.0, (from_y - to_y) / 2)
    path = (
        f"M{x:.1f} {from_y:.1f}C{x:.1f} {from_y - bend:.1f} {x_end:.1f} {to_y + bend:.1f} "
        f"{x_end:.1f} {to_y:.1f}"
    )
    wide = 1 + 5 * min(1.0, abs(effect))
    dash = ' stroke-dasharray="6 4"' if effect < 0 else ""
    k = stage % 8
    return (
        f'<path class="s{k}" fill="none" d="{path}" stroke-opacity="0.7" '
        f'marker-end="url(#end{k})" stroke-width="{wide:.1f}"{dash}>'
        f"<title>{escape(hint)}</title></path>"
    )


def _node(circuit: Circuit, head: Head, x: float, y: float) -> str:
    """Return a head: coloured by the stage that found it first."""
    told, k, strength = [], 0, 0.0
    for number_of, found in enumerate(circuit.stages):
        if head in found.heads:
            effect = found.effect(head)
            told.append(f"{found.stage.name}: {effect:+.3f}")
            if abs(effect) > strength:
                k, strength = number_of % 8, abs(effect)
    hint = f"head {name_of(head)}; " + "; ".join(told)
    return (
        f'<g><circle class="none s{k}" stroke-width="2.5" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}"/>'
        f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{name_of(head)}</text>'
        f"<title>{escape(hint)}</title></g>"
    )


def _map(circuit: Circuit, found: Found) -> Html:
    """Return a stage's effects, layers as rows, the last on top."""
    known = [abs(v) for row in found.effects for v in row if v is not None]
    reach = max(known, default=1.0) or 1.0
    order = range(circuit.layers - 1, -1, -1)
    return heatmap(
        f"Effects by layer and head, {found.stage.name}",
        [f"layer {layer}" for layer in order],
        [str(head) for head in range(circuit.heads_per_layer)],
        [list(found.effects[layer]) for layer in order],
        low=-reach,
        high=reach,
    )


def _title(found: Found) -> str:
    stage = found.stage
    to = LOGITS if stage.side == LOGITS else f"{stage.side} of {stage.of}"
    return f"{stage.name}: paths to {to} at {stage.position}"


def _about(circuit: Circuit) -> str:
    named = f"{circuit.model}; " if circuit.model else ""
    shape = f"{len(circuit.heads)} heads of {circuit.layers} x {circuit.heads_per_layer}"
    drawn = f"{circuit.prompts} prompts of {circuit.task}, seed {circuit.seed}"
    clear, corrupt = (number(value, "+.2f") for value in (circuit.clean, circuit.corrupt))
    return clean(
        f"{named}{shape}; {drawn}: {circuit.accuracy:.0%} right, logit difference {clear}, "
        f"corrupted {corrupt}; each stage keeps {circuit.top:.1%} of all heads"
    )


def _rows(circuit: Circuit) -> Sequence[Sequence[str | float]]:
    rows = []
    for found in circuit.stages:
        side = found.stage.side
        to = ", ".join(f"{side} {layer}.{index}" for layer, index, _ in found.receivers) or LOGITS
        for head, share in zip(found.heads, found.frequency, strict=True):
            rows.append((found.stage.name, name_of(head), found.effect(head), share, to))
    return rows
