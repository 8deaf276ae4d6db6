"""`Routed`: one frozen base and many small parts, mixed for each row of a batch.

    theta(x) = theta_0 + sum_t w_t(x) delta_t,   w(x) = router(features(base, x))

The weights of no row are ever built: every layer adds its parts' deltas to its own output, grouped
by who needs what (`_sites`), which equals running each row through its own merge, up to rounding.
Tensors that no layer can mix (class tokens, packed attention projections, a table that is read
without a call) are an exception (`_odd`): rows with different mixtures of them may have to run one
after another, and `report()` names them.

Routing takes a first pass of the base alone for its features, unless weights are given. What is
shared stays shared: the base's tensors are neither copied nor changed, and one base may serve
several `Routed` at a time as long as only one of them runs.

Lu et al., NeurIPS 2024 (Twin-Merging, https://arxiv.org/abs/2406.15479), section 4.2, builds each
input's weights instead.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pluribus.core.errors import InputError, MismatchError, listing, nearest
from pluribus.core.shapes import Float
from pluribus.route._around import Around
from pluribus.route._banks import Banks
from pluribus.route._batch import (
    begun_as,
    joined,
    remember,
    rows_of,
    shapes_of,
    taken,
)
from pluribus.route._checking import checked
from pluribus.route._packed import followed
from pluribus.route._placing import placed
from pluribus.route._route import Current, Route
from pluribus.route._sites import AdapterSite, Site
from pluribus.route._switch import Switch
from pluribus.route.features import Features, features_of
from pluribus.route.parts import Bottleneck, Delta, Part
from pluribus.route.router import Router

Weights = Mapping[str, Float[Tensor, " b"] | float] | Float[Tensor, "b t"] | Sequence[str] | str
SHAPES = 4096  # of batches, of which it is known whether layers sort them


class Routed(Around):
    """A base with parts, called as the base is.

    `parts` maps names to parts; a part maps the base's tensor names to deltas. `router` gives
    weights (b, t) from features (b, d); `features` says which (see `pluribus.route.features`).
    `top_k` keeps the largest weights of each row, rescaled to the same sum. `heads` are linear
    layers {"weight", "bias"} on the base's output, by task, for calls with `task=`. `keep` is how
    many experts' merged tensors are kept for batches that take one part alone, and for `switch`.

    Raises MismatchError for parts that do not fit the base, or a router with other names.
    """

    def __init__(
        self,
        base: nn.Module,
        parts: Mapping[str, Part],
        router: Router | None = None,
        *,
        features: Features | str = "output",
        top_k: int | None = None,
        heads: Mapping[str, Mapping[str, Tensor]] | None = None,
        keep: int = 0,
    ) -> None:
        super().__init__()
        if not parts:
            raise InputError("there is no part to route to; give at least one")
        self.base = base.requires_grad_(False).eval()
        self.names = tuple(parts)
        self.features = features_of(features)
        if top_k is not None and not 1 <= top_k <= len(parts):
            raise InputError(f"top_k is {top_k}; there are {len(parts)} parts")
        self.top_k = top_k
        self.heads = {task: dict(head) for task, head in (heads or {}).items()}
        self._current = Current()
        # Where a parameter is: asking the base for its first one takes as long as a small layer.
        self._first = next(
            (table, name)
            for module in base.modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        )
        self._last: Route | None = None
        self._unsorted: set[tuple] = set()  # shapes of batches that no layer sorts
        self._switch = Switch(base)
        self.keep = keep
        self.sites, self.odd, self._tied = placed(base, parts)
        self._looked = False  # whether all sites have been seen to run
        self._handles = {site: site.attach(self._current) for site in self.sites}  # type: ignore[operator]
        self.router: Router | None = None
        if router is not None:
            self.set_router(router)

    # -- building --------------------------------------------------------------------------------

    def set_router(self, router: Router) -> None:
        """Use a router. Raises MismatchError unless it knows exactly these parts, by name."""
        names = tuple(router.names)
        if sorted(names) != sorted(self.names):
            raise MismatchError(
                f"the router knows the parts {listing(names)}; here are {listing(self.names)}"
            )
        self.router = router
        self._order = [names.index(name) for name in self.names]

    # -- routing ---------------------------------------------------------------------------------

    def embed(self, *args: Any, **kwargs: Any) -> Float[Tensor, "b d"]:
        """Return the router's features: one pass of the base alone."""
        with self._routed(None):
            return self.features(self.base, *args, **kwargs)

    def route(self, *args: Any, **kwargs: Any) -> Float[Tensor, "b t"]:
        """Return what the router gives each row of these inputs, a column for each of `names`.

        Raises InputError without a router, NonFiniteError for weights that are not finite.
        """
        if self.router is None:
            raise InputError(
                "there is no router yet: fit one (pluribus.route.fit_router), or give weights="
            )
        with torch.no_grad():
            return self.weigh(self.embed(*args, **kwargs))

    def weigh(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b t"]:
        """Return what the router gives rows of features, a column for each of `names`."""
        if self.router is None:
            raise InputError("there is no router yet: fit one (pluribus.route.fit_router)")
        return self._limited(self.router(features)[:, self._order])

    def _limited(self, weights: Tensor) -> Tensor:
        if self.top_k is None or self.top_k == weights.shape[1]:
            return weights
        found = weights.topk(self.top_k, dim=1)
        kept = torch.zeros_like(weights).scatter(1, found.indices, found.values)
        total, left = weights.sum(1, keepdim=True), kept.sum(1, keepdim=True)
        return kept * torch.where(left != 0, total / left, torch.ones_like(left))

    def weights(self, given: Weights, rows: int) -> Float[Tensor, "b t"]:
        """Return weights (b, t) of what a user may give: names, a name for each row, or numbers.

        Raises InputError for an unknown part or a wrong number of rows.
        """
        table_of, attribute = self._first
        like: Any = table_of[attribute]
        if isinstance(given, str):
            given = [given] * rows
        if isinstance(given, Tensor):
            if given.shape != (rows, len(self.names)):
                raise InputError(
                    f"weights are {list(given.shape)}; expected {[rows, len(self.names)]}: a row "
                    f"an input, columns {', '.join(self.names)}"
                )
            return given.to(like.device)
        table = torch.zeros(rows, len(self.names), device=like.device)
        if isinstance(given, Mapping):
            for name, weight in given.items():
                table[:, self._number(name)] = torch.as_tensor(weight, dtype=table.dtype)
            return table
        if len(given) != rows:
            raise InputError(f"{len(given)} parts were named for a batch of {rows}")
        for row, name in enumerate(given):
            table[row, self._number(name)] = 1.0
        return table

    def _number(self, name: str) -> int:
        if name not in self.names:
            raise InputError(
                f"there is no part {name!r}; there are: {', '.join(self.names)}."
                f"{nearest(name, self.names)}"
            )
        return self.names.index(name)

    @contextmanager
    def _routed(self, route: Route | None) -> Iterator[None]:
        before, self._current.route = self._current.route, route
        try:
            yield
        finally:
            self._current.route = before

    @contextmanager
    def mixing(self, weights: Float[Tensor, "b t"]) -> Iterator[nn.Module]:
        """Let the base run with these weights inside the block, whatever runs it.

        For loops of one's own. Raises InputError if a part moves tensors that no layer can mix and
        the rows differ in them.
        """
        route = Route(weights)
        groups = self.odd.groups(route)
        if len(groups) > 1 and not self.odd.spreads:
            raise InputError(
                f"rows with different mixtures of {listing(self.odd.names)} cannot run in one "
                "batch; call the composite itself, or run them apart"
            )
        moved = (
            self.odd.spread(route)
            if len(groups) > 1
            else self.odd.standing(route, groups[0][1] if groups else None)
        )
        with self._routed(route), moved:
            yield self.base

    # -- running ---------------------------------------------------------------------------------

    def forward(
        self,
        *args: Any,
        weights: Weights | None = None,
        task: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what the base returns, every row through its own mixture of parts.

        `weights` instead of the router's; with an attention cache that an earlier call of this
        composite filled, rows go on as they were routed there. `task` puts that task's head on the
        output, which chooses no part. Raises InputError for a part, task or batch that is not
        there.
        """
        rows = rows_of(args, kwargs)
        head = None if task is None else self._head(task)
        if self.switched is not None:
            self._only(weights, rows)
            return _headed(self.base(*args, **kwargs), head)
        if weights is not None:
            table = self.weights(weights, rows)
        elif (begun := begun_as(args, kwargs, rows)) is not None:
            table = begun
        else:
            table = self.route(*args, **kwargs)
        out = self._run(args, kwargs, table, rows)
        if not self._looked:
            self._looked = True
            if silent := [site for site in self.sites if not site.seen]:
                self._demote(silent)  # type: ignore[arg-type]
                out = self._run(args, kwargs, table, rows)
        remember(out, table)
        return _headed(out, head)

    def _only(self, weights: Weights | None, rows: int) -> None:
        """Refuse other parts than the one that was switched to."""
        if weights is None:
            return
        table = self.weights(weights, rows)
        if not torch.equal(table, self.weights(str(self.switched), rows)):
            raise InputError(
                f"the base is switched to {self.switched}; call switch(None) to mix parts again"
            )

    def _run(self, args: tuple, kwargs: dict[str, Any], table: Tensor, rows: int) -> Any:
        """Run the base with each row's parts, by whichever way the odd tensors allow."""
        if (alone := self._alone(table)) is not None:
            with alone:
                return self.base(*args, **kwargs)
        shapes = shapes_of(args, kwargs)
        order = None if shapes is None or shapes in self._unsorted else self._sorted(table)
        if order is None:
            route = self._known(table)
            out = checked(self._mixed, self._demote, args, kwargs, route)
        else:
            route = self._known(table[order])
            some, named = taken(args, kwargs, order, rows)
            out = joined([checked(self._mixed, self._demote, some, named, route)], [order], rows)
        if shapes is not None and not torch.is_grad_enabled():
            if route.copied:
                self._unsorted.discard(shapes)
            elif len(self._unsorted) < SHAPES:
                self._unsorted.add(shapes)
        return out

    def _known(self, table: Tensor) -> Route:
        """Return the last batch's route where the weights are the same, as decoding goes on."""
        if followed():
            return Route(table)
        if self._last is None or not self._last.serves(table):
            self._last = Route(table.clone())  # which nobody else can change
        return self._last

    def _mixed(self, args: tuple, kwargs: dict[str, Any], route: Route) -> Any:
        odd = self.odd
        if not odd.names:
            return self._with(route, args, kwargs)
        groups = odd.groups(route)
        if len(groups) < 2:
            with odd.standing(route, groups[0][1] if groups else None):
                return self._with(route, args, kwargs)
        if odd.spreads:
            with odd.spread(route):
                return self._with(route, args, kwargs)
        outputs = []
        for places, mixture in groups:
            assert places is not None
            some, named = taken(args, kwargs, places, route.rows)
            part = Route(route.weights[places])
            part.unsure = route.unsure
            with odd.standing(part, mixture):
                outputs.append(self._with(part, some, named))
        out = joined(outputs, [places for places, _ in groups], route.rows)  # type: ignore[misc]
        if odd.spreads is None:
            with self._routed(route):
                odd.spreads = odd.agrees(out, args, kwargs, route)
        return out

    def _with(self, route: Route, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the base while its layers see a route."""
        before, self._current.route = self._current.route, route
        try:
            return self.base(*args, **kwargs)
        finally:
            self._current.route = before

    def _sorted(self, table: Tensor) -> Tensor | None:
        """Return the order that puts rows of one part side by side; None: as they are.

        Layers then read each part's rows without copying them.
        """
        if len(table) < 3 or torch.is_grad_enabled():
            return None
        chief = table.argmax(1)
        order = chief.argsort(stable=True)
        return None if bool((chief[order] == chief).all()) else order

    def _demote(self, silent: Sequence[Site]) -> None:
        """Mix tensors of modules that the base reads without calling them as odd ones.

        And what shares them, or they would be mixed twice.
        """
        for site in silent:
            if isinstance(site, AdapterSite):
                raise MismatchError(
                    f"the base does not run {site.path} on these inputs, so the adapters behind it "
                    "do nothing; name a module that runs"
                )
        theirs = {id(found) for site in silent for found in site.banks.values()}
        leave: list[Site] = []
        for site in self.sites:
            if any(id(found) in theirs for found in site.banks.values()):  # type: ignore[union-attr]
                leave.append(site)  # type: ignore[arg-type]
        self.sites = nn.ModuleList(site for site in self.sites if site not in leave)
        for site in leave:
            for place, found in self._listed(site):
                self.odd.add(place, found)
            self._handles.pop(site).remove()

    def _head(self, task: str) -> Mapping[str, Tensor]:
        if task not in self.heads:
            raise InputError(
                f"there is no head for task {task!r}; heads: "
                f"{', '.join(self.heads) or 'none'}.{nearest(task, self.heads)}"
            )
        return self.heads[task]

    def generate(self, *args: Any, weights: Weights | None = None, **kwargs: Any) -> Any:
        """Write with the base's own `generate`, routed once by the prompt.

        Takes what the base's takes (`input_ids`, `attention_mask`, beams, a streamer). Raises
        InputError if the base cannot generate.
        """
        run: Callable[..., Any] | None = getattr(self.base, "generate", None)
        if run is None:
            raise InputError(f"{type(self.base).__name__} cannot generate: it has no such method")
        prompt = {k: kwargs[k] for k in ("input_ids", "attention_mask", "inputs") if k in kwargs}
        ids = args[0] if args else prompt.get("input_ids", prompt.get("inputs"))
        if ids is None:
            raise InputError("give the prompt's input_ids")
        rows = len(ids)
        if self.switched is not None:
            self._only(weights, rows)
            return run(*args, **kwargs)
        if weights is None:
            mask = prompt.get("attention_mask")
            table = self.route(ids, **({} if mask is None else {"attention_mask": mask}))
        else:
            table = self.weights(weights, rows)
        with torch.no_grad(), self._alone(table) or self.mixing(table):
            return run(*args, **kwargs)

    @property
    def switched(self) -> str | None:
        """The part that stands in the base's own tensors, if one does."""
        return self._switch.name

    @property
    def keep(self) -> int:
        """How many experts' merged tensors are kept, each as large as what its part moves.

        A batch whose rows all take one part alone (without gradients) then runs on them, at the
        base's own cost; the expert used longest ago goes first. Set it to 0 to keep none.
        """
        return self._switch.limit

    @keep.setter
    def keep(self, limit: int) -> None:
        """Keep at most that many."""
        self._switch.keep(limit)

    def _alone(self, table: Tensor) -> AbstractContextManager[Any] | None:
        """Return a block in which the base is the one expert that all rows take, if that is so."""
        if not self.keep or not self._looked or torch.is_grad_enabled():
            return None
        number = int(table[0].argmax())
        name = self.names[number]
        if not torch.equal(table, self.weights(name, len(table)).to(table)):
            return None
        if any(isinstance(site, AdapterSite) and number in site.members for site in self.sites):
            return None
        return self._switch.standing(self._switch.ready(name, lambda: self.part(name)))

    def switch(self, name: str | None) -> list[str]:
        """Put one part into the base's own tensors, so that every row takes it; None undoes it.

        For long runs of one part: the base then costs what it costs alone. With `keep`, experts
        that were made before are only pointed at; else the part is written over the base, of which
        a copy waits. Origins come back bit for bit. Returns the tensors that changed. Raises
        InputError for an unknown part, or a part with adapters.
        """
        return self._switch.to(name, {} if name is None else self.part(name))

    # -- looking in ------------------------------------------------------------------------------

    def part(self, name: str) -> dict[str, Delta | Bottleneck]:
        """Return one part's deltas, by tensor (adapters by module)."""
        number = self._number(name)
        found: dict[str, Delta | Bottleneck] = {}
        for site in self.sites:
            if isinstance(site, AdapterSite):
                if number in site.members:
                    found[site.path] = site.at(number)
                continue
            for place, kept in self._listed(site):  # type: ignore[arg-type]
                for bank in kept:
                    if number in bank.members:
                        found[place] = bank.at(bank.members.index(number))
        for tensor, kept in self.odd.items():
            for bank in kept:
                if number in bank.members:
                    found[tensor] = bank.at(bank.members.index(number))
        return found

    def _listed(self, site: Site) -> Iterator[tuple[str, Banks]]:
        """Iterate over a site's tensors by name, less second names of tied ones."""
        seconds = {other for others in self._tied.values() for other in others}
        for tensor, kept in site.banks.items():
            place = f"{site.path}.{tensor}" if site.path else tensor
            if place not in seconds:
                yield place, kept  # type: ignore[misc]

    def materialise(self, weights: Mapping[str, float] | str) -> dict[str, Tensor]:
        """Return the state dict of the base merged with these weights of the parts.

        Raises InputError for an unknown part, or a part with adapters: those are no deltas of
        tensors.
        """
        if self.switched is not None:
            raise InputError(f"the base is switched to {self.switched}; call switch(None) first")
        shares = {weights: 1.0} if isinstance(weights, str) else weights
        state = {name: t.detach().clone() for name, t in self.base.state_dict().items()}
        origin = self.base.state_dict()
        for label, share in shares.items():
            for name, delta in self.part(label).items():
                if isinstance(delta, Bottleneck):
                    raise InputError(
                        f"part {label} has an adapter behind {name}, which is no delta of a tensor"
                    )
                if share:
                    base = origin[name]
                    state[name] = state[name] + (share * delta.delta(base)).to(base.dtype)
        for name, others in self._tied.items():
            state.update(dict.fromkeys(others, state[name]))
        return state

    def report(self) -> dict[str, Any]:
        """Return bytes of base and parts, forms by tensor, and the tensors that no layer mixes."""
        own = {id(t): t.numel() * t.element_size() for t in self.base.state_dict().values()}
        parts = sum(t.numel() * t.element_size() for t in self._stored())
        router = self.router.parameters() if isinstance(self.router, nn.Module) else ()
        return {
            "parts": list(self.names),
            "base_bytes": sum(own.values()),
            "parts_bytes": parts,
            "router_bytes": sum(t.numel() * t.element_size() for t in router),
            "heads_bytes": sum(
                t.numel() * t.element_size() for h in self.heads.values() for t in h.values()
            ),
            "run_apart": [] if self.odd.spreads else list(self.odd.names),
            "forms": {
                name: {tensor: type(delta).__name__ for tensor, delta in self.part(name).items()}
                for name in self.names
            },
        }

    def save(self, folder: str | os.PathLike[str], **settings: Any) -> None:
        """Write the composite to a folder: see `pluribus.route.store.save`."""
        from pluribus.route.store import save

        save(self, folder, **settings)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        module: nn.Module | None = None,
        *,
        device: str = "cpu",
    ) -> "Routed":
        """Read a composite from a folder: see `pluribus.route.store.load`."""
        from pluribus.route.store import load

        return load(folder, module, device=device)

    def _stored(self) -> Iterator[Tensor]:
        for module in (self.sites, self.odd):
            yield from module.parameters()
            yield from module.buffers()

    def __deepcopy__(self, memo: dict) -> NoReturn:
        """Refuse: the layers of a copied base would go on asking these parts."""
        raise InputError("a composite cannot be deep-copied; save it, and load it again")

    def detach(self) -> nn.Module:
        """Take the parts out of the base for good, and return the base."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}
        return self.base


def _headed(out: Any, head: Mapping[str, Tensor] | None) -> Any:
    if head is None:
        return out
    return nn.functional.linear(out, *(head[n].to(out) for n in ("weight", "bias")))
