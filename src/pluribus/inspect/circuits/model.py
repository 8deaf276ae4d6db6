"""Heads of a language model: run it and keep what they gave, or run it with some of that changed.

    heads = HeadModel(model)
    clean = heads.run(ids)                                  # Cache: z, resid, mlp, pattern, q, k, v
    other = heads.patched(clean, z={(3, 1): corrupt.z[3][:, -1, 1]}, freeze=True)

Rows of unequal length are padded behind their end, which no earlier token sees. Axis letters: `l`
layers, `b` prompts, `s` positions, `h` heads, `g` groups of keys and values, `e` values of a head,
`d` width.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pluribus.core.errors import InputError
from pluribus.core.shapes import Float, Int
from pluribus.inspect.circuits.attention import attending, mixed, pattern_of
from pluribus.inspect.circuits.layout import find

Head = tuple[int, int]  # layer, head; both from 0
Side = Literal["q", "k", "v"]
Part = Literal["z", "resid", "mlp", "pattern", "q", "k", "v"]
PARTS: tuple[Part, ...] = ("z", "resid", "mlp", "pattern", "q", "k", "v")


@dataclass(frozen=True)
class Cache:
    """What a pass gave, by layer; a part that was not kept is an empty list.

    q, k (turned by their positions) and v are (b, h or g, s, e). With `at` in `run`, z, resid and
    mlp are kept at those positions alone.
    """

    ids: Int[Tensor, "b s"]
    ends: Int[Tensor, " b"]  # each row's last position
    logits: Float[Tensor, "b v"]  # behind the last position, float32
    z: list[Tensor] = field(default_factory=list)  # (b, s, h, e), before W_O
    resid: list[Tensor] = field(default_factory=list)  # (b, s, d), before each layer
    mlp: list[Tensor] = field(default_factory=list)  # (b, s, d)
    pattern: list[Tensor] = field(default_factory=list)  # (b, h, s, s)
    q: list[Tensor] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)  # attention's other arguments

    @classmethod
    def of(cls, ids: Int[Tensor, "b s"], ends: Int[Tensor, " b"]) -> "Cache":
        """Return tokens that were not run: enough for `patched` where nothing is frozen."""
        return cls(ids, ends, torch.zeros(len(ids), 0))


class HeadModel:
    """A causal language model of transformers, seen head by head.

    Blocks are found by running the model (see `layout`); its way of computing attention is put back
    after each pass. Raises InputError for what is not understood, with the reason.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        found = find(model)
        self.blocks, self.trunk = found.blocks, found.trunk
        self.final_norm, self.unembedding = found.final_norm, found.head
        self.layers, self.heads, self.groups = len(found.blocks), found.heads, found.groups
        self.size, self.width = found.size, found.width
        self.device = next(iter(model.parameters())).device
        self._number = {block.attention: i for i, block in enumerate(found.blocks)}

    def layer_of(self, attention: nn.Module) -> int:
        """Return the layer of an attention module."""
        return self._number[attention]

    def group_of(self, head: int) -> int:
        """Return the group of keys and values that a head reads."""
        return head // (self.heads // self.groups)

    def check(self, heads: Collection[Head]) -> None:
        """Raise InputError for heads that the model has not."""
        for layer, head in heads:
            if not (0 <= layer < self.layers and 0 <= head < self.heads):
                raise InputError(
                    f"head {layer}.{head} does not exist: the model has layers 0 to "
                    f"{self.layers - 1} with heads 0 to {self.heads - 1}"
                )

    def run(
        self,
        ids: Int[Tensor, "b s"],
        ends: Int[Tensor, " b"] | None = None,
        keep: Collection[Part] = PARTS,
        at: Int[Tensor, "b n"] | None = None,
    ) -> Cache:
        """Run the model and keep parts; z, resid and mlp at all positions, or only `at` some.

        `ends`: each row's last position; None: the last column.
        """
        return self._pass(ids, ends, _Pass(self, keep=keep, at=at))

    def patched(
        self,
        cache: Cache,
        *,
        z: Mapping[Head, Tensor] | None = None,
        q: Mapping[Head, Tensor] | None = None,
        k: Mapping[Head, Tensor] | None = None,
        v: Mapping[Head, Tensor] | None = None,
        pattern: Mapping[Head, Tensor] | None = None,
        freeze: bool = False,
        freeze_mlps: bool = False,
        free: Collection[Head] = (),
        position: Int[Tensor, " b"] | None = None,
        keep: Collection[Part] = (),
    ) -> Cache:
        """Run a cache's tokens again with values of some heads set at one position of each row.

        `z`, `q`: (b, e) by (layer, head); `k`, `v`: by (layer, group). Values (b, s, e) of z are
        set at all positions. `pattern`: rows (b, s) of the query at the position. `freeze`: all
        other heads' z at the position stay as in the cache (which needs z), `freeze_mlps`: so do
        the parts behind attention (mlp). `free`: heads that are not
        frozen. `position`: the end by default.
        """
        at = cache.ends if position is None else position
        run = _Pass(self, keep=keep, position=at)
        run.sets = {
            "z": z or {},
            "q": q or {},
            "k": k or {},
            "v": v or {},
            "pattern": pattern or {},
        }
        self.check([*run.sets["z"], *run.sets["q"], *run.sets["pattern"]])
        run.frozen_z = cache.z if freeze else []
        run.frozen_mlp = cache.mlp if freeze_mlps else []
        run.free = free
        if (freeze and not cache.z) or (freeze_mlps and not cache.mlp):
            raise InputError("what is frozen must be in the cache: run with keep=('z', 'mlp')")
        return self._pass(cache.ids, cache.ends, run)

    def logits(self, normed: Float[Tensor, "... d"]) -> Float[Tensor, "... v"]:
        """Return float32 logits of what the final norm gave."""
        return self.unembedding(normed).float()

    def difference(
        self,
        resid: Float[Tensor, "m b d"],
        answers: Int[Tensor, " b"],
        alternatives: Int[Tensor, " b"],
    ) -> Float[Tensor, "m b"]:
        """Return logit(answer) - logit(alternative) from the residual stream before the norm.

        Two rows of the head are enough, whatever the size of the vocabulary.
        """
        weight: Any = self.unembedding.weight
        bias: Any = getattr(self.unembedding, "bias", None)
        toward = (weight[answers] - weight[alternatives]).float()
        found = (self.final_norm(resid).float() * toward).sum(-1)
        return found if bias is None else found + (bias[answers] - bias[alternatives]).float()

    def _pass(self, ids: Tensor, ends: Tensor | None, run: "_Pass") -> Cache:
        ids = ids.to(self.device)
        if ends is None:
            ends = torch.full((len(ids),), ids.shape[1] - 1, device=self.device)
        with torch.no_grad(), attending(self.model, run), run.hooked():
            out: Any = self.trunk(input_ids=ids, use_cache=False)
            last = out.last_hidden_state[torch.arange(len(ids)), ends]
            logits = self.logits(last)
        return Cache(ids, ends, logits, **run.kept)


