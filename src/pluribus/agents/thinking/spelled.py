"""Modes as text: `direct, cot, self_consistency(n=8)`."""

from pluribus.agents.thinking.modes import ByStrategy, CoT, Direct, Mode
from pluribus.core.errors import InputError, RecipeError
from pluribus.decode.scaling import spelled
from pluribus.decode.scaling.interface import Sampling
from pluribus.decode.scaling.strategies import facts

OWN = ("direct", "cot")


def modes(text: str, *, direct_tokens: int = 10, max_tokens: int = 1024) -> list[Mode]:
    """Return the modes that a text names, in its order.

    Raises RecipeError for what is no such list, InputError for a bad parameter or a strategy that
    needs a verifier.
    """
    found: list[Mode] = []
    for part in _parts(text):
        if part == "direct":
            found.append(Direct(max_tokens=direct_tokens))
        elif part == "cot":
            found.append(CoT(max_tokens=max_tokens))
        else:
            [(label, one)] = spelled.strategies(
                part, sampling=Sampling(max_tokens=max_tokens)
            ).items()
            if facts(one).verifier == "required":
                raise InputError(
                    f"{label} needs a verifier; give it from Python (ByStrategy), or take a "
                    "strategy that works without, such as self_consistency(n=8)"
                )
            found.append(ByStrategy(strategy=one, name=label))
    return found


def _parts(text: str) -> list[str]:
    """Return what stands between commas outside of parentheses."""
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(text[begin:place].strip())
            begin = place + 1
    parts = [*parts, text[begin:].strip()]
    if not all(parts):
        raise RecipeError(
            f"{text!r} is no list of modes; write direct, cot or strategies such as "
            "self_consistency(n=8), with commas between them"
        )
    return parts
