"""Sums worked out in writing, and a verifier of the writer's own size that learned from its errors.

    12+34+56=   ->   12+34>46;46+56>102;#102

Steps end with `;`, and `#` ends the thinking, so that its length can be forced. A verifier is a
copy of the writer trained on, with a head on the last layer: at each step's end of a trace that the
writer drew it learns whether there was an error up to there, by the checker of steps. (On seed 100
it was tried with the outcome as the label of all steps, too: it learned which sums are hard, and
preferred wrong traces of one sum to right ones more often than not.)
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from pluribus.claims import OnStep, _chars
from pluribus.claims._chars import Pair
from pluribus.decode.scaling.interface import Problem, Sampling

if TYPE_CHECKING:
    from pluribus.agents import LocalModel
    from pluribus.decode.scaling.verifiers.head import Head

LETTERS = "0123456789+=>;#"
STEP, MARK = ";", "#"
TERMS = (3, 4)
LARGEST = 99
LENGTH, STEP_LENGTH = 48, 16  # most tokens of a text and of a step; 37 and 11 if they are right
POSITIONS = 160

WIDTH, LAYERS = 96, 3
ROWS, RATE, STEPS = 64, 2e-3, 3000  # of a training step; at most so many of these
WRITES = 0.4  # training stops where so many traces are written without an error
HELD_OUT = 256  # sums that tell when
TEMPERATURE = 0.8
SAMPLES = 16
TESTS = 200
JUDGED = 1000  # traces that the frozen head is fitted to
LEARNING_RATE = 1e-3  # of the verifiers
BATCH = 128  # traces in a request
DRAWN = Sampling(temperature=TEMPERATURE, max_tokens=LENGTH)


class Lessons(NamedTuple):
    """What a verifier learns from: traces, how many of them are of one sum, and steps."""

    traces: int
    each: int
    steps: int


MANY = Lessons(20_000, 1, 1200)
FEW = Lessons(5000, 8, 400)


def asked(numbers: Sequence[int]) -> str:
    """Return the question: numbers with + between them, and = at the end."""
    return "+".join(map(str, numbers)) + "="


def worked(numbers: Sequence[int]) -> str:
    """Return what is to be written: a step for each addition, then the answer behind its mark."""
    total, said = numbers[0], ""
    for number in numbers[1:]:
        said += f"{total}+{number}>{total + number}{STEP}"
        total += number
    return f"{said}{MARK}{total}"


def answer(text: str) -> str | None:
    """Return the digits behind the last mark; None without a mark, or if there is anything else."""
    _, mark, said = text.rpartition(MARK)
    return said if mark and said.isdecimal() else None


def drawn(rng: random.Random) -> Pair:
    """Return a sum of three or four numbers from 1 to 99."""
    numbers = [rng.randint(1, LARGEST) for _ in range(rng.choice(TERMS))]
    return Pair(asked(numbers), worked(numbers))


def problems(rng: random.Random, count: int, but: Sequence[Problem] = ()) -> list[Problem]:
    """Return as many different sums, none of which is among `but`."""
    seen = {one.question for one in but}
    found: list[Problem] = []
    while len(found) < count:
        pair = drawn(rng)
        if pair.asked not in seen:
            seen.add(pair.asked)
            found.append(
                Problem(
                    question=pair.asked,
                    answer=answer(pair.written),
                    id=pair.asked,
                    extract=answer,
                )
            )
    return found


def verifier(
    writer: "LocalModel",
    traces: Sequence[tuple[Problem, str]],
    rng: random.Random,
    steps: int,
    on_step: OnStep | None = None,
) -> "Head":
    """Return a head on a copy of the writer, both trained on traces at each step's end.

    The rate rises over 50 steps and falls to 0 at the last of `steps`.
    """
    from pluribus.agents import LocalModel
    from pluribus.decode.scaling.verifiers.head import Head
    from pluribus.decode.stack import Opened

    model: Any = copy.deepcopy(writer.model)
    words = writer.tokenizer
    told = [judged(words, problem, text) for problem, text in traces]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.randrange(1 << 30))
        head = nn.Linear(model.config.hidden_size, 1)
    own = [*model.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(own, weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / _chars.WARM) * (1 - step / steps)
        taken = rng.choices(told, k=ROWS)
        ids = torch.zeros(ROWS, max(len(one[0]) for one in taken), dtype=torch.long)
        for row, (tokens, _, _) in enumerate(taken):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state
        at = [(row, end) for row, (_, ends, _) in enumerate(taken) for end in ends]
        right = torch.tensor([label for _, _, labels in taken for label in labels])
        scores = head(states[tuple(torch.tensor(at).T)])[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(scores, right)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(own, 1.0)
        optimiser.step()
        if on_step is not None:
            on_step("training a verifier", step + 1, steps)
    model.eval()
    reader = LocalModel(Opened(model, words), chat="no")
    return Head(reader, head.weight.detach()[0].double(), float(head.bias.detach()))


def judged(words: Any, problem: Problem, text: str) -> tuple[list[int], list[int], list[float]]:
    """Return a trace's tokens, the places of its steps' last ones, and what the checker says there.

    1 while all is as it should be, 0 from the first error on.
    """
    from pluribus.decode.scaling.answers import split

    right = worked([int(number) for number in problem.question.rstrip("=").split("+")])
    ids, said = list(words(problem.question)["input_ids"]), ""
    ends, labels = [], []
    for step in split(text, STEP):
        said += step
        ids += words(step)["input_ids"]
        ends.append(len(ids) - 1)
        labels.append(float(right.startswith(said) and (STEP in step or said == right)))
    return ids, ends, labels


def trained(
    seed: int, on_step: OnStep | None = None
) -> tuple["LocalModel", list[Problem], dict[str, float]]:
    """Return the writer, the sums it is tested on, and how long it was trained."""
    from pluribus.agents import LocalModel
    from pluribus.decode.stack import Opened

    tests = problems(random.Random(f"sums/{seed}/tests"), TESTS)
    kept = {one.question for one in tests}
    rng = random.Random(f"sums/{seed}/held out")
    held_out = [drawn(rng) for _ in range(HELD_OUT)]

    def draw(chance: random.Random) -> Pair:
        while (pair := drawn(chance)).asked in kept:
            pass
        return pair

    words = _chars.tokenizer(LETTERS)
    model = _chars.untrained(seed, words, WIDTH, LAYERS, POSITIONS)
    steps = _chars.train(
        model,
        words,
        draw,
        random.Random(f"sums/{seed}/training"),
        steps=STEPS,
        rows=ROWS,
        rate=RATE,
        done=lambda now, _: _chars.chance(now, words, held_out, TEMPERATURE) >= WRITES,
        on_step=on_step,
        told="training on sums",
    )
    return LocalModel(Opened(model, words), chat="no"), tests, {"training steps": float(steps)}


def heads(
    seed: int, model: "LocalModel", tests: list[Problem], on_step: OnStep | None = None
) -> tuple[dict[str, "Head"], dict[str, float]]:
    """Return verifiers: of the writer's size, from many traces and from few, and the frozen one."""
    from pluribus.decode.scaling.verifiers.head import Head, Labelled

    found: dict[str, Head] = {}
    out: dict[str, float] = {}
    for name, lessons in (("head", MANY), ("head of few traces", FEW)):
        rng = random.Random(f"sums/{seed}/{name}")
        traces = traced(seed, model, lessons, tests, rng, on_step)
        found[name] = verifier(model, traces, rng, lessons.steps, on_step)
        labels = [float(one.find(text) == one.answer) for one, text in traces]
        out[f"{name}: traces right"] = 100 * sum(labels) / len(labels)
        if name == "head":
            own = [
                Labelled(one, (text,), label)
                for (one, text), label in zip(traces, labels, strict=True)
            ]
            judged_by = random.Random(f"sums/{seed}/frozen").sample(own, min(JUDGED, len(own)))
            found["frozen"] = Head.train(model, judged_by)
    return found, out


def traced(
    seed: int,
    model: "LocalModel",
    lessons: Lessons,
    tests: Sequence[Problem],
    rng: random.Random,
    on_step: OnStep | None = None,
) -> list[tuple[Problem, str]]:
    """Return traces of sums that are not among the tests, those left out that say nothing."""
    from pluribus.decode.scaling.pool import Pool

    asked = problems(rng, ceil(lessons.traces / lessons.each), but=tests)
    pool = Pool(replace(DRAWN, seed=1 + seed))
    pool.fill(asked, model, lessons.each, batch=BATCH, told=on_step)
    found = [(one, made.text) for one in asked for made in pool.samples(one)][: lessons.traces]
    return [(one, text) for one, text in found if text]
