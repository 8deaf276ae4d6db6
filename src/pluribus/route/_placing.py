"""Where each tensor of the parts is mixed: at a module of the base as it runs, or as an odd one."""

from collections.abc import Mapping

from torch import Tensor, nn

from pluribus.core.errors import MismatchError, nearest
from pluribus.route._banks import Banks, banks
from pluribus.route._batch import close
from pluribus.route._odd import Odd
from pluribus.route._sites import AdapterSite, Site, mixer
from pluribus.route.parts import Bottleneck, Delta, Part

Tied = dict[str, tuple[str, ...]]  # other names of tensors that have several, by the first


def placed(base: nn.Module, parts: Mapping[str, Part]) -> tuple[nn.ModuleList, Odd, Tied]:
    """Return the sites of all parts' deltas, what no site can mix, and names that are tied.

    Raises MismatchError for a part that does not fit the base.
    """
    modules = dict(base.named_modules(remove_duplicate=False))
    state = base.state_dict(keep_vars=True)
    tables: dict[str, dict[int, Delta]] = {}
    adapters: dict[str, dict[int, Bottleneck]] = {}
    for number, (label, part) in enumerate(parts.items()):
        for name, delta in part.items():
            if isinstance(delta, Bottleneck):
                if name not in modules:
                    raise MismatchError(
                        f"part {label}: the base has no module {name!r}.{nearest(name, modules)}"
                    )
                adapters.setdefault(name, {})[number] = delta
                continue
            if name not in state:
                raise MismatchError(
                    f"part {label}: the base has no tensor {name!r}.{nearest(name, state)}"
                )
            try:
                delta.check(name, state[name])
            except MismatchError as error:
                raise MismatchError(f"part {label}: {error}") from None
            tables.setdefault(name, {})[number] = delta
    tied = _tied(state)
    by_module: dict[str, dict[str, Banks]] = {}
    odd: dict[str, Banks] = {}
    kinds: dict[str, type[Site]] = {}
    for name, found in _one_each(tables, state, tied, tuple(parts)).items():
        kept, places = banks(found), [name, *tied.get(name, ())]
        known = [_mixable(place, modules) for place in places]
        if any(kind is None for kind in known):
            odd[name] = kept
            continue
        for place, kind in zip(places, known, strict=True):
            path, _, attribute = place.rpartition(".")
            same = (modules[path] is modules[other] for other in by_module if other != path)
            if len(places) > 1 and any(same):
                continue  # one module under two names
            by_module.setdefault(path, {})[attribute] = kept
            kinds[path] = kind  # type: ignore[assignment]
    sites: list[Site] = [
        kinds[path](path, modules[path], found) for path, found in by_module.items()
    ]
    sites += [AdapterSite(path, modules[path], found) for path, found in adapters.items()]
    return nn.ModuleList(sites), Odd(base, odd), tied


def _one_each(
    tables: Mapping[str, Mapping[int, Delta]],
    state: Mapping[str, Tensor],
    tied: Tied,
    labels: tuple[str, ...],
) -> dict[str, dict[int, Delta]]:
    """Return the deltas of tensors with several names under the first of these alone.

    Raises MismatchError if a part gives one tensor two different deltas.
    """
    first = {other: name for name, others in tied.items() for other in others}
    out: dict[str, dict[int, Delta]] = {}
    for name, found in tables.items():
        chief = first.get(name, name)
        mine = out.setdefault(chief, {})
        for number, delta in found.items():
            if number not in mine:
                mine[number] = delta
                continue
            base = state[chief].detach()
            if not close(delta.delta(base), mine[number].delta(base)):
                raise MismatchError(
                    f"part {labels[number]}: {chief} and {name} are one tensor in the "
                    "base, but their deltas differ; leave one of them out"
                )
    return {name: dict(sorted(found.items())) for name, found in out.items()}


def _tied(state: Mapping[str, Tensor]) -> Tied:
    """Return the other names of tensors that have several, as tied embeddings do, by the first."""
    seen: dict[int, list[str]] = {}
    for name, tensor in state.items():
        seen.setdefault(id(tensor), []).append(name)
    return {first: tuple(others) for first, *others in seen.values() if others}


def _mixable(place: str, modules: Mapping[str, nn.Module]) -> type[Site] | None:
    """Return what mixes deltas of a tensor where its module runs, or None if nothing can."""
    path, _, attribute = place.rpartition(".")
    kind = None if _read_oddly(path, modules) else mixer(modules[path])
    return kind if kind is not None and attribute in kind.tensors else None


def _read_oddly(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a hook on a module is no place to mix.

    nn.MultiheadAttention runs its parts without a call, and what T5 looks up in its bias of
    relative places has no axis for the batch.
    """
    pieces = path.split(".")
    above = (".".join(pieces[:i]) for i in range(len(pieces) + 1))
    inside = any(isinstance(modules.get(p), nn.MultiheadAttention) for p in above)
    return inside or pieces[-1] == "relative_attention_bias"
