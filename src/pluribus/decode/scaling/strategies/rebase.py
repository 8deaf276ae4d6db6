"""REBASE: at each depth, children in proportion to how good the nodes are.

Wu et al. 2024, https://arxiv.org/abs/2408.00724, section 3:

    B_d = n - finished,   children_j = B_d softmax_j(R_j / T)

Whole numbers by the largest remainder (the lowest index of equals), so that they sum to B_d; the
paper rounds and does not say how the sum is mended. T = 0.2 is the paper's, as far as we know.
Finished nodes are kept and get no children. The answer is the best, or the weighted vote.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pluribus.core.merger import Positive, PositiveInt
from pluribus.decode.scaling import _steps
from pluribus.decode.scaling._run import Run, best_of, holder
from pluribus.decode.scaling._steps import Path
from pluribus.decode.scaling.answers import check_separator, weighted
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import DRAWN, Generator, Problem, Sampling, Scaled, Verifier
from pluribus.decode.scaling.strategies import strategy


@strategy("rebase", kind="hybrid", verifier="required", continues=True, paper="arXiv:2408.00724")
@dataclass(frozen=True, kw_only=True)
class Rebase:
    """Spends more on better nodes, level by level."""

    n: PositiveInt = 16  # nodes of a level, finished ones included
    balance: Positive = 0.2  # T; small: the best takes all, large: all alike
    choose: Literal["weighted", "best"] = "weighted"
    rounds: PositiveInt = 40
    separator: str = "\n\n"
    step_tokens: PositiveInt = 512
    aggregate: Literal["last", "min", "prod"] = "last"
    sampling: Sampling = DRAWN

    def check(self) -> None:
        """Raise InputError for an empty separator."""
        check_separator(self.separator)

    def run(
        self,
        problem: str | Problem,
        generator: Generator,
        verifier: Verifier | None = None,
        budget: Budget | None = None,
    ) -> Scaled:
        """See `Strategy`."""
        run = Run(self, problem, generator, verifier, budget, draws=self.n)
        nodes, done = [Path()], []
        for number in range(self.rounds):
            counts = shares([node.score for node in nodes], self.n - len(done), self.balance)
            asked = [node for node, count in zip(nodes, counts, strict=True) for _ in range(count)]
            grown = _steps.extend(
                run,
                asked,
                self.separator,
                most=self.step_tokens,
                whole=number == self.rounds - 1,
            )
            grown = _steps.judged(run, grown)
            run.tell("round", children=counts, scores=[path.score for path in grown])
            done += [path for path in grown if path.ended]
            nodes = [path for path in grown if not path.ended] or ([] if grown else nodes)
            if not nodes or run.spent:
                break
        if not any(not path.cut for path in done):
            done += _steps.to_the_end(run, nodes, self.separator)
        found = [_steps.candidate(run, path) for path in done]
        if self.choose == "best":
            return run.done(found, best_of(found))
        ended = [one for one in found if one.finished] or found
        answer = weighted([one.answer for one in ended], [one.score or 0.0 for one in ended])
        return run.done(found, holder(ended, answer), answer)


def shares(scores: Sequence[float], total: int, temperature: float) -> list[int]:
    """Return whole numbers in proportion to softmax(scores / temperature) that sum to total."""
    top = max(scores)
    weights = [math.exp((score - top) / temperature) for score in scores]
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts
