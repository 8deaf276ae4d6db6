"""The digest: what changed between two days, in text, page and letter."""

import datetime
import json

import pytest
from smtp_server import Server

from pluribus.catalogue.records import Check, Record
from pluribus.core.errors import FormatError, InputError, MissingError
from pluribus.ui import digest as digests
from pluribus.ui.store import Store

DAY = datetime.date
HOSTILE = "<script>x</script> | *b* [l](j) `c`"


def record(name, added, verdict="holds", title="A title"):
    check = Check("a over b", True, 2.0, (1.0, 2.0, 3.0), ">= 0", verdict == "holds")
    return Record(
        name=name,
        title=title,
        paper="",
        data="",
        model="",
        metric="",
        seeds=(0, 1, 2),
        verdict=verdict,
        checks=(check,),
        command="",
        added=added,
    )


@pytest.fixture
def own(monkeypatch):
    """Records that the package is to carry."""
    found = [
        record("early", "2026-01-31"),
        record("first", "2026-02-01"),
        record("last", "2026-02-07", "fails", HOSTILE),
        record("late", "2026-02-08"),
    ]
    monkeypatch.setattr(digests, "records", lambda: {one.name: one for one in found})


@pytest.fixture
def store(tmp_path):
    """A store with runs that ended on three days, and one that has not."""
    path = tmp_path / "ui.sqlite"
    kept = Store.open(path)
    for day in (DAY(2026, 1, 31), DAY(2026, 2, 3), DAY(2026, 2, 9)):
        run = kept.begin("demo", f"run of {day} {HOSTILE}")
        kept.keep(run, "report.html", "html", b"<p>")
        kept.end(run, "killed", "by SIGKILL", -9)
        noon = datetime.datetime.combine(day, datetime.time(12)).timestamp()
        kept._base.execute("UPDATE runs SET ended = ? WHERE number = ?", (noon, run))
    kept.begin("demo", "unfinished")
    kept.close()
    return path


def test_days_are_both_included(own, store):
    found = digests.gather(DAY(2026, 2, 1), DAY(2026, 2, 7), store=store)
    assert [one.name for one in found.records] == ["last", "first"]
    assert [one.run.number for one in found.runs] == [2]
    assert found.summary == "2 claims with new figures (1 hold, 1 fail), 1 runs ended."


def test_text_and_page_escape(own, store):
    found = digests.gather(DAY(2026, 2, 1), DAY(2026, 2, 7), store=store)
    text, page = found.markdown(), found.html()
    assert "| 2026-02-01 | first | holds | A title | a over b | 2 ± 1 | >= 0 |" in text
    assert r"&lt;script>x&lt;/script> \| \*b\* \[l\](j) \`c\`" in text
    assert "<script>x" not in text
    assert "<script>x" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    for told in (text, page):
        assert "killed (by SIGKILL)" in told
        assert "report.html" in told
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if "| " in line}
    assert widths == {8, 6}  # seven columns, and five


def test_folders_go_before_the_packages_own(own, tmp_path):
    told = json.loads(open_own("ties"))
    folder = tmp_path / "measured"
    folder.mkdir()
    (folder / "first.json").write_text(json.dumps({**told, "claim": "first", "title": "here"}))
    today = datetime.date.today()
    found = digests.gather(DAY(2026, 2, 1), today, [folder])
    titles = {one.name: one.title for one in found.records}
    assert titles["first"] == "here"
    assert "late" in titles


def open_own(name):
    """A record in the form that `pluribus claims` writes."""
    from pathlib import Path

    return (Path(__file__).parents[2] / f"benchmarks/results/claims/{name}.json").read_text()


def test_nothing_new(own):
    found = digests.gather(DAY(2020, 1, 1), DAY(2020, 1, 2))
    assert "0 claims" in found.markdown()
    assert "##" not in found.markdown()
    assert "<h2>" not in found.html()


def test_refused(own, tmp_path):
    with pytest.raises(InputError, match="the first day is after the last"):
        digests.gather(DAY(2026, 2, 2), DAY(2026, 2, 1))
    with pytest.raises(InputError, match="no such folder"):
        digests.gather(DAY(2026, 2, 1), DAY(2026, 2, 2), [tmp_path / "no"])
    (tmp_path / "odd.json").write_text("{}")
    with pytest.raises(FormatError, match=r"odd\.json"):
        digests.gather(DAY(2026, 2, 1), DAY(2026, 2, 2), [tmp_path])
    with pytest.raises(MissingError, match="pluribus ui"):
        digests.gather(DAY(2026, 2, 1), DAY(2026, 2, 2), store=tmp_path / "no.sqlite")
    for text in ("yesterday", "2026-13-01", "", "01.02.2026"):
        with pytest.raises(InputError, match="write it as 2026-11-28"):
            digests.day(text)


# -- the command -----------------------------------------------------------------------------------


def run(monkeypatch, capsys, *words):
    from pluribus.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["digest", *map(str, words)])
    return int(stop.value.code or 0), capsys.readouterr()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PLURIBUS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PLURIBUS_DEBUG", raising=False)


def test_command_writes_and_sends(own, store, tmp_path, monkeypatch, capsys):
    days = ("--since", "2026-02-01", "--until", "2026-02-07", "--store", store)
    code, said = run(monkeypatch, capsys, *days)
    assert (code, said.out.splitlines()[0]) == (
        0,
        "# pluribus: new results from 2026-02-01 to 2026-02-07",
    )
    for name, begins in (("week.md", "# pluribus"), ("week.html", "<!doctype html>")):
        code, said = run(monkeypatch, capsys, *days, "--out", tmp_path / name)
        assert (code, said.err) == (0, "")
        assert (tmp_path / name).read_text().startswith(begins)
    with Server(None, "none") as server:
        (tmp_path / "mail.yml").write_text(
            f"host: 127.0.0.1\nport: {server.port}\nsecurity: none\n"
            "sender: a@b.org\nto: [c@d.org]\n"
        )
        code, said = run(monkeypatch, capsys, *days, "--mail", tmp_path / "mail.yml")
    assert (code, said.err) == (0, "")
    assert b"2026-02-01" in server.letters[0].body
    code, said = run(monkeypatch, capsys, *days, "--json")
    assert [one["name"] for one in json.loads(said.out)["records"]] == ["last", "first"]


def test_command_refuses_before_it_writes(tmp_path, monkeypatch, capsys):
    for words, told in [
        (["--out", tmp_path / "week.pdf"], "a .md or a .html file"),
        (["--out", tmp_path / "no" / "week.md"], "no such folder"),
        (["--since", "soon"], "write it as"),
        (["--mail", tmp_path / "mail.yml"], "no such recipe"),
    ]:
        code, said = run(monkeypatch, capsys, *words)
        assert code == 1
        assert told in said.err
        assert (said.out, said.err.count("\n")) == ("", 1)
    assert not list(tmp_path.glob("week*"))
