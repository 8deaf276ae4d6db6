"""The loop of a search that tries points one after another, and how it comes back to life.

Before trial i is proposed, the algorithm knows exactly the first max(0, i - workers + 1) scores.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from pluribus.core.errors import InputError
from pluribus.search._pyglove import pg
from pluribus.search.algorithms import facts
from pluribus.search.execute import Evaluation, Outcome, Pool, executor
from pluribus.search.space import Space
from pluribus.search.store import Row, Store
from pluribus.search.study import Objective, OnTrial, Session, Study, Trial

KNOWN = "an earlier study"  # the proposer of trials that a study began with
METADATA = {"proposal_id": None, "generation_id": 1, "initial_population": True}


class Loop:
    """A search in progress."""

    evaluation: Evaluation
    store: Store | None
    deadline: float | None
    on_trial: OnTrial | None
    began: float

    def __init__(
        self,
        space: Space,
        algorithm: Any,
        objectives: tuple[Objective, ...],
        told: tuple[Objective, ...],
        seed: int,
    ) -> None:
        self.space, self.algorithm, self.objectives, self.told = space, algorithm, objectives, told
        self.seed = seed
        self.proposer = f"{algorithm!r}, seed {seed}"
        self.trials: list[Trial] = []
        self.notes: list[str] = []
        self.resumed = 0
        self._reset()

    def _reset(self) -> None:
        self.generator: Any = None
        if not facts(self.algorithm).shares_weights and not self.space.constant:
            self.generator = self.algorithm.generator(self.space, self.told, self.seed)
            self.generator.setup(self.space.spec)
        self.settled = 0  # trials whose scores the algorithm knows, or that it will hear of later
        self._proposed: list[Any] = []  # DNA as the algorithm made it: it keeps notes on them
        self._held: list[Any] = []  # failed ones, before there is a worst score to tell
        self._worst: tuple[float, ...] | None = None

    # -- proposals and scores ----------------------------------------------------------------------

    def _propose(self) -> Any:
        """Return the next point, or None if there are no more."""
        if self.generator is None:
            return pg.DNA(None).use_spec(self.space.spec) if not self.trials else None
        try:
            return self.generator.propose()
        except StopIteration:
            return None

    def _due(self, trial: Trial) -> list[tuple[Any, Any]]:
        """Return what the algorithm is to be told now that the next trial in order has ended."""
        dna = self._proposed[trial.number]
        self.settled += 1
        if trial.status == "done":
            rewards = tuple(o.sign * trial.scores[o.name] for o in self.told)
            self._worst = tuple(map(min, self._worst or rewards, rewards))
            due = [(earlier, self._worst) for earlier in self._held]
            self._held = []
            due.append((dna, rewards))
        elif self._worst is None:
            self._held.append(dna)
            due = []
        else:
            due = [(dna, self._worst)]
        many = facts(self.algorithm).many
        return [(dna, rewards if many else rewards[0]) for dna, rewards in due]

    def _settle(self, trial: Trial) -> None:
        for dna, reward in self._due(trial):
            if self.generator is not None:
                self.generator.feedback(dna, reward)

    # -- resuming ----------------------------------------------------------------------------------

    def restore(self, rows: Sequence[Row]) -> None:
        """Bring the algorithm to where a store's trials left it."""
        self.trials = [row.trial for row in rows]
        self.resumed = sum(trial.status != "running" for trial in self.trials)
        if not rows or self.generator is None:
            return
        foreign = max(
            (i + 1 for i, row in enumerate(rows) if row.proposer != self.proposer), default=0
        )
        if foreign:
            self.notes.append(
                f"the first {foreign} trials were proposed by {rows[foreign - 1].proposer}; "
                f"{self.proposer} goes on from them"
            )
        self._recover(foreign)
        for trial in self.trials[foreign:]:
            while self.settled < trial.settled:
                self._settle(self.trials[self.settled])
            dna = self._propose()
            if dna is None or dna != trial.dna:
                self.notes.append(
                    f"trial {trial.number} of the store is not what the algorithm proposes there "
                    "now (another version of a library?): it was told the history instead"
                )
                self._reset()
                self._recover(len(self.trials))
                return
            self._proposed.append(dna)

    def adopt(self, known: Sequence[Trial]) -> None:
        """Begin with trials of an earlier study."""
        names = [o.name for o in self.objectives]
        for trial in known:
            if trial.status == "running":
                continue
            if lacking := [n for n in names if trial.status == "done" and n not in trial.scores]:
                raise InputError(f"trial {trial.number} of those known has no {lacking[0]!r}")
            dna = self.space.fitted(trial.dna.clone(deep=True))
            number = len(self.trials)
            self.trials.append(dataclasses.replace(trial, number=number, dna=dna, settled=number))
            if self.store is not None:
                self.store.end(self.trials[-1], KNOWN)
        if self.generator is not None:
            self._recover(len(self.trials))

    def _recover(self, count: int) -> None:
        """Tell a fresh algorithm of the first trials, which it did not propose itself."""
        told: list[tuple[Any, Any]] = []
        for trial in self.trials[:count]:
            dna = self.space.fitted(trial.dna.clone(deep=True))
            for key, value in METADATA.items():  # what pyglove's evolution keeps on its own points
                if key not in dna.metadata:
                    dna.set_metadata(key, trial.number + 1 if value is None else value)
            self._proposed.append(dna)
        for trial in self.trials[:count]:
            if trial.status == "running":
                break
            told += self._due(trial)
        if told:
            self.generator.recover(told)

    # -- loops -------------------------------------------------------------------------------------

    def search(self, limit: int, workers: int, ray: bool) -> None:
        """Run trials until there are `limit`, or the time is up, or there are no more points."""
        again = [trial for trial in self.trials if trial.status == "running"]
        more = len(self.trials) < limit
        with executor(self.evaluation, workers, ray) as pool:
            running: set[int] = set()
            for trial in again:
                if self._late():
                    return
                self._begin(trial, pool)
                running.add(trial.number)
            while True:
                number = len(self.trials)
                if more and (number >= limit or self._late()):
                    more = False
                target = max(self.settled, number - workers + 1)
                if more and self.settled == target:
                    more = self._next(number, pool)
                    if more:
                        running.add(number)
                    continue
                if self.settled < number and self.trials[self.settled].status != "running":
                    self._settle(self.trials[self.settled])
                    continue
                if not running:
                    return
                for done, outcome in pool.wait():
                    running.discard(done)
                    self._end(done, outcome)

    def _next(self, number: int, pool: Pool) -> bool:
        dna = self._propose()
        if dna is None:
            self.notes.append(f"all {number} points of the space were tried")
            return False
        self._proposed.append(dna)
        seed = trial_seed(self.seed, number)
        trial = Trial(number, dna, seed, settled=self.settled)
        self.trials.append(trial)
        self._begin(trial, pool)
        return True

    def _begin(self, trial: Trial, pool: Pool) -> None:
        if self.store is not None:
            self.store.begin(trial, self.proposer)
        pool.submit(trial.number, self.space, trial.dna, trial.seed)

    def _end(self, number: int, outcome: Outcome) -> None:
        trial = dataclasses.replace(self.trials[number], **outcome._asdict())
        self.trials[number] = trial
        if self.store is not None:
            self.store.end(trial, self.proposer)
        if self.on_trial is not None:
            self.on_trial(trial, self.study())

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def share(self, limit: int, evaluate: Any) -> None:
        """Let an algorithm with shared weights run its own loop."""

        def record(dna: Any, scores: Any, report: Mapping[str, Any], seconds: float) -> Trial:
            number = len(self.trials)
            given = self.evaluation.outcome(self.space, self.space.fitted(dna), scores)
            outcome = given._replace(report=dict(report), seconds=seconds)
            seed = trial_seed(self.seed, number)
            self.trials.append(Trial(number, dna, seed))
            self._end(number, outcome)
            return self.trials[number]

        session = Session(
            seed=self.seed,
            trials=limit,
            objectives=self.told,
            costs=self.evaluation.functions,
            deadline=self.deadline,
            _record=record,
            known=list(self.trials),
            notes=self.notes,
        )
        if not session.over:
            self.algorithm.search(self.space, evaluate, session)

    def study(self) -> Study:
        """Return what was found so far."""
        return Study(
            space=self.space,
            objectives=self.objectives,
            algorithm=facts(self.algorithm).name,
            seed=self.seed,
            trials=tuple(self.trials),
            seconds=time.monotonic() - self.began,
            resumed=self.resumed,
            notes=tuple(self.notes),
        )


def trial_seed(seed: int, number: int) -> int:
    """Return the seed of one trial, below 2^31: a hash of the study's seed and its number."""
    return xxhash.xxh3_64_intdigest(f"trial {seed} {number}".encode()) >> 33
