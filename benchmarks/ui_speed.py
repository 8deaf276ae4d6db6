"""How fast the catalogue is: search over all cards, and first paint in Chromium on loopback.

    python benchmarks/ui_speed.py --out benchmarks/results/ui_speed.json

Search is timed over every query below and over cards whose names are typed letter by letter; by
meaning, once the cards' vectors are there. Paint is Chromium's own entry `first-contentful-paint`,
in a new context for each visit, so that nothing is cached; the first visit of all is told apart.
`/enter` is nearly empty: the floor.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

QUERIES = (
    "sign conflict",
    "merge without data",
    "few labels",
    "forget less",
    "one model for each token",
    "continual learning without task names",
    "zebra",
    "t",
)
PAGES = ("/enter", "/", "/?q=sign+conflict", "/card/ties", "/compare?c=ties&c=dare_ties", "/runs")


def spread(milliseconds):
    ordered = sorted(milliseconds)
    return {
        "n": len(ordered),
        "median_ms": round(statistics.median(ordered), 2),
        "p95_ms": round(ordered[int(0.95 * (len(ordered) - 1))], 2),
        "largest_ms": round(ordered[-1], 2),
    }


def timed(call):
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


def searches(repeats):
    from pluribus import catalogue
    from pluribus.catalogue import meaning

    began = time.perf_counter()
    finder = catalogue.finder()
    found = {"cards": len(finder.cards), "index_s": round(time.perf_counter() - began, 3)}
    typed = [card.name[:end] for card in finder.cards for end in range(1, len(card.name) + 1)]
    words = [*QUERIES, *typed]
    found["words"] = spread([timed(lambda q=q: finder.search(q)) for q in words])
    if meaning.installed():
        found["meaning_first_s"] = round(
            timed(lambda: finder.search("x", by_meaning=True)) / 1e3, 2
        )
        asked = [query for query in QUERIES for _ in range(repeats)]
        found["meaning"] = spread(
            [timed(lambda q=q: finder.search(q, by_meaning=True)) for q in asked]
        )
    return found


def pages(url, repeats):
    import httpx

    found = {}
    with httpx.Client(base_url=url) as client:
        for path in ("/cards?q=sign+conflict", "/"):
            client.get(path)
            found[path] = spread([timed(lambda p=path: client.get(p)) for _ in range(repeats)])
    return found


def paints(url, repeats):
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        return "no chromium on this machine"
    ask = "performance.getEntriesByName('first-contentful-paint').map((e) => e.startTime)[0]"
    found = {}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def visit(path):
            context = browser.new_context()
            page = context.new_page()
            page.goto(url + path)
            while (told := page.evaluate(ask)) is None:  # the pages forbid what evaluates by itself
                page.wait_for_timeout(5)
            context.close()
            return told

        found["first visit of all"] = round(visit("/"), 1)
        for path in PAGES:
            found[path] = spread([visit(path) for _ in range(repeats)])
        found["browser"] = browser.version
        browser.close()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    from pluribus import __version__
    from pluribus.ui.run import background

    search = searches(told.repeats)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with background(place / "ui.sqlite", place) as url:
            answer, paint = pages(url, told.repeats), paints(url, told.repeats)
    result = {
        "search": search,
        "answer": answer,
        "paint": paint,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load": round(os.getloadavg()[0], 1),
        "versions": {
            "pluribus": __version__,
            "python": platform.python_version(),
            "processors": os.cpu_count(),
        },
    }
    print(json.dumps(result, indent=1))
    if told.out is not None:
        told.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
