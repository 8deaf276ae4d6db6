"""Charts as inline SVG: bars, grouped bars, lines, scatter, heat map.

Each is a figure with axes, labels and a legend, and carries its numbers as a table below, for
people who cannot see it or want the digits. Colours come from the page's style, in light and dark.
"""

import math
from collections.abc import Collection, Mapping, Sequence

from pluribus.report.html import Html, escape, scrolling, table
from pluribus.report.terminal import number

WIDTH = 680
COLOURS = 8
CHAR = 6.6  # width of a letter at 12 px, on average
DASHES = ("", "7 3", "2 3", "9 3 2 3")
Number = float | int | None


def bars(
    title: str,
    values: Mapping[str, Number],
    *,
    unit: str = "",
    form: str = ".3g",
    errors: Mapping[str, Number] | None = None,
    marked: Sequence[str] = (),
) -> Html:
    """Draw one horizontal bar a name, with its value; `errors` are half lengths of whiskers.

    `marked` names are drawn in a second colour.
    """
    errors = errors or {}
    told = {name: _known(value) for name, value in values.items()}
    reach = [
        value + sign * (_known(errors.get(name)) or 0)
        for name, value in told.items()
        if value is not None
        for sign in (-1, 1)
    ]
    axis = _Axis.over([0, *reach])
    left = min(max((len(name) for name in told), default=0) * CHAR + 14, 250)
    right = WIDTH - 56
    height = 24 * len(told) + 46
    bottom = height - 40
    svg = _vertical_grid(axis, left, right, bottom, form, unit)
    zero = axis.at(0, left, right)
    for row, (name, value) in enumerate(told.items()):
        y = 6 + 24 * row
        svg.append(_text(left - 8, y + 13, _short(name, 34), "end", title=name))
        if value is None:
            svg.append(_text(zero + 4, y + 13, "–", css="soft"))
            continue
        x = axis.at(value, left, right)
        css = "f1" if name in marked else "f0"
        hint = f"{name}: {number(value, form)}{unit}"
        svg.append(_rect(min(x, zero), y, abs(x - zero), 17, css, hint))
        half = _known(errors.get(name))
        end = x
        if half:
            low, high = (axis.at(value + sign * half, left, right) for sign in (-1, 1))
            caps = f"M{low:.1f} {y + 5}v7M{high:.1f} {y + 5}v7"
            svg.append(f'<path class="whisker" d="M{low:.1f} {y + 8.5}H{high:.1f}{caps}"/>')
            end = max(x, high)
        svg.append(_text(max(end, zero) + 5, y + 13, number(value, form)))
    svg.append(_line(zero, 2, zero, bottom))
    rows = [(name, value, _known(errors.get(name))) for name, value in told.items()]
    head = ["name", "value", "±"] if errors else ["name", "value"]
    numbers = table(head, [row[: len(head)] for row in rows], {"value": form, "±": form})
    return _figure(title, svg, height, [], numbers)


def grouped_bars(
    title: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[Number]],
    *,
    unit: str = "",
    form: str = ".3g",
    stacked: bool = False,
    x_label: str = "",
    y_label: str = "",
) -> Html:
    """Draw vertical bars: for each group one bar a series, side by side or on top of each other."""
    told = {name: [_known(value) for value in row] for name, row in series.items()}
    if stacked:
        sums = [sum(row[i] or 0 for row in told.values()) for i in range(len(groups))]
        axis = _Axis.over([0, *sums])
    else:
        axis = _Axis.over([0, *(v for row in told.values() for v in row if v is not None)])
    frame = _Frame.around(axis, form, unit, groups, x_label)
    svg = _horizontal_grid(axis, frame, form, unit, y_label)
    pitch = (frame.right - frame.left) / max(len(groups), 1)
    inner = min(pitch * 0.82, 46 if stacked else 30 * len(told))
    wide = inner if stacked else inner / max(len(told), 1)
    zero = axis.at(0, frame.bottom, frame.top)
    for i, group in enumerate(groups):
        x = frame.left + pitch * (i + 0.5) - inner / 2
        level = 0.0
        for k, (name, row) in enumerate(told.items()):
            value = row[i]
            if value is None:
                continue
            y = axis.at(level + value, frame.bottom, frame.top)
            foot = axis.at(level, frame.bottom, frame.top) if stacked else zero
            hint = f"{group}, {name}: {number(value, form)}{unit}"
            css = f"f{k % COLOURS}"
            gap = 1 if wide > 6 and not stacked else 0
            svg.append(_rect(x, min(y, foot), wide - gap, abs(y - foot), css, hint))
            if stacked:
                level += value
            else:
                x += wide
    svg += _group_labels(groups, frame, pitch, x_label)
    svg.append(_line(frame.left, zero, frame.right, zero))
    return _figure(
        title, svg, frame.height, [(name, f"f{k % COLOURS}", "") for k, name in enumerate(told)],
        _numbers(x_label or "group", groups, told, form),
    )  # fmt: skip


