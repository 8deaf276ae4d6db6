"""A learned process verifier: a logistic head on a language model's hidden state at a step's end.

Labels by Monte-Carlo roll-outs, Wang et al. (Math-Shepherd), ACL 2024,
https://arxiv.org/abs/2312.08935, the soft estimate:

    label(x, y_<=t) = share of k completions from step t on that end in the right answer
    score(x, y_<=t) = sigmoid(w . h + b),   h (d,) the last layer's state of the last token, scaled
    loss = mean of -(label log score + (1 - label) log(1 - score)) + decay |w|^2 / 2

The states come from one pass over prompt and candidate; the head is fitted by L-BFGS, in float64,
which has one optimum, so nothing depends on chance but the roll-outs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pluribus.core.errors import FormatError, InputError, MissingError
from pluribus.core.shapes import Float
from pluribus.core.whole import whole_file
from pluribus.decode.scaling.answers import split
from pluribus.decode.scaling.interface import DRAWN, Generator, Problem, Prompt, Sampling
from pluribus.decode.scaling.verifiers import verifier


class Reader(Protocol):
    """A model, its tokenizer, and how a prompt is written for it: `pluribus.agents.LocalModel`."""

    model: Any
    tokenizer: Any
    chat: bool

    def text(self, prompt: Prompt, prefix: str = "") -> str:
        """Return what the model reads."""
        ...


class Labelled(NamedTuple):
    """The beginning of an answer, and how often it came to the right one."""

    problem: Problem
    steps: tuple[str, ...]
    label: float


def roll_out(
    problems: Sequence[Problem],
    generator: Generator,
    *,
    traces: int = 4,
    rollouts: int = 4,
    separator: str = "\n\n",
    sampling: Sampling = DRAWN,
) -> list[Labelled]:
    """Return labelled beginnings of self-generated answers: every step of every trace.

    The label of a whole answer is whether it is right. Costs problems * traces * (1 + steps *
    rollouts) completions at most. Raises InputError for numbers below 1, an answer that is not
    known, or a generator that cannot go on.
    """
    if traces < 1 or rollouts < 1:
        raise InputError(f"traces is {traces} and rollouts {rollouts}; give at least 1")
    if not getattr(generator, "continues", True):
        raise InputError("roll-outs go on from steps, which this generator cannot")
    found, seed = [], sampling.seed

    def draw(problem: Problem, n: int, prefix: str) -> list[str]:
        nonlocal seed
        made = generator.sample(
            problem.question,
            n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop=sampling.stop,
            seed=seed,
            prefix=prefix,
        )
        seed += n
        return [one.text for one in made]

    for place, problem in enumerate(problems, 1):
        if problem.answer is None:
            raise InputError(f"problem {place} has no answer, so roll-outs cannot be judged")
        for text in draw(problem, traces, ""):
            steps = tuple(split(text, separator))
            for t in range(1, len(steps)):
                begun = "".join(steps[:t])
                ends = [begun + more for more in draw(problem, rollouts, begun)]
                right = [problem.find(end) == problem.answer for end in ends]
                found.append(Labelled(problem, steps[:t], sum(right) / len(right)))
            if steps:
                found.append(Labelled(problem, steps, float(problem.find(text) == problem.answer)))
    return found


@verifier("head", needs="head", paper="arXiv:2312.08935")
@dataclass(frozen=True)
class Head:
    """Scores every step by a model's hidden state at its end."""

    model: Reader
    weight: Float[Tensor, " d"]  # float64
    bias: float

    def score(self, problem: Problem, candidate: list[str]) -> list[float]:
        """Return one score a step."""
        states = hidden(self.model, problem, candidate)
        return torch.sigmoid(states @ self.weight + self.bias).tolist()

    @classmethod
    def train(cls, model: Reader, rows: Sequence[Labelled], *, decay: float = 1e-2) -> "Head":
        """Fit a head to labels. Raises InputError if they are all the same, or decay < 0."""
        labels = torch.tensor([row.label for row in rows], dtype=torch.float64)
        if len(rows) < 2 or bool((labels == labels[0]).all()) or decay < 0:
            raise InputError(
                f"{len(rows)} labelled beginnings, decay {decay}: a head needs two different "
                "labels and a decay of 0 or more; give more problems, neither too hard nor too easy"
            )
        x = torch.stack([hidden(model, row.problem, list(row.steps))[-1] for row in rows])
        centre, spread = x.mean(0), x.std(0).clamp(min=1e-6)
        z = (x - centre) / spread
        weight = torch.zeros(z.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            search.zero_grad()
            logits = z @ weight[:-1] + weight[-1]
            fit = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
            total = fit + decay * weight[:-1].square().sum() / 2
            total.backward()
            return total

        search.step(loss)  # type: ignore[arg-type] - torch's stubs want a float
        own = weight.detach()
        scaled = own[:-1] / spread
        return cls(model, scaled, float(own[-1] - scaled @ centre))

    def save(self, path: str | Path) -> None:
        """Write the head as safetensors, whole or not at all. Raises OutputError."""
        from safetensors.torch import save_file

        told = {"weight": self.weight.contiguous(), "bias": torch.tensor([self.bias]).double()}
        with whole_file(path) as part:
            save_file(told, part, {"format": "pluribus head"})

    @classmethod
    def load(cls, model: Reader, path: str | Path) -> "Head":
        """Read a head for the model that it was trained on.

        Raises MissingError, or FormatError for another file or a model of another width.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path).expanduser()
        try:
            told = load_file(path)
        except FileNotFoundError:
            raise MissingError(f"{path}: no such head") from None
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path}: no head of a verifier ({error})") from None
        width = model.model.get_input_embeddings().weight.shape[1]
        if set(told) != {"weight", "bias"} or told["weight"].shape != (width,):
            raise FormatError(
                f"{path}: expected weight ({width},) and bias; does it belong to another model?"
            )
        return cls(model, told["weight"].double(), float(told["bias"][0]))


def hidden(model: Reader, problem: Problem, steps: Sequence[str]) -> Float[Tensor, "s d"]:
    """Return the last layer's state at the end of each step, in float64.

    Steps are tokenised one after another behind the prompt, so that each has its own last token; an
    empty one has the state before it.
    """
    words = model.tokenizer
    ids = list(words(model.text(problem.question), add_special_tokens=not model.chat)["input_ids"])
    ends = []
    for step in steps:
        ids += words(step, add_special_tokens=False)["input_ids"]
        ends.append(len(ids) - 1)
    if not ids:
        raise InputError("the tokenizer makes no tokens of the prompt and the candidate")
    rows = torch.tensor([ids], device=next(model.model.parameters()).device)
    with torch.inference_mode():
        out = model.model(rows, output_hidden_states=True)
    return out.hidden_states[-1][0][ends].double().cpu()
