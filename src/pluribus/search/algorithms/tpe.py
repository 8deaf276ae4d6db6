"""TPE: model the good points and the others, try where their ratio is largest.

Bergstra et al., NeurIPS 2011, section 4; the package `optuna` (its `TPESampler`, which for several
objectives splits by front). Floats, `scale="log"` among them, candidates and conditional choices
go to it as they are; of `manyof` each place is a choice, and one taken already passes to the next
candidate that is free.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pluribus.core.errors import need
from pluribus.core.merger import PositiveInt
from pluribus.search._pyglove import pg
from pluribus.search.algorithms import algorithm
from pluribus.search.space import Space
from pluribus.search.study import Objective


@algorithm("tpe", paper="Bergstra et al., NeurIPS 2011", many=True)
@dataclass(frozen=True, kw_only=True)
class Tpe:
    """A tree of Parzen estimators."""

    start: PositiveInt = 10  # random points before there is a model

    def generator(self, space: Space, objectives: Sequence[Objective], seed: int) -> Any:
        """Return a generator. Raises ExtraError without the package."""
        return _Sampler(start=self.start, count=len(objectives), seed=seed)


@pg.members([("start", pg.typing.Int()), ("count", pg.typing.Int()), ("seed", pg.typing.Int())])
class _Sampler(pg.DNAGenerator):
    """Asks optuna for every choice that has a say."""

    @property
    def multi_objective(self) -> bool:
        """Rewards are tuples, also of one."""
        return True

    def _setup(self) -> None:
        optuna = _optuna()
        with _quiet(optuna):
            sampler = optuna.samplers.TPESampler(
                seed=self.seed % (1 << 32), n_startup_trials=self.start
            )
            self._study = optuna.create_study(directions=["maximize"] * self.count, sampler=sampler)
        self._open: dict[str, Any] = {}

    def _propose(self) -> Any:
        with _quiet(_optuna()):
            trial = self._study.ask()
            dna = pg.DNA.from_fn(self.dna_spec, lambda point: _decision(trial, point))
        self._open[str(trial.number)] = trial
        dna.use_spec(self.dna_spec)
        return dna.set_metadata("asked", str(trial.number))

    def _feedback(self, dna: Any, reward: tuple[float, ...]) -> None:
        with _quiet(_optuna()):
            self._study.tell(self._open.pop(dna.metadata.asked), list(reward))

    def recover(self, history: Any) -> None:
        """Add the trials of a history that another algorithm made."""
        optuna = _optuna()
        for dna, reward in history:
            values, kinds = {}, {}
            for name, kind, value in _described(optuna, dna):
                values[name], kinds[name] = value, kind
            with _quiet(optuna):
                self._study.add_trial(
                    optuna.trial.create_trial(
                        params=values, distributions=kinds, values=list(reward)
                    )
                )


def _decision(trial: Any, point: Any) -> Any:
    if isinstance(point, pg.geno.Float):
        log = point.scale == "log"
        return trial.suggest_float(str(point.id), point.min_value, point.max_value, log=log)
    count = len(point.candidates)
    picked: list[int] = []
    for place in range(point.num_choices):
        name = str(point.id) if point.num_choices == 1 else f"{point.id}#{place}"
        choice = trial.suggest_categorical(name, list(range(count)))
        while point.distinct and choice in picked:
            choice = (choice + 1) % count
        picked.append(choice)
    return sorted(picked) if point.sorted else picked


def _described(optuna: Any, dna: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, distribution and value of each choice that has a say, as `_decision` asks."""
    for point, value in dna.to_dict(key_type="dna_spec", multi_choice_key="parent").items():
        if isinstance(point, pg.geno.Float):
            log = point.scale == "log"
            kind = optuna.distributions.FloatDistribution(point.min_value, point.max_value, log=log)
            yield str(point.id), kind, value
            continue
        whole = point.parent_spec if point.is_subchoice else point
        kind = optuna.distributions.CategoricalDistribution(list(range(len(whole.candidates))))
        for place, index in enumerate(value if isinstance(value, list) else [value]):
            name = str(whole.id) if whole.num_choices == 1 else f"{whole.id}#{place}"
            yield name, kind, index


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise need("optuna", "search", 'algorithm="tpe"') from None
    return optuna


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Keep optuna from writing to stderr; its level is put back."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
