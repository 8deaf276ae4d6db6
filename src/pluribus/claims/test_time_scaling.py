"""More samples, a checker, a search: what they add to a small model that errs half of the time.

A transformer over characters is trained to work out sums of three or four numbers in writing (see
`_sums`), and stopped where it writes 40 % of held-out traces without an error at temperature 0.8.
On 200 sums that it was not trained on, all by `pluribus.decode.scaling`:

    majority, weighted, best    of one pool of 16 samples a sum; subsets of it for smaller sizes
    exact                       the checker that knows the answer
    head                        a verifier of the writer's size, trained on 20,000 traces that the
                                writer drew, each of another sum
    head of few traces          the same, trained on 5,000 traces of 625 sums
    frozen head                 one by `Head.train` on the writer's states as they are
    beam search                 8 beams, 2 kept, by the head's score of each step
    budget forcing              at most 8, 16 or 32 tokens of thought, one early end not taken

Beam search is compared with the best (by the same head) of as many samples as cost as much or more.
And SmolLM2-135M-Instruct adds two numbers of two digits after three examples.

Sizes and rates were chosen on seed 100, which no figure is of. Game of 24 is a claim of its own
(`game-of-24`). Not here: the compute-optimal choice at 50 M parameters, which needs a GPU.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from pluribus.claims import Check, Claim, OnStep, _chars, _sums
from pluribus.claims._sums import DRAWN, SAMPLES, TEMPERATURE
from pluribus.decode.scaling.interface import Generator, Problem, Sampling
from pluribus.tasks.specialise import threads

if TYPE_CHECKING:
    from pluribus.agents import LocalModel
    from pluribus.decode.scaling.interface import Verifier
    from pluribus.decode.scaling.pool import Pool

BEAMS, BEAM_WIDTH, ROUNDS = 8, 4, 6
FORCED, THOUGHTS = 40, (8, 16, 32)  # sums with forced thinking, and its limits
SHOTS, ADDITIONS = 3, 40  # of the real model


def _checks() -> Iterator[Check]:
    yield Check(text="the premise, pass@1 at least 30", left="pass@1", margin=30.0, each=True)
    yield Check(
        text="the premise, pass@1 at most 60",
        left="pass@1",
        margin=60.0,
        each=True,
        at_most=True,
    )
    yield Check(text="majority of 16 over pass@1", left="majority@16", right="pass@1", margin=5.0)
    yield Check(
        text="vote of 16 weighted by the head over majority",
        left="weighted@16",
        right="majority@16",
        margin=3.0,
    )
    yield Check(
        text="best of 16 by the exact checker, away from pass@16",
        left="exact@16 away from pass@16",
        each=True,
        at_most=True,
    )
    yield Check(
        text="best of 16 by the exact checker over pass@1",
        left="exact@16",
        right="pass@1",
        margin=20.0,
    )
    for name in ("majority", "weighted", "exact"):
        yield Check(
            text=f"{name}: largest fall as samples double from 1 to 16",
            left=f"{name} largest fall",
            margin=2.0,
            each=True,
            at_most=True,
        )
    yield Check(
        text="beam search over the best of samples, as many tokens at least, by the same head",
        left="beam search",
        right="best at the beams' tokens",
        margin=-1.0,
    )
    yield Check(
        text="tokens of those samples over the beams'",
        left="best at the beams' tokens, tokens",
        right="beam search tokens",
        each=True,
    )
    yield Check(
        text="adaptive stop: percent of 16 samples drawn",
        left="adaptive samples",
        margin=60.0,
        at_most=True,
    )
    yield Check(
        text="adaptive stop: points lost to majority of 16",
        left="majority@16",
        right="adaptive",
        margin=1.0,
        at_most=True,
    )
    yield Check(
        text="budget forcing: percent of runs within their limit",
        left="within the limit",
        margin=100.0,
        each=True,
    )
    yield Check(
        text="SmolLM2-135M adds two numbers: majority of 16 over a single sample",
        left="SmolLM2 majority@16",
        right="SmolLM2 pass@1",
        margin=3.0,
    )
    yield Check(
        text="vote weighted by the head of few traces, over majority",
        left="few weighted@16",
        right="majority@16",
        margin=3.0,
    )
    yield Check(
        text="vote weighted by a head on the writer's own states, over majority",
        left="frozen weighted@16",
        right="majority@16",
        asserted=False,
    )
    yield Check(
        text="best of 16 by the head, over majority",
        left="best@16",
        right="majority@16",
        asserted=False,
    )


CLAIM = Claim(
    name="test-time-scaling",
    title="Votes, checkers and searches answer what single samples miss, at a known cost",
    paper="arXiv:2503.24235",
    data="200 sums of three or four numbers from 1 to 99; 40 of two numbers for SmolLM2",
    model="a Llama over characters, 3 layers of width 96 (0.3 M), stopped early; SmolLM2-135M",
    metric="percent of problems that are answered right",
    checks=tuple(_checks()),
)


def measure(seed: int, on_step: OnStep | None = None) -> Mapping[str, float]:
    """Return all figures for one seed. Raises MissingError without the real model's package."""
    with threads(1):
        model, tests, out = _sums.trained(seed, on_step)
        out |= _of_pool(seed, model, tests, on_step)
        out |= forced(model, tests[:FORCED], on_step)
        out |= additions(_chars.real(), seed, on_step)
    return out


