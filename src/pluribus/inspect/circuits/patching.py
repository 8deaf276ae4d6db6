"""Which heads carry a task: path patching, activation patching, and a cheap first guess.

Merullo et al., Circuit Component Reuse Across Tasks in Transformer Language Models, ICLR 2024,
https://arxiv.org/abs/2310.08744; path patching after Wang et al. 2022 (IOI).

    D = mean over prompts of logit(answer) - logit(alternative) at the end
    e = (D_patched - D_clean) / (D_corrupt - D_clean)      1: as bad as the corrupted run; < 0: the
                                                           head was in the way

Differs from the authors' code: means over all prompts, then their ratio (not a mean of ratios of
batches); keys and values are patched for groups of heads that share them.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pluribus.core.errors import InputError
from pluribus.core.shapes import Float
from pluribus.inspect.circuits import fast, plain
from pluribus.inspect.circuits.model import Head, HeadModel
from pluribus.inspect.circuits.plain import Receiver
from pluribus.inspect.circuits.prompts import END, Prompts, logit_difference

Engine = Literal["fast", "plain"]
OnStep = Callable[[str, int, int], None]
GAP = 0.5  # logits; below it the ratio is noise
PART = 32  # prompts at once


@dataclass(frozen=True)
class Effects:
    """D of each prompt, clean, corrupted, and with each head patched."""

    differences: Float[Tensor, "l h b"]  # NaN: not a sender
    clean: Float[Tensor, " b"]
    corrupt: Float[Tensor, " b"]
    receivers: tuple[Receiver, ...] = ()  # none: the final residual
    position: str = END

    @property
    def values(self) -> Float[Tensor, "l h"]:
        """Return e of each head; NaN for heads that are no senders."""
        return self.over(torch.arange(len(self.clean)))

    def over(self, prompts: Tensor) -> Float[Tensor, "l h"]:
        """Return e over some prompts, which may be given more than once."""
        clean, corrupt = self.clean[prompts].mean(), self.corrupt[prompts].mean()
        return (self.differences[:, :, prompts].mean(-1) - clean) / (corrupt - clean)

    def check_gap(self) -> None:
        """Raise InputError if D hardly differs between clean and corrupted prompts."""
        clean, corrupt = float(self.clean.mean()), float(self.corrupt.mean())
        if not abs(corrupt - clean) >= GAP:
            raise InputError(
                f"the logit difference is {clean:+.2f} on the prompts and {corrupt:+.2f} on their "
                f"twins, less than {GAP} apart: effects would be noise. The model hardly does this "
                "task; try another, or allow_small_gap (--allow-small-gap)"
            )


def top(values: Float[Tensor, "l h"], share: float) -> list[Head]:
    """Return the heads of largest |e|, that share of all heads, at least one; largest first."""
    count = min(max(1, round(share * values.numel())), int((~values.isnan()).sum()))
    order = values.abs().nan_to_num(-1.0).flatten().argsort(descending=True, stable=True)
    return [divmod(int(place), values.shape[1]) for place in order[:count]]


def path_patch(
    heads: HeadModel,
    prompts: Prompts,
    receivers: Literal["logits"] | Sequence[Receiver] = "logits",
    *,
    position: str = END,
    freeze_mlps: bool = False,
    freeze_others: bool = False,
    senders: Collection[Head] | None = None,
    engine: Engine = "fast",
    allow_small_gap: bool = False,
    on_step: OnStep | None = None,
) -> Effects:
    """Return each head's effect along its direct paths to the receivers.

    Direct: all other heads at the position are frozen; parts behind attention are passed through,
    or frozen too (`freeze_mlps`). Behind the receivers all is free, so later heads may make up for
    them; `freeze_others` keeps them from it (for queries).

    `receivers`: "logits", or (layer, head, "q" | "k" | "v"); for k and v, heads become the group
    that they share. `senders`: None for all up to the lowest
    receiver's layer, receivers left out.

    Raises InputError for receivers without a layer below them, for logits from another position
    than the end, for heads that are not there, and for a gap below `GAP` unless it is allowed.
    """
    to = () if receivers == "logits" else _receivers(heads, receivers)
    if not to and position != END:
        raise InputError(
            f"paths from {position} to the logits pass through later heads; the logits are those "
            "of the end, so give position END, or q, k or v of heads as receivers"
        )
    lowest = min((layer for layer, _, _ in to), default=heads.layers - 1)
    if to and lowest == 0:
        raise InputError("a receiver is in layer 0, below which there are no heads to send")
    if freeze_others and (not to or {side for _, _, side in to} != {"q"}):
        raise InputError("others are frozen behind receivers' queries; give receivers with side q")
    taken = {(layer, index) for layer, index, side in to if side == "q"}
    taken |= {
        (layer, head)
        for layer, group, side in to
        if side != "q"
        for head in range(heads.heads)
        if heads.group_of(head) == group
    }
    if senders is None:
        wanted = [(n, h) for n in range(lowest + 1) for h in range(heads.heads)]
        wanted = [sender for sender in wanted if sender not in taken]
    else:
        heads.check(senders)
        wanted = sorted(set(senders))
        if above := [f"{n}.{h}" for n, h in wanted if n > lowest]:
            raise InputError(
                f"heads {', '.join(above)} are above the lowest receiver (layer {lowest}); a head "
                "sends to later layers only"
            )
    run = {"fast": fast.path_patch, "plain": plain.path_patch}[engine]
    stage = f"paths to {len(to)} heads" if to else "paths to the logits"
    found, clean, corrupt = [], [], []
    parts = prompts.parts(PART)
    for number, part in enumerate(parts):
        where = part.position(position)
        told = _told(on_step, stage, number, len(parts))
        one = _ends(heads, part)
        clean.append(one[0])
        corrupt.append(one[1])
        if not allow_small_gap and len(parts) == 1:
            Effects(torch.zeros(0, 0, 0), *one).check_gap()  # before the work
        found.append(run(heads, part, to, wanted, where, freeze_mlps, freeze_others, told))
    made = Effects(torch.cat(found, -1), torch.cat(clean), torch.cat(corrupt), to, position)
    if not allow_small_gap:
        made.check_gap()
    return made


def activation_patch(
    heads: HeadModel,
    prompts: Prompts,
    *,
    position: str = END,
    senders: Collection[Head] | None = None,
    engine: Engine = "fast",
    allow_small_gap: bool = False,
    on_step: OnStep | None = None,
) -> Effects:
    """Return each head's effect when its output at the position is the corrupted run's, all free.

    Raises InputError for heads that are not there, and for a gap below `GAP` unless it is allowed.
    """
    wanted = [(n, h) for n in range(heads.layers) for h in range(heads.heads)]
    if senders is not None:
        heads.check(senders)
        wanted = sorted(set(senders))
    run = {"fast": fast.activation_patch, "plain": plain.activation_patch}[engine]
    found, clean, corrupt = [], [], []
    parts = prompts.parts(PART)
    for number, part in enumerate(parts):
        told = _told(on_step, "activations", number, len(parts))
        found.append(run(heads, part, wanted, part.position(position), told))
        one = _ends(heads, part)
        clean.append(one[0])
        corrupt.append(one[1])
    made = Effects(torch.cat(found, -1), torch.cat(clean), torch.cat(corrupt), (), position)
    if not allow_small_gap:
        made.check_gap()
    return made


def attribution(
    heads: HeadModel,
    prompts: Prompts,
    *,
    freeze_mlps: bool = False,
    allow_small_gap: bool = False,
) -> Effects:
    """Return a linear guess of `path_patch` to the logits: one backward pass for all heads.

    D_patched - D_clean ~ (z_corrupt - z_clean) . dD/dz at the end, with all other heads frozen as
    in path patching. Exact in the limit of small differences; use it to choose what to patch.
    """
    found, clean, corrupt = [], [], []
    for part in prompts.parts(PART):
        one = _ends(heads, part)
        sweep = fast.Sweep(heads, part, part.ends, later=False)
        found.append(sweep.toward(freeze_mlps).cpu() + one[0])
        clean.append(one[0])
        corrupt.append(one[1])
    made = Effects(torch.cat(found, -1), torch.cat(clean), torch.cat(corrupt))
    if not allow_small_gap:
        made.check_gap()
    return made


def screened(
    heads: HeadModel,
    prompts: Prompts,
    *,
    share: float = 0.1,
    freeze_mlps: bool = False,
    allow_small_gap: bool = False,
    on_step: OnStep | None = None,
) -> Effects:
    """Return `path_patch` to the logits of the share of heads that `attribution` puts first."""
    guess = attribution(heads, prompts, freeze_mlps=freeze_mlps, allow_small_gap=allow_small_gap)
    return path_patch(
        heads,
        prompts,
        senders=top(guess.values, share),
        freeze_mlps=freeze_mlps,
        allow_small_gap=allow_small_gap,
        on_step=on_step,
    )


def _receivers(heads: HeadModel, given: Sequence[Receiver]) -> tuple[Receiver, ...]:
    """Return receivers with groups in place of heads for k and v, each once."""
    if isinstance(given, str) or not given:
        raise InputError(f"receivers are 'logits' or (layer, head, 'q' | 'k' | 'v'), not {given!r}")
    heads.check([(layer, head) for layer, head, _ in given])
    if wrong := sorted({side for _, _, side in given} - {"q", "k", "v"}):
        raise InputError(f"a receiver's side is q, k or v, not {wrong[0]!r}")
    found = [(n, h if side == "q" else heads.group_of(h), side) for n, h, side in given]
    return tuple(dict.fromkeys(found))


def _ends(heads: HeadModel, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Return D of the clean and the corrupted prompts."""
    clean = heads.run(prompts.clean, prompts.ends, ())
    corrupt = heads.run(prompts.corrupt, prompts.ends, ())
    return tuple(logit_difference(run.logits.cpu(), prompts) for run in (clean, corrupt))  # type: ignore[return-value]


def _told(
    on_step: OnStep | None, stage: str, part: int, parts: int
) -> Callable[[int, int], None] | None:
    if on_step is None:
        return None
    return lambda done, total: on_step(stage, part * total + done, parts * total)
