"""Agreement: the share of further samples that give the same answer as the candidate.

Self-consistency as a verifier (Wang et al. 2022, https://arxiv.org/abs/2203.11171). The samples are
drawn once a problem, and counted. A candidate without an answer scores 0.
"""

from dataclasses import replace

from pluribus.core.errors import InputError
from pluribus.decode.scaling.interface import DRAWN, Generator, Problem, Sampling
from pluribus.decode.scaling.verifiers import verifier


@verifier("majority", needs="generator", paper="arXiv:2203.11171")
class Majority:
    """Scores answers by how many other samples agree."""

    def __init__(self, generator: Generator, *, n: int = 8, sampling: Sampling = DRAWN) -> None:
        """Raise InputError for n < 1."""
        if n < 1:
            raise InputError(f"majority: n is {n}; give at least 1 sample")
        self._generator, self._n = generator, n
        self._sampling = replace(sampling, seed=sampling.seed + 1_000_003)  # not the strategy's
        self.tokens = self.calls = 0
        self._known: dict[tuple[str, str], list[str | None]] = {}

    def score(self, problem: Problem, candidate: list[str]) -> list[float]:
        """Return one score."""
        key = (problem.id, problem.question)
        if key not in self._known:
            self._known[key] = self._answers(problem)
        answer = problem.find("".join(candidate))
        same = sum(answer is not None and one == answer for one in self._known[key])
        return [same / len(self._known[key])]

    def _answers(self, problem: Problem) -> list[str | None]:
        settings = self._sampling
        made = self._generator.sample(
            problem.question,
            self._n,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            stop=settings.stop,
            seed=settings.seed,
        )
        self.tokens += sum(one.tokens for one in made)
        self.calls += len(made)
        return [problem.find(one.text) for one in made]
