"""Where a text ends a paragraph, and where it gives its answer."""

ENDS = frozenset(".!?:;…。！？：；।؟۔)]}\"'”’»")  # what a finished paragraph ends in


def boxed(text: str) -> str | None:
    r"""Return what stands in the last whole `\boxed{...}`, braces within it matched; None: none."""
    start = len(text)
    while (start := text.rfind("\\boxed{", 0, start)) >= 0:
        depth = 0
        first = start + len("\\boxed{")
        for place in range(first - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[first:place].strip()
    return None


def finished(text: str) -> bool:
    """Whether a text ends in a blank line behind a sentence that has ended."""
    before = text.rstrip()
    return bool(before) and before[-1] in ENDS and "\n\n" in text[len(before) :]
