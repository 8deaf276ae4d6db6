"""Monte-Carlo tree search over steps, guided by upper confidence bounds.

Kocsis and Szepesvari 2006 (UCT); for language models Hao et al. 2023, https://arxiv.org/abs/2305.14992.
Each simulation goes down by the largest

    Q_j + c sqrt(ln n_parent / n_j),   infinite where n_j = 0

to a leaf; a leaf that was visited before gets k children, of which the first is taken; the leaf
is valued, by the verifier as it is or after a greedy roll-out to the end; and the value is added to
all above (Q is the mean). The answer is the finished leaf visited most (the higher value of
equals), or the vote of all finished ones, weighted by value.

Roll-outs are thrown away but counted. Equal children are kept once.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from pluribus.core.merger import NonNegative, PositiveInt
from pluribus.decode.scaling import _steps
from pluribus.decode.scaling._run import Run, best_of, holder
from pluribus.decode.scaling._steps import Path
from pluribus.decode.scaling.answers import check_separator, weighted
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import (
    DRAWN,
    Generator,
    Problem,
    Sampling,
    Scaled,
    Verifier,
)
from pluribus.decode.scaling.strategies import strategy


@dataclass
class Node:
    """A path in the tree, and what was learned about it."""

    path: Path
    visits: int = 0
    total: float = 0.0
    children: list["Node"] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Q, 0 before a visit."""
        return self.total / self.visits if self.visits else 0.0

    def bound(self, parent: int, c: float) -> float:
        """Return the upper confidence bound under a parent with so many visits."""
        if not self.visits:
            return math.inf
        return self.mean + c * math.sqrt(math.log(parent) / self.visits)


@strategy("mcts", kind="hybrid", verifier="required", continues=True, paper="arXiv:2305.14992")
@dataclass(frozen=True, kw_only=True)
class MCTS:
    """Searches a tree of steps by simulations."""

    simulations: PositiveInt = 32
    k: PositiveInt = 4  # children of an expansion
    c: NonNegative = 1.4
    value: Literal["verifier", "rollout"] = "verifier"
    choose: Literal["visits", "weighted"] = "visits"
    depth: PositiveInt = 40  # steps, at most
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
        run = Run(self, problem, generator, verifier, budget, draws=self.k)
        root = Node(Path())
        self._expand(run, root)
        for _ in range(self.simulations):
            if not root.children or (run.spent and self.value == "rollout"):
                break
            if run.spent and not any(node.path.ended for node in nodes(root)):
                break
            line = [root]
            while line[-1].children:
                parent = max(line[-1].visits, 1)
                line.append(max(line[-1].children, key=lambda node: node.bound(parent, self.c)))
            leaf = line[-1]
            if leaf.visits and not leaf.path.ended and not run.spent:
                self._expand(run, leaf)
                line += leaf.children[:1]
            worth = self._worth(run, line[-1].path)
            for node in line:
                node.visits += 1
                node.total += worth
            run.tell("simulation", text=line[-1].path.text, value=worth)
        return self._result(run, root)

    def _expand(self, run: Run, node: Node) -> None:
        grown = _steps.extend(
            run,
            [node.path] * self.k,
            self.separator,
            most=self.step_tokens,
            whole=len(node.path.steps) >= self.depth - 1,
        )
        unlike = {(path.text, path.ended): path for path in reversed(grown)}
        node.children = [Node(path) for path in reversed(unlike.values())]

    def _worth(self, run: Run, path: Path) -> float:
        if self.value == "verifier" or path.ended:
            return run.value(path.steps or ("",))
        made = run.sample(1, prefix=path.text, temperature=0.0)
        return run.value((*path.steps, *(one.text for one in made)))

    def _result(self, run: Run, root: Node) -> Scaled:
        ends = [node for node in nodes(root) if node.path.ended and not node.path.cut]
        seen = [node for node in ends if node.visits] or ends
        if not seen:
            open_ends = [
                node.path for node in nodes(root) if not node.children and node is not root
            ]
            scored = _steps.judged(run, open_ends)
            paths = _steps.to_the_end(run, scored, self.separator)
            found = [_steps.candidate(run, path) for path in paths]
            return run.done(found, best_of(found))
        found = [_steps.candidate(run, node.path) for node in seen]
        if self.choose == "visits":
            top = max(range(len(seen)), key=lambda i: (seen[i].visits, seen[i].mean, -i))
            return run.done(found, found[top])
        answer = weighted([one.answer for one in found], [node.mean for node in seen])
        return run.done(found, holder(found, answer), answer)


def nodes(root: Node) -> list[Node]:
    """Return all nodes of a tree, parents before children."""
    found = [root]
    for node in found:
        found += node.children
    return found
