"""One HTML page without dependencies: `page`, `section`, `table`, `text`, `notes`.

Parts are `Html`; a plain `str` among them is a paragraph and is escaped. The page forbids itself
every request by its content security policy, and its few lines of script only sort tables and show
the names of marks in plots: without them it reads the same.
"""

import base64
import hashlib
import html
import os
from collections.abc import Mapping, Sequence

from pluribus.core.whole import whole_file
from pluribus.report.terminal import Value, clean, number, numeric


class Html(str):
    """Markup that is safe as it stands."""

    __slots__ = ()


def escape(value: object) -> str:
    """Escape a text for markup or an attribute; control characters are replaced."""
    return html.escape(clean(value))


def text(paragraph: str) -> Html:
    """Return a paragraph."""
    return Html(f"<p>{escape(paragraph)}</p>")


def notes(items: Sequence[str], *, warning: bool = False) -> Html:
    """Return a list; as a warning it is set apart, and says so in words."""
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    if not warning:
        return Html(f"<ul>{lines}</ul>")
    return Html(f'<div class="warning" role="note"><strong>Warnings</strong><ul>{lines}</ul></div>')


def section(heading: str, *parts: str) -> Html:
    """Return a section; plain strings become paragraphs."""
    body = "\n".join(part if isinstance(part, Html) else text(part) for part in parts)
    return Html(f"<section><h2>{escape(heading)}</h2>\n{body}\n</section>")


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[Value]],
    forms: Mapping[str, str] | None = None,
    *,
    caption: str = "",
) -> Html:
    """Return a table whose columns sort on a click; `forms` are format specifications by column."""
    forms = forms or {}
    right = [numeric([row[i] for row in rows]) for i in range(len(header))]
    marks = [' class="n"' if side else "" for side in right]
    heads = "".join(
        f'<th scope="col"{mark}>{escape(name)}</th>'
        for name, mark in zip(header, marks, strict=True)
    )
    lines = []
    for row in rows:
        cells = []
        for i, (name, value) in enumerate(zip(header, row, strict=True)):
            shown = html.escape(number(value, forms.get(name, "")))
            key = ""
            if value is not None and right[i] and shown != "–":
                key = f' data-v="{float(value):.9g}"'
            tag = 'th scope="row"' if i == 0 and not right[0] else "td"
            cells.append(f"<{tag}{marks[i]}{key}>{shown}</{tag[:2]}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return scrolling(f"<table>{told}{body}</table>", caption or "table")


def beside(*parts: Html) -> Html:
    """Put small figures side by side, as many as there is room for."""
    return Html(f'<div class="beside">{"".join(parts)}</div>')


def scrolling(markup: str, label: str) -> Html:
    """Wrap what may be wider than the screen, so that it scrolls by itself, also by keyboard."""
    return Html(
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}">{markup}</div>'
    )


def page(title: str, sections: Sequence[str], *, subtitle: str = "") -> str:
    """Return the whole page. Sections are `Html` or plain paragraphs."""
    body = "\n".join(part if isinstance(part, Html) else text(part) for part in sections)
    policy = f"default-src 'none'; style-src {_digest(STYLE)}; script-src {_digest(SCRIPT)}"
    under = f'<p class="subtitle">{escape(subtitle)}</p>' if subtitle else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1>{under}</header>
{body}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def save(path: str | os.PathLike[str], markup: str) -> None:
    """Write a page under a temporary name and rename it into place.

    Raises OutputError saying why it cannot be written.
    """
    with whole_file(path) as part:
        part.write_text(markup, "utf-8")


def _digest(inline: str) -> str:
    found = hashlib.sha256(inline.encode()).digest()
    return f"'sha256-{base64.b64encode(found).decode()}'"


