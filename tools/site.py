"""What mkdocs.yml calls: pages made from cards and docstrings, beside those in docs/.

    index.md               README.md
    systems/NAME.md        a card and the docstring of its code, for every system and method
    systems/index.md       all of them in one table
    reference/PACKAGE.md   the public names of a package, by mkdocstrings
    contributing.md, changelog.md

Nothing of it is written into the repository. Links to files that are no pages become their names.
"""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pluribus import catalogue
from pluribus.catalogue import Card

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "pluribus", "pluribus.merge", "pluribus.compress", "pluribus.tune", "pluribus.route",
    "pluribus.decode", "pluribus.agents", "pluribus.tasks", "pluribus.inspect", "pluribus.search",
    "pluribus.claims", "pluribus.report", "pluribus.catalogue",
)  # fmt: skip
WHOLE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
LINK = re.compile(r"(!?)\[([^\]\n]*)\]\(([^)\s]+)\)")


def on_config(config: Any) -> Any:
    """Add the generated pages to the navigation."""
    cards = catalogue.cards()
    built = [{one.name: f"systems/{one.name}.md"} for one in cards if one.built]
    planned = [{one.name: f"systems/{one.name}.md"} for one in cards if not one.built]
    systems: list[Any] = [{"All systems": "systems/index.md"}, {"Built": built}]
    if planned:
        systems.append({"Planned": planned})
    for section in config.nav:
        if "Systems" in section:
            section["Systems"] = systems
        if "Reference" in section:
            section["Reference"] = [{name: f"reference/{name}.md"} for name in PACKAGES]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for name, text in pages():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    del config
    known = {file.src_uri for file in files}
    return linked(markdown, page.file.src_uri, known)


def pages() -> Iterator[tuple[str, str]]:
    """Give every generated page: its name and its text."""
    for name, source in WHOLE.items():
        yield name, (ROOT / source).read_text("utf-8")
    names = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
    table = names.sub(r"| [\1](\1.md) |", catalogue.system_table())
    yield "systems/index.md", f"# Systems and methods\n\n{table}\n"
    for card in catalogue.cards():
        yield f"systems/{card.name}.md", of_card(card)
    for package in PACKAGES:
        yield f"reference/{package}.md", reference(package)


def of_card(card: Card) -> str:
    """Return the page of one system or method."""
    lines = [f"# {card.title}", ""]
    if card.summary != card.title:
        lines += [card.summary, ""]
    lines += ["| | |", "| --- | --- |"]
    for label, told in card.rows():
        text = told.replace("|", "\\|").replace("\n", " ")
        if label == "run":
            text = f"`{text}`"
        if label == "paper" and card.link:
            text = f"[{text}]({card.link})"
        lines.append(f"| **{label}** | {text} |")
    if card.parameters:
        lines += ["", "## Parameters", "", "| name | type and default |", "| --- | --- |"]
        for name, told in card.parameters.items():
            kind = told.replace("|", "\\|")
            lines.append(f"| `{name}` | `{kind}` |")
    if card.built and card.doc:
        lines += ["", "## What is computed", "", "```text", card.doc.replace("```", ""), "```"]
    return "\n".join(lines) + "\n"


def reference(package: str) -> str:
    """Return the page of a package's public names."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", [])
    options = "    options:\n      members: [" + ", ".join(names) + "]\n" if names else ""
    return f"# {package}\n\n::: {package}\n{options}"


def linked(markdown: str, uri: str, known: set[str]) -> str:
    """Return a page's text with its links as the site has them."""
    source = WHOLE.get(uri, f"docs/{uri}")
    if uri.startswith("systems/"):  # made here, as the site has them
        return markdown

    def made(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path, hash_, place = target.partition("#")
        whole = _normal(Path(source).parent / path)
        pages = {value: key for key, value in WHOLE.items()}
        inside = pages.get(whole, whole.removeprefix("docs/"))
        if inside not in known:
            return f"`{whole}`" if text in (Path(whole).name, whole) else f"{text} (`{whole}`)"
        up = "../" * uri.count("/")
        return f"{mark}[{text}]({up}{inside}{hash_}{place})"

    return LINK.sub(made, markdown)


def _normal(path: Path) -> str:
    """Return a path without its turns upwards."""
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts:
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)
