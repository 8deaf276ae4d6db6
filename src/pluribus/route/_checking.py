"""Whether layers that had to guess whose inputs they were given guessed right.

A row that runs alone leaves nothing to guess. So the first mixed batch that can be split is
compared with a few of its rows alone; other guesses are tried if it differs, and layers for which
none is right are mixed as odd tensors (`_odd`) from then on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pluribus.route._batch import close, own_rows, splits, taken
from pluribus.route._route import Route
from pluribus.route._sites import Site, UnlikeError

FEW = 3  # rows that run alone, of different mixtures
WRONG = (RuntimeError, IndexError, TypeError, ValueError)  # what wrong shapes raise

Run = Callable[[tuple, dict[str, Any], Route], Any]


def checked(
    plain: Run,
    demote: Callable[[Sequence[Site]], None],
    args: tuple,
    kwargs: dict[str, Any],
    route: Route,
) -> Any:
    """Return what `plain` gives; with `demote`, layers are taken out that cannot be mixed right."""
    if not splits(args, kwargs):
        route.unsure = None
        return plain(args, kwargs, route)

    def run(args: tuple, kwargs: dict[str, Any], route: Route) -> Any:
        """Run, without the modules that turn out to be unlike what they seem."""
        while True:
            route.unsure = {}
            try:
                return plain(args, kwargs, route)
            except UnlikeError as error:
                # Wrong numbers of rows may come of a wrong guess before.
                if not error.certain and any(doubtful for _, doubtful in route.unsure.values()):
                    raise
                demote([error.site])

    failed: Exception | None = None
    out: Any = None
    try:
        out = run(args, kwargs, route)
    except WRONG as error:
        if not route.unsure:
            raise
        failed = error
    if not (guessed := route.unsure):
        return out
    route.unsure = None
    alone = _alone(run, args, kwargs, route)
    if failed is None and _agree(out, alone, route.rows):
        _settle(guessed)
        return out
    for others in _others(guessed):
        for site, (shared, doubtful) in others.items():
            if doubtful:
                site.shared = shared
        out, right = _tried(run, args, kwargs, route, alone)
        if right:
            _settle(others)
            return out
    for site, (_, doubtful) in guessed.items():
        if doubtful:
            site.shared = None
    for some in _doubted(guessed):
        demote(some)
        out, right = _tried(run, args, kwargs, route, alone)
        if right:
            _settle({site: told for site, told in guessed.items() if site not in some})
            return out
    return run(args, kwargs, Route(route.weights))  # rows of this base are not apart themselves


Guesses = dict[Any, tuple[bool, bool]]  # for each site: inputs are shared, which was doubtful


def _settle(guessed: Guesses) -> None:
    for site, (shared, doubtful) in guessed.items():
        site.known.add(shared)
        if doubtful:
            site.shared = shared


def _doubted(guessed: Guesses) -> Iterator[list[Site]]:
    """Iterate over the sites to be taken out: first those in doubt, at last all."""
    doubts = [site for site, (_, doubtful) in guessed.items() if doubtful]
    shared = [site for site, (shared, _) in guessed.items() if shared and site not in doubts]
    rest = [site for site in guessed if site not in doubts and site not in shared]
    yield from (some for some in (doubts, shared, rest) if some)


def _tried(
    run: Run, args: tuple, kwargs: dict[str, Any], route: Route, alone: Sequence[tuple[Tensor, Any]]
) -> tuple[Any, bool]:
    """Return what a batch gives, and whether it is right."""
    try:
        out = run(args, kwargs, Route(route.weights))
    except WRONG:
        return None, False
    return out, _agree(out, alone, route.rows)


def _others(guessed: Guesses) -> Iterator[Guesses]:
    """Iterate over other guesses where there is doubt: one other than before, then all."""
    doubts = [site for site, (_, doubtful) in guessed.items() if doubtful]
    for turned in [[site] for site in doubts] + [doubts] * (len(doubts) > 1):
        yield guessed | {site: (not guessed[site][0], True) for site in turned}


def _alone(run: Run, args: tuple, kwargs: dict[str, Any], route: Route) -> list[tuple[Tensor, Any]]:
    """Return some rows and what each gives alone."""
    table, found = route.weights.detach(), []
    for mixture in table.unique(dim=0)[:FEW]:
        row = (table == mixture).all(1).nonzero()[0]
        some, named = taken(args, kwargs, row, route.rows)
        with torch.no_grad():
            found.append((row, run(some, named, Route(table[row]))))
    return found


def _agree(out: Any, alone: Sequence[tuple[Tensor, Any]], rows: int) -> bool:
    """Whether a batch's output has these rows."""
    if isinstance(out, Tensor) and len(out) != rows:
        return False
    if isinstance(out, Mapping) and not all(_fits(value, rows) for value in out.values()):
        return False
    one = torch.zeros(1, dtype=torch.long)
    return all(
        close(own_rows(out, row, rows), own_rows(expected, one.to(row.device), 1))
        for row, expected in alone
    )


def _fits(value: Any, rows: int) -> bool:
    return not isinstance(value, Tensor) or not value.ndim or len(value) == rows
