"""A pool of samples: drawn once, kept on disk, shared by all strategies that draw whole ones.

The file is a journal: its first line says what drew the samples (model and settings), each further
line is one sample of one problem, or the result of one strategy on one problem. A run that was
killed goes on where it stopped and loses at most the request under way, which is one sample unless
a larger batch is asked for. Sample i of a problem has the seed `problem.seed(sampling.seed)` + i,
whatever was drawn before it, so a pool that was interrupted or enlarged holds the same samples, if
requests have one sample, or those of several problems. (Several samples of one problem in a request
share the first's seed.)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pluribus.core.errors import FormatError, InputError
from pluribus.decode.scaling.budget import BudgetSpent
from pluribus.decode.scaling.interface import Completion, Generator, Problem, Sampling
from pluribus.decode.scaling.journal import Journal

VERSION = 1
OnStep = Callable[[str, int, int], None]


class Pool:
    """Samples of problems, in memory, and in a file if one is named."""

    def __init__(
        self, sampling: Sampling, *, model: str = "", path: str | Path | None = None
    ) -> None:
        """Open or begin a pool.

        Raises OutputError for a file that can't be written or is in use, FormatError for one that
        is no pool, InputError for a pool that was drawn otherwise.
        """
        self.sampling = sampling
        self._samples: dict[str, list[Completion]] = {}
        self.results: dict[tuple[str, str], dict[str, Any]] = {}  # (strategy, problem) -> told
        self._journal = None if path is None else Journal(path)
        if self._journal is not None:
            try:
                self._read(self._journal, model)
            except BaseException:
                self._journal.close()
                raise

    def _read(self, journal: Journal, model: str) -> None:
        head = {"kind": "pool", "version": VERSION, "model": model, **_plain(self.sampling)}
        if not journal.lines:
            journal.append(head)
            return
        first = journal.lines[0]
        if first.get("kind") != "pool":
            raise FormatError(f"{journal.path}: is no pool of samples; name another file")
        for key in head:
            if first.get(key) != head[key]:
                raise InputError(
                    f"{journal.path}: its samples were drawn with {key} = {first.get(key)!r}, not "
                    f"{head[key]!r}; give the same, or name another file"
                )
        for number, line in enumerate(journal.lines[1:], 2):
            if line.get("kind") == "result":
                self.results[str(line.get("strategy")), str(line.get("problem"))] = line
                continue
            try:
                kept = self._samples.setdefault(line["problem"], [])
                if line["kind"] != "sample" or line["sample"] != len(kept):
                    raise InputError(f"expected sample {len(kept)} of {line['problem']!r}")
                kept.append(Completion.of(line))
            except (KeyError, TypeError, ValueError) as error:
                raise FormatError(f"{journal.path}, line {number}: {error}") from None

    def samples(self, problem: Problem) -> list[Completion]:
        """Return what was drawn of a problem."""
        return list(self._samples.get(problem.name, ()))

    def fill(
        self,
        problems: Sequence[Problem],
        generator: Generator,
        n: int,
        *,
        batch: int = 1,
        tokens: int | None = None,
        told: OnStep | None = None,
    ) -> None:
        """Draw until every problem has n samples, `batch` in a request.

        Where a request has room for all samples of two problems or more and the generator has
        `sample_many`, it takes several: one pass of the model writes a token of each. `tokens`
        limits what is written for one problem: none is begun once it is reached. Raises
        InputError for n or batch < 1, or two problems that are the same.
        """
        if n < 1 or batch < 1:
            raise InputError(f"n is {n} and batch {batch}; give at least 1")
        check_identities(problems)
        many = getattr(generator, "sample_many", None)
        if many is not None and tokens is None and batch >= 2 * n:
            return self._fill_together(problems, many, n, batch, told)
        total, settings = n * len(problems), asdict(self.sampling)
        for place, problem in enumerate(problems):
            kept = self._samples.setdefault(problem.name, [])
            while len(kept) < n and not (
                tokens is not None and sum(one.tokens for one in kept) >= tokens
            ):
                asked = {**settings, "seed": problem.seed(self.sampling.seed) + len(kept)}
                try:
                    made = generator.sample(problem.question, min(batch, n - len(kept)), **asked)
                except BudgetSpent:
                    return
                self._add([(problem, len(kept) + i) for i in range(len(made))], made)
                if told is not None:
                    told("samples", place * n + min(len(kept), n), total)

    def _fill_together(
        self,
        problems: Sequence[Problem],
        many: Callable[..., list[Completion]],
        n: int,
        batch: int,
        told: OnStep | None,
    ) -> None:
        """Draw for several problems in a request, those with questions of like length."""
        settings = asdict(self.sampling)
        seed = settings.pop("seed")
        wanted = [
            (problem, number)
            for problem in sorted(problems, key=lambda one: len(one.question))
            for number in range(len(self.samples(problem)), n)
        ]
        for low in range(0, len(wanted), batch):
            some = wanted[low : low + batch]
            seeds = [problem.seed(seed) + number for problem, number in some]
            self._add(some, many([problem.question for problem, _ in some], seeds, **settings))
            if told is not None:
                done = n * len(problems) - len(wanted) + low + len(some)
                told("samples", done, n * len(problems))

    def _add(self, places: Sequence[tuple[Problem, int]], made: Sequence[Completion]) -> None:
        """Keep samples of problems with these numbers; those of a problem come in order."""
        lines = [
            {"kind": "sample", "problem": problem.name, "sample": number, **one.to_dict()}
            for (problem, number), one in zip(places, made, strict=True)
        ]
        if self._journal is not None:
            self._journal.append(*lines)
        for (problem, _), one in zip(places, made, strict=True):
            self._samples.setdefault(problem.name, []).append(one)

    def keep(self, strategy: str, problem: Problem, result: Mapping[str, Any]) -> None:
        """Keep what a strategy found, so that it isn't run again."""
        line = {
            "kind": "result",
            "strategy": strategy,
            "problem": problem.name,
            **result,
        }
        self.results[strategy, problem.name] = line
        if self._journal is not None:
            self._journal.append(line)

    def result(self, strategy: str, problem: Problem) -> dict[str, Any] | None:
        """Return what `keep` was given, or None."""
        return self.results.get((strategy, problem.name))

    def close(self) -> None:
        """Let go of the file."""
        if self._journal is not None:
            self._journal.close()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_identities(problems: Sequence[Problem]) -> None:
    """Raise InputError for no problem, or for two that are called the same."""
    if not problems:
        raise InputError("there is no problem; give at least one")
    seen: set[str] = set()
    for problem in problems:
        name = problem.name
        if name in seen:
            raise InputError(f"two problems are called {name[:60]!r}; give each an id of its own")
        seen.add(name)


def _plain(sampling: Sampling) -> dict[str, Any]:
    told = asdict(sampling)
    return {**told, "stop": list(told["stop"])}