def _of_pool(
    seed: int, model: "LocalModel", tests: list[Problem], on_step: OnStep | None
) -> dict[str, float]:
    """Return what votes, checkers and beams make of the tests."""
    from pluribus.decode.scaling.pool import Pool
    from pluribus.decode.scaling.verifiers.exact import Exact

    verifiers, out = _sums.heads(seed, model, tests, on_step)
    pool = Pool(replace(DRAWN, seed=100_000 + seed))
    pool.fill(tests, model, SAMPLES, batch=_sums.BATCH, told=on_step)
    out |= voted(pool, tests, {"exact": Exact(), **verifiers})
    return out | searched(seed, model, pool, tests, verifiers["head"], on_step)


def voted(
    pool: "Pool", tests: list[Problem], verifiers: Mapping[str, "Verifier"]
) -> dict[str, float]:
    """Return accuracies of all strategies of whole samples, in percent, by one pool."""
    from pluribus.decode.scaling import BestOfN, SelfConsistency, Weighted
    from pluribus.decode.scaling.curves import curve, passes, sizes

    out: dict[str, float] = {}
    ns = sizes(SAMPLES)
    for name, strategy, judge in (
        ("majority", SelfConsistency(), ""),
        ("weighted", Weighted(), "head"),
        ("best", BestOfN(), "head"),
        ("exact", BestOfN(), "exact"),
    ):
        points = curve({name: strategy}, tests, pool, verifiers.get(judge), ns=ns)
        out |= {f"{name}@{point.n}": 100 * point.accuracy for point in points}
        right = [point.accuracy for point in points]
        out[f"{name} largest fall"] = 100 * max(0.0, *(a - b for a, b in pairwise(right)))
    for judge, told in (("frozen", "frozen"), ("head of few traces", "few")):
        for name, strategy in (("weighted", Weighted()), ("best", BestOfN())):
            [point] = curve({name: strategy}, tests, pool, verifiers[judge], ns=[SAMPLES])
            out[f"{told} {name}@{SAMPLES}"] = 100 * point.accuracy
    early = {"adaptive": SelfConsistency(confidence=0.95)}
    [point] = curve(early, tests, pool, ns=[SAMPLES])
    out["adaptive"] = 100 * point.accuracy
    out["adaptive samples"] = 100 * point.calls / SAMPLES
    reached = passes(tests, pool, ns)
    out |= {f"pass@{k}": 100 * value for k, value in reached.items()}
    away = out[f"exact@{SAMPLES}"] - out[f"pass@{SAMPLES}"]
    return out | {"exact@16 away from pass@16": abs(away)}


