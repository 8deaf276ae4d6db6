"""Thinking pays on one kind of task and costs on another: measured, decided and routed.

    A  strings of 100 grammars of `pluribus.tasks.suites`: bigrams against rules (`_grammars`)
    B  modes with known chances: what `CoTProbe` decides, and how soon (`_fated`)
    C  one transformer over characters, trained on two kinds of task (`_flip`), asked by `Direct`
       and `CoT`; a probe of each kind, a policy of both probes, and 200 questions of each kind
       that come without a name
    D  SmolLM2-135M-Instruct on 40 requests of CLINC150, four intents of banking, by `Likelihood`:
       at once, or after 48 tokens of thought

In B both modes are right together on most problems: 8 % go one way and 8 % the other beside delta,
as two modes of one model do. `independent` modes agree by chance alone, which takes more problems;
that is reported. An error is any decision but the right one, and any decision at delta 0.

The loss by telling a rule is trained into C's model, so C shows the tool, not the psychology. The
page's model has 2 to 4 M values; this one has 0.3 M, which take a processor two or three minutes.
Rates and what is trained on were chosen on seed 100, which no figure is of. Not here: eight tasks
at 50 M parameters with the card left out in turn (needs a GPU), and the paper's own effects, which
need a strong model behind an endpoint.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pluribus.claims import Check, Claim, OnStep, _chars, _fated, _flip, _grammars
from pluribus.claims._fated import ALPHA, MOST
from pluribus.decode.scaling.interface import Generator, Problem
from pluribus.tasks.specialise import threads

if TYPE_CHECKING:
    from pluribus.agents import LocalModel
    from pluribus.agents.thinking import Mode

BANKING = ("balance", "transfer", "routing", "transactions")  # intents, one token each
REQUESTS, THOUGHT = 40, 48


def _checks() -> Iterator[Check]:
    def check(text: str, left: str, margin: float, right: str | None = None, **how: Any) -> Check:
        return Check(text=text, left=left, right=right, margin=margin, **how)

    yield check("grammar: bigrams", "grammar: bigrams", 80.0)
    yield check(
        "grammar: best of three stated rules, with hindsight",
        "grammar: best rule",
        72.0,
        at_most=True,
    )
    for name in ("labels off balance", "tests that were shown"):
        yield check(f"grammar: {name}", f"grammar: {name}", 0.0, each=True, at_most=True)
    for delta in (-0.2, 0.0, 0.2):
        yield check(
            f"delta {delta:+g}: percent of decisions that are wrong",
            f"{delta:+g}: wrong",
            100 * ALPHA,
            at_most=True,
        )
    for delta in (-0.2, 0.2):
        yield check(
            f"delta {delta:+g}: problems until it is decided",
            f"{delta:+g}: problems",
            80.0,
            at_most=True,
        )
    yield check("sums: thinking over answering at once", "sums: cot", 15.0, "sums: direct")
    yield check(
        "strings: thinking over answering at once",
        "strings: cot",
        -5.0,
        "strings: direct",
        at_most=True,
    )
    yield check(
        "both kinds mixed: policy over the better single mode",
        "policy",
        4.0,
        "best single mode",
        each=True,
    )
    yield check(
        "both kinds mixed: tokens of the policy, percent of always thinking",
        "policy's tokens",
        60.0,
        each=True,
        at_most=True,
    )
    yield check(
        "problems that both probes asked", "problems probed", 400.0, each=True, at_most=True
    )
    yield check("SmolLM2, banking: undecided", "SmolLM2 undecided", 1.0, each=True)
    yield check("SmolLM2, banking: answers at once", "SmolLM2 at once", 1.0, each=True)
    yield check(
        "SmolLM2, banking: tokens of thinking over those of answering at once",
        "SmolLM2 times the tokens",
        40.0,
        each=True,
    )
    for delta in (-0.05, 0.05):
        yield check(
            f"delta {delta:+g}: percent of decisions for the worse mode",
            f"{delta:+g}: worse",
            100 * ALPHA,
            at_most=True,
            asserted=False,
        )
    yield check(
        "independent modes, delta +0.2: problems until it is decided",
        "independent: problems",
        80.0,
        at_most=True,
        asserted=False,
    )


CLAIM = Claim(
    name="selective-cot",
    title="Whether thinking pays is measured with few questions, and each goes where it pays",
    paper="arXiv:2410.21333",
    data="grammars, parities and strings made from the seed; 40 requests of CLINC150",
    model="a Llama over characters, 3 layers of width 96 (0.3 M); SmolLM2-135M-Instruct",
    metric="percent of problems that are answered right, tokens, decisions",
    checks=tuple(_checks()),
)


def measure(seed: int, on_step: OnStep | None = None) -> Mapping[str, float]:
    """Return all figures for one seed.

    Raises DataError without CLINC150, MissingError without the real model's package.
    """
    with threads(1):
        out = _grammars.figures(seed)
        out |= _fated.simulated(seed, on_step)
        out |= flipped(seed, on_step)
        out |= asked(_chars.real(), seed, on_step)
    return out


# -- C: one model, two kinds of task ---------------------------------------------------------------


def modes() -> list["Mode"]:
    """Return both ways of asking the model of characters; the first is the default."""
    from pluribus.agents.thinking import CoT, Direct

    return [
        Direct(template="{question}" + _flip.AT_ONCE, max_tokens=4),
        CoT(template="{question}" + _flip.THINK, max_tokens=40),
    ]


def flipped(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return what both modes and the policy reach on both kinds of task."""
    from pluribus.agents.thinking import CoTPolicy, CoTProbe, Task

    model, tests, probed = _flip.trained(seed, on_step)
    ways = modes()
    probe = CoTProbe(model, ways, alpha=ALPHA, n_max=MOST, tasks=len(probed), seed=seed)
    effects = [probe.measure(Task.of(name, own), on_step) for name, own in probed.items()]
    router = CoTPolicy.fit(effects).as_router(ways)
    out: dict[str, float] = {"problems probed": float(sum(one.n for one in effects))}
    out |= {f"{one.task}: problems probed": float(one.n) for one in effects}
    totals: dict[str, list[tuple[bool, int]]] = {}
    for kind, own in tests.items():
        for way in (*ways, router):
            made = _answers(way, own, model, f"{kind}: {way.name}", on_step)
            out[f"{kind}: {way.name}"] = 100 * fmean(right for right, _ in made)
            out[f"{kind}: {way.name}, tokens"] = fmean(tokens for _, tokens in made)
            totals.setdefault(way.name, []).extend(made)
    mixed = {name: 100 * fmean(right for right, _ in made) for name, made in totals.items()}
    tokens = {name: fmean(count for _, count in made) for name, made in totals.items()}
    return out | {
        "always direct": mixed["direct"],
        "always cot": mixed["cot"],
        "best single mode": max(mixed["direct"], mixed["cot"]),
        "policy": mixed[router.name],
        "policy's tokens": 100 * tokens[router.name] / tokens["cot"],
    }


