"""Artificial grammars: is a new string like those that were seen? Learned without a rule.

After Liu et al., ICML 2025, https://arxiv.org/abs/2410.21333 (implicit statistical learning): a
finite automaton makes strings; some are shown, and one more is to be judged. States have two edges
out with letters that differ, all can be reached and reach an end, and there are 60 strings or more
of 3 to 8 letters. An ungrammatical string is one that could have been shown, with one or two
letters replaced by others of the alphabet so that the automaton refuses it.

Differs from the paper: `tests` strings are judged for each grammar, of which half are grammatical;
the paper asks 44 of each, but strings of one grammar are no independent problems.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from pluribus.core.errors import InputError
from pluribus.core.merger import PositiveInt
from pluribus.tasks.suites import Item, item_suite

CONSONANTS = "BDFGKLMPRSTVXZ"
LENGTHS = range(3, 9)
FEWEST = 60  # strings of a grammar
TRIES = 1000
SIZES = {"easy": (4, 5, 20), "medium": (5, 6, 15), "hard": (6, 7, 12)}  # states, strings shown


@dataclass(frozen=True)
class Automaton:
    """States 0, 1, ...; `edges[state]` is where each letter leads; 0 is the start."""

    edges: tuple[Mapping[str, int], ...]
    ends: frozenset[int]

    @property
    def alphabet(self) -> str:
        """Letters of its edges, in order."""
        return "".join(sorted({letter for out in self.edges for letter in out}))

    def accepts(self, text: str) -> bool:
        """Return whether the letters lead from the start to an end, and are 3 to 8."""
        state: int | None = 0
        for letter in text:
            state = None if state is None else self.edges[state].get(letter)
        return state in self.ends and len(text) in LENGTHS

    def strings(self) -> list[str]:
        """Return all strings of 3 to 8 letters, the shortest first."""
        found, paths = [], [("", 0)]
        for length in range(1, LENGTHS.stop):
            paths = [
                (text + letter, state)
                for text, at in paths
                for letter, state in sorted(self.edges[at].items())
            ]
            if length in LENGTHS:
                found += [text for text, state in paths if state in self.ends]
        return found


def draw(chance: random.Random, states: int, letters: int) -> Automaton | None:
    """Return a random automaton, or None if a state is out of reach or strings are too few."""
    alphabet = chance.sample(CONSONANTS, letters)
    edges = tuple(
        {letter: chance.randrange(states) for letter in chance.sample(alphabet, 2)}
        for _ in range(states)
    )
    ends = frozenset(chance.sample(range(states), 2 if states > 2 else 1))
    made = Automaton(edges, ends)
    if len(made.alphabet) < letters or len(reached(edges, {0})) < states:
        return None
    back = tuple(
        {str(i): i for i, out in enumerate(edges) if state in out.values()}
        for state in range(states)
    )
    if len(reached(back, set(ends))) < states:
        return None
    return made if len(made.strings()) >= FEWEST else None


def reached(edges: tuple[Mapping[str, int], ...], start: set[int]) -> set[int]:
    """Return the states that edges lead to from some."""
    found, new = set(start), set(start)
    while new:
        new = {state for at in new for state in edges[at].values()} - found
        found |= new
    return found


@item_suite("grammar", kind="hurts people", traits=("implicit_pattern",))
@dataclass(frozen=True, kw_only=True)
class Grammar:
    """Is a string of the kind that the shown ones are?"""

    tests: PositiveInt = 4  # strings judged for one grammar; 44 in the paper, 22 + 22
    spaced: bool = False  # letters apart, since tokenizers join them oddly

    def make(self, n: int, seed: int, difficulty: str) -> list[Item]:
        """See `Suite`; raises InputError where no grammar has enough strings."""
        least, most, shown = SIZES[difficulty]
        half = (self.tests + 1) // 2
        if shown + 2 * half > FEWEST:
            raise InputError(
                f"{self.tests} tests and {shown} strings shown need more than the {FEWEST} that a "
                f"grammar is sure to have; give at most {2 * ((FEWEST - shown) // 2)} tests"
            )
        items: list[Item] = []
        number = 0
        while len(items) < n:
            chance = random.Random(f"grammar/{seed}/{number}")
            grammar = self._grammar(chance, least, most)
            items += self._of(grammar, chance, shown, half, f"{seed}/{number}", number)
            number += 1
        return items[:n]

    def _grammar(self, chance: random.Random, least: int, most: int) -> Automaton:
        for _ in range(TRIES):
            states, letters = chance.randint(least, most), chance.randint(least, most)
            if (found := draw(chance, states, letters)) is not None:
                return found
        raise InputError(
            f"no grammar of {least} to {most} states had {FEWEST} strings after {TRIES:,} tries; "
            "give another seed or a harder difficulty"
        )

    def _of(
        self,
        grammar: Automaton,
        chance: random.Random,
        shown: int,
        half: int,
        where: str,
        number: int,
    ) -> list[Item]:
        drawn = chance.sample(grammar.strings(), shown + 2 * half)
        train, good, rest = drawn[:shown], drawn[shown : shown + half], drawn[shown + half :]
        bad: list[str] = []
        for text in rest:
            bad.append(spoiled(text, grammar, chance, bad))
        # A grammar with an odd number of tests has its spare one grammatical and not in turn.
        goods = self.tests // 2 + (self.tests % 2) * ((number + 1) % 2)
        labelled = [(text, "Yes") for text in good[:goods]]
        labelled += [(text, "No") for text in bad[: self.tests - goods]]
        chance.shuffle(labelled)
        if len({label for _, label in labelled}) == 2:  # so that a few of them are balanced too
            pairs = zip(
                *[[t for t in labelled if t[1] == one] for one in ("Yes", "No")], strict=False
            )
            ordered = [one for pair in pairs for one in pair]
            labelled = ordered + [one for one in labelled if one not in ordered]
        return [
            Item(
                prompt=self._prompt(train, text),
                answer=label,
                choices=("Yes", "No"),
                meta={"train": tuple(train), "test": text, "grammar": grammar},
                id=f"grammar/{where}/{place}",
            )
            for place, (text, label) in enumerate(labelled)
        ]

    def _prompt(self, train: list[str], test: str) -> str:
        def told(text: str) -> str:
            return " ".join(text) if self.spaced else text

        return (
            "These strings were all made by the same set of rules:\n"
            + "\n".join(map(told, train))
            + f"\n\nWas this string made by the same rules?\n{told(test)}\nAnswer Yes or No."
        )


def spoiled(text: str, grammar: Automaton, chance: random.Random, taken: list[str]) -> str:
    """Return the text with one or two letters replaced so that the grammar refuses it.

    One that was taken is not made again. Raises InputError if there is none, as where every string
    over the alphabet is grammatical.
    """
    for _ in range(TRIES):
        letters = list(text)
        for place in chance.sample(range(len(text)), chance.choice((1, 2))):
            letters[place] = chance.choice([one for one in grammar.alphabet if one != text[place]])
        made = "".join(letters)
        if not grammar.accepts(made) and made not in taken:
            return made
    raise InputError(f"no change of {text} is refused by its grammar; give another seed")
