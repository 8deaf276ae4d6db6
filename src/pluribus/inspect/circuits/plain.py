"""Path and activation patching by the book: the whole model again for every single head.

Slow, and what the fast engine is held against. Both fill an array (l, h, b) with D of each prompt
once a head was patched; heads that were not are NaN.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from pluribus.core.shapes import Float, Int
from pluribus.inspect.circuits.model import Head, HeadModel
from pluribus.inspect.circuits.prompts import Prompts, logit_difference

Receiver = tuple[int, int, str]  # layer, head (q) or group (k, v), side
Told = Callable[[int, int], None]


def path_patch(
    heads: HeadModel,
    prompts: Prompts,
    receivers: Collection[Receiver],
    senders: Collection[Head],
    position: Int[Tensor, " b"],
    freeze_mlps: bool = False,
    freeze_others: bool = False,
    told: Told | None = None,
) -> Float[Tensor, "l h b"]:
    """Return D once each sender reached the receivers with its corrupted output.

    1. clean and corrupted runs; 2. the clean run with the sender's z at the position corrupted, all
    other heads' there frozen: the receivers' inputs are kept; 3. the clean run with those set, all
    else free (`freeze_others`, with queries alone: all other heads at the position frozen again).
    Without receivers the second run's logits count: the path to the final residual.
    """
    clean = heads.run(prompts.clean, prompts.ends, ("z", "mlp"))
    corrupt = heads.run(prompts.corrupt, prompts.ends, ("z",))
    rows = torch.arange(len(prompts))
    found = torch.full((heads.layers, heads.heads, len(prompts)), torch.nan)
    for number, (layer, head) in enumerate(senders):
        sent = heads.patched(
            clean,
            z={(layer, head): corrupt.z[layer][rows, position, head]},
            freeze=True,
            freeze_mlps=freeze_mlps,
            position=position,
            keep=("q", "k", "v") if receivers else (),
        )
        if receivers:
            sets: dict[str, dict[Head, Tensor]] = {"q": {}, "k": {}, "v": {}}
            for to, index, side in receivers:
                sets[side][to, index] = getattr(sent, side)[to][rows, index, position]
            sent = heads.patched(
                clean,
                q=sets["q"],
                k=sets["k"],
                v=sets["v"],
                freeze=freeze_others,
                free=[(to, index) for to, index, _ in receivers],
                position=position,
            )
        found[layer, head] = logit_difference(sent.logits.cpu(), prompts)
        if told is not None:
            told(number + 1, len(senders))
    return found


def activation_patch(
    heads: HeadModel,
    prompts: Prompts,
    senders: Collection[Head],
    position: Int[Tensor, " b"],
    told: Told | None = None,
) -> Float[Tensor, "l h b"]:
    """Return D once each head's z at the position is its corrupted one, all else free."""
    clean = heads.run(prompts.clean, prompts.ends, ())
    corrupt = heads.run(prompts.corrupt, prompts.ends, ("z",))
    rows = torch.arange(len(prompts))
    found = torch.full((heads.layers, heads.heads, len(prompts)), torch.nan)
    for number, (layer, head) in enumerate(senders):
        patched = heads.patched(
            clean, z={(layer, head): corrupt.z[layer][rows, position, head]}, position=position
        )
        found[layer, head] = logit_difference(patched.logits.cpu(), prompts)
        if told is not None:
            told(number + 1, len(senders))
    return found
