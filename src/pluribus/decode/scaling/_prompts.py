"""Templates of prompts: fields in braces, filled as they stand; other braces are left alone."""

import re
from collections.abc import Sequence

from pluribus.core.errors import InputError


def fill(template: str, **values: str) -> str:
    """Put values in the place of their fields, all at once: braces in a value stay."""
    pattern = re.compile("|".join(re.escape(f"{{{name}}}") for name in values))
    return pattern.sub(lambda found: values[found[0][1:-1]], template)


def check_fields(where: str, template: str, fields: Sequence[str]) -> None:
    """Raise InputError for an empty template, or one that lacks a field."""
    if not template.strip():
        raise InputError(f"{where} is empty; give a text")
    for name in fields:
        if f"{{{name}}}" not in template:
            raise InputError(f"{where} is {template!r}; it needs {{{name}}} where the {name} goes")
