"""Aligned tables for a terminal, and numbers as people read them."""

import math
import unicodedata
from collections.abc import Mapping, Sequence

Value = str | int | float | None


def clean(text: object) -> str:
    """Return a text without control characters, which a terminal or a page would obey."""
    return "".join(
        "\ufffd" if unicodedata.category(char) in ("Cc", "Cs", "Cf") else char for char in str(text)
    )


def number(value: Value, form: str = "") -> str:
    """Format a value: texts as they are, numbers by `form`, a dash for nothing."""
    value = getattr(value, "item", lambda: value)()  # a numpy scalar
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not form:
        return str(value) if isinstance(value, int) else f"{value:.4g}"
    shown = format(value, form)
    return shown.replace("-", "") if shown.strip("-0.%") == "" else shown


def numeric(values: Sequence[Value]) -> bool:
    """Return whether a column holds numbers, so that it is aligned at the right."""
    told = [value for value in values if value is not None]
    return bool(told) and not any(isinstance(value, str) for value in told)


def aligned(
    header: Sequence[str],
    rows: Sequence[Sequence[Value]],
    forms: Mapping[str, str] | None = None,
) -> str:
    """Return a table as lines of text: texts at the left of their column, numbers at the right.

    `forms` are format specifications by column, such as `{"share": ".1%"}`.
    """
    forms = forms or {}
    columns = [[row[i] for row in rows] for i in range(len(header))]
    lines = [[clean(name) for name in header]]
    lines += [
        [number(value, forms.get(name, "")) for name, value in zip(header, row, strict=True)]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = [numeric(column) for column in columns]
    told = (
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )
    return "\n".join(told)
