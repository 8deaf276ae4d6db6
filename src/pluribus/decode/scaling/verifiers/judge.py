"""A language model as a judge: it is asked for a grade, and the grades of some replies averaged.

Zheng et al., NeurIPS 2023, https://arxiv.org/abs/2306.05685: single-answer grading. The grade is
the last number of a reply, divided by `out_of`; a reply without one, or with one out of range, does
not count. `unread` counts those. If none counts, the score is 0. A judge likes long and confident
texts: check it against known answers before you trust it.
"""

import re

from pluribus.core.errors import InputError
from pluribus.decode.scaling._prompts import check_fields, fill
from pluribus.decode.scaling.interface import Generator, Problem, Sampling
from pluribus.decode.scaling.verifiers import verifier

TEMPLATE = (
    "Question:\n{question}\n\nProposed answer:\n{answer}\n\nHow likely is it that the proposed "
    "answer is right? Reply with a whole number from 0 (surely wrong) to 10 (surely right) and "
    "nothing else."
)
GRADE = re.compile(r"\d+(?:\.\d+)?")
ONCE = Sampling(temperature=0.0, max_tokens=64)


@verifier("judge", needs="generator", paper="arXiv:2306.05685")
class Judge:
    """Grades candidates by a model's replies."""

    def __init__(
        self,
        generator: Generator,
        *,
        template: str = TEMPLATE,
        out_of: float = 10.0,
        replies: int = 1,
        sampling: Sampling = ONCE,
    ) -> None:
        """Raise InputError for a template without {answer}, or several replies without chance."""
        check_fields("judge: template", template, ("question", "answer"))
        if replies < 1 or not out_of > 0:
            raise InputError(f"judge: replies is {replies} and out_of {out_of}; give 1 or more")
        if replies > 1 and sampling.temperature == 0:
            raise InputError(
                f"judge: {replies} replies are the same at temperature 0; give one, or a "
                "temperature above 0"
            )
        self._generator, self._template = generator, template
        self._out_of, self._replies, self._sampling = out_of, replies, sampling
        self.tokens = self.calls = self.unread = 0

    def score(self, problem: Problem, candidate: list[str]) -> list[float]:
        """Return one score."""
        prompt = fill(self._template, question=problem.question, answer="".join(candidate))
        settings = self._sampling
        made = self._generator.sample(
            prompt,
            self._replies,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            stop=settings.stop,
            seed=settings.seed,
        )
        self.tokens += sum(one.tokens for one in made)
        self.calls += len(made)
        grades = [grade for one in made if (grade := self._grade(one.text)) is not None]
        self.unread += len(made) - len(grades)
        return [sum(grades) / len(grades) if grades else 0.0]

    def _grade(self, text: str) -> float | None:
        found = GRADE.findall(text)
        value = float(found[-1]) / self._out_of if found else -1.0
        return value if 0 <= value <= 1 else None
