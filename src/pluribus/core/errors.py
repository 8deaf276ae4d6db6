"""Errors a user can act on: each says what was given, what was expected and what to try."""

import difflib
from collections.abc import Iterable


class PluribusError(Exception):
    """Base of every error that is the input's fault; the command line prints it as one line."""


class InputError(PluribusError, ValueError):
    """A value that cannot be used: a parameter out of range, weights that sum to zero."""


class FormatError(PluribusError, ValueError):
    """A file that is not what its name or header says: truncated, overlapping, unsafe pickle."""


class MismatchError(PluribusError, ValueError):
    """Models that do not fit together: names, shapes or dtypes differ."""


class NonFiniteError(PluribusError, ValueError):
    """NaN or infinity in an input where arithmetic would spread it."""


class RecipeError(PluribusError, ValueError):
    """A recipe with an unknown key, method or parameter, or one that contradicts itself."""


class MissingError(PluribusError, FileNotFoundError):
    """A file, folder or model reference that is not there."""


class OutputError(PluribusError, OSError):
    """The output cannot be written: it exists, the disk is full, or it is in use."""


class NetworkError(PluribusError, OSError):
    """A remote file that could not be read after several tries."""


class ExtraError(PluribusError, ImportError):
    """A feature whose optional packages are not installed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def listing(names: Iterable[str], most: int = 5) -> str:
    """Join the first `most` names, and say how many were left out."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def need(package: str, extra: str, purpose: str) -> ExtraError:
    """Return the error for an optional package that is missing."""
    return ExtraError(
        f"{purpose} needs the package '{package}', which is not installed; "
        f"try: pip install 'pluribus[{extra}]'"
    )
