"""A causal language model of transformers that reads and writes shared blocks.

No module is touched: transformers takes attention functions by name, and the view goes as cache.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from pluribus.core.errors import InputError, MismatchError
from pluribus.core.optional import optional
from pluribus.core.renamed import cache_name
from pluribus.core.shapes import Float
from pluribus.decode.hogwild.blocks import KVBlock
from pluribus.decode.hogwild.rotation import Pairs, Rotation
from pluribus.decode.hogwild.view import SharedView

hf = optional("transformers", "hf", "workers that share a cache")

NAME = "pluribus_shared_blocks"
FIXED = ("default", "linear", "llama3", "yarn")  # kinds of RoPE whose turns don't know the length
CHUNK = 512  # tokens of a prompt that are read at once
PROBE, PIECES = 12, (7, 3, 2)  # tokens that are read as one and in pieces, to see that both agree

_current: ContextVar[SharedView] = ContextVar("view")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    del key, value, attention_mask  # the view has them, and knows who sees what
    for name in ("softcap", "s_aux", "sliding_window", "position_bias"):
        if options.get(name) is not None:
            raise InputError(f"the model's attention has {name}, which shared blocks don't carry")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _current.get().attend(query, int(module.layer_idx), scale), None  # type: ignore[arg-type]


hf.AttentionInterface.register(NAME, _attention)


class Reader:
    """Runs a model on views. What cannot be shared exactly is refused, with the reason.

    How the model turns pairs is found by running it: a dozen tokens are read at once and in pieces,
    and both must give the same logits.

    Raises InputError for models without rotary positions, whose turns depend on the length
    (dynamic, longrope) or on more than one axis, with windows or recurrent layers, or on several
    devices.
    """

    def __init__(self, model: Any) -> None:
        self.model: Any = model
        model.eval()
        frequencies = _frequencies(model)
        self.device = next(iter(model.parameters())).device
        names = inspect.signature(model.forward).parameters
        self._cache = cache_name(names)
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        self.rotation = self._found(frequencies)

    @property
    def limit(self) -> int | None:
        """Positions that the model was made for."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Let the model attend over views; afterwards it attends as it did."""
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def step(self, view: SharedView, tokens: Sequence[Sequence[int]]) -> Float[Tensor, "w v"]:
        """Read each row's new tokens; return float32 logits of what may follow the last of each.

        Call it inside `sharing`.
        """
        counts = [len(row) for row in tokens]
        places = view.begin(counts, self.device)
        most = max(counts)
        padded = [[row[0]] * (most - len(row)) + list(row) for row in tokens]
        ids = torch.tensor(padded, device=self.device)
        token = _current.set(view)
        try:
            with torch.inference_mode():
                out = self.model(
                    input_ids=ids,
                    position_ids=places,
                    use_cache=True,
                    **{self._cache: view},
                    **self._last,
                )
        finally:
            _current.reset(token)
        return out.logits[:, -1].float()

    def read(self, row: Sequence[KVBlock], tokens: Sequence[int]) -> Float[Tensor, "1 v"] | None:
        """Read tokens into the last block of a row, in chunks; return the last logits, if any."""
        logits = None
        for first in range(0, len(tokens), CHUNK):
            view = SharedView([row], self.rotation)
            logits = self.step(view, [tokens[first : first + CHUNK]])
        return logits

    def _found(self, frequencies: Tensor) -> Rotation:
        """Return the turns with which reading in pieces gives what reading at once gives."""
        size = int(self.model.config.get_text_config().vocab_size)
        rng = torch.Generator().manual_seed(0)
        ids = torch.randint(size, (PROBE,), generator=rng).tolist()
        with torch.inference_mode():
            expected = self.model(torch.tensor([ids], device=self.device)).logits[0, -1].float()
        wide = expected.dtype == next(iter(self.model.parameters())).dtype
        allowed = (1e-3 if wide else 5e-2) * float(expected.abs().max())
        errors = {}
        for pairs in ("halves", "neighbours"):
            self.rotation = Rotation(frequencies, pairs)
            errors[pairs] = float((self._in_pieces(ids) - expected).abs().max())
        best: Pairs = min(errors, key=errors.__getitem__)  # type: ignore[assignment]
        if not errors[best] <= allowed:
            raise InputError(
                f"{type(self.model).__name__}: tokens read in pieces give logits that are "
                f"{errors[best]:.2g} away from those read at once (allowed: {allowed:.2g}), so its "
                "attention does more than turn queries and keys; workers cannot share its cache"
            )
        return Rotation(frequencies, best)

    def _in_pieces(self, ids: Sequence[int]) -> Tensor:
        blocks: list[KVBlock] = []
        rest = list(ids)
        logits = None
        with self.sharing():
            for size in PIECES:
                blocks.append(KVBlock())
                logits = self.read(blocks, rest[:size])
                rest = rest[size:]
        assert logits is not None
        return logits[0]


def _frequencies(model: Any) -> Tensor:
    """Return the model's rotary frequencies. Raises InputError as `Reader` says."""
    name = type(model).__name__
    if not isinstance(model, nn.Module) or not hasattr(model, "set_attn_implementation"):
        raise InputError(f"{name} is no transformers model; workers share a transformers cache")
    whole: Any = model.config
    config = whole.get_text_config()
    if getattr(whole, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder with a decoder; workers need a causal model")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise InputError(
            f"{name} has layers of other kinds ({', '.join(sorted(kinds - {'full_attention'}))}); "
            "only full attention can be shared"
        )
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise InputError(f"{name} attends within a window; only full attention can be shared")
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise InputError(f"{name} has several kinds of RoPE; workers need one")
    kind = rope.get("rope_type", "default")
    if kind not in FIXED:
        raise InputError(
            f"{name} has RoPE of type {kind!r}, whose turns depend on the length; workers need one "
            f"of {', '.join(FIXED)}"
        )
    if "mrope_section" in rope:
        raise InputError(f"{name} has positions on several axes (mrope); workers need one")
    found = [b for n, b in model.named_buffers() if n.rsplit(".", 1)[-1] == "inv_freq"]
    if not found:
        raise InputError(
            f"{name} has no rotary positions (RoPE), so its keys cannot be moved; workers need them"
        )
    if any(not torch.equal(one.cpu(), found[0].cpu()) for one in found):
        raise InputError(f"{name} has several kinds of RoPE; workers need one")
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        raise MismatchError(f"{name} lies on {', '.join(sorted(devices))}; workers need one device")
    return found[0].detach().float().cpu()
