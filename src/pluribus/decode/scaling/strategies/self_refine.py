"""Self-refine: the model criticises its answer and writes it anew, until it is content.

Madaan et al., NeurIPS 2023, https://arxiv.org/abs/2303.17651, algorithm 1:

    y_0 ~ p(x);  for t < rounds:  f_t ~ p(feedback | x, y_t);  stop, or
    y_{t+1} ~ p(refine | x, y_0, f_0, ..., y_t, f_t)

It stops when the feedback holds `stop_word`, or a verifier accepts the answer. With a verifier the
best answer is returned, without one the last.
"""

from dataclasses import dataclass
from typing import Literal

from pluribus.core.merger import PositiveInt, Share
from pluribus.decode.scaling._prompts import check_fields, fill
from pluribus.decode.scaling._run import Run, best_of
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import (
    DRAWN,
    Candidate,
    Generator,
    Problem,
    Sampling,
    Scaled,
    Verifier,
)
from pluribus.decode.scaling.strategies import strategy

FEEDBACK = (
    "{question}\n\nProposed answer:\n{answer}\n\nSay what is wrong with it and how to mend it. If "
    "nothing is, reply with {stop} alone."
)
REFINE = (
    "{question}\n\nWhat was tried, and what was said about it:\n{history}\n\nWrite a better answer."
)


@strategy("self_refine", kind="sequential", verifier="optional", paper="arXiv:2303.17651")
@dataclass(frozen=True, kw_only=True)
class SelfRefine:
    """Refines one answer by the model's own feedback."""

    rounds: PositiveInt = 4  # of feedback, at most
    accept: Share = 1.0  # the verifier's score that ends it
    stop_word: str = "CORRECT"
    feedback: str = FEEDBACK  # with {question}, {answer}, {stop}
    refine: str = REFINE  # with {question}, {history}
    aggregate: Literal["last", "min", "prod"] = "last"
    sampling: Sampling = DRAWN

    def check(self) -> None:
        """Raise InputError for a template without its fields, or an empty stop word."""
        check_fields("self_refine: feedback", self.feedback, ("question", "answer"))
        check_fields("self_refine: refine", self.refine, ("question", "history"))
        check_fields("self_refine: stop_word", self.stop_word, ())

    def run(
        self,
        problem: str | Problem,
        generator: Generator,
        verifier: Verifier | None = None,
        budget: Budget | None = None,
    ) -> Scaled:
        """See `Strategy`."""
        run = Run(self, problem, generator, verifier, budget)
        asked = run.problem.question
        found: list[Candidate] = [run.of(made) for made in run.sample(1)]
        history = ""
        for _ in range(self.rounds if found else 0):
            current = found[-1]
            if current.score is not None and current.score >= self.accept:
                run.tell("accepted", score=current.score)
                break
            prompt = fill(self.feedback, question=asked, answer=current.text, stop=self.stop_word)
            said = run.sample(1, prompt=prompt)
            if not said:
                break
            run.tell("feedback", text=said[0].text)
            if self.stop_word in said[0].text:
                break
            history += f"\nAnswer:\n{current.text}\nFeedback:\n{said[0].text}\n"
            made = run.sample(1, prompt=fill(self.refine, question=asked, history=history))
            if not made:
                break
            found.append(run.of(made[0]))
        last = found[-1] if found else None
        return run.done(found, last if verifier is None else best_of(found))
