"""Learn a distribution over choices from their rewards.

Williams, 1992; Pham et al., "Efficient Neural Architecture Search via Parameter Sharing", ICML
2018, https://arxiv.org/abs/1802.03268, section 2; Bender et al., "Can weight sharing outperform
random architecture search?" (TuNAS), CVPR 2020, https://arxiv.org/abs/2008.06120, section 3.

    a ~ pi(a) = prod_d pi(a_d | a_<d)
    ascend    (R(a) - b) grad log pi(a) + entropy * grad H(pi)
    then      b <- decay * b + (1 - decay) * R(a)

`Logits` gives each decision logits of its own; `Recurrent` is the published controller, an LSTM
that reads its earlier choices, with logits 2.5 tanh(logits / 5). H is that of the decisions that
exist in the sampled choice. Decisions of a `manyof` with distinct or sorted candidates are drawn
from what the earlier ones leave. Differs from the paper: b starts at the first reward.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn

from pluribus.core.errors import InputError
from pluribus.core.shapes import Bool, Float
from pluribus.search.decisions import Choice, Decision, walk


class Draw(NamedTuple):
    """A choice and what its distribution says of it."""

    choice: dict[str, int]
    log_prob: Float[Tensor, ""]
    entropy: Float[Tensor, ""]


@runtime_checkable
class Step(Protocol):
    """One walk over the decisions."""

    def logits(self, decision: Decision) -> Float[Tensor, " c"]:
        """Return the logits of the next decision."""
        ...

    def chose(self, decision: Decision, index: int) -> None:
        """Take note of what was chosen."""
        ...


@runtime_checkable
class Policy(Protocol):
    """A distribution over choices with parameters to learn."""

    decisions: Mapping[str, Decision]

    def start(self) -> Step:
        """Return what gives the logits of one decision after another."""
        ...

    def parameters(self) -> list[Tensor]:
        """Return what is learned."""
        ...


class Logits:
    """Independent logits for each decision; even at the start."""

    def __init__(self, decisions: Mapping[str, Decision]) -> None:
        self.decisions = decisions
        self.table = {p: torch.zeros(d.count, requires_grad=True) for p, d in decisions.items()}

    def start(self) -> "Logits":
        """Return itself: nothing depends on earlier choices."""
        return self

    def logits(self, decision: Decision) -> Float[Tensor, " c"]:
        """Return the decision's own logits."""
        return self.table[decision.path]

    def chose(self, decision: Decision, index: int) -> None:
        """Take no notice."""

    def parameters(self) -> list[Tensor]:
        """Return the logits."""
        return list(self.table.values())


class Recurrent:
    """An LSTM over the decisions in their order; it reads each choice before the next decision.

    All parameters are drawn from U(-0.1, 0.1), as in the authors' code.
    """

    def __init__(
        self,
        decisions: Mapping[str, Decision],
        rng: Generator,
        width: int = 100,
        temperature: float = 5.0,
        tanh: float = 2.5,
    ) -> None:
        self.decisions, self.width = decisions, width
        self.temperature, self.tanh = temperature, tanh
        self.first = {path: number for number, path in enumerate(decisions)}
        counts = [decision.count for decision in decisions.values()]
        self.cell = nn.LSTMCell(width, width)
        self.read = nn.ModuleList(nn.Embedding(count, width) for count in counts)
        self.write = nn.ModuleList(nn.Linear(width, count) for count in counts)
        self.begin = nn.Parameter(torch.empty(width))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.2 * torch.rand(parameter.shape, generator=rng) - 0.1)

    def start(self) -> "_Walk":
        """Return a walk that has chosen nothing yet."""
        return _Walk(self)

    def parameters(self) -> list[Tensor]:
        """Return the weights of the cell, the embeddings and the readouts."""
        parts = (self.cell, self.read, self.write)
        return [self.begin, *(tensor for part in parts for tensor in part.parameters())]


class _Walk:
    def __init__(self, policy: Recurrent) -> None:
        self.policy = policy
        zeros = torch.zeros(1, policy.width)
        self.state = policy.cell(policy.begin[None], (zeros, zeros))

    def logits(self, decision: Decision) -> Float[Tensor, " c"]:
        policy = self.policy
        raw = policy.write[policy.first[decision.path]](self.state[0])[0]
        return policy.tanh * torch.tanh(raw / policy.temperature)

    def chose(self, decision: Decision, index: int) -> None:
        policy = self.policy
        seen = policy.read[policy.first[decision.path]](torch.tensor([index]))
        self.state = policy.cell(seen, self.state)


def draw(policy: Policy, rng: Generator) -> Draw:
    """Draw a choice, with the gradients of its log-probability and entropy."""

    def pick(decision: Decision, log_p: Tensor) -> int:
        return int(torch.multinomial(log_p.detach().exp(), 1, generator=rng))

    return _walked(policy, pick)


def rated(policy: Policy, choice: Choice) -> Draw:
    """Return the log-probability and entropy of a given choice."""
    return _walked(policy, lambda decision, log_p: choice[decision.path])


def likeliest(policy: Policy) -> dict[str, int]:
    """Return the choice that takes the likeliest candidate at each decision in turn."""
    with torch.no_grad():
        return _walked(policy, lambda decision, log_p: int(log_p.argmax())).choice


def _walked(policy: Policy, pick: Callable[[Decision, Tensor], int]) -> Draw:
    step = policy.start()
    log_prob, entropy = torch.zeros(()), torch.zeros(())

    def choose(decision: Decision, allowed: Bool[Tensor, " c"]) -> int:
        nonlocal log_prob, entropy
        log_p = step.logits(decision).masked_fill(~allowed, -torch.inf).log_softmax(0)
        index = pick(decision, log_p)
        step.chose(decision, index)
        log_prob = log_prob + log_p[index]
        left = log_p[allowed]
        entropy = entropy - (left.exp() * left).sum()
        return index

    choice = walk(policy.decisions, choose)
    return Draw(choice, log_prob, entropy)


@dataclass
class Reinforce:
    """Samples choices and learns from their rewards, one at a time."""

    policy: Policy
    rng: Generator
    lr: float = 3.5e-4
    decay: float = 0.95  # of the baseline
    entropy: float = 1e-4
    baseline: float | None = None
    _last: Draw | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Make the optimiser."""
        self.optimiser = torch.optim.Adam(self.policy.parameters(), self.lr)

    def sample(self) -> dict[str, int]:
        """Return a choice drawn from the policy."""
        self._last = draw(self.policy, self.rng)
        return self._last.choice

    def update(self, reward: float) -> None:
        """Learn what the last sample was worth. Raises InputError if there is none."""
        if self._last is None:
            raise InputError("update(reward) rates the last sample(): call that first")
        if self.baseline is None:
            self.baseline = reward
        loss = objective(self._last, reward, self.baseline, self.entropy)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.baseline = self.decay * self.baseline + (1 - self.decay) * reward
        self._last = None


def objective(draw: Draw, reward: float, baseline: float, entropy: float) -> Float[Tensor, ""]:
    """Return the loss whose gradient REINFORCE descends."""
    return -(reward - baseline) * draw.log_prob - entropy * draw.entropy
