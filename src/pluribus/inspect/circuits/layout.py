"""Where a model keeps its blocks, heads and feed-forward parts, found by running it.

A dozen tokens are read once with hooks on every module, and what came out is compared with what
went in elsewhere. No class or module is known by name. A block is understood if

    sequential   y = x + W_O z;   x' = y + mlp(norm2(y))       z = attention(norm1(x))
    parallel     x' = x + W_O z + mlp(norm2(x))

gives what the block gave, to rounding. Everything else is refused, with what did not fit.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pluribus.core.errors import InputError, MismatchError
from pluribus.inspect.circuits.attention import attending, mixed, pattern_of

PROBE = 12  # tokens


@dataclass(frozen=True)
class Block:
    """One layer's parts."""

    layer: nn.Module
    attention: nn.Module
    out: nn.Module  # W_O, with its bias: takes all heads' outputs side by side
    mlp: nn.Module
    before_attention: nn.Module  # the norms
    before_mlp: nn.Module
    parallel: bool


@dataclass(frozen=True)
class Layout:
    """A model's parts, in the order in which a token meets them."""

    trunk: nn.Module  # from tokens to the final norm
    blocks: tuple[Block, ...]
    final_norm: nn.Module
    head: nn.Module
    heads: int
    groups: int  # of keys and values
    size: int  # values of a head's output
    width: int


class _Seen:
    """What every module took and gave, by its first tensor; the first call of each."""

    def __init__(self) -> None:
        self.took: dict[nn.Module, Tensor] = {}
        self.gave: dict[nn.Module, Tensor] = {}

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = [*args, kwargs.get("hidden_states"), kwargs.get("x"), kwargs.get("input")]
        took = next((one for one in given if isinstance(one, Tensor)), None)
        gave = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(took, Tensor) and isinstance(gave, Tensor):
            self.took.setdefault(module, took)
            self.gave.setdefault(module, gave)


@torch.no_grad()
def find(model: Any) -> Layout:
    """Return a causal language model's parts.

    Raises InputError for a model of another kind or with blocks that are not understood,
    MismatchError if it lies on several devices.
    """
    name = type(model).__name__
    trunk = getattr(model, "base_model", None)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(model, nn.Module) or not hasattr(model, "set_attn_implementation"):
        raise InputError(f"{name} is no transformers model; heads are found in transformers models")
    if getattr(model.config, "is_encoder_decoder", False) or head is None or trunk is model:
        raise InputError(f"{name} is no causal language model; open one that predicts tokens")
    assert isinstance(trunk, nn.Module)
    assert isinstance(head, nn.Module)
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        raise MismatchError(f"{name} lies on {', '.join(sorted(devices))}; put it on one device")
    model.eval()
    seen, calls, logits, last = _probe(model)
    if not calls:
        raise InputError(
            f"{name} computes attention by itself, not by transformers' attention interface, so "
            "its heads cannot be reached; models such as GPT-2, Llama, Qwen and GPT-NeoX can"
        )
    shapes = {(q.shape[1], k.shape[1], z.shape[3]) for _, q, k, z in calls}
    if len(shapes) > 1:
        raise InputError(f"{name} has layers with different numbers of heads: {sorted(shapes)}")
    names = {module: path for path, module in model.named_modules()}
    parts = dict(model.named_modules())
    blocks = []
    for attention, _, _, z in calls:
        layer = parts[names[attention].rpartition(".")[0]]
        blocks.append(_block(f"{name}: {names[layer]}", layer, attention, z, seen))
    if not _near(head(last), logits):
        raise InputError(f"{name}: logits are not the head's output; it scales or caps them")
    inside = {module for block in blocks for module in block.layer.modules()}
    top = seen.gave[blocks[-1].layer]
    norms = [
        module
        for module in seen.gave
        if module not in inside
        and _own(module)
        and _near(seen.took[module], top)
        and _near(seen.gave[module], last)
    ]
    if not norms:
        raise InputError(f"{name}: there is no norm between the last block and the head")
    (heads, groups, size) = next(iter(shapes))
    return Layout(trunk, tuple(blocks), norms[0], head, heads, groups, size, top.shape[-1])


def _probe(model: Any) -> tuple[_Seen, list[Any], Tensor, Tensor]:
    """Return what modules took and gave, the calls of attention, logits and what the head took."""
    calls: list[Any] = []

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        z = mixed(pattern_of(q, k, scaling), v)
        calls.append((module, q, k, z))
        return z

    seen = _Seen()
    size = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(size, (1, PROBE), generator=torch.Generator().manual_seed(0))
    ids = ids.to(next(iter(model.parameters())).device)
    hooks = [m.register_forward_hook(seen, with_kwargs=True) for m in model.modules()]
    try:
        with attending(model, attend):
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    ended = model.get_output_embeddings()
    last = seen.took.get(ended)
    if last is None or last.shape[:2] != ids.shape:
        raise InputError(f"{type(model).__name__}: its head does not read all tokens of a prompt")
    return seen, calls, logits, last


def _block(where: str, layer: nn.Module, attention: nn.Module, z: Tensor, seen: _Seen) -> Block:
    """Return one layer's parts. Raises InputError naming what does not fit."""
    x, x_after = seen.took[layer], seen.gave[layer]
    flat = z.flatten(2)
    outs = [m for m in attention.modules() if m in seen.took and _same(seen.took[m], flat)]
    if not outs:
        raise InputError(f"{where}: no module takes the heads' outputs side by side")
    out = outs[0]
    attended = seen.gave[out]
    children = [child for child in layer.children() if child in seen.gave]
    fed = [
        child
        for child in children
        if child is not attention and _own(child) and _fits(x + attended, child, seen, x_after)
    ]
    if not fed:
        raise InputError(
            f"{where}: its output is not its input plus attention plus one more part, so what a "
            "head adds cannot be followed (norms behind attention, scaled residuals?)"
        )
    mlp = fed[-1]
    first = [c for c in children if c in seen.gave and _same(seen.gave[c], seen.took[attention])]
    second = [c for c in children if c is not mlp and _same(seen.gave[c], seen.took[mlp])]
    if not first or not second:
        raise InputError(f"{where}: attention and the part behind it do not each read from a norm")
    taken = seen.took[second[0]]
    if not (parallel := _same(taken, x)) and not _near(taken, x + attended):
        raise InputError(f"{where}: the part behind attention reads neither its input nor the sum")
    return Block(layer, attention, out, mlp, first[0], second[0], parallel)


def _fits(sum_so_far: Tensor, child: nn.Module, seen: _Seen, x_after: Tensor) -> bool:
    gave = seen.gave[child]
    return gave.shape == x_after.shape and _near(sum_so_far + gave, x_after)


def _own(module: nn.Module) -> bool:
    return next(iter(module.parameters()), None) is not None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _near(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    allowed = 1e-4 if other.dtype == torch.float32 else 3e-2
    return bool((one - other).abs().max() <= allowed * other.abs().max())
