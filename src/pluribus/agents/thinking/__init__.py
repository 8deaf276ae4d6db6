"""Whether thinking pays: measured on a task, and then decided.

    effect = CoTProbe(model, [Direct(), CoT()], value=1.0, price=1e-4).measure(task)
    effect.delta, effect.p, effect.decision          # "cot", "direct" or "undecided"
    CoTPolicy.fit([effect, ...]).choose(task.name).mode

The question is that of Liu et al., ICML 2025, https://arxiv.org/abs/2410.21333: thinking step by
step helps on some tasks and hurts on others. Names are imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pluribus.agents.thinking.drift import Drift
    from pluribus.agents.thinking.effect import Arm, Effect, Pair, compare
    from pluribus.agents.thinking.learning import PassesEffect, learn, passes_effect
    from pluribus.agents.thinking.likelihood import Likelihood
    from pluribus.agents.thinking.modes import Attempt, ByStrategy, CoT, Direct, Mode
    from pluribus.agents.thinking.policy import Choice, CoTPolicy
    from pluribus.agents.thinking.probe import CoTProbe
    from pluribus.agents.thinking.prompts import halves, pick
    from pluribus.agents.thinking.sequential import ConfidenceSequence
    from pluribus.agents.thinking.tasks import Task

_WHERE = {
    "Arm": "effect",
    "Attempt": "modes",
    "ByStrategy": "modes",
    "Choice": "policy",
    "CoT": "modes",
    "CoTPolicy": "policy",
    "CoTProbe": "probe",
    "ConfidenceSequence": "sequential",
    "Direct": "modes",
    "Drift": "drift",
    "Effect": "effect",
    "Likelihood": "likelihood",
    "Mode": "modes",
    "Pair": "effect",
    "PassesEffect": "learning",
    "Task": "tasks",
    "compare": "effect",
    "halves": "prompts",
    "learn": "learning",
    "passes_effect": "learning",
    "pick": "prompts",
}

__all__ = [
    "Arm",
    "Attempt",
    "ByStrategy",
    "Choice",
    "CoT",
    "CoTPolicy",
    "CoTProbe",
    "ConfidenceSequence",
    "Direct",
    "Drift",
    "Effect",
    "Likelihood",
    "Mode",
    "Pair",
    "PassesEffect",
    "Task",
    "compare",
    "halves",
    "learn",
    "passes_effect",
    "pick",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _WHERE:
        raise AttributeError(f"module 'pluribus.agents.thinking' has no attribute {name!r}")
    return getattr(import_module(f"pluribus.agents.thinking.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
