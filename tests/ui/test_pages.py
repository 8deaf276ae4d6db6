"""Pages without a browser: what they say, in what they escape, and that they need no script."""

import html
from html.parser import HTMLParser

import pytest
from ui_help import site

from pluribus import catalogue
from pluribus.catalogue import meaning
from pluribus.ui import commands, pages

HOSTILE = "<script>alert('x')</script>\"'>&\u202e"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with site(tmp_path_factory.mktemp("pages")) as found:
        yield found


class Page(HTMLParser):
    """What a test asks of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.labelled, self.fields = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "label":
            self.labelled.add(attrs.get("for"))
        if tag in ("input", "select", "textarea") and attrs.get("type") not in ("hidden", "submit"):
            self.fields.append((tag, attrs))

    def handle_data(self, data):
        self.texts.append(data)


def links(text):
    found = [attrs["href"] for tag, attrs in Page(text).tags if tag == "a"]
    return [link.removeprefix("/card/") for link in found if link.startswith("/card/")]


def test_the_list_is_every_card_with_what_runs_first(client):
    found = links(client.get("/").text)
    assert sorted(found) == [card.name for card in catalogue.cards()]
    states = [catalogue.card(name).built for name in found]
    assert states == sorted(states, reverse=True)


def test_search_and_filters_without_script(client):
    """The form is a plain GET: its address is the answer, and it keeps what was asked."""
    text = client.get("/", params={"q": "sign conflict", "data": "none", "state": "built"}).text
    wanted = catalogue.find(["sign", "conflict"], catalogue.Filters(data="none", built=True))
    assert links(text) == [card.name for card in wanted]
    assert 'value="sign conflict"' in text
    assert '<option value="none" selected>' in text
    assert links(client.get("/?trains=no&at=inference").text) == [
        card.name
        for card in sorted(
            catalogue.find([], catalogue.Filters(trains=False, at="inference")),
            key=lambda card: (not card.built, not card.system),
        )
    ]
    assert "Nothing has these words" in client.get("/?q=zebra").text


def test_the_part_that_script_asks_for_is_the_same(client):
    whole, part = client.get("/?q=gate").text, client.get("/cards?q=gate").text
    assert part.strip() in whole
    assert "<html" not in part


@pytest.mark.skipif(not meaning.installed(), reason="the sentence encoder is not installed")
def test_search_by_meaning(client, monkeypatch):
    few = [catalogue.card(name) for name in ("ties", "hogwild", "dddm-vc")]
    finder = catalogue.Finder(few, keep=False)
    monkeypatch.setattr(catalogue, "finder", lambda: finder)
    found = links(client.get("/", params={"q": "change somebody's voice", "by": "meaning"}).text)
    assert found[0] == "dddm-vc"


@pytest.mark.parametrize("card", catalogue.cards(), ids=lambda card: card.name)
def test_every_card_has_a_page(client, card):
    answer = client.get(f"/card/{card.name}")
    assert answer.status_code == 200
    said = html.unescape(answer.text)
    for text in (card.title, card.summary, card.needs, card.memory, card.command):
        assert text in said
    if card.record is not None:
        for check in card.record.checks:
            assert check.text in said
            assert check.figure in said
    assert ("Run it here" in said) == bool(commands.offered(card)) == card.built


def test_planned_cards_offer_no_run(client):
    text = client.get("/card/m3vit").text
    assert "planned: not built yet" in text
    assert "<form" not in text


def test_side_by_side(client):
    text = html.unescape(client.get("/compare?c=ties&c=dare_ties").text)
    for name in ("ties", "dare_ties"):
        assert catalogue.card(name).title in text
    assert "Tick two cards" in client.get("/compare?c=ties").text
    many = "&".join(f"c={card.name}" for card in catalogue.cards()[:7])
    answer = client.get(f"/compare?{many}")
    assert answer.status_code == 400
    assert "at most 6 cards" in answer.text


@pytest.mark.parametrize("path", ["/", "/card/ties", "/compare?c=ties&c=sce", "/runs", "/card/mhr"])
def test_every_field_has_a_label_and_every_page_one_heading(client, path):
    page = Page(client.get(path).text)
    for tag, attrs in page.fields:
        named = attrs.get("id") in page.labelled or "aria-label" in attrs
        assert named or attrs.get("name") == "c", (tag, attrs)  # those stand inside their label
    names = [tag for tag, _ in page.tags]
    assert names.count("h1") == 1
    assert names.count("main") == 1
    assert dict(page.tags)["html"]["lang"] == "en"
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("path", ["/", "/card/ties", "/compare?c=ties&c=sce", "/runs"])
def test_pages_ask_for_nothing_elsewhere(client, path):
    answer = client.get(path)
    for tag, attrs in Page(answer.text).tags:
        assert "style" not in attrs
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "action"):
            assert attrs.get(name, "/").startswith("/"), (tag, attrs)
        if tag == "link":
            assert attrs["href"].startswith("/")
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/?q={}", 200),
        ("/?data={}", 400),
        ("/card/{}", 404),
        ("/compare?c={}", 404),
        ("/runs/{}", 404),
        ("/static/{}", 404),
        ("/{}", 404),
    ],
)
def test_hostile_text_is_escaped(client, path, status):
    from urllib.parse import quote

    answer = client.get(path.format(quote(HOSTILE, safe="")))
    assert answer.status_code == status
    assert "<script>alert" not in answer.text
    assert "\u202e" not in answer.text  # it would turn the line around
    names = [tag for tag, _ in Page(answer.text).tags]
    assert names.count("script") == 1  # ours


def test_templates_escape_and_refuse_what_is_missing():
    import jinja2

    made = pages._environment().from_string("{{ text }}")
    assert made.render(text=HOSTILE) == (
        "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&#34;&#39;&gt;&amp;\ufffd"
    )
    with pytest.raises(jinja2.UndefinedError):
        made.render()


def test_static_files(client):
    import re

    (address,) = re.findall(r'href="(/static/ui\.css[^"]*)"', client.get("/").text)
    answer = client.get(address)
    assert "immutable" in answer.headers["cache-control"]
    assert answer.headers["content-type"].startswith("text/css")
    assert client.get("/static/../app.py").status_code == 404
    assert client.get("/favicon.ico").status_code == 204


# -- contrast --------------------------------------------------------------------------------------


def themes():
    """The colours of both themes, by name."""
    import re

    body = pages.static("ui.css")[0].decode()
    light, dark = re.findall(r":root \{(.*?)\}", body, re.DOTALL)
    found = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in (light, dark)]
    assert set(found[0]) == set(found[1])
    return found


def luminance(colour):
    """WCAG 2.2's relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_by_hand():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_contrast_is_aa(theme):
    texts = [
        *((ink, ground) for ink in ("ink", "soft", "link") for ground in ("paper", "band")),
        ("ink", "warn"),
        ("good-ink", "good"),
        ("bad-ink", "bad"),
        ("busy-ink", "busy"),
        ("button-ink", "button"),
    ]
    for ink, ground in texts:
        assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)
    for ground in ("paper", "band"):  # edges of fields
        assert contrast(theme["edge"], theme[ground]) >= 3, ground
