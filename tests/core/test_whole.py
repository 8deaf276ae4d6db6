"""Files and folders that appear whole or not at all."""

import os

import pytest

from pluribus.core.errors import InputError, OutputError
from pluribus.core.whole import whole_file, whole_folder

FULL = OSError(28, "No space left on device")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(out, text, error=None):
    with whole_file(out, parents=True) as part:
        part.write_text(text)
        if error is not None:
            raise error


def fill(out, text, error=None):
    with whole_folder(out) as stage:
        (stage / "file").write_text(text)
        if error is not None:
            raise error


def test_a_file_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "file.txt"
    with whole_file(out, parents=True) as part:
        part.write_text("new")
        assert not out.exists()
    assert out.read_text() == "new"
    assert names(out.parent) == ["file.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert out.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (FULL, OutputError, "cannot be written .No space left"),
        (InputError("odd"), InputError, "^odd$"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_what_fails_leaves_what_stood_there(tmp_path, error, kind, said):
    write(tmp_path / "file.txt", "old")
    fill(tmp_path / "folder", "old")
    with pytest.raises(kind, match=said):
        write(tmp_path / "file.txt", "ne", error)
    with pytest.raises(kind, match=said):
        fill(tmp_path / "folder", "ne", error)
    assert (tmp_path / "file.txt").read_text() == "old"
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert names(tmp_path) == ["file.txt", "folder"]


def test_a_folder_takes_the_place_of_another(tmp_path):
    out = tmp_path / "out"
    for text in ("one", "two"):
        fill(out, text)
        assert (out / "file").read_text() == text
    assert names(tmp_path) == ["out"]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    out = tmp_path / "out"
    fill(out, "old")
    replace = os.replace

    def broken(source, to):
        if os.fspath(source).endswith(".partial"):
            raise OSError(5, "Input/output error")
        replace(source, to)

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OutputError, match="Input/output error"):
        fill(out, "new")
    monkeypatch.undo()
    assert (out / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_no_such_place(tmp_path):
    with pytest.raises(OutputError, match="nowhere"):
        fill(tmp_path / "nowhere" / "x", "text")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        write(tmp_path / "file" / "x", "text")
