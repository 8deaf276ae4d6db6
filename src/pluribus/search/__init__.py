"""Search: any recipe, method or program becomes a space by putting choices in place of values.

    from pluribus import search
    space = search.space(Ties(), {"density": search.floatv(0.05, 1.0)})
    study = search.run(space, evaluate, algorithm="evolution", trials=60, store="study.sqlite")
    study.best_value, study.front

Space, algorithm and evaluation know nothing of each other; each is exchanged alone. `Training`,
the program of a network's training, needs torch and is imported when it is first used; supernets
are in `pluribus.search.supernet`.
"""

from typing import TYPE_CHECKING, Any

from pluribus.search import cost
from pluribus.search.algorithms import ALGORITHMS, algorithm, facts
from pluribus.search.nested import factorized, flat, hybrid, nested
from pluribus.search.run import run
from pluribus.search.space import Space, floatv, manyof, oneof, permutate, space
from pluribus.search.study import Objective, Session, Study, Trial, front
from pluribus.search.torch_glue import symbolic

if TYPE_CHECKING:
    from pluribus.search.training import Training

__all__ = [
    "ALGORITHMS",
    "Objective",
    "Session",
    "Space",
    "Study",
    "Training",
    "Trial",
    "algorithm",
    "cost",
    "factorized",
    "facts",
    "flat",
    "floatv",
    "front",
    "hybrid",
    "manyof",
    "nested",
    "oneof",
    "permutate",
    "run",
    "space",
    "symbolic",
]


def __getattr__(name: str) -> Any:
    if name != "Training":
        raise AttributeError(f"module 'pluribus.search' has no attribute {name!r}")
    from pluribus.search.training import Training

    return Training
