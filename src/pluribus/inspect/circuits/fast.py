"""Path and activation patching of all heads in one sweep up the layers; exact, but for rounding.

What changes at position p changes nothing before it. Keys and values of the tokens before p are
read from one clean run, and only the tokens from p to the end (one, if p is the end) go through
layers again, for many heads at once:

    step 2   all heads at p are frozen, so no attention is needed: x <- x + W_O z_l, then the part
             behind attention; at each layer the rows of that layer's senders join
    step 3   from the lowest receiver up, the tokens from p on, over the kept keys and values

The rows of a batch are senders x prompts (m, b); heads of a layer below which nothing changed cost
nothing.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pluribus.core.shapes import Float, Int, Shaped
from pluribus.inspect.circuits.attention import attending
from pluribus.inspect.circuits.model import Head, HeadModel
from pluribus.inspect.circuits.plain import Receiver, Told
from pluribus.inspect.circuits.prompts import Prompts

ROWS = 8192  # tokens that go through a layer at once, at most (one layer's senders at least)
Sets = Mapping[tuple[int, str], Mapping[int, Tensor]]  # (layer, side) -> head or group -> (m, b, e)


class Sweep:
    """Prompts with what a clean and a corrupted run gave from a position on.

    `later`: keys and values are kept too, for what goes on behind the position.
    """

    def __init__(
        self, heads: HeadModel, prompts: Prompts, position: Int[Tensor, " b"], later: bool
    ) -> None:
        self.heads, self.prompts = heads, prompts
        device = heads.device
        ends, position = prompts.ends.to(device), position.to(device)
        self.count, self.tokens = len(prompts), int((ends - position).max()) + 1
        self.index = ends[:, None] - self.tokens + 1 + torch.arange(self.tokens, device=device)
        self.offset = position - ends + self.tokens - 1  # of the position among the tokens
        self.rows = torch.arange(self.count, device=device)
        places = self.index.clamp(min=0)
        keep = ("z", "resid", "mlp", "k", "v") if later else ("z", "resid", "mlp")
        self.clean = heads.run(prompts.clean, ends, keep, at=places)
        self.corrupt = heads.run(prompts.corrupt, ends, ("z",), at=position[:, None])
        self.answers = prompts.answers.to(device)
        self.alternatives = prompts.alternatives.to(device)
        length = prompts.clean.shape[1]
        before = torch.arange(length, device=device) < self.index[:, :1]  # (b, s)
        own = torch.ones(self.tokens, self.tokens, dtype=torch.bool, device=device).tril()
        same = torch.eye(self.tokens, dtype=torch.bool, device=device)
        self._before = before[:, None, None]
        self._own = ((self.index >= 0)[:, None] & own | same)[:, None, None, None]
        self._all = [_at(options, length, places.flatten()) for options in self.clean.options]
        at_position = position.flatten()
        self._one = [_at(options, length, at_position) for options in self.clean.options]

    def here(self, kept: Tensor) -> Tensor:
        """Return what was kept at the position, (b, ...)."""
        return kept[self.rows, self.offset]

    def sent(
        self,
        senders: Mapping[int, Sequence[int]],
        receivers: Collection[Receiver],
        freeze_mlps: bool,
    ) -> tuple[Float[Tensor, "m b d"], dict[tuple[int, str], dict[int, Tensor]]]:
        """Return the residual stream behind step 2, and what the receivers took there.

        `senders`: heads by layer. Without receivers all layers are passed.
        """
        heads = self.heads
        last = max(layer for layer, _, _ in receivers) if receivers else heads.layers - 1
        total = sum(map(len, senders.values()))
        took: dict[tuple[int, str], dict[int, Tensor]] = {}
        live = self.clean.resid[0].new_zeros(0, self.count, heads.width)
        for layer in range(min(senders), last + 1):
            sides = {side for to, _, side in receivers if to == layer}
            if sides:
                clean = self.here(self.clean.resid[layer])[None]  # what later senders leave alone
                given = self._inputs(layer, torch.cat([live, clean]))
                for side in sides:
                    indices = [i for to, i, s in receivers if (to, s) == (layer, side)]
                    took[layer, side] = {i: _filled(given[side][:, i], total) for i in indices}
            if receivers and layer == last:
                break
            block, z = heads.blocks[layer], self.here(self.clean.z[layer])
            attended = block.out(z.flatten(1)).expand(len(live), -1, -1)
            if own := senders.get(layer):
                new = self._corrupted(layer, z.expand(len(own), *z.shape), own)
                attended = torch.cat([attended, block.out(new.flatten(2))])
                clean = self.here(self.clean.resid[layer])
                live = torch.cat([live, clean.expand(len(own), -1, -1)])
            if freeze_mlps:
                live = live + attended + self.here(self.clean.mlp[layer])
            else:
                live = self._behind(layer, live, attended)
        return live, took

    def received(
        self, first: int, took: Sets, count: int, freeze_others: bool
    ) -> Float[Tensor, "m b"]:
        """Return D of step 3: the clean run from a layer on, with the receivers' inputs set."""
        clean = self.clean.resid[first].flatten(0, 1)
        live = clean.expand(count, *clean.shape)
        for layer in range(first, self.heads.layers):
            free = {head for (to, _), own in took.items() if to == layer for head in own}
            others = [head for head in range(self.heads.heads) if head not in free]
            kept = self.here(self.clean.z[layer])[:, others]

            def freeze(z: Tensor, others: list[int] = others, kept: Tensor = kept) -> Tensor:
                z = z.clone()
                places = torch.tensor(others, device=z.device)
                z[:, self.rows[:, None], self.offset[:, None], places] = kept
                return z

            live = self._layer(layer, live, took, freeze if freeze_others else None)
        return self._difference(live)

    def patched(self, senders: Mapping[int, Sequence[int]]) -> Float[Tensor, "m b"]:
        """Return D once each sender's z at the position is corrupted, all else free."""
        live = self.clean.resid[0].new_zeros(0, self.count * self.tokens, self.heads.width)
        for layer in range(min(senders), self.heads.layers):
            own = senders.get(layer, ())
            if own:
                clean = self.clean.resid[layer].flatten(0, 1)
                live = torch.cat([live, clean.expand(len(own), *clean.shape)])

            def change(z: Tensor, layer: int = layer, own: Sequence[int] = own) -> Tensor:
                if own:
                    z = z.clone()
                    part = z[len(z) - len(own) :]
                    every = torch.arange(len(own), device=z.device)[:, None]
                    heads = torch.tensor(own, device=z.device)
                    new = self.corrupt.z[layer][:, 0, heads].transpose(0, 1)
                    part[every, self.rows, self.offset, heads[:, None]] = new
                return z

            live = self._layer(layer, live, {}, change)
        return self._difference(live)

    def settled(
        self, values: Mapping[Head, Float[Tensor, "b e"]], rows_of: Collection[int] = ()
    ) -> tuple[Float[Tensor, "b v"], dict[int, Float[Tensor, "b h s"]]]:
        """Return logits once some heads' z at the position is set, all else free.

        Also the attention of the position's last token in some layers, in which its own place is
        that behind all kept ones.
        """
        first = min([layer for layer, _ in values] + list(rows_of), default=self.heads.layers)
        if first == self.heads.layers:
            return self.clean.logits, {}
        live = self.clean.resid[first].flatten(0, 1)[None]
        seen: dict[int, Tensor] = {}
        for layer in range(first, self.heads.layers):
            own = {head: new for (number, head), new in values.items() if number == layer}

            def change(z: Tensor, own: Mapping[int, Tensor] = own) -> Tensor:
                for head, new in own.items():
                    z[:, self.rows, self.offset, head] = new.to(z)
                return z

            live = self._layer(layer, live, {}, change, seen if layer in rows_of else None)
        last = live.unflatten(1, (self.count, self.tokens))[0, :, -1]
        return self.heads.logits(self.heads.final_norm(last)), seen

    def toward(self, freeze_mlps: bool) -> Float[Tensor, "l h b"]:
        """Return D's slope along (corrupted - clean z) of each head; see `attribution`.

        All heads at the position are leaves of one graph, which no attention is part of.
        """
        heads = self.heads
        with torch.enable_grad():
            leaves = [self.here(z).detach().requires_grad_() for z in self.clean.z]
            live = self.here(self.clean.resid[0])[None]
            for layer, z in enumerate(leaves):
                attended = heads.blocks[layer].out(z.flatten(1))[None]
                if freeze_mlps:
                    live = live + attended + self.here(self.clean.mlp[layer])
                else:
                    live = self._behind(layer, live, attended)
            total = heads.difference(live, self.answers, self.alternatives).sum()
            slopes = torch.autograd.grad(total, leaves)
        moved = [
            (slope * (corrupt[:, 0] - self.here(clean))).sum(-1).T
            for slope, corrupt, clean in zip(slopes, self.corrupt.z, self.clean.z, strict=True)
        ]
        return torch.stack(moved)

    def _corrupted(self, layer: int, z: Tensor, own: Sequence[int]) -> Tensor:
        """Return (m, b, h, e) with head own[i] of row i corrupted."""
        z = z.clone()
        for row, head in enumerate(own):
            z[row, :, head] = self.corrupt.z[layer][:, 0, head]
        return z

    def _behind(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """Return what a block gives, from what it took and what attention added."""
        block = self.heads.blocks[layer]
        sum_so_far = x + attended
        fed = block.mlp(block.before_mlp(x if block.parallel else sum_so_far))
        return sum_so_far + (fed if isinstance(fed, Tensor) else fed[0])

    def _inputs(self, layer: int, x: Float[Tensor, "m b d"]) -> dict[str, Tensor]:
        """Return the q, k and v (m, h or g, b, e) that attention makes of x at the position."""
        given: dict[str, Tensor] = {}

        def take(
            module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float
        ) -> Shaped[Tensor, "..."]:
            del module, scaling
            given.update(q=q, k=k, v=v)
            return q.new_zeros(len(q), q.shape[2], self.heads.heads, self.heads.size)

        block = self.heads.blocks[layer]
        with attending(self.heads.model, take):
            block.attention(block.before_attention(x), **self._one[layer])
        return given

    def _layer(
        self,
        layer: int,
        x: Float[Tensor, "m t d"],
        took: Sets,
        change: Callable[[Tensor], Tensor] | None = None,
        seen: dict[int, Tensor] | None = None,
    ) -> Float[Tensor, "m t d"]:
        """Return a layer's output for the tokens from the position on; t is prompts x tokens."""
        block = self.heads.blocks[layer]

        def attend(
            module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float
        ) -> Shaped[Tensor, "..."]:
            del module
            q, k, v = (one.unflatten(2, (self.count, self.tokens)) for one in (q, k, v))
            for (to, side), new in took.items():
                if to == layer:
                    one = {"q": q, "k": k, "v": v}[side]
                    for index, value in new.items():
                        one[:, index, self.rows, self.offset] = value
            z, pattern = self._attention(layer, q, k, v, scaling)
            if seen is not None:
                seen[layer] = pattern[:, :, 0, :, -1].flatten(1, 2)
            if change is not None:
                z = change(z)
            return z.flatten(1, 2)

        with attending(self.heads.model, attend):
            attended = block.attention(block.before_attention(x), **self._all[layer])
        return self._behind(layer, x, attended[0] if isinstance(attended, tuple) else attended)

    def _attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Return z (m, b, n, h, e) of the tokens, over kept keys and values and their own.

        And the pattern (b, g, m, r, n, s + n); r are a group's heads.
        """
        senders, heads, count, tokens, _ = q.shape
        groups = k.shape[1]
        old_k, old_v = self.clean.k[layer], self.clean.v[layer]  # (b, g, s, e)
        q = q.unflatten(1, (groups, heads // groups)).permute(3, 1, 0, 2, 4, 5)  # b g m r n e
        k, v = (one.permute(2, 1, 0, 3, 4)[:, :, :, None] for one in (k, v))  # b g m 1 n e
        scores = (q.flatten(2, 4) @ old_k.transpose(2, 3)).masked_fill(~self._before, -torch.inf)
        own = (q @ k.transpose(4, 5)).masked_fill(~self._own, -torch.inf)
        scores = torch.cat([scores.view(*q.shape[:5], -1), own], -1).float() * scaling
        pattern = scores.softmax(-1).to(v.dtype)
        length = old_k.shape[2]
        z = pattern[..., :length].flatten(2, 4) @ old_v
        z = z.view(*q.shape[:5], -1) + pattern[..., length:] @ v
        z = z.permute(2, 0, 4, 1, 3, 5).reshape(senders, count, tokens, heads, -1)
        return z, pattern

    def _difference(self, live: Float[Tensor, "m t d"]) -> Float[Tensor, "m b"]:
        last = live.unflatten(1, (self.count, self.tokens))[:, :, -1]
        return self.heads.difference(last, self.answers, self.alternatives)

    def groups(self, senders: Collection[Head]) -> Iterator[dict[int, list[int]]]:
        """Give senders by layer, as many layers at once as go into `ROWS`."""
        by_layer: dict[int, list[int]] = {}
        for layer, head in sorted(senders):
            by_layer.setdefault(layer, []).append(head)
        part: dict[int, list[int]] = {}
        for layer, own in by_layer.items():
            held = sum(map(len, part.values())) + len(own)
            if part and held * self.count * self.tokens > ROWS:
                yield part
                part = {}
            part[layer] = own
        if part:
            yield part


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
    """See `plain.path_patch`. Without receivers the position must be the end."""
    found = torch.full((heads.layers, heads.heads, len(prompts)), torch.nan)
    lowest = min((layer for layer, _, _ in receivers), default=heads.layers)
    highest = max((layer for layer, _, _ in receivers), default=heads.layers)
    below = [one for one in senders if one[0] < lowest or one[0] == lowest < highest]
    done = 0
    with torch.no_grad():
        sweep = Sweep(heads, prompts, position, later=bool(receivers))
        last = sweep.clean.logits
        plain = last[sweep.rows, sweep.answers] - last[sweep.rows, sweep.alternatives]
        for part in sweep.groups(below):
            live, took = sweep.sent(part, receivers, freeze_mlps)
            if receivers:
                told_d = sweep.received(lowest, took, sum(map(len, part.values())), freeze_others)
            else:
                told_d = heads.difference(live, sweep.answers, sweep.alternatives)
            done = _put(found, part, told_d, done, len(senders), told)
    for layer, head in set(senders) - set(below):  # nothing reaches an input of its own layer
        found[layer, head] = plain.cpu()
    return found


def activation_patch(
    heads: HeadModel,
    prompts: Prompts,
    senders: Collection[Head],
    position: Int[Tensor, " b"],
    told: Told | None = None,
) -> Float[Tensor, "l h b"]:
    """See `plain.activation_patch`."""
    found = torch.full((heads.layers, heads.heads, len(prompts)), torch.nan)
    done = 0
    with torch.no_grad():
        sweep = Sweep(heads, prompts, position, later=True)
        for part in sweep.groups(senders):
            done = _put(found, part, sweep.patched(part), done, len(senders), told)
    return found


def _put(
    found: Tensor,
    part: Mapping[int, Sequence[int]],
    values: Tensor,
    done: int,
    total: int,
    told: Told | None,
) -> int:
    places = [(layer, head) for layer, own in part.items() for head in own]
    for (layer, head), value in zip(places, values.cpu(), strict=True):
        found[layer, head] = value
    if told is not None:
        told(done + len(places), total)
    return done + len(places)


def _filled(value: Float[Tensor, "m b e"], total: int) -> Float[Tensor, "n b e"]:
    """Return rows with the last one repeated until there are so many, itself left out."""
    return torch.cat([value[:-1], value[-1:].expand(total - len(value) + 1, -1, -1)])


def _at(value: Any, length: int, places: Int[Tensor, " t"]) -> Any:
    """Return attention's arguments at some positions: whatever has them on its second axis."""
    if isinstance(value, Tensor):
        whole = value.dim() > 1 and value.shape[1] == length
        return value[:1, places] if whole else value
    if isinstance(value, dict):
        return {name: _at(inner, length, places) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_at(inner, length, places) for inner in value)
    return value