def searched(
    seed: int,
    model: Generator,
    pool: "Pool",
    tests: list[Problem],
    head: "Verifier",
    on_step: OnStep | None = None,
) -> dict[str, float]:
    """Return what beam search reaches, and the best of samples that cost as much or more."""
    from pluribus.decode.scaling import BeamSearch, BestOfN
    from pluribus.decode.scaling.curves import curve, live

    beams = BeamSearch(
        n=BEAMS,
        width=BEAM_WIDTH,
        separator=_sums.STEP,
        step_tokens=_sums.STEP_LENGTH,
        rounds=ROUNDS,
        sampling=replace(DRAWN, seed=200_000 + seed),
    )
    [beam] = live({"beam search": beams}, tests, model, head, told=on_step)
    best = curve({"best": BestOfN()}, tests, pool, head, ns=range(1, SAMPLES + 1))
    enough = [point for point in best if point.tokens >= beam.tokens]
    chosen = enough[0] if enough else best[-1]  # the fewest samples; the check tells if too few
    return {
        "beam search": 100 * beam.accuracy,
        "beam search tokens": beam.tokens,
        "best at the beams' tokens": 100 * chosen.accuracy,
        "best at the beams' tokens, samples": float(chosen.n or 0),
        "best at the beams' tokens, tokens": chosen.tokens,
    }


def forced(
    model: Generator, tests: list[Problem], on_step: OnStep | None = None
) -> dict[str, float]:
    """Return how often forced thinking kept to its limit, and what was answered, in percent."""
    from pluribus.decode.scaling import BudgetForcing, controllability

    out: dict[str, float] = {}
    kept: list[float] = []
    for limit in THOUGHTS:
        way = BudgetForcing(
            thinking=limit,
            ignore=1,
            start="",
            end=_sums.MARK,
            wait=_sums.STEP,
            ask="",
            answer_tokens=4,
            sampling=DRAWN,
        )
        used, right = [], 0
        for number, problem in enumerate(tests):
            own = replace(way, sampling=replace(DRAWN, seed=problem.seed(DRAWN.seed)))
            done = own.run(replace(problem, extract=_digits), model)
            [told] = [event for event in done.trace if event.kind == "thinking"]
            used.append(int(told.values["tokens"]))
            right += done.answer == problem.answer
            if on_step is not None:
                on_step(f"at most {limit} tokens of thought", number + 1, len(tests))
        kept.append(controllability(used, most=limit))
        out[f"thinking {limit}"] = 100 * right / len(tests)
        out[f"thinking {limit}, tokens"] = sum(used) / len(used)
    return out | {"within the limit": 100 * min(kept)}


def _digits(text: str) -> str | None:
    found = re.match(r"\s*(\d+)", text)
    return found.group(1) if found else None


def additions(model: Generator, seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return how well a real model adds two numbers of two digits, once and by majority."""
    from pluribus.decode.scaling import SelfConsistency
    from pluribus.decode.scaling.curves import curve, passes
    from pluribus.decode.scaling.pool import Pool

    rng = random.Random(f"additions/{seed}")
    every = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    pairs = rng.sample(every, SHOTS + ADDITIONS)
    shown = "".join(f"{a}+{b}={a + b}\n" for a, b in pairs[:SHOTS])
    asked = [
        Problem(question=f"{shown}{a}+{b}=", answer=str(a + b), id=f"{a}+{b}", extract=_digits)
        for a, b in pairs[SHOTS:]
    ]
    pool = Pool(Sampling(temperature=TEMPERATURE, max_tokens=4, stop=("\n",), seed=300_000 + seed))
    pool.fill(asked, model, SAMPLES, batch=4 * SAMPLES, told=on_step)
    [voted] = curve({"majority": SelfConsistency()}, asked, pool, ns=[SAMPLES])
    return {
        f"SmolLM2 majority@{SAMPLES}": 100 * voted.accuracy,
        "SmolLM2 pass@1": 100 * passes(asked, pool, [1])[1],
        f"SmolLM2 pass@{SAMPLES}": 100 * passes(asked, pool, [SAMPLES])[SAMPLES],
    }
