"""The slow form: keys turned to every reader's places, copied for each, and padded on the left."""

import torch
from torch import Tensor


def turned(x: Tensor, shift: int, frequencies: Tensor) -> Tensor:
    """Turn (..., e) by complex numbers: value i goes with i + e / 2."""
    half = x.shape[-1] // 2
    paired = torch.complex(x[..., :half].double(), x[..., half:].double())
    paired = paired * torch.exp(1j * shift * frequencies.double())
    return torch.cat([paired.real, paired.imag], -1).to(x.dtype)


class Block:
    """Keys and values (h, n, e) by layer, turned by places in the block."""

    def __init__(self, layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def n(self, layer: int = 0) -> int:
        found = self.keys[layer]
        return 0 if found is None else found.shape[1]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        for kept, new in ((self.keys, keys), (self.values, values)):
            old = kept[layer]
            kept[layer] = new if old is None else torch.cat([old, new], 1)

    def move_into(self, other: "Block", frequencies: Tensor) -> None:
        by = other.n()
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            if keys is not None:
                other.append(layer, turned(keys, by, frequencies), values)
        self.keys, self.values = ([None] * len(self.keys) for _ in range(2))


class Rows:
    """A cache for ordinary attention: what each row sees, in its order."""

    def __init__(self, rows: list[list[Block]], counts: list[int], frequencies: Tensor) -> None:
        self.rows, self.counts, self.frequencies = rows, counts, frequencies
        self.before = [row[-1].n() for row in rows]
        new = {id(row[-1]): count for row, count in zip(rows, counts, strict=True)}
        self.totals = [sum(block.n() + new.get(id(block), 0) for block in row) for row in rows]
        self.width, self.most = max(self.totals), max(counts)

    def places(self) -> Tensor:
        """Places of the new tokens in their rows."""
        return torch.tensor(
            [[max(0, t - self.most + s) for s in range(self.most)] for t in self.totals]
        )

    def mask(self) -> Tensor:
        out = torch.full((len(self.rows), 1, self.most, self.width), -torch.inf)
        for w, total in enumerate(self.totals):
            pad = self.width - total
            for s in range(self.most):
                end = self.width - self.most + s + 1
                out[w, 0, s, min(pad, end - 1) : end] = 0  # what padding gives is not looked at
        return out

    def get_seq_length(self, layer: int = 0) -> int:
        return 0

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        for w, (row, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            local = self.before[w] + count - self.totals[w]  # the same for all its new tokens
            own = turned(keys[w, :, -count:], local, self.frequencies)
            row[-1].append(layer, own, values[w, :, -count:])
        every_key = keys.new_zeros(len(self.rows), keys.shape[1], self.width, keys.shape[3])
        every_value = values.new_zeros(*every_key.shape[:3], values.shape[3])
        for w, row in enumerate(self.rows):
            pad, offset = self.width - self.totals[w], 0
            for block in row:
                if not block.n(layer):
                    continue
                here = slice(pad + offset, pad + offset + block.n(layer))
                every_key[w, :, here] = turned(block.keys[layer], offset, self.frequencies)
                every_value[w, :, here] = block.values[layer]
                offset += block.n(layer)
        return every_key, every_value


def step(model, rows: list[list[Block]], tokens: list[list[int]], frequencies: Tensor) -> Tensor:
    """Return logits behind each row's last token."""
    cache = Rows(rows, [len(row) for row in tokens], frequencies)
    ids = torch.tensor([[row[0]] * (cache.most - len(row)) + row for row in tokens])
    with torch.no_grad():
        out = model(
            input_ids=ids,
            position_ids=cache.places(),
            attention_mask=cache.mask(),
            use_cache=True,
            logits_to_keep=1,
            cache=cache,
        )
    return out.logits[:, -1]
