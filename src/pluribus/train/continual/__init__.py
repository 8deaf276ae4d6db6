"""Tasks one after another, then a model for any stated preference between them, without training.

    from pluribus.train.continual import CheckpointFront, CredalBase, prefer

`CredalBase` (IBCL) keeps posteriors of one small network over fixed features; `CheckpointFront`
offers the same calls over fine-tunes of one base through the merge engine. `TameLearner` learns a
stream whose tasks change without notice, with an expert for each. Names are imported when they are
first used, so that a front of checkpoints loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pluribus.train.continual.baselines import (
        GradientEpisodicMemory,
        Rehearsal,
        SequentialPosterior,
        joint,
    )
    from pluribus.train.continual.drift import LossShiftDetector, Switch
    from pluribus.train.continual.front import CheckpointFront
    from pluribus.train.continual.ibcl import CredalBase
    from pluribus.train.continual.metrics import AccuracyTable, backward_transfer, drawn, measure
    from pluribus.train.continual.posterior import GaussianPosterior
    from pluribus.train.continual.preference import Preferring, prefer, sweep
    from pluribus.train.continual.report import Cost, Report
    from pluribus.train.continual.reservoir import ClassReservoir, Reservoir
    from pluribus.train.continual.tame import Tame, TameLearner
    from pluribus.train.continual.variational import Inference

_WHERE = {
    "AccuracyTable": "metrics",
    "CheckpointFront": "front",
    "ClassReservoir": "reservoir",
    "Cost": "report",
    "CredalBase": "ibcl",
    "GaussianPosterior": "posterior",
    "GradientEpisodicMemory": "baselines",
    "Inference": "variational",
    "LossShiftDetector": "drift",
    "Preferring": "preference",
    "Rehearsal": "baselines",
    "Report": "report",
    "Reservoir": "reservoir",
    "SequentialPosterior": "baselines",
    "Switch": "drift",
    "Tame": "tame",
    "TameLearner": "tame",
    "backward_transfer": "metrics",
    "drawn": "metrics",
    "joint": "baselines",
    "measure": "metrics",
    "prefer": "preference",
    "sweep": "preference",
}

__all__ = [
    "AccuracyTable",
    "CheckpointFront",
    "ClassReservoir",
    "Cost",
    "CredalBase",
    "GaussianPosterior",
    "GradientEpisodicMemory",
    "Inference",
    "LossShiftDetector",
    "Preferring",
    "Rehearsal",
    "Report",
    "Reservoir",
    "SequentialPosterior",
    "Switch",
    "Tame",
    "TameLearner",
    "backward_transfer",
    "drawn",
    "joint",
    "measure",
    "prefer",
    "sweep",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
