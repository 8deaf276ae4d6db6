"""Budget forcing: the length of thinking is made to lie within limits.

Muennighoff et al. 2025 (s1), https://arxiv.org/abs/2501.19393, section 3.1. The model thinks until
its end-of-thinking marker or `thinking` tokens. When it wants to end, up to `ignore` times the
marker is dropped and "Wait" put in its place, and it thinks on with what is left. Then the marker
and "Final Answer:" are put in, and it answers, with a limit of its own. All of it greedy.

Tokens that were put in are counted apart (`Cost.appended`), so the limit is that of what was
written. Controllability is measured by `measures.controllability` on `thinking` in the trace.
"""

from dataclasses import dataclass, replace

from pluribus.core.errors import InputError
from pluribus.core.merger import NonNegative, PositiveInt
from pluribus.decode.scaling._run import Run
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import DRAWN, Generator, Problem, Sampling, Scaled, Verifier
from pluribus.decode.scaling.strategies import strategy


@strategy("budget_forcing", kind="sequential", continues=True, paper="arXiv:2501.19393")
@dataclass(frozen=True, kw_only=True)
class BudgetForcing:
    """Thinks for as long as it is told to, then answers."""

    thinking: PositiveInt = 1024  # tokens, at most
    ignore: int = 1  # how often an early end is not taken
    start: str = "<think>"  # put before the thinking; may be empty
    end: str = "</think>"  # the model's end-of-thinking marker
    wait: str = "Wait"
    ask: str = "\nFinal Answer:"
    answer_tokens: PositiveInt = 256
    temperature: NonNegative = 0.0
    sampling: Sampling = DRAWN  # its seed and top_p

    def check(self) -> None:
        """Raise InputError for a marker that is empty, or fewer than 0 ends to be ignored."""
        if not self.end:
            raise InputError("budget_forcing: end is empty; give the model's end-of-thinking text")
        if self.ignore < 0:
            raise InputError(f"budget_forcing: ignore = {self.ignore}; give 0 or more")

    def run(
        self,
        problem: str | Problem,
        generator: Generator,
        verifier: Verifier | None = None,
        budget: Budget | None = None,
    ) -> Scaled:
        """See `Strategy`. A verifier is not asked."""
        greedy = replace(self, sampling=replace(self.sampling, temperature=self.temperature))
        run = Run(greedy, problem, generator, None, budget)
        text, used, ignored = self.start, 0, 0
        run.meter.append(self.start)
        while used < self.thinking:
            made = run.sample(1, prefix=text, max_tokens=self.thinking - used, stop=(self.end,))
            if not made:
                break
            text += made[0].text
            used += made[0].tokens
            if made[0].finish == "length" or ignored >= self.ignore or used >= self.thinking:
                break
            ignored += 1
            text += self.wait
            run.meter.append(self.wait)
        text += self.end + self.ask
        run.meter.append(self.end + self.ask)
        run.tell("thinking", tokens=used, ignored=ignored, limit=self.thinking)
        made = run.sample(1, prefix=text, max_tokens=self.answer_tokens, stop=())
        if not made:
            return run.done((), None)
        answered = run.answer(made[0].text)
        one = run.candidate(
            text + made[0].text,
            used + made[0].tokens,
            finished=made[0].finish != "length",
            judge=False,
        )
        one = replace(one, answer=answered)
        return run.done([one], one)
