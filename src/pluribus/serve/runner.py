"""How the batch calls a model: ids, masks and positions in, logits out; a route for each row.

A `Runner` is made for models whose rows can be batched; `runner_of` finds out by trying: the same
rows alone and together must give the same logits.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pluribus.core.renamed import cache_name
from pluribus.core.shapes import Float, Int
from pluribus.serve import cache as kv
from pluribus.serve.fusing import FusedRunner

CHUNK = 512  # tokens of a prompt that are read between two tokens of the others


class Runner:
    """A causal language model of transformers, or a composite around one."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.routed = hasattr(model, "route") and hasattr(model, "sites")

    @property
    def device(self) -> torch.device:
        """Where ids go."""
        return next(self.model.parameters()).device

    @cached_property
    def _accepts(self) -> frozenset[str]:
        runs = self.model.base if self.routed else self.model
        return frozenset(inspect.signature(runs.forward).parameters)

    def route(self, ids: Sequence[int], part: str | None = None) -> Float[Tensor, "1 t"] | None:
        """Return what a composite decides for a prompt, or one part alone; None: no composite."""
        if not self.routed:
            return None
        if part is not None:
            return self.model.weights(part, 1)
        given = torch.tensor([list(ids)], device=self.device)
        return self.model.route(input_ids=given, attention_mask=torch.ones_like(given))

    def empty(self) -> Any:
        """Return a cache for a prompt."""
        return kv.empty()

    def join(self, caches: Sequence[Any]) -> Any:
        """Return one cache of the rows of several."""
        return kv.join(caches)

    def keep(self, cache: Any, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Keep some rows of those with these lengths."""
        kv.keep(cache, rows, max(lengths) - max(lengths[i] for i in rows))

    def size(self, ids: Sequence[int], inputs: Mapping[str, Any]) -> int:
        """Return how many tokens are to be read."""
        return len(ids)

    def read(
        self,
        ids: Sequence[int],
        inputs: Mapping[str, Any],
        begin: int,
        end: int,
        cache: Any,
        routes: Float[Tensor, "1 t"] | None = None,
        every: bool = False,
    ) -> Float[Tensor, "s v"]:
        """Read a piece of a prompt; return the logits of its last position, or of all."""
        piece = torch.tensor([list(ids[begin:end])], device=self.device)
        seen = torch.ones(1, end, dtype=torch.long, device=self.device)
        return self(piece, seen, cache, routes, every)[0]

    def __call__(
        self,
        ids: Int[Tensor, "b s"],
        seen: Int[Tensor, "b a"],
        cache: Any,
        routes: Float[Tensor, "b t"] | None = None,
        every: bool = False,
    ) -> Float[Tensor, "b s v"]:
        """Return the logits of the last position, or of all, and add to the cache."""
        places = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        named = cache_name(self._accepts)
        given: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": seen,
            "position_ids": places,
            named: cache,
            "use_cache": True,
        }
        if not every and "logits_to_keep" in self._accepts:
            given["logits_to_keep"] = 1
        if routes is not None:
            given["weights"] = routes
        logits = self.model(**given).logits
        return logits if every else logits[:, -1:]


def runner_of(model: Any) -> "Runner | FusedRunner | None":
    """Return how a model's rows are batched, or None where they cannot be.

    Two prompts of different lengths are read alone and as a batch; a model whose logits differ by
    more than rounding, or that raises, writes one answer at a time.
    """
    if not hasattr(getattr(model, "base", model), "prepare_inputs_for_generation"):
        return None
    try:
        if hasattr(model, "members_by_role"):  # Fused
            with _unwatched(model):
                fused = FusedRunner(model)
                return fused if fused.fits and _agrees(fused) else None
        runner = Runner(model)
        if {"position_ids", "attention_mask"} - runner._accepts:
            return None
        return runner if _agrees(runner) else None
    except Exception:  # whatever a model raises at inputs that it was not made for
        return None


class _Blind:
    """Sees nothing to warn of."""

    def look(self, info: Mapping[str, Any]) -> None:
        """Do nothing."""


@contextmanager
def _unwatched(model: Any) -> Iterator[None]:
    """Let a fused model read nonsense without a warning that its members are far apart."""
    before, model.watch = model.watch, _Blind()
    try:
        yield
    finally:
        model.watch = before


@torch.inference_mode()
def _agrees(runner: Runner | FusedRunner) -> bool:
    size = int(runner.model.config.vocab_size)
    rows = [[(7 * i + 3) % size for i in range(5)], [(11 * i + 5) % size for i in range(9)]]
    one = torch.ones(1, 1, dtype=torch.long, device=runner.device)
    caches, routes, alone = [], [], []
    parts = getattr(runner.model, "names", [None]) if runner.routed else [None]
    for i, row in enumerate(rows):
        ids = torch.tensor([row], device=runner.device)
        route = runner.route(row, parts[i % len(parts)])  # rows of different parts
        routes.append(route)
        pair = []
        for cache in (runner.empty(), runner.empty()):  # one to go on alone, one to join
            runner(ids, torch.ones_like(ids), cache, route)
            pair.append(cache)
        caches.append(pair[1])
        alone.append(runner(one, torch.ones(1, len(row) + 1).to(ids), pair[0], route)[0, 0])
    cache = runner.join(caches)
    seen = torch.ones(2, 10, dtype=torch.long, device=runner.device)
    seen[0, :4] = 0
    both = None if routes[0] is None else torch.cat(routes)  # type: ignore[arg-type]
    together = runner(one.expand(2, 1), seen, cache, both)[:, 0]
    expected = torch.stack(alone).float()
    size_of = float(expected.abs().max())
    rounding = 64 * torch.finfo(together.dtype).eps
    return bool(((together.float() - expected).abs() <= rounding * max(size_of, 1e-6)).all())
