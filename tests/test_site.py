"""The documentation as a site: a page for every system, and links that lead to pages."""

import importlib.util
from pathlib import Path

import pytest

from pluribus import catalogue

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("pluribus_site", ROOT / "tools" / "site.py")
assert spec is not None
assert spec.loader is not None
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)


def test_every_system_has_a_page_with_its_card():
    pages = dict(site.pages())
    for card in catalogue.cards():
        text = pages[f"systems/{card.name}.md"]
        assert text.startswith(f"# {card.title}\n")
        for label, told in card.rows():
            if label not in ("run", "paper"):
                assert told.replace("|", "\\|") in text
        assert all(f"`{name}`" in text for name in card.parameters)
    assert "[ties](ties.md)" in pages["systems/index.md"]


def test_public_names_are_listed():
    assert "members: [" in site.reference("pluribus.route")
    for package in site.PACKAGES:
        assert f"::: {package}\n" in site.reference(package)


@pytest.mark.parametrize(
    ("uri", "text", "made"),
    [
        ("index.md", "[guide](docs/guide.md#merge)", "[guide](guide.md#merge)"),
        ("guide.md", "[it](search.md)", "[it](search.md)"),
        ("tutorials/a.md", "[it](../search.md)", "[it](../search.md)"),
        ("guide.md", "![](images/a.png)", "![](images/a.png)"),
        ("tutorials/a.md", "[how](../../CONTRIBUTING.md)", "[how](../contributing.md)"),
        ("guide.md", "[a.yml](../examples/a.yml)", "`examples/a.yml`"),
        ("guide.md", "[the recipe](../examples/a.yml)", "the recipe (`examples/a.yml`)"),
        ("guide.md", "[out](https://example.org/a.md)", "[out](https://example.org/a.md)"),
        ("systems/ties.md", "[ties](ties.md)", "[ties](ties.md)"),
    ],
)
def test_links(uri, text, made):
    known = {"guide.md", "search.md", "contributing.md", "images/a.png", "systems/ties.md"}
    assert site.linked(text, uri, known) == made
