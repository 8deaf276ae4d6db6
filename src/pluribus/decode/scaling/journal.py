"""Files of one JSON object a line that survive a kill at any moment.

Lines are appended with one write each, so a kill loses the line under way at most. What a kill left
of a last line is cut off when the file is opened again. One process writes at a time.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pluribus.core.errors import FormatError, OutputError


class Journal:
    """An open file to append to; `lines` are those that were in it."""

    def __init__(self, path: str | Path) -> None:
        """Open or create the file and lock it.

        Raises OutputError if it cannot be written or another process has it, FormatError for a
        damaged line that is not the last.
        """
        self.path = Path(path).expanduser()
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.lines, whole = _parsed(self.path)
            if whole < os.fstat(self._file).st_size:
                os.ftruncate(self._file, whole)
        except BlockingIOError:
            os.close(self._file)
            raise OutputError(
                f"{self.path}: another process writes into it; wait for it or name another file"
            ) from None
        except BaseException:
            os.close(self._file)
            raise

    def append(self, *lines: Mapping[str, Any]) -> None:
        """Write lines, at once. Raises OutputError if they cannot be, and takes them back."""
        text = "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines).encode()
        before = os.fstat(self._file).st_size
        try:
            wrote = os.write(self._file, text)
            while wrote < len(text):  # a disk that is almost full takes a part
                wrote += os.write(self._file, text[wrote:])
        except OSError as error:
            os.ftruncate(self._file, before)
            raise OutputError(f"{self.path}: cannot be written ({error.strerror})") from None

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: str | Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file. Raises FormatError, or OSError if it is not there."""
    return _parsed(Path(path).expanduser())[0]


def _parsed(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines, and how many bytes are whole."""
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    found = []
    for number, line in enumerate(raw[:whole].splitlines(), 1):
        try:
            told = json.loads(line)
        except ValueError as error:
            raise FormatError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(told, dict):
            raise FormatError(f"{path}, line {number}: expected a JSON object")
        found.append(told)
    if raw[whole:] and not found and raw[:1] != b"{":
        raise FormatError(f"{path}: is no file of JSON lines; name another one")
    return found, whole
