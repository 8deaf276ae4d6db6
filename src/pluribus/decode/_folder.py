"""A folder that appears under its name when it is whole, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pluribus.core.errors import OutputError


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` that takes its place if all goes well.

    Raises OutputError if it cannot be written; what stood there then still does.
    """
    try:
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror or error})") from None
    old = stage.with_suffix(".replaced")
    try:
        yield stage
        stage.chmod(0o755)
        if out.exists():
            os.replace(out, old)
        os.replace(stage, out)
    except OSError as error:
        if old.exists() and not out.exists():
            os.replace(old, out)
        raise OutputError(f"{out}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
