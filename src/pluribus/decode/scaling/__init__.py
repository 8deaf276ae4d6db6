"""Test-time scaling: the best answer for a budget, of any generator and any verifier.

    strategy = SelfConsistency(n=16, confidence=0.95)
    done = strategy.run("What is 12 * 13?", model, budget=Budget(tokens=4000))
    done.answer, done.cost.tokens

A strategy is one file in `strategies`, a verifier one in `verifiers`; `curve` compares them by one
pool of samples. Names are imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pluribus.decode.scaling.budget import Budget, BudgetSpent
    from pluribus.decode.scaling.curves import Point, curve, live
    from pluribus.decode.scaling.interface import (
        Candidate,
        Completion,
        Cost,
        Generator,
        Problem,
        Sampling,
        Scaled,
        Verifier,
    )
    from pluribus.decode.scaling.measures import controllability, pass_at_k, scalability
    from pluribus.decode.scaling.pool import Pool
    from pluribus.decode.scaling.strategies import STRATEGIES, Strategy
    from pluribus.decode.scaling.strategies.beam_search import BeamSearch
    from pluribus.decode.scaling.strategies.best_of_n import BestOfN
    from pluribus.decode.scaling.strategies.budget_forcing import BudgetForcing
    from pluribus.decode.scaling.strategies.compute_optimal import ComputeOptimal
    from pluribus.decode.scaling.strategies.dvts import DVTS
    from pluribus.decode.scaling.strategies.mcts import MCTS
    from pluribus.decode.scaling.strategies.particle_filtering import ParticleFiltering
    from pluribus.decode.scaling.strategies.particle_gibbs import ParticleGibbs
    from pluribus.decode.scaling.strategies.rebase import Rebase
    from pluribus.decode.scaling.strategies.revision_chains import RevisionChains
    from pluribus.decode.scaling.strategies.sample import Sample
    from pluribus.decode.scaling.strategies.self_consistency import SelfConsistency
    from pluribus.decode.scaling.strategies.self_refine import SelfRefine
    from pluribus.decode.scaling.strategies.tree_of_thoughts import TreeOfThoughts
    from pluribus.decode.scaling.strategies.weighted import Weighted
    from pluribus.decode.scaling.verifiers import VERIFIERS

_WHERE = {
    "Budget": "budget",
    "BudgetSpent": "budget",
    "Candidate": "interface",
    "Completion": "interface",
    "Cost": "interface",
    "Generator": "interface",
    "Point": "curves",
    "Pool": "pool",
    "Problem": "interface",
    "STRATEGIES": "strategies",
    "Sampling": "interface",
    "Scaled": "interface",
    "Strategy": "strategies",
    "VERIFIERS": "verifiers",
    "Verifier": "interface",
    "controllability": "measures",
    "curve": "curves",
    "live": "curves",
    "pass_at_k": "measures",
    "scalability": "measures",
    **{
        name: f"strategies.{file}"
        for name, file in {
            "BeamSearch": "beam_search",
            "BestOfN": "best_of_n",
            "BudgetForcing": "budget_forcing",
            "ComputeOptimal": "compute_optimal",
            "DVTS": "dvts",
            "MCTS": "mcts",
            "ParticleFiltering": "particle_filtering",
            "ParticleGibbs": "particle_gibbs",
            "Rebase": "rebase",
            "RevisionChains": "revision_chains",
            "Sample": "sample",
            "SelfConsistency": "self_consistency",
            "SelfRefine": "self_refine",
            "TreeOfThoughts": "tree_of_thoughts",
            "Weighted": "weighted",
        }.items()
    },
}

__all__ = [
    "DVTS",
    "MCTS",
    "STRATEGIES",
    "VERIFIERS",
    "BeamSearch",
    "BestOfN",
    "Budget",
    "BudgetForcing",
    "BudgetSpent",
    "Candidate",
    "Completion",
    "ComputeOptimal",
    "Cost",
    "Generator",
    "ParticleFiltering",
    "ParticleGibbs",
    "Point",
    "Pool",
    "Problem",
    "Rebase",
    "RevisionChains",
    "Sample",
    "Sampling",
    "Scaled",
    "SelfConsistency",
    "SelfRefine",
    "Strategy",
    "TreeOfThoughts",
    "Verifier",
    "Weighted",
    "controllability",
    "curve",
    "live",
    "pass_at_k",
    "scalability",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _WHERE:
        raise AttributeError(f"module 'pluribus.decode.scaling' has no attribute {name!r}")
    return getattr(import_module(f"pluribus.decode.scaling.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
