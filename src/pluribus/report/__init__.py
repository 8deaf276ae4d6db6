"""Reports: self-contained HTML pages with tables and charts, and aligned tables for a terminal.

    page("Title", [section("Results", "A sentence.", table(["method", "score"], rows), bars(...))])

gives one file that needs no network and no library, in light and dark, on paper and on a phone.
Every text is escaped, so names from other people's models are safe in it.
"""

from pluribus.report.charts import bars, grouped_bars, heatmap, lines, scatter
from pluribus.report.html import Html, beside, notes, page, save, section, table, text
from pluribus.report.terminal import aligned, clean, number

__all__ = [
    "Html",
    "aligned",
    "bars",
    "beside",
    "clean",
    "grouped_bars",
    "heatmap",
    "lines",
    "notes",
    "number",
    "page",
    "save",
    "scatter",
    "section",
    "table",
    "text",
]
