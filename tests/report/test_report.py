import base64
import hashlib
import html
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from pluribus.core.errors import OutputError
from pluribus.report import (
    Html,
    aligned,
    bars,
    beside,
    clean,
    grouped_bars,
    heatmap,
    lines,
    notes,
    number,
    page,
    save,
    scatter,
    section,
    table,
    text,
)
from pluribus.report.charts import _Axis

HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;\x1b[2J\u202e"
NAN = float("nan")
VOID = {"meta", "img", "br", "rect"}


class Reader(HTMLParser):
    """Collects tags and text, and fails on tags that do not close."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID - {"rect"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def everything(name: str = HOSTILE) -> str:
    matrix = [[1.0, -0.5], [NAN, None]]
    parts = [
        text(name),
        notes([name]),
        notes([name], warning=True),
        table([name, "n"], [[name, 1.5], ["b", None]], caption=name),
        bars(name, {name: 1.0, "b": -2.0, "c": None}, errors={name: 0.5}, marked=[name]),
        grouped_bars(name, [name, "b"], {name: [1, None], "y": [2.0, NAN]}, x_label=name),
        grouped_bars(name, ["a"], {name: [1]}, stacked=True, y_label=name),
        lines(name, ["0", name], {name: [1, None], "z": [None, 2]}, y_label=name),
        scatter(name, [(name, 1, 2), ("b", 3, 4)], x_label=name, y_label=name, groups={"b": name}),
        beside(heatmap(name, [name, "b"], ["a", name], matrix)),
    ]
    return page(name, [name, section(name, name, *parts)], subtitle=name)


def test_hostile_names_stay_text():
    read = Reader(everything())
    assert read.count("img") == 0
    assert read.count("script") == 1
    assert read.count("title") >= 1
    assert not any(key.startswith("on") for _, attributes in read.tags for key in attributes)
    shown = "".join(read.text)
    assert "<script>alert(1)</script>" in shown  # as text
    for mark in "\x1b\u202e":
        assert mark not in everything()


def test_page_asks_for_nothing_and_allows_only_its_own_code():
    markup = everything("plain")
    read = Reader(markup)
    for _, attributes in read.tags:
        assert not {"src", "href", "style"} & set(attributes)
    assert "http:" not in markup
    assert "https:" not in markup
    assert "url(" not in markup
    policy = next(a["content"] for t, a in read.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    for tag in ("style", "script"):
        body = re.search(f"<{tag}>(.*?)</{tag}>", markup, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_page_is_made_for_phones_both_themes_and_keyboards():
    markup = everything("plain")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in markup
    assert "prefers-color-scheme: dark" in markup
    wide = [a for t, a in Reader(markup).tags if a.get("class") == "wide"]
    assert wide
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in wide)


@pytest.mark.parametrize("name", [HOSTILE, "plain"])
def test_charts_are_well_formed(name):
    drawings = re.findall(r'<svg class="chart.*?</svg>', everything(name), re.S)
    assert len(drawings) == 6
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img"
        assert root.get("aria-label") == clean(name)
        for node in root.iter():
            for key in ("x", "y", "width", "height", "cx", "cy"):
                value = node.get(key)
                assert value is None or np.isfinite(float(value)), (node.tag, key, value)


def test_every_chart_carries_its_numbers():
    figure = bars("Accuracy", {"ties": 83.4, "linear": 77.125}, form=".1f", unit=" %")
    read = Reader(figure)
    assert read.count("details") == 1
    assert {"83.4", "77.1", "ties", "linear"} <= set(read.text)
    assert 'data-v="77.125"' in figure


def test_bars_are_as_long_as_their_values():
    drawing = ElementTree.fromstring(
        re.search(r"<svg class.*?</svg>", bars("t", {"a": 1.0, "b": 3.0, "c": -1.0}), re.S)[0]
    )
    a, b, c = (float(node.get("width")) for node in drawing.iter("rect"))
    assert b == pytest.approx(3 * a, abs=0.2)
    assert c == pytest.approx(a, abs=0.2)


def test_stacked_bars_stand_on_each_other():
    markup = grouped_bars("t", ["g"], {"a": [0.25], "b": [0.75]}, stacked=True)
    drawing = ElementTree.fromstring(re.search(r"<svg class.*?</svg>", markup, re.S)[0])
    a, b = list(drawing.iter("rect"))
    foot = float(b.get("y")) + float(b.get("height"))
    assert foot == pytest.approx(float(a.get("y")), abs=0.2)


def test_heatmap_deepens_with_the_value():
    markup = heatmap("t", ["r"], ["a", "b", "c"], [[0.2, 0.9, -0.5]])
    drawing = ElementTree.fromstring(re.search(r"<svg class.*?</svg>", markup, re.S)[0])
    cells = [n for n in drawing.iter("rect") if n.get("class") in ("up", "down")]
    a, b, c = (float(cell.get("fill-opacity")) for cell in cells)
    assert a < c < b
    assert [cell.get("class") for cell in cells] == ["up", "up", "down"]
    assert [cell.find("title").text for cell in cells] == [
        "r, a: 0.20",
        "r, b: 0.90",
        "r, c: -0.50",
    ]


@pytest.mark.parametrize(
    "chart",
    [
        bars("t", {}),
        grouped_bars("t", [], {}),
        grouped_bars("t", ["a"], {"s": [None]}),
        lines("t", [], {}),
        lines("t", ["a"], {"s": [NAN]}),
        scatter("t", [], x_label="x", y_label="y"),
        scatter("t", [("a", 1.0, 1.0)], x_label="x", y_label="y", log_x=True),
        heatmap("t", [], [], []),
    ],
)
def test_nothing_to_draw_is_drawn(chart):
    Reader(chart)


def test_many_series_stay_apart():
    told = {f"e{i}": [i] for i in range(12)}
    markup = lines("t", ["0"], told)
    drawn = re.findall(r'<path class="line s(\d)" d="M0 6H22"( stroke-dasharray="[^"]*")?', markup)
    assert len(set(drawn)) == len(told)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0, 1], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([0, 83.4], [0, 20, 40, 60, 80, 100]),
        ([-3, 5], [-4, -2, 0, 2, 4, 6]),
        ([0], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([5], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_ticks_are_round_and_enclose(values, ticks):
    assert _Axis.over(values).ticks == pytest.approx(ticks)


@pytest.mark.parametrize("values", [[1, 8], [0.003, 0.004], [1, 1e9], [7], [5e-324, 1]])
def test_log_axis_encloses(values):
    axis = _Axis.log(values)
    assert axis.ticks[0] <= min(values) * 1.01 or min(values) < 1e-300
    assert axis.ticks[-1] >= max(values) * 0.99
    for value in values:
        assert -0.1 <= axis.at(value, 0, 100) <= 100.1


def test_aligned_puts_numbers_at_the_right():
    told = aligned(
        ["method", "score", "n"],
        [["ties", 0.5, 3], ["task_arithmetic", None, 12], ["\x1b[31mred", NAN, 4]],
        {"score": ".1%"},
    )
    assert told == "\n".join(
        [
            "method           score   n",
            "ties             50.0%   3",
            "task_arithmetic      –  12",
            "\ufffd[31mred             –   4",
        ]
    )


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [
        (None, "", "–"),
        (NAN, ".2f", "–"),
        (0.12345, "", "0.1235"),
        (7, "", "7"),
        (1234567, ",", "1,234,567"),
        (-0.0001, ".2f", "0.00"),
        (-0.001, ".2%", "-0.10%"),
        (np.float32(0.5), ".1f", "0.5"),
        (np.int64(3), "", "3"),
        (True, "", "yes"),
        ("a\nb", "", "a\ufffdb"),
    ],
)
def test_numbers(value, form, shown):
    assert number(value, form) == shown


def test_table_marks_numbers_for_sorting():
    read = Reader(table(["a", "n"], [["x", np.float64(0.25)], ["y", None]], {"n": ".0%"}))
    values = [a.get("data-v") for t, a in read.tags if t == "td"]
    assert values == ["0.25", None]
    assert [a.get("class") for t, a in read.tags if t == "td"] == ["n", "n"]


def test_plain_strings_are_paragraphs_and_markup_is_kept():
    told = section("h", "a < b", Html("<hr>"))
    assert "<p>a &lt; b</p>\n<hr>" in told
    assert html.escape("a < b") in page("t", ["a < b"])


def test_save_replaces_whole_files(tmp_path):
    out = tmp_path / "report.html"
    save(out, "one")
    save(out, "two\ud7ff")
    assert out.read_text("utf-8") == "two\ud7ff"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(OutputError, match="absent"):
        save(tmp_path / "absent" / "report.html", "x")


def test_only_chosen_points_bear_labels():
    points = [("one", 1.0, 2.0), ("two", 2.0, 3.0)]
    drawn = scatter("Some", points, x_label="x", y_label="y", labelled=["two"])
    assert ">two</text>" in str(drawn)
    assert ">one</text>" not in str(drawn)
    assert "one: 1" in str(drawn)  # under the pointer


def test_labels_never_cover_each_other():
    crowd = [(f"a point with a name {i}", 1 + i / 1e4, 2.0) for i in range(40)]
    drawn = scatter("Some", crowd, x_label="x", y_label="y")
    spots = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>a point with', drawn)
    assert 1 < len(spots) < 40  # as many as there is room for
    assert len(set(spots)) == len(spots)
    assert drawn.count("a point with a name 39") >= 2  # its hint, and its row in the table
