"""Files and folders that appear under their name when they are whole, or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from pluribus.core.errors import OutputError, PluribusError


@contextmanager
def whole_file(path: str | os.PathLike[str], *, parents: bool = False) -> Iterator[Path]:
    """Give a path beside another that takes its name if all goes well.

    `parents`: make the folders above it. Raises OutputError if it cannot be written; what stood
    there then still does.
    """
    path = Path(path).expanduser()
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise _told(path, error) from None
    finally:
        with suppress(OSError):  # what was said already matters more
            part.unlink(missing_ok=True)


@contextmanager
def whole_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a folder beside another that takes its place if all goes well.

    Raises OutputError if it cannot be written; what stood there then still does.
    """
    out = Path(out).expanduser()
    stage = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    old = stage.with_suffix(".replaced")
    try:
        stage.mkdir()
        yield stage
        if out.exists():
            os.replace(out, old)
        os.replace(stage, out)
    except (OSError, SafetensorError) as error:
        raise _told(out, error) from None
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
        shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _told(path: Path, error: Exception) -> Exception:
    if isinstance(error, PluribusError):
        return error
    why = error.strerror if isinstance(error, OSError) and error.strerror else error
    return OutputError(f"{path}: cannot be written ({why})")
