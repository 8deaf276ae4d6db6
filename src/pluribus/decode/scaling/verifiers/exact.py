"""Exact checker: 1 if the answer found in the candidate is the problem's, else 0.

It knows the solution, so it measures what a perfect verifier would give: best of n with it is
pass@n. For use where answers can be checked but not found, and as a bound.
"""

from dataclasses import dataclass

from pluribus.core.errors import InputError
from pluribus.decode.scaling.interface import Problem
from pluribus.decode.scaling.verifiers import verifier


@verifier("exact", needs="answer")
@dataclass(frozen=True)
class Exact:
    """Compares answers."""

    def score(self, problem: Problem, candidate: list[str]) -> list[float]:
        """Return one score. Raises InputError for a problem whose answer is not known."""
        if problem.answer is None:
            raise InputError(
                f"the problem {problem.id or problem.question[:40]!r} has no answer to compare "
                "with; give one, or take another verifier"
            )
        return [float(problem.find("".join(candidate)) == problem.answer)]
