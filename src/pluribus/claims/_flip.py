"""Two kinds of task for one model that answers at once, or after it has written something down.

    sums      p 011010110010........   the parity of 12 to 20 bits. Written down: the running one.
    strings   g 3 BDKKBV..             whether grammar 3 of ten makes the string. Written down: one
                                       rule of its surface, and the verdict is that rule's.

Answers at once (`>`) to strings are learned from labelled examples, and from strings that a grammar
makes, without a rule. The rule that is written down (`?`) is true and says too little: every string
that the grammar makes ends with one of some letters, but so do most others. So thinking helps with
the one and harms with the other, by construction: after Liu et al., ICML 2025,
https://arxiv.org/abs/2410.21333, but the loss by telling is trained in here.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pluribus.claims import OnStep, _chars
from pluribus.claims._chars import Pair
from pluribus.decode.scaling.interface import Problem
from pluribus.tasks.suites import grammar as suite

if TYPE_CHECKING:
    from pluribus.agents import LocalModel

BITS, FIELD = (12, 20), 8  # least and most bits; letters of the longest string
GRAMMARS, STATES = 10, (5, 6)
ASIDE = 24  # strings of each grammar that are not trained on
AT_ONCE, THINK, MARK = ">", "?", "####"
LETTERS = f"01.pgYN {AT_ONCE}{THINK}23456789{suite.CONSONANTS}abcdefghijklmnopqrstuvwxyz"
POSITIONS = 80
WIDTH, LAYERS = 96, 3
STEPS, ROWS, RATE = 1000, 96, 2e-3
SHARES = {  # of what is trained on
    ("sums", "at once"): 1,
    ("sums", "thinking"): 2,
    ("strings", "seen"): 3,
    ("strings", "at once"): 5,
    ("strings", "thinking"): 1,
}
TESTS, PROBED = 200, 200  # problems of each kind
TALK = {True: "the last letter {} fits", False: "the last letter {} is wrong"}


@dataclass(frozen=True)
class Told:
    """A question with its answer, and what is written down before an answer."""

    question: str
    answer: str
    thought: str
    verdict: str  # the answer that the thought leads to

    def pair(self, thinks: bool) -> Pair:
        """Return what is trained on."""
        if thinks:
            return Pair(self.question + THINK, f"{self.thought}{MARK}{self.verdict}")
        return Pair(self.question + AT_ONCE, self.answer)


def sums(rng: random.Random) -> Told:
    """Return the parity of random bits, and the running one."""
    bits = [rng.randint(0, 1) for _ in range(rng.randint(*BITS))]
    states, state = "", 0
    for bit in bits:
        state ^= bit
        states += str(state)
    shown = "".join(map(str, bits)).ljust(BITS[1], ".")
    return Told(f"p {shown}", str(state), states, str(state))


@dataclass(frozen=True)
class Strings:
    """Ten grammars, with strings to train on and strings set aside."""

    grammars: tuple[suite.Automaton, ...]
    train: tuple[tuple[str, ...], ...]
    aside: tuple[tuple[str, ...], ...]
    ends: tuple[frozenset[str], ...]  # letters that a grammar's strings end with
    taken: frozenset[str] = field(default=frozenset())  # questions not to be trained on

    @classmethod
    def of(cls, seed: int) -> "Strings":
        """Return the grammars of a seed."""
        rng = random.Random(f"strings/{seed}")
        grammars: list[suite.Automaton] = []
        while len(grammars) < GRAMMARS:
            made = suite.draw(rng, rng.randint(*STATES), rng.randint(*STATES))
            if made is not None:
                grammars.append(made)
        texts = [rng.sample(all_, len(all_)) for all_ in (one.strings() for one in grammars)]
        return cls(
            tuple(grammars),
            tuple(tuple(own[ASIDE:]) for own in texts),
            tuple(tuple(own[:ASIDE]) for own in texts),
            tuple(frozenset(text[-1] for text in own) for own in texts),
        )

    def draw(self, rng: random.Random) -> Told:
        """Return a string to train on, as likely right as wrong."""
        while True:
            made = self._told(rng, self.train)
            if made.question not in self.taken:
                return made

    def seen(self, rng: random.Random) -> Pair:
        """Return a string that a grammar makes, without a label, to be written after its name."""
        number = rng.randrange(len(self.grammars))
        return Pair(f"g {number} ", rng.choice(self.train[number]).ljust(FIELD, "."))

    def unseen(self, rng: random.Random, count: int, but: Sequence[Told] = ()) -> list[Told]:
        """Return different strings of those set aside, half of them right, none among `but`."""
        seen = {one.question for one in but}
        found: dict[str, list[Told]] = {"Y": [], "N": []}
        while min(map(len, found.values())) < (count + 1) // 2:
            made = self._told(rng, self.aside)
            own = found[made.answer]
            if made.question not in seen and len(own) < (count + 1) // 2:
                seen.add(made.question)
                own.append(made)
        both = [one for pair in zip(*found.values(), strict=True) for one in pair]
        return both[:count]

    def _told(self, rng: random.Random, texts: Sequence[Sequence[str]]) -> Told:
        number = rng.randrange(len(self.grammars))
        text, right = rng.choice(texts[number]), rng.random() < 0.5
        if not right:
            text = suite.spoiled(text, self.grammars[number], rng, [])
        fits = text[-1] in self.ends[number]
        return Told(
            f"g {number} {text.ljust(FIELD, '.')}",
            "Y" if right else "N",
            TALK[fits].format(text[-1]),
            "Y" if fits else "N",
        )


def problem(one: Told) -> Problem:
    """Return the problem that a question is, with two answers to choose from."""
    from pluribus.agents.thinking.modes import choice

    choices = ("Y", "N") if one.answer in "YN" else ("0", "1")
    return Problem(
        question=one.question, answer=one.answer, id=one.question, extract=choice(choices)
    )


def trained(
    seed: int, on_step: OnStep | None = None
) -> tuple["LocalModel", dict[str, list[Problem]], dict[str, list[Problem]]]:
    """Return the model, and by kind the problems it is tested on and those of the probes."""
    from pluribus.agents import LocalModel
    from pluribus.decode.stack import Opened

    strings = Strings.of(seed)
    aside = random.Random(f"flip/{seed}/aside")
    fresh: dict[str, Told] = {}
    while len(fresh) < TESTS + PROBED:
        one = sums(aside)
        fresh[one.question] = one
    told = list(fresh.values())
    tests = {"sums": told[:TESTS], "strings": strings.unseen(aside, TESTS)}
    probed = {
        "sums": told[TESTS:],
        "strings": strings.unseen(aside, PROBED, but=tests["strings"]),
    }
    kept = frozenset(
        one.question for part in (tests, probed) for own in part.values() for one in own
    )
    strings = replace(strings, taken=kept)

    def draw(rng: random.Random) -> Pair:
        [(kind, how)] = rng.choices(list(SHARES), list(SHARES.values()))
        if how == "seen":
            return strings.seen(rng)
        if kind == "strings":
            return strings.draw(rng).pair(how == "thinking")
        while (made := sums(rng)).question in kept:
            pass
        return made.pair(how == "thinking")

    words = _chars.tokenizer(LETTERS, (MARK,))
    model = _chars.untrained(seed, words, WIDTH, LAYERS, POSITIONS)
    _chars.train(
        model,
        words,
        draw,
        random.Random(f"flip/{seed}/training"),
        steps=STEPS,
        rows=ROWS,
        rate=RATE,
        on_step=on_step,
        told="training on both kinds",
    )

    def made(part: Mapping[str, Sequence[Told]]) -> dict[str, list[Problem]]:
        return {kind: [problem(one) for one in own] for kind, own in part.items()}

    return LocalModel(Opened(model, words), chat="no"), made(tests), made(probed)