class _Pass:
    """One pass: what it sets, and what it keeps. Computes the model's attention."""

    def __init__(
        self,
        heads: HeadModel,
        keep: Collection[Part],
        at: Tensor | None = None,
        position: Tensor | None = None,
    ) -> None:
        self.of, self.keep, self.at, self.position = heads, set(keep), at, position
        if unknown := self.keep - set(PARTS):
            raise InputError(f"a cache has no {sorted(unknown)}; it has {', '.join(PARTS)}")
        self.sets: dict[str, Mapping[Head, Tensor]] = {}
        self.frozen_z: Sequence[Tensor] = ()
        self.frozen_mlp: Sequence[Tensor] = ()
        self.free: Collection[Head] = ()
        self.kept: dict[str, list[Any]] = {}

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float
    ) -> Tensor:
        layer = self.of.layer_of(module)
        q = self._set("q", layer, q.transpose(1, 2)).transpose(1, 2)
        k = self._set("k", layer, k.transpose(1, 2)).transpose(1, 2)
        v = self._set("v", layer, v.transpose(1, 2)).transpose(1, 2)
        pattern = pattern_of(q, k, scaling)
        pattern = self._set("pattern", layer, pattern.transpose(1, 2)).transpose(1, 2)
        z = mixed(pattern, v)
        if self.frozen_z:
            frozen = self._at(z, self.frozen_z[layer])
            for head in (head for number, head in self.free if number == layer):
                frozen[:, :, head] = z[:, :, head]
            z = frozen
        z = self._set("z", layer, z)
        for name, value in (("pattern", pattern), ("q", q), ("k", k), ("v", v)):
            if name in self.keep:
                self._keep(name, value)
        if "z" in self.keep:
            self._keep("z", self._cut(z))
        return z

    def _set(self, name: str, layer: int, value: Tensor) -> Tensor:
        """Return (b, s, h, ...) with the heads of this layer set that are to be set."""
        wanted = {h: new for (number, h), new in self.sets.get(name, {}).items() if number == layer}
        if not wanted:
            return value
        value = value.clone()
        rows = torch.arange(len(value))
        for head, new in wanted.items():
            if new.dim() == value.dim() - 1:
                value[:, :, head] = new.to(value)
            else:
                value[rows, self.position, head] = new.to(value)
        return value

    def _at(self, value: Tensor, kept: Tensor) -> Tensor:
        """Return a value with what was kept at the position."""
        rows = torch.arange(len(value))
        value = value.clone()
        value[rows, self.position] = kept[rows, self.position]
        return value

    def _keep(self, name: str, value: Any) -> None:
        self.kept.setdefault(name, []).append(value)

    def _cut(self, value: Tensor) -> Tensor:
        return value if self.at is None else value[torch.arange(len(value))[:, None], self.at]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Keep and freeze what does not go through attention."""
        hooks = []
        if "resid" in self.keep:
            for block in self.of.blocks:
                hooks.append(block.layer.register_forward_pre_hook(self._resid, with_kwargs=True))
            hooks.append(
                self.of.final_norm.register_forward_pre_hook(self._resid, with_kwargs=True)
            )
        if "mlp" in self.keep or self.frozen_mlp:
            for number, block in enumerate(self.of.blocks):
                hooks.append(block.mlp.register_forward_hook(self._mlp(number)))
        for block in self.of.blocks:
            hooks.append(block.attention.register_forward_pre_hook(self._options, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _resid(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        del module
        given = args[0] if args else kwargs["hidden_states"]
        self._keep("resid", self._cut(given))

    def _mlp(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            del module, args
            whole = output if isinstance(output, Tensor) else output[0]
            if self.frozen_mlp:
                whole = self._at(whole, self.frozen_mlp[layer])
            if "mlp" in self.keep:
                self._keep("mlp", self._cut(whole))
            return whole if isinstance(output, Tensor) else (whole, *output[1:])

        return hook

    def _options(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        del module, args
        self._keep("options", {n: v for n, v in kwargs.items() if n != "hidden_states"})
