"""The pages in a real browser: search, filter, compare, run, report; by mouse and by keyboard."""

import os
import re
import shutil
import signal

import pytest
from ui_help import WAIT, instead, site

from pluribus import catalogue

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
MS = WAIT * 1000
WAITS = """
import sys
print("begun", flush=True)
sys.stderr.write("\\r 50 %")
sys.stderr.flush()
import signal
signal.pause()
"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        found = driver.chromium.launch(executable_path=CHROMIUM, args=options, timeout=MS)
        yield found
        found.close()


@pytest.fixture
def client(models):
    with site(models) as found:
        yield found


@pytest.fixture
def visit(browser, client):
    """Opens a page in a browser of its own; at the end no page may have complained."""
    opened, complaints = [], []

    def go(path="/", **settings):
        context = browser.new_context(base_url=str(client.base_url), **settings)
        context.set_default_timeout(MS)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console", lambda said: complaints.append(said.text) if said.type == "error" else None
        )
        page.goto(path)
        opened.append(context)
        return page

    yield go
    for context in opened:
        context.close()
    assert not complaints


def names(page):
    return [link.get_attribute("href").removeprefix("/card/") for link in cards(page).all()]


def cards(page):
    return page.locator(".card h2 a")


def expect(locator):
    return playwright.expect(locator)


@pytest.fixture(autouse=True, scope="module")
def patience():
    playwright.expect.set_options(timeout=MS)


def test_search_as_you_type_filter_and_compare(visit):
    page = visit()
    count = len(catalogue.cards())
    expect(page.locator("#count")).to_have_text(f"{count} of {count} cards")
    page.get_by_label("What do you want to do?").press_sequentially("sign conflict")
    wanted = [card.name for card in catalogue.find(["sign", "conflict"])]
    expect(cards(page)).to_have_count(len(wanted))
    assert names(page) == wanted
    assert page.url.endswith("/?q=sign+conflict")
    page.get_by_label("compare ties", exact=True).check()
    page.get_by_label("State").select_option("built")
    page.get_by_label("What do you want to do?").fill("dare")
    found = catalogue.find(["dare"], catalogue.Filters(built=True))
    expect(cards(page)).to_have_count(len(found))
    page.get_by_label("compare dare_ties", exact=True).check()
    expect(page.locator("#chosen")).to_have_text("Side by side: ties, dare_ties")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_url("**/compare?c=ties&c=dare_ties")
    heads = page.locator("thead th")
    assert heads.all_inner_texts() == ["ties", "dare_ties"]
    page.go_back()
    expect(page.get_by_label("What do you want to do?")).to_have_value("dare")


def test_a_search_survives_a_reload(visit):
    page = visit("/?q=gate&data=unlabelled")
    wanted = [card.name for card in catalogue.find(["gate"], catalogue.Filters(data="unlabelled"))]
    assert names(page) == wanted
    page.get_by_label("Data").select_option("")
    expect(cards(page)).to_have_count(len(catalogue.find(["gate"])))
    page.reload()
    expect(cards(page)).to_have_count(len(catalogue.find(["gate"])))
    page.get_by_label("What do you want to do?").fill("zebra")
    expect(page.get_by_text("Nothing has these words")).to_be_visible()


def test_by_keyboard_alone(visit):
    page = visit()
    page.keyboard.press("/")
    page.keyboard.type("hogwild")
    expect(page.locator("#count")).to_contain_text("hogwild")
    page.keyboard.press("ArrowDown")
    expect(cards(page).first).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(page.locator("#q")).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url("**/card/hogwild")
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName + document.activeElement.id"))
    assert any(one.startswith("SUMMARY") for one in reached)
    outline = page.evaluate(
        "() => { document.querySelector('summary').focus({focusVisible: true});"
        " return getComputedStyle(document.querySelector('summary')).outlineStyle }"
    )
    assert outline == "solid"


def test_run_and_report(visit):
    """A real inspection of three small models, started from a card, to its page and back."""
    page = visit("/card/ties")
    page.get_by_text("Look for interference").click()
    form = page.locator("form", has=page.locator("input[value=inspect]"))
    form.get_by_label("Base model").fill("base.safetensors")
    form.get_by_label("Experts").fill("one.safetensors\ntwo.safetensors")
    form.get_by_role("button", name="Start").click()
    page.wait_for_url(re.compile(r"/runs/\d+$"))
    expect(page.locator("#status")).to_have_text("done")  # without a click: the page watches
    expect(page.locator("#log")).to_contain_text("one.safetensors")
    page.get_by_role("link", name="report.html").click()
    page.wait_for_url("**/reports/1")
    expect(page.locator("h1")).to_be_visible()
    assert page.locator("table").count() > 0
    assert page.evaluate("origin") == "null"  # it sees nothing of this server
    heads = page.locator("thead th button")
    assert heads.count() > 0  # its own script, which sorts, may run
    page.go_back()
    page.get_by_role("link", name="All runs").click()
    expect(page.get_by_role("link", name="Look for interference")).to_be_visible()
    page.get_by_role("link", name="Look for interference").click()
    page.get_by_role("button", name="Remove run, log and reports").click()
    expect(page.get_by_text("Nothing has been run from here yet")).to_be_visible()


def begin(page):
    page.goto("/card/ties")
    page.get_by_text("Run the demo").click()
    form = page.locator("form", has=page.locator("input[value=demo]"))
    form.get_by_role("button", name="Start").click()
    page.wait_for_url(re.compile(r"/runs/\d+$"))
    expect(page.locator("#progress")).to_have_text(" 50 %")


def test_two_browsers_watch_and_one_cancels(visit, monkeypatch):
    instead(monkeypatch, WAITS)
    one, two = visit(), visit()
    begin(one)
    two.goto(one.url)
    for page in (one, two):
        expect(page.locator("#status")).to_have_text("running")
        expect(page.locator("#log")).to_contain_text("begun")
    two.get_by_role("button", name="Cancel").click()
    for page in (one, two):
        expect(page.locator("#status")).to_have_text("cancelled")
        assert page.locator("#log").inner_text().count("begun") == 1


def test_a_run_that_is_killed_while_the_page_watches(visit, monkeypatch):
    instead(monkeypatch, WAITS)
    page = visit()
    begin(page)
    pid = int(page.locator("dl div", has_text="process").locator("dd").inner_text())
    os.kill(pid, signal.SIGKILL)
    expect(page.locator("#status")).to_have_text("killed")
    expect(page.locator("#note")).to_contain_text("SIGKILL")
    expect(page.locator("#log")).to_contain_text("begun")


def test_without_script(visit, monkeypatch):
    """Reading, searching, comparing, and a run whose page comes anew until it is over."""
    page = visit("/", java_script_enabled=False)
    page.get_by_label("What do you want to do?").fill("sign conflict")
    page.get_by_label("Data").select_option("none")
    page.get_by_role("button", name="Search").click()
    page.wait_for_url("**q=sign+conflict**")
    wanted = catalogue.find(["sign", "conflict"], catalogue.Filters(data="none"))
    assert names(page) == [card.name for card in wanted]
    both = names(page)[:2]
    for name in both:
        page.get_by_label(f"compare {name}", exact=True).check()
    page.get_by_role("button", name="Compare").click()
    page.wait_for_url("**/compare?c=**")
    assert page.locator("thead th").all_inner_texts() == both
    instead(monkeypatch, "print('all there is')")
    page.goto("/card/ties")
    page.get_by_text("Run the demo").click()
    form = page.locator("form", has=page.locator("input[value=demo]"))
    form.get_by_role("button", name="Start").click()
    expect(page.locator("#status")).to_have_text("done")
    expect(page.locator("#log")).to_contain_text("all there is")


@pytest.mark.parametrize("path", ["/", "/card/ties", "/compare?c=ties&c=sce", "/runs"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_sticks_out_and_targets_are_large(visit, path, scheme):
    page = visit(path, color_scheme=scheme, viewport={"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 19, 24)"}[scheme]
    low = page.evaluate(
        "[...document.querySelectorAll('button, select, input[type=text], input[type=search]')]"
        ".filter(e => e.offsetParent && e.getBoundingClientRect().height < 36).length"
    )
    assert low == 0


@pytest.mark.parametrize("path", ["/", "/card/ties", "/runs"])
def test_every_control_has_a_name_and_every_text_contrast(visit, path):
    """As Chromium tells a screen reader; and as WCAG 2.2 counts what is painted, at 4.5 to 1."""
    roles = {"textbox", "searchbox", "combobox", "checkbox", "button", "link", "DisclosureTriangle"}
    for scheme in ("light", "dark"):
        page = visit(path, color_scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
        talk = page.context.new_cdp_session(page)
        nodes = talk.send("Accessibility.getFullAXTree")["nodes"]
        told = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
        assert len(told) >= 2
        assert [node for node in told if not node.get("name", {}).get("value", "").strip()] == []
        assert page.evaluate(FAINT) == []


FAINT = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => numbers(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if ((numbers(colour)[3] ?? 1) === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    if (e.tagName === "OPTION" || !e.getClientRects().length) continue;
    const [low, high] = [light(getComputedStyle(e).color), light(ground(e))].sort((a, b) => a - b);
    if ((high + 0.05) / (low + 0.05) < 4.5) found.push(e.outerHTML.slice(0, 200));
  }
  return found;
}"""
