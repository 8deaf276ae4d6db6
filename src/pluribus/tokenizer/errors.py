"""The error of this package."""

from pluribus.core.errors import PluribusError


class TokenizerError(PluribusError, ValueError):
    """A tokenizer that is missing, contradicts itself, or cannot be written as asked."""
