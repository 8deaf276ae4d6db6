"""The store of runs: what it keeps, and which files it refuses."""

import sqlite3

import pytest

from pluribus.core.errors import FormatError, MissingError, OutputError
from pluribus.ui import store as stores
from pluribus.ui.store import Store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "ui.sqlite"


def test_round_trip(path):
    kept = Store.open(path)
    run = kept.begin("demo", "The <demo>")
    kept.started(run, ["pluribus", "demo"], 123)
    kept.write(run, "err", ["one", "two"])
    kept.write(run, "out", ["three"])
    number = kept.keep(run, "report.html", "html", b"<p>")
    kept.end(run, "done", "fine", 0)
    kept.close()
    again = Store.open(path)
    told = again.run(run)
    assert (told.title, told.command, told.status) == ("The <demo>", ["pluribus", "demo"], "done")
    assert (told.note, told.code, told.pid) == ("fine", 0, 123)
    assert told.ended is not None
    assert told.ended >= told.began
    assert [tuple(line) for line in again.lines(run)] == [
        (1, "err", "one"),
        (2, "err", "two"),
        (3, "out", "three"),
    ]
    assert [line.text for line in again.lines(run, after=2)] == ["three"]
    report, body = again.report(number)
    assert (report.name, report.kind, report.size, body) == ("report.html", "html", 3, b"<p>")
    again.remove(run)
    assert (again.runs(), again.reports(), again.lines(run)) == ([], [], [])
    again.close()


def test_what_is_not_there(path):
    kept = Store.open(path)
    for ask in (kept.run, kept.report, kept.remove):
        with pytest.raises(MissingError):
            ask(7)
    run = kept.begin("demo", "t")
    with pytest.raises(OutputError, match="cancel it first"):
        kept.remove(run)
    kept.close()


def test_a_run_that_its_server_left_is_lost(path):
    kept = Store.open(path)
    run = kept.begin("demo", "t")
    kept.close()
    again = Store.open(path)
    assert again.run(run).status == "lost"
    assert "its server ended before it did" in again.run(run).note
    again.close()


def test_long_logs_are_cut(path, monkeypatch):
    monkeypatch.setattr(stores, "MOST_LINES", 5)
    monkeypatch.setattr(stores, "LONGEST", 10)
    kept = Store.open(path)
    run = kept.begin("demo", "t")
    kept.write(run, "out", ["x" * 50] * 4)
    kept.write(run, "out", ["y"] * 3)
    kept.write(run, "out", ["z"])
    found = [line.text for line in kept.lines(run)]
    assert found == ["x" * 10] * 4 + ["... more than 5 lines; the rest is not kept"]
    kept.close()


def test_one_server_at_a_time_but_anybody_may_look(path):
    kept = Store.open(path)
    run = kept.begin("demo", "t")
    with pytest.raises(OutputError, match="another `pluribus ui` uses this store"):
        Store.open(path)
    other = Store.look(path)
    assert other.run(run).status == "running"  # not lost: its server is there
    with pytest.raises(OutputError):
        other.begin("demo", "t")
    other.close()
    kept.close()


def test_a_newer_store_is_refused_and_left_alone(path):
    Store.open(path).close()
    base = sqlite3.connect(path)
    base.execute(f"PRAGMA user_version = {stores.VERSION + 1}")
    base.commit()
    base.close()
    before = path.read_bytes()
    for ask in (Store.open, Store.look):
        with pytest.raises(FormatError) as error:
            ask(path)
        assert f"a store of version {stores.VERSION + 1}, from a newer pluribus" in str(error.value)
        assert "--store" in str(error.value)
    assert path.read_bytes() == before


def test_a_damaged_store_is_told(path):
    kept = Store.open(path)
    run = kept.begin("demo", "t")
    kept._base.execute("UPDATE runs SET command = '{' WHERE number = ?", (run,))
    with pytest.raises(FormatError, match="the file was damaged"):
        kept.runs()
    kept.close()


def test_other_files_are_refused_and_left_alone(path, tmp_path):
    other = tmp_path / "other.sqlite"
    base = sqlite3.connect(other)
    base.execute("CREATE TABLE mine (x)")
    base.commit()
    base.close()
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to be read as one" * 30)
    for file in (other, text):
        before = file.read_bytes()
        for ask in (Store.open, Store.look):
            with pytest.raises(FormatError):
                ask(file)
        assert file.read_bytes() == before
    with pytest.raises(MissingError, match="`pluribus ui` makes one"):
        Store.look(path)
    with pytest.raises(OutputError):
        Store.open(tmp_path)
    with pytest.raises(OutputError):
        Store.open(text / "inside.sqlite")
