"""What each worker sees of the blocks, and attention over it by turning queries.

Rodionov et al., NeurIPS 2025, https://arxiv.org/abs/2504.06261; the form that rotates queries.

A row of blocks b_1 .. b_m begins at offsets o_1 .. o_m and has N tokens, all workers' tokens of the
step included. A new token is at place p = N - S + s of its row and at place r of its own block. Its
score with key j of block i would be (R_p q) (R_{o_i + j} k_j), and turns only count by difference:

    (R_p q) (R_{o_i + j} k_j) = (R_{p - o_i} q) (R_j k_j) = (R_{p - o_i - r} R_r q) (R_j k_j)

The model turns queries by r itself and keys lie turned by j, so a block needs one more turn of the
query, by p - o_i - r: nothing is copied or turned anew for a reader. Each block gives each reader
an output and the logarithm of its sum of exponents, which are put together.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pluribus.core.errors import InputError, MismatchError
from pluribus.core.shapes import Bool, Float, Int
from pluribus.decode.hogwild.blocks import KVBlock
from pluribus.decode.hogwild.rotation import Rotation

# torch's attention for processors, which tells the logarithms too; None where torch has none
FUSED: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def attention(
    queries: Float[Tensor, "h m e"],
    keys: Float[Tensor, "h n e"],
    values: Float[Tensor, "h n f"],
    scaling: float,
    mask: Bool[Tensor, "h m n"] | None = None,
) -> tuple[Float[Tensor, "h m f"], Float[Tensor, "h m"]]:
    """Return attention over one block, and log sum_n exp(score) of each query (float32)."""
    if (
        FUSED is not None
        and mask is None
        and queries.device.type == "cpu"
        and keys.shape[2] == values.shape[2]
    ):
        found, total = FUSED(queries[:, None], keys[:, None], values[:, None], scale=scaling)
        return found[:, 0], total[:, 0].float()
    scores = torch.bmm(queries, keys.transpose(1, 2)).float() * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    total = scores.logsumexp(-1, keepdim=True)
    return torch.bmm((scores - total).exp().to(values.dtype), values), total[..., 0]


class Reading(NamedTuple):
    """One block and the rows that read it, which lie side by side among all pairs."""

    block: KVBlock
    first: int
    last: int
    mask: Bool[Tensor, "r s n"] | None  # which keys each new token may see; None: all


class Plan(NamedTuple):
    """One step: pairs of a row and a block, sorted by block."""

    rows: Int[Tensor, " p"]
    cos: Float[Tensor, "p 1 1 q"]
    sin: Float[Tensor, "p 1 1 q"]
    turned: bool  # whether any pair needs a turn
    readings: list[Reading]
    pairs: Int[Tensor, "w m"]  # a row's pairs; a place that it doesn't need has pair 0
    absent: Bool[Tensor, "w m"] | None
    counts: list[int]


class SharedView:
    """Rows of blocks, and the block that each row writes: its last one, or `write_to`.

    It is what a model takes for its cache for a step. Raises InputError for no rows, an empty row,
    a target that is not in its row, or one block written by two rows.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[KVBlock]],
        rotation: Rotation,
        write_to: Sequence[KVBlock] | None = None,
    ) -> None:
        if not rows or not all(rows):
            raise InputError("a view needs a row of at least one block for each worker")
        self.rows = [list(row) for row in rows]
        self.rotation = rotation
        self.write_to = [row[-1] for row in self.rows] if write_to is None else list(write_to)
        if len(self.write_to) != len(self.rows):
            raise InputError(f"{len(self.write_to)} blocks to write for {len(self.rows)} rows")
        for number, (row, target) in enumerate(zip(self.rows, self.write_to, strict=True)):
            if not any(block is target for block in row):
                raise InputError(f"row {number} does not see the block that it writes")
            if len({id(block) for block in row}) < len(row):
                raise InputError(f"row {number} lists a block twice")
        if len({id(block) for block in self.write_to}) < len(self.write_to):
            raise InputError("two rows write one block; give each its own")
        self._plan: Plan | None = None

    def begin(self, counts: Sequence[int], device: Any = "cpu") -> Int[Tensor, "w s"]:
        """Plan a step in which row w reads counts[w] new tokens, padded on the left to the most.

        Returns the places of the tokens in their own blocks, as the model's position_ids.
        Raises MismatchError if there isn't one number of at least 1 a row.
        """
        if len(counts) != len(self.rows) or min(counts) < 1:
            raise MismatchError(
                f"new tokens {list(counts)} for {len(self.rows)} rows of at least 1"
            )
        new = dict(zip(map(id, self.write_to), counts, strict=True))
        most = max(counts)
        sizes = {id(block): block.n() + new.get(id(block), 0) for row in self.rows for block in row}
        readers: dict[int, tuple[KVBlock, list[tuple[int, int]]]] = {}  # (row, turn) by block
        for w, (row, target) in enumerate(zip(self.rows, self.write_to, strict=True)):
            total = sum(sizes[id(block)] for block in row)
            offset = 0
            for block in row:
                size = sizes[id(block)]
                if size:
                    turn = total - counts[w] - offset - target.n()
                    readers.setdefault(id(block), (block, []))[1].append((w, turn))
                offset += size
        pairs = [pair for _, found in readers.values() for pair in found]
        own: list[list[int]] = [[] for _ in self.rows]
        for number, (w, _) in enumerate(pairs):
            own[w].append(number)
        width = max(map(len, own))
        filled = [numbers + [0] * (width - len(numbers)) for numbers in own]
        absent = [[False] * len(n) + [True] * (width - len(n)) for n in own]
        turns = torch.tensor([turn for _, turn in pairs], device=device)
        cos, sin = self.rotation.angles(turns)
        readings, first = [], 0
        for block, found in readers.values():
            mask = self._mask(block, found, counts, most, sizes[id(block)], device)
            readings.append(Reading(block, first, first + len(found), mask))
            first += len(found)
        self._plan = Plan(
            rows=torch.tensor([w for w, _ in pairs], device=device),
            cos=cos[:, None, None],
            sin=sin[:, None, None],
            turned=any(turn for _, turn in pairs),
            readings=readings,
            pairs=torch.tensor(filled, device=device),
            absent=torch.tensor(absent, device=device) if any(map(any, absent)) else None,
            counts=list(counts),
        )
        places = [
            [max(0, target.n() + s - most + count) for s in range(most)]
            for target, count in zip(self.write_to, counts, strict=True)
        ]
        return torch.tensor(places, device=device)

    def _mask(
        self,
        block: KVBlock,
        found: Sequence[tuple[int, int]],
        counts: Sequence[int],
        most: int,
        size: int,
        device: Any,
    ) -> Tensor | None:
        """Return which keys of a block its writer's new tokens may see; None: all."""
        writer = next((w for w, target in enumerate(self.write_to) if target is block), None)
        if writer is None or counts[writer] == 1:
            return None
        allowed = torch.ones(len(found), most, size, dtype=torch.bool, device=device)
        places = torch.arange(most, device=device) + size - most
        causal = torch.arange(size, device=device) <= places.clamp(min=0)[:, None]
        for number, (w, _) in enumerate(found):
            if w == writer:
                allowed[number] = causal
        return allowed

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep a step's keys and values (w, h, s, e) of one layer; called by the model."""
        plan = self._planned()
        if len(keys) != len(self.rows):
            raise MismatchError(f"a batch of {len(keys)} for a view of {len(self.rows)} rows")
        for w, (target, count) in enumerate(zip(self.write_to, plan.counts, strict=True)):
            target.append(layer, keys[w, :, -count:], values[w, :, -count:])
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        """Return 0: places are given, not counted."""
        del layer
        return 0

    def attend(
        self, queries: Float[Tensor, "w q s e"], layer: int, scaling: float
    ) -> Float[Tensor, "w s q e"]:
        """Return attention of a step's queries over all that their rows see."""
        plan = self._planned()
        _, heads, length, _ = queries.shape
        turned = queries[plan.rows]
        if plan.turned:
            turned = self.rotation.turn(turned, plan.cos, plan.sin)
        outputs, sums = [], []
        for block, first, last, mask in plan.readings:
            keys, values = block.keys(layer), block.values(layer)
            kv, count = len(keys), last - first
            shape = (kv, count, heads // kv, length)
            grouped = turned[first:last].unflatten(1, (kv, heads // kv)).transpose(0, 1)
            wide = None if mask is None else mask[None, :, None].expand(*shape, -1).flatten(1, 3)
            found, total = attention(grouped.flatten(1, 3), keys, values, scaling, wide)
            outputs.append(found.view(*shape, -1).transpose(0, 1).flatten(1, 2))
            sums.append(total.view(shape).transpose(0, 1).flatten(1, 2))
        if len(outputs) == 1:
            return outputs[0].transpose(1, 2)
        every, total = torch.cat(outputs), torch.cat(sums)[plan.pairs]  # (p, q, s, e), (w, m, q, s)
        if plan.absent is not None:
            total = total.masked_fill(plan.absent[:, :, None, None], -torch.inf)
        shares = total.softmax(1)[..., None]
        return (shares * every[plan.pairs]).sum(1).to(queries.dtype).transpose(1, 2)

    def nbytes(self) -> int:
        """Return the bytes of all blocks, each counted once."""
        blocks = {id(block): block for row in self.rows for block in row}
        return sum(block.nbytes() for block in blocks.values())

    def _planned(self) -> Plan:
        if self._plan is None:
            raise InputError("begin a step before the model runs on a view")
        return self._plan
