"""A stream learner as tensors and plain values, and back: it then goes on bit for bit."""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from pluribus.core.errors import FormatError, MismatchError
from pluribus.train.continual.expert import Expert
from pluribus.train.continual.reservoir import ClassReservoir, Reservoir

if TYPE_CHECKING:
    from pluribus.train.continual.tame import TameLearner

VERSION = 1
PLAIN = ("batches", "shape", "named", "young_of", "chosen_from", "selector_won")


def state_dict(learner: "TameLearner") -> dict[str, Any]:
    """Return a copy of everything but the factories."""
    experts = {}
    for number, one in learner.kept_experts.items():
        weights, optimiser = one.saved()
        experts[number] = {
            "weights": dict(weights),
            "optimiser": optimiser,
            "steps": one.steps,
            "masks": deepcopy(one.masks),
        }
    selector = learner.selector
    return {
        "version": VERSION,
        "settings": learner.settings(),
        "experts": experts,
        "switch": learner.switch.state_dict(),
        "buffer": learner.buffer.state_dict(),
        "young": learner.young.state_dict(),
        "ids": torch.tensor(sorted(learner.ids), dtype=torch.long),
        "young_ids": torch.tensor(sorted(learner.young_ids), dtype=torch.long),
        "alarms": [tuple(alarm) for alarm in learner.alarms],
        "selector": None if selector is None else deepcopy(dict(selector.state_dict())),
        **{name: getattr(learner, name) for name in PLAIN},
    }


def load(learner: "TameLearner", state: dict[str, Any]) -> None:
    """Give a learner the state of another one, all of it or nothing."""
    from pluribus.train.continual.tame import Alarm

    try:
        if state["version"] != VERSION:
            raise FormatError(f"a state of version {state['version']}; this one reads {VERSION}")
        told, own = state["settings"], learner.settings()
        differing = sorted(name for name in told.keys() | own.keys() if _differs(told, own, name))
        if differing:
            name = differing[0]
            raise MismatchError(
                f"{name} is {told.get(name)!r} in the state, but {own.get(name)!r} here; make the "
                "learner with the settings that it was saved with"
            )
        state = deepcopy(state)
        switch = learner.switching()
        switch.load_state_dict(state["switch"])
        new: dict[str, Any] = {name: state[name] for name in PLAIN}
        new |= {
            "kept_experts": {n: _expert(learner, n, one) for n, one in state["experts"].items()},
            "switch": switch,
            "buffer": ClassReservoir.restored(state["buffer"]),
            "young": Reservoir.restored(state["young"]),
            "ids": set(state["ids"].tolist()),
            "young_ids": set(state["young_ids"].tolist()),
            "alarms": tuple(Alarm(*alarm) for alarm in state["alarms"]),
            "selector": None,
        }
        if state["selector"] is not None:
            net = learner.make_selector(len(state["chosen_from"])).to(learner.device).eval()
            new["selector"] = _filled(net, state["selector"], "the selector")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, FormatError | MismatchError):
            raise
        raise FormatError(f"this is not the state of a TAME learner ({error!r})") from None
    learner.__dict__.update(new)


def _differs(one: dict[str, Any], other: dict[str, Any], name: str) -> bool:
    return name not in one or name not in other or one[name] != other[name]


def _expert(learner: "TameLearner", number: int, told: dict[str, Any]) -> Expert:
    with learner.networks.drawing(f"expert {number}"):
        net = learner.make_expert().to(learner.device).eval()
    net = _filled(net, told["weights"], f"expert {number}")
    optimiser = None
    if told["optimiser"] is not None:
        optimiser = learner.optimiser(net)
        optimiser.load_state_dict(told["optimiser"])
    masks = told["masks"]
    if masks is not None:
        masks = {name: mask.to(learner.device) for name, mask in masks.items()}
    return Expert(net, told["steps"], optimiser, masks)


def _filled(net: Any, weights: dict[str, Any], whose: str) -> Any:
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise MismatchError(
            f"{whose}: the factory makes another network than the state has ({told})"
        ) from None
    return net
