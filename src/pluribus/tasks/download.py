"""Fetch public files whose length and SHA-256 are known beforehand, and make text sets of them.

A file grows under a `.partial` name, goes on from there after an interruption (where the server
serves ranges; else it starts anew), and gets its own name only once its checksum is right. There
is no way to fetch a file without a checksum. PLURIBUS_OFFLINE=1 and HF_HUB_OFFLINE=1 forbid it.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pluribus.core.errors import FormatError, MissingError, NetworkError, OutputError
from pluribus.core.remote import Patience, Remote
from pluribus.tasks import texts
from pluribus.tasks.sources import ORIGINS, File, Origin

OnBytes = Callable[[str, int, int], None]  # file, bytes that are here, bytes in all


def offline() -> str | None:
    """Return the name of the variable that forbids the network, or None."""
    for name in ("PLURIBUS_OFFLINE", "HF_HUB_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return name
    return None


def text_set(
    name: str,
    folder: Path,
    *,
    origin: Origin | None = None,
    on_bytes: OnBytes | None = None,
    patience: Patience | None = None,
) -> Path:
    """Download a set's files, convert them and return folder/text/NAME.jsonl.gz.

    Raises MissingError offline or for a set without a known source, NetworkError, FormatError for
    what is not the file that the checksum is of, OutputError if it cannot be written.
    """
    origin = origin or ORIGINS.get(name)
    if origin is None:
        raise MissingError(
            f"no public source with a known checksum for '{name}'; there is one for "
            f"{', '.join(ORIGINS)}. Put the file into PLURIBUS_DATA by hand"
        )
    raw = folder / "downloads" / name
    paths = [
        fetch(file, raw / f"{number:02d}-{file.name}", on_bytes=on_bytes, patience=patience)
        for number, file in enumerate(origin.files)
    ]
    rows = origin.rows([path.read_bytes() for path in paths])
    if (found := texts.digest(rows)) != origin.digest:
        raise FormatError(
            f"the rows made of {name}'s files have digest {found}, expected {origin.digest}: the "
            "files are right, so this is a fault of the conversion; please report it"
        )
    out = folder / "text" / f"{name}.jsonl.gz"
    try:
        texts.write(out, rows)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from None
    shutil.rmtree(raw, ignore_errors=True)  # their rows are kept
    return out


def fetch(
    file: File,
    path: Path,
    *,
    on_bytes: OnBytes | None = None,
    patience: Patience | None = None,
) -> Path:
    """Download a file to a path unless it is there already, and return the path.

    Raises MissingError offline or for 404, NetworkError after several tries, FormatError if length
    or checksum are not the known ones, OutputError if another process is at it or the disk is full.
    """
    if path.is_file():
        return _check(path, file)
    if name := offline():
        raise MissingError(
            f"{name} is set and {file.name} is not in {path.parent}: unset it, or download "
            f"{file.url} elsewhere and put it at {path}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.partial")
        with _alone(part):
            if path.is_file():  # another process was faster
                return _check(path, file)
            begun = part.stat().st_size if part.exists() else 0
            _receive(file, part, on_bytes, patience)
            try:
                _check(part, file)
            except FormatError:
                if not 0 < begun <= file.bytes:
                    raise
                _receive(file, part, on_bytes, patience)  # what was there was something else
                _check(part, file)
            os.replace(part, path)
    except OSError as error:
        if isinstance(error, NetworkError | MissingError | OutputError):
            raise
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path


def _receive(file: File, part: Path, on_bytes: OnBytes | None, patience: Patience | None) -> None:
    """Append what a partial file lacks; a longer one is begun anew."""
    with part.open("ab") as out:
        if out.tell() > file.bytes:
            out.truncate(0)
            out.seek(0)

        def put(at: int, piece: bytes) -> None:
            if at != out.tell():  # a server without ranges begins again
                out.truncate(at)
                out.seek(at)
            out.write(piece)
            if on_bytes is not None:
                on_bytes(file.name, at + len(piece), file.bytes)

        Remote(file.url, patience=patience).stream(file.bytes, put, begin=out.tell())


def _check(path: Path, file: File) -> Path:
    """Return the path of a file with the right bytes; remove any other and raise FormatError."""
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
        size = opened.tell()
    if found != file.sha256:
        path.unlink()
        raise FormatError(
            f"{file.url}: SHA-256 {found} of {size} bytes, expected {file.sha256} of "
            f"{file.bytes}; what was downloaded is removed. Try again; if it stays so, the source "
            "is not what it was: get the set elsewhere and put it into PLURIBUS_DATA"
        )
    return path


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Keep other processes from the same partial file."""
    lock = part.with_name(f"{part.name}.lock")
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{part}: another process is downloading it; wait for it, then try again"
            ) from None
        except OSError:
            pass  # this filesystem has no locks
        yield