def lines(
    title: str,
    places: Sequence[str],
    series: Mapping[str, Sequence[Number]],
    *,
    unit: str = "",
    form: str = ".3g",
    x_label: str = "",
    y_label: str = "",
    zero: bool = True,
) -> Html:
    """Draw one line a series over places in order, such as layers; gaps where a value is missing.

    `zero` starts the axis at 0.
    """
    told = {name: [_known(value) for value in row] for name, row in series.items()}
    known = [v for row in told.values() for v in row if v is not None]
    axis = _Axis.over([0, *known] if zero else known)
    frame = _Frame.around(axis, form, unit, places, x_label)
    svg = _horizontal_grid(axis, frame, form, unit, y_label)
    pitch = (frame.right - frame.left) / max(len(places), 1)
    dots = pitch > 9
    legend = []
    for k, (name, row) in enumerate(told.items()):
        dash = DASHES[(k + k // COLOURS) % len(DASHES)]
        path, pen = [], "M"
        for i, value in enumerate(row):
            if value is None:
                pen = "M"
                continue
            x = frame.left + pitch * (i + 0.5)
            y = axis.at(value, frame.bottom, frame.top)
            path.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
            if dots or len(row) == 1:
                hint = f"{places[i]}, {name}: {number(value, form)}{unit}"
                svg.append(_circle(x, y, 3, f"f{k % COLOURS}", hint))
        stroke = f' stroke-dasharray="{dash}"' if dash else ""
        if path:
            svg.append(f'<path class="line s{k % COLOURS}" d="{"".join(path)}"{stroke}/>')
        legend.append((name, f"line s{k % COLOURS}", dash))
    svg += _group_labels(places, frame, pitch, x_label)
    svg.append(_line(frame.left, frame.bottom, frame.right, frame.bottom))
    numbers = _numbers(x_label or "place", places, told, form)
    return _figure(title, svg, frame.height, legend, numbers)


def scatter(
    title: str,
    points: Sequence[tuple[str, float, float]],
    *,
    x_label: str,
    y_label: str,
    x_form: str = ".3g",
    y_form: str = ".3g",
    groups: Mapping[str, str] | None = None,
    labelled: Collection[str] | None = None,
    log_x: bool = False,
    x_zero: bool = False,
    y_zero: bool = False,
) -> Html:
    """Draw labelled points (name, x, y), such as accuracy against storage.

    `groups` maps names to the group that colours them; of points not in `labelled` (None: all are),
    and of those around which there is no room, the name shows under the pointer only. `log_x`
    spaces positive x by their ratio.
    """
    groups = groups or {}
    kinds = list(dict.fromkeys(groups.get(name, "") for name, _, _ in points))
    xs = [x for _, x, _ in points]
    x_axis = _Axis.log(xs) if log_x else _Axis.over([0, *xs] if x_zero else xs)
    y_axis = _Axis.over([*([0] if y_zero else []), *(y for _, _, y in points)])
    frame = _Frame.around(y_axis, y_form, "", [], x_label)
    svg = _horizontal_grid(y_axis, frame, y_form, "", y_label)
    for tick in x_axis.ticks:
        x = x_axis.at(tick, frame.left, frame.right)
        svg.append(_line(x, frame.top, x, frame.bottom, "grid"))
        svg.append(_text(x, frame.bottom + 17, number(tick, x_form), "middle", css="soft"))
    svg.append(_text((frame.left + frame.right) / 2, frame.bottom + 36, x_label, "middle"))
    svg.append(_line(frame.left, frame.bottom, frame.right, frame.bottom))
    svg.append(_line(frame.left, frame.top, frame.left, frame.bottom))
    taken: list[tuple[float, float, float, float]] = []
    spots = []
    for name, x, y in points:
        px, py = x_axis.at(x, frame.left, frame.right), y_axis.at(y, frame.bottom, frame.top)
        spots.append((name, x, y, px, py))
        taken.append((px - 5, py - 5, px + 5, py + 5))
    for name, x, y, px, py in spots:
        k = kinds.index(groups.get(name, "")) % COLOURS
        hint = f"{name}: {number(x, x_form)}, {number(y, y_form)}"
        svg.append(_mark(px, py, k, hint))
        if labelled is not None and name not in labelled:
            continue
        label = _short(name, 26)
        if (place := _free(px, py, len(label) * CHAR, frame, taken)) is not None:
            svg.append(_text(*place[:2], label, place[2], title=name))
    legend = [(kind, f"f{k % COLOURS}", f"mark{k}") for k, kind in enumerate(kinds) if kind]
    head = ["name", x_label, y_label]
    numbers = table(head, [list(point) for point in points], {x_label: x_form, y_label: y_form})
    return _figure(title, svg, frame.height, legend, numbers)


def heatmap(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[Number]],
    *,
    form: str = ".2f",
    low: float = -1.0,
    high: float = 1.0,
) -> Html:
    """Draw a matrix: a cell's colour deepens from 0 towards `high`, in another hue towards `low`.

    Values stand in the cells while they fit, and always in the cells' tooltips.
    """
    cell = max(24.0, min(58.0, 430 / max(len(columns), 1)))
    left = min(max((len(name) for name in rows), default=0), 26) * (CHAR + 0.4) + 12
    longest = min(max((len(name) for name in columns), default=0), 24)
    slanted = longest * CHAR > cell - 4
    top = min(longest * CHAR * 0.75 + 14, 130) if slanted else 24.0
    width = left + cell * len(columns) + (70 if slanted else 12)
    height = top + min(cell, 40) * len(rows) + 8
    tall = min(cell, 40)
    fits = cell >= 34
    svg = []
    for j, name in enumerate(columns):
        x = left + cell * (j + 0.5)
        if slanted:
            turned = f' transform="rotate(-45 {x:.1f} {top - 8:.1f})"'
            svg.append(_text(x, top - 8, _short(name, 24), title=name, more=turned))
        else:
            svg.append(_text(x, top - 8, name, "middle"))
    for i, row in enumerate(rows):
        y = top + tall * i
        svg.append(_text(left - 7, y + tall / 2 + 4, _short(row, 26), "end", title=row))
        for j, column in enumerate(columns):
            value = _known(values[i][j])
            x = left + cell * j
            hint = f"{row}, {column}: {number(value, form)}"
            if value is None:
                svg.append(_rect(x, y, cell - 1, tall - 1, "none", hint))
                depth = 0.0
            else:
                side = high if value >= 0 else low
                depth = min(abs(value / side), 1.0) if side else 0.0
                css = "up" if value >= 0 else "down"
                svg.append(_rect(x, y, cell - 1, tall - 1, "none", ""))
                svg.append(_rect(x, y, cell - 1, tall - 1, css, hint, opacity=0.06 + 0.9 * depth))
            if fits:
                shown = number(value, form)
                css = "strong" if depth > 0.62 else ""
                more = ' pointer-events="none"'
                place = (x + cell / 2, y + tall / 2 + 4)
                svg.append(_text(*place, shown, "middle", css=css, more=more))
    told = {name: [row[j] for row in values] for j, name in enumerate(columns)}
    return _figure(title, svg, height, [], _numbers("", rows, told, form), width)


# -- pieces ----------------------------------------------------------------------------------------


class _Axis:
    """A scale from values to places, with round ticks."""

    def __init__(self, ticks: Sequence[float], log: bool = False) -> None:
        self.ticks, self._log = list(ticks), log

    @classmethod
    def over(cls, values: Sequence[float]) -> "_Axis":
        values = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(values), max(values)
        if high == low:
            low, high = (min(low, 0), max(high, 0)) if low else (0.0, 1.0)
        rough = (high - low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * 0.999)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls([i * step for i in range(first, last + 1)])

    @classmethod
    def log(cls, values: Sequence[float]) -> "_Axis":
        values = [value for value in values if 0 < value < math.inf] or [1.0]
        low, high = min(values), max(values)
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        steps = (1, 2, 5) if last - first < 3 else (1,)
        marks = [m * 10.0**e for e in range(first, last + 1) for m in steps]
        start = max(i for i, mark in enumerate(marks) if mark <= low * 1.001)
        stop = next((i for i, mark in enumerate(marks) if mark >= high * 0.999), -1)
        found = marks[start : stop + 1 if stop >= 0 else None]
        found = found if len(found) > 1 else [found[0], found[0] * 10]
        return cls(found, log=True)

    def at(self, value: float, start: float, stop: float) -> float:
        """Return the place of a value between the places of the first and the last tick."""
        low, high = self.ticks[0], self.ticks[-1]
        if self._log:
            value, low, high = (math.log(max(x, 1e-300)) for x in (value, low, high))
        return start + (stop - start) * (value - low) / (high - low)


class _Frame:
    """The rectangle inside the axes."""

    def __init__(self, left: float, right: float, top: float, bottom: float, height: float) -> None:
        self.left, self.right, self.top, self.bottom = left, right, top, bottom
        self.height = height

    @classmethod
    def around(
        cls, axis: _Axis, form: str, unit: str, labels: Sequence[str], x_label: str
    ) -> "_Frame":
        widest = max(len(number(tick, form)) + len(unit) for tick in axis.ticks)
        left = widest * CHAR + 16
        pitch = (WIDTH - 12 - left) / max(len(labels), 1)
        longest, slanted, _ = _labelling(labels, pitch)
        if slanted:  # the first label reaches back to the left
            left = max(left, longest * CHAR * 0.72 + 12 - pitch / 2)
        under = longest * CHAR * 0.72 + 16 if slanted else 24
        bottom = 26 + 220
        return cls(left, WIDTH - 12, 26, bottom, bottom + under + (20 if x_label else 4))


def _labelling(labels: Sequence[str], pitch: float) -> tuple[int, bool, int]:
    """Return the letters of the longest label, whether labels slant, and which nth one is shown."""
    longest = min(max((len(name) for name in labels), default=0), 24)
    slanted = longest * CHAR > pitch - 4 and not all(name.isdigit() for name in labels)
    room = 14 if slanted else longest * CHAR + 6
    return longest, slanted, max(1, math.ceil(room / pitch))


def _group_labels(labels: Sequence[str], frame: _Frame, pitch: float, x_label: str) -> list[str]:
    out = []
    _, slanted, every = _labelling(labels, pitch)
    for i in range(0, len(labels), every):
        x, y = frame.left + pitch * (i + 0.5), frame.bottom + 17
        if slanted:
            turned = f' transform="rotate(-45 {x:.1f} {y - 4:.1f})"'
            name = labels[i]
            out.append(_text(x, y - 4, _short(name, 24), "end", title=name, more=turned))
        else:
            out.append(_text(x, y, labels[i], "middle", css="soft"))
    if x_label:
        out.append(_text((frame.left + frame.right) / 2, frame.height - 4, x_label, "middle"))
    return out


def _horizontal_grid(axis: _Axis, frame: _Frame, form: str, unit: str, y_label: str) -> list[str]:
    out = []
    for tick in axis.ticks:
        y = axis.at(tick, frame.bottom, frame.top)
        out.append(_line(frame.left, y, frame.right, y, "grid"))
        out.append(_text(frame.left - 7, y + 4, number(tick, form) + unit, "end", css="soft"))
    if y_label:
        out.append(_text(2, 12, y_label))
    return out


def _vertical_grid(
    axis: _Axis, left: float, right: float, bottom: float, form: str, unit: str
) -> list[str]:
    out = []
    for tick in axis.ticks:
        x = axis.at(tick, left, right)
        out.append(_line(x, 2, x, bottom, "grid"))
        out.append(_text(x, bottom + 17, number(tick, form) + unit, "middle", css="soft"))
    return out


def _free(
    x: float, y: float, wide: float, frame: _Frame, taken: list[tuple[float, float, float, float]]
) -> tuple[float, float, str] | None:
    """Return the first place around a point where a label meets nothing, and note it; or None."""
    options = []
    for shift in (0, -14, 14, -28, 28, -42, 42):
        options += [(x + 9, y + 4 + shift, "start"), (x - 9, y + 4 + shift, "end")]
    for lx, ly, anchor in options:
        start = lx if anchor == "start" else lx - wide
        box = (start, ly - 10, start + wide, ly + 3)
        inside = start >= frame.left - 4 and start + wide <= WIDTH and 10 < ly < frame.bottom
        if not inside:
            continue
        if all(box[2] <= b[0] or box[0] >= b[2] or box[3] <= b[1] or box[1] >= b[3] for b in taken):
            taken.append(box)
            return lx, ly, anchor
    return None


def _mark(x: float, y: float, kind: int, hint: str) -> str:
    """Return a point whose shape, like its colour, tells its group."""
    css = f"f{kind % COLOURS}"
    shapes = (
        "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0 -5 0Z",
        "M-4.6 -4.6H4.6V4.6H-4.6Z",
        "M0 -6L5.6 4.4H-5.6Z",
        "M0 -6.2L6.2 0L0 6.2L-6.2 0Z",
    )
    shape = shapes[kind % len(shapes)]
    title = f"<title>{escape(hint)}</title>" if hint else ""
    move = f"translate({x:.1f} {y:.1f})"
    return f'<path class="{css}" transform="{move}" d="{shape}">{title}</path>'


def _figure(
    title: str,
    svg: Sequence[str],
    height: float,
    legend: Sequence[tuple[str, str, str]],
    numbers: Html,
    width: float = WIDTH,
) -> Html:
    small = " small" if width < 608 else ""
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    drawn = (
        f'<svg class="chart{small}" {size} role="img" aria-label="{escape(title)}">'
        f"{''.join(svg)}</svg>"
    )
    keys = "".join(f"<li>{_swatch(css, extra)}{escape(name)}</li>" for name, css, extra in legend)
    key = f'<ul class="key">{keys}</ul>' if len(legend) > 1 else ""
    return Html(
        f"<figure><figcaption>{escape(title)}</figcaption>{scrolling(drawn, title)}{key}"
        f"<details><summary>Numbers</summary>{numbers}</details></figure>"
    )


def _swatch(css: str, extra: str) -> str:
    if css.startswith("line"):
        dash = f' stroke-dasharray="{extra}"' if extra else ""
        inner = f'<path class="{css}" d="M0 6H22"{dash}/>'
    elif extra.startswith("mark"):
        inner = _mark(11, 6, int(extra.removeprefix("mark")), "")
    else:
        inner = f'<rect class="{css}" x="5" width="12" height="12"/>'
    return f'<svg viewBox="0 0 22 12" aria-hidden="true">{inner}</svg>'


def _numbers(
    first: str, places: Sequence[str], series: Mapping[str, Sequence[Number]], form: str
) -> Html:
    rows = [[str(place), *(row[i] for row in series.values())] for i, place in enumerate(places)]
    return table([first, *series], rows, dict.fromkeys(series, form))


def _known(value: Number) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _short(name: str, most: int) -> str:
    """Return a name with its middle left out if it is long: its ends tell models apart."""
    if len(name) <= most:
        return name
    head = most // 2 - 1
    return f"{name[:head]}…{name[len(name) - (most - head - 1) :]}"


def _text(
    x: float,
    y: float,
    shown: str,
    anchor: str = "start",
    *,
    css: str = "",
    title: str = "",
    more: str = "",
) -> str:
    mark = f' class="{css}"' if css else ""
    hint = f"<title>{escape(title)}</title>" if title and title != shown else ""
    where = f'x="{x:.1f}" y="{y:.1f}"'
    side = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f"<text{mark} {where}{side}{more}>{hint}{escape(shown)}</text>"


def _rect(
    x: float, y: float, wide: float, tall: float, css: str, hint: str, opacity: float = 1.0
) -> str:
    faint = f' fill-opacity="{opacity:.2f}"' if opacity < 1 else ""
    title = f"<title>{escape(hint)}</title>" if hint else ""
    size = f'x="{x:.1f}" y="{y:.1f}" width="{max(wide, 0):.1f}" height="{max(tall, 0):.1f}"'
    return f'<rect class="{css}" {size}{faint}>{title}</rect>'


def _circle(x: float, y: float, radius: float, css: str, hint: str) -> str:
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}"'
    return f'<circle class="{css}" {place}><title>{escape(hint)}</title></circle>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str = "axis") -> str:
    return f'<path class="{css}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'