STYLE = """
:root {
  --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --rule: #d0d7de; --band: #f6f8fa;
  --link: #0b61a4; --warn: #fff4e0; --warn-edge: #b45309; --up: #0b61a4; --down: #b3370a;
  --c0: #0b61a4; --c1: #c2410c; --c2: #0f766e; --c3: #a21caf;
  --c4: #8a5a00; --c5: #3f6f0c; --c6: #475569; --c7: #be123c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f1318; --ink: #e6edf3; --soft: #9aa7b4; --rule: #39424d; --band: #171d24;
    --link: #79b8f5; --warn: #2b2110; --warn-edge: #e0a33e; --up: #6cb2f0; --down: #f98a5a;
    --c0: #6cb2f0; --c1: #fb923c; --c2: #4fd1c5; --c3: #e58af5;
    --c4: #f2cc3d; --c5: #a3d65c; --c6: #b6c2cf; --c7: #fb7f92;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid var(--rule); }
p, ul { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.subtitle { color: var(--soft); margin-top: 0; }
.warning { background: var(--warn); border-left: 4px solid var(--warn-edge);
  padding: .5rem .9rem; margin: 1rem 0; max-width: 46rem; }
.warning ul { padding-left: 1.2rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--rule);
  white-space: nowrap; font-weight: 400; }
thead th { font-weight: 600; background: var(--band); border-bottom: 2px solid var(--rule); }
th.n, td.n { text-align: right; }
tbody tr:hover { background: var(--band); }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
th button::after { content: " \\2195"; color: var(--soft); }
th[aria-sort=ascending] button::after { content: " \\2191"; color: var(--ink); }
th[aria-sort=descending] button::after { content: " \\2193"; color: var(--ink); }
figure { margin: 1.4rem 0; }
figcaption { font-weight: 600; margin-bottom: .2rem; }
.beside { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: flex-end; }
.beside figure { max-width: 100%; }
.beside figcaption { max-width: 24rem; }
figure .wide { margin: .2rem 0; }
svg.chart { display: block; height: auto; min-width: 38rem; max-width: 100%;
  font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
svg.chart.small { min-width: 0; max-width: none; }
svg text { fill: var(--ink); }
svg .soft { fill: var(--soft); }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .whisker { stroke: var(--ink); stroke-width: 1.5; fill: none; }
svg .line { fill: none; stroke-width: 2; }
svg .up { fill: var(--up); } svg .down { fill: var(--down); } svg .none { fill: var(--band); }
svg text.strong { fill: var(--paper); }
.key { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem;
  font-size: .85rem; }
.key svg { width: 22px; height: 12px; vertical-align: -1px; margin-right: .35rem; }
details { font-size: .85rem; color: var(--soft); }
summary { cursor: pointer; }
.tip { position: fixed; z-index: 9; pointer-events: none; max-width: min(22rem, 90vw);
  background: var(--ink); color: var(--paper); padding: .2rem .55rem; border-radius: 4px;
  font-size: .85rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  main { padding: 1rem .8rem 3rem; }
  th, td { padding: .3rem .5rem; }
  tbody th[scope=row] { position: sticky; left: 0; background: var(--paper); max-width: 46vw;
    overflow: hidden; text-overflow: ellipsis; }
  .wide:focus-within tbody th[scope=row], tbody tr:hover th[scope=row] { white-space: normal;
    overflow-wrap: anywhere; }
}
@media print { .wide { overflow: visible; } details { display: none; } }
""" + "".join(
    f".f{i} {{ fill: var(--c{i}); }} .s{i} {{ stroke: var(--c{i}); }}\n" for i in range(8)
)

# Wraps the heads of tables in buttons, so that a page without script has none that do nothing.
SCRIPT = """
for (const head of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "descending";
    const up = head.getAttribute("aria-sort") === "ascending";
    const number = head.classList.contains("n");
    const sign = (number ? down : !up) ? 1 : -1;
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const body = head.closest("table").tBodies[0];
    const key = (row) => {
      const cell = row.cells[head.cellIndex];
      return number ? parseFloat(cell.dataset.v) : cell.textContent;
    };
    const compare = (a, b) => {
      if (!number) return sign * a.localeCompare(b, "en", { numeric: true });
      if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b);
      return sign * (a - b);
    };
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  });
}
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
tip.setAttribute("role", "status");
document.body.append(tip);
const show = (event) => {
  const mark = event.target.closest && event.target.closest("svg.chart *");
  const title = mark && mark.querySelector(":scope > title, :scope > desc");
  tip.hidden = !title;
  if (!title) return;
  if (title.tagName === "title") {
    const told = document.createElementNS(title.namespaceURI, "desc");
    told.textContent = title.textContent;
    mark.setAttribute("aria-label", title.textContent);
    title.replaceWith(told);
  }
  tip.textContent = mark.getAttribute("aria-label");
  const box = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 12, innerWidth - box.width - 6);
  const top = event.clientY - box.height - 12;
  tip.style.left = `${Math.max(left, 6)}px`;
  tip.style.top = `${top < 4 ? event.clientY + 18 : top}px`;
};
for (const kind of ["pointerover", "pointermove", "pointerdown"])
  document.addEventListener(kind, show);
document.addEventListener("scroll", () => { tip.hidden = true; }, true);
"""
