"""Search: any recipe, method or program becomes a space by putting choices in place of values.

    from pluribus import search
    space = search.space(Ties(), {"density": search.floatv(0.05, 1.0)})
    study = search.run(space, evaluate, algorithm="evolution", trials=60, store="study.sqlite")
    study.best_value, study.front

Space, algorithm and evaluation know nothing of each other; each is exchanged alone.
"""

from pluribus.search import cost
from pluribus.search.algorithms import ALGORITHMS, algorithm, facts
from pluribus.search.nested import factorized, flat, hybrid, nested
from pluribus.search.run import run
from pluribus.search.space import Space, floatv, manyof, oneof, permutate, space
from pluribus.search.study import Objective, Session, Study, Trial, front
from pluribus.search.torch_glue import symbolic

__all__ = [
    "ALGORITHMS",
    "Objective",
    "Session",
    "Space",
    "Study",
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
