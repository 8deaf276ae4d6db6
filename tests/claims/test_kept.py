"""Kept figures: which changes of the package's files make a seed be measured anew."""

import json
import sys
from types import ModuleType

import pytest

from pluribus.claims import _kept

TREE = {
    "__init__.py": "",
    "notes.txt": "read by nobody in particular",
    "claims/__init__.py": "",
    "claims/ties.py": "from toy.merge import ties",
    "claims/lines.py": "",
    "claims/data/table.json": "[1]",
    "cli/__init__.py": "",
    "cli/run.py": "",
    "merge/__init__.py": "",
    "merge/ties.py": "ties = 1",
    "merge/dare.py": "",
    "serve/__init__.py": "",
    "serve/app.py": "",
}
LOADED = ("__init__.py", "claims/__init__.py", "claims/ties.py", "cli/run.py", "merge/__init__.py")


@pytest.fixture
def package(tmp_path, monkeypatch):
    place = tmp_path / "toy"
    for name, text in TREE.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    for name in (*LOADED, "merge/ties.py"):
        module = ModuleType(name)
        module.__file__ = str(place / name)
        monkeypatch.setitem(sys.modules, f"toy:{name}", module)
    monkeypatch.setattr(_kept, "PACKAGE", place)
    for function in (_kept.snapshot, _kept.keys):
        monkeypatch.setattr(function, "__defaults__", (place,))
    return place


@pytest.fixture
def folder(package, tmp_path):
    found = {"figures": {"a": 1.0}, "seconds": 2.0}
    _kept.keep(tmp_path / "kept", "ties", 0, found, _kept.snapshot())
    return tmp_path / "kept"


def known(folder, name="ties", seed=0):
    return _kept.read(folder, name, seed, _kept.snapshot())


def test_what_was_kept_is_read_again(folder):
    assert known(folder) == {"figures": {"a": 1.0}, "seconds": 2.0}
    assert known(folder, seed=1) is None
    assert known(folder, name="lines") is None


@pytest.mark.parametrize(
    "name",
    [
        "claims/ties.py",  # the claim
        "merge/ties.py",  # what it loaded
        "merge/__init__.py",
        "merge/more.py",  # a method that wasn't there: lists of methods are longer now
        "merge/tables/cuts.json",  # data that a loaded folder may read
        "claims/data/table.json",
    ],
)
def test_changes_that_count(package, folder, name):
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_text("changed = 2")
    assert known(folder) is None


@pytest.mark.parametrize(
    "name",
    [
        "claims/lines.py",  # another claim
        "claims/more.py",
        "cli/run.py",  # loaded, but no claim's business
        "cli/more.py",
        "merge/dare.py",  # a neighbour that was not loaded
        "serve/app.py",
        "serve/more.py",
        "merge/__pycache__/ties.cpython-311.pyc",
    ],
)
def test_changes_that_do_not(package, folder, name):
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_text("changed = 2")
    assert known(folder) is not None


def test_a_loaded_file_that_is_gone_counts(package, folder):
    (package / "merge/ties.py").unlink()
    assert known(folder) is None


@pytest.mark.parametrize("library", ["torch", "numpy", "python"])
def test_other_libraries_count(folder, monkeypatch, library):
    monkeypatch.setitem(_kept.VERSIONS, library, "0.1")
    assert known(folder) is None


@pytest.mark.parametrize(
    "line", ["import subprocess", "    from multiprocessing import Pool", 'optional("ray", "ray")']
)
def test_where_processes_are_started_every_file_counts(package, tmp_path, line):
    (package / "merge/ties.py").write_text(f"def f():\n{line}\n")
    found = {"figures": {"a": 1.0}, "seconds": 2.0}
    _kept.keep(tmp_path / "kept", "ties", 0, found, _kept.snapshot())
    assert known(tmp_path / "kept") is not None
    (package / "serve/app.py").write_text("changed = 2")
    assert known(tmp_path / "kept") is None


def test_nothing_is_kept_of_code_that_changed_while_it_ran(package, tmp_path):
    before = _kept.snapshot()
    (package / "merge/ties.py").write_text("ties = 2")
    _kept.keep(tmp_path / "kept", "ties", 0, {"figures": {}, "seconds": 1.0}, before)
    assert known(tmp_path / "kept") is None
    assert not (tmp_path / "kept").exists()


def test_figures_of_two_states_stand_side_by_side(package, folder):
    text = (package / "merge/ties.py").read_text()
    (package / "merge/ties.py").write_text("ties = 2")
    found = {"figures": {"a": 3.0}, "seconds": 2.0}
    _kept.keep(folder, "ties", 0, found, _kept.snapshot())
    assert known(folder)["figures"] == {"a": 3.0}
    (package / "merge/ties.py").write_text(text)
    assert known(folder)["figures"] == {"a": 1.0}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"figures": {"a": 1}, "seconds": 1}'])
def test_damaged_files_count_as_absent(folder, text):
    (path,) = folder.iterdir()
    path.write_text(text)
    assert known(folder) is None


def test_without_digests_nothing_is_believed(folder):
    (path,) = folder.iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), "code": {}}))
    assert known(folder) is None