def _answers(
    mode: "Mode",
    problems: Sequence[Problem],
    model: Generator,
    told: str,
    on_step: OnStep | None,
) -> list[tuple[bool, int]]:
    """Return for each problem whether a mode is right, and the tokens it wrote."""
    made = []
    for number, one in enumerate(problems):
        attempt = mode.run(one, model)
        made.append((attempt.parsed and attempt.answer == one.answer, attempt.tokens))
        if on_step is not None:
            on_step(told, number + 1, len(problems))
    return made


# -- D: a real model on real requests --------------------------------------------------------------


def requests(seed: int, count: int = REQUESTS) -> list[Problem]:
    """Return test requests of the four intents, as many of each. Raises DataError."""
    from pluribus.tasks import sets

    rows = [one for one in sets.records("clinc150") if one["split"] == "test"]
    rng = random.Random(f"requests/{seed}")
    found = []
    for intent in BANKING:
        own = [one["text"] for one in rows if one["label"] == intent]
        found += [
            Problem(
                question=f'Which of {", ".join(BANKING)} is this request about?\n"{text}"',
                answer=intent,
                id=text,
            )
            for text in rng.sample(own, count // len(BANKING))
        ]
    return found


def asked(model: "LocalModel", seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return what the probe makes of a real model on real requests."""
    from pluribus.agents.thinking import CoTProbe, Likelihood, Task
    from pluribus.agents.thinking.effect import UNDECIDED

    ways = [Likelihood(choices=BANKING), Likelihood(choices=BANKING, thinking=THOUGHT)]
    probe = CoTProbe(model, ways, alpha=ALPHA, n_max=REQUESTS, seed=seed)
    effect = probe.measure(Task.of("banking", requests(seed)), on_step)
    direct, cot = effect.arms
    return {
        "SmolLM2 direct": 100 * direct.accuracy,
        "SmolLM2 cot": 100 * cot.accuracy,
        "SmolLM2 problems": float(effect.n),
        "SmolLM2 p": effect.p,
        "SmolLM2 undecided": float(effect.decision == UNDECIDED),
        "SmolLM2 at once": float(effect.chosen == direct.mode),
        "SmolLM2 times the tokens": cot.tokens / direct.tokens,
    }
