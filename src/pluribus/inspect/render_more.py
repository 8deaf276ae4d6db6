"""The parts of an inspection that not every run has, as text and as sections of a page."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pluribus.inspect.inspection import Inspection
from pluribus.inspect.tally import Tally, pairs
from pluribus.report import aligned, bars, beside, heatmap, lines, notes, section, table

if TYPE_CHECKING:
    from pluribus.inspect.trial import Trials

_EXPECTED = {"expected loss": ".1%", "±": ".1%", "distance": ".2f", "its loss": ".1%"}
_SPECTRA = {
    "effective rank": ".1f", "stable rank": ".1f", "of": ",", "overlap": ".3f", "by chance": ".3f",
    "barrier": ".4f", "worst score": ".4f", "start score": ".4f", "stop score": ".4f",
}  # fmt: skip


def first_to_try(found: Inspection) -> str:
    """Return the section with the advice: method, reasons, forecasts, similar pools, warnings."""
    advice = found.advice
    doubt = "" if advice.tried else "; a few rows of your own tasks decide better (--try)"
    parts = [f"{advice.text} — {advice.basis}{doubt}."]
    parts += [notes(advice.reasons)]
    if found.trials is not None:
        parts.append(_trials(found.trials))
    if advice.expected:
        losses = {one.method: one.loss for one in advice.expected}
        spread = {one.method: one.spread for one in advice.expected}
        parts += [
            bars(
                "Expected loss against the specialists, with its root mean square error",
                losses, form=".1%", errors=spread, marked=[advice.expected[0].method],
            ),
            table(
                ["most similar measured pools", "distance", "did best there", "its loss"],
                [[one.label, one.distance, one.best, one.loss] for one in advice.near],
                _EXPECTED,
            ),
        ]  # fmt: skip
    if found.warnings:
        parts.append(notes(found.warnings, warning=True))
    return section("First to try", *parts)


def _trials(trials: "Trials") -> str:
    rows = [[one.method, one.kept, *one.scores.values()] for one in trials.tried]
    rows.append(["best expert of each", 1.0, *trials.ceilings.values()])
    head = ["tried", "kept", *trials.ceilings]
    return table(head, rows, {"kept": ".1%", **dict.fromkeys(trials.ceilings, ".3f")})


def tried(trials: "Trials") -> str:
    """Return the trials for a terminal."""
    rows = [[one.method, f"{one.kept:.1%}", *_scores(one.scores)] for one in trials.tried]
    rows.append(["best expert of each", "", *_scores(trials.ceilings)])
    return aligned(["tried", "kept", *trials.ceilings], rows)


def _scores(scores: Mapping[str, float]) -> list[str]:
    return [f"{value:.3f}" for value in scores.values()]


def atlas(found: Inspection, labels: list[str]) -> list[str]:
    """Return the section by layer and kind: a table of kinds, and heat maps of both."""
    from pluribus.inspect.render import sums

    if len(found.kinds) < 2:
        return []
    parts = [table(*sums("kind", found.kinds, found))]
    if len(found.layers) > 1:
        grown = _cells(found, lambda tally: float(np.nanmax(np.append(tally.ratio, 0))))
        high = max((v for row in grown for v in row if v is not None), default=1.0) or 1.0
        square = list(found.layers), list(found.kinds)
        maps = [
            heatmap("Longest task vector over the base's norm", *square, grown, form=".3f", low=0,
                    high=high)
        ]  # fmt: skip
        if len(labels) > 1:
            cosine = _cells(found, lambda tally: mean(tally.cosine))
            conflict = _cells(found, lambda tally: mean(tally.kept_conflict))
            reach = max((abs(v) for row in cosine for v in row if v is not None), default=1.0)
            reach = max(reach, 0.1)
            maps += [
                heatmap("Mean cosine between task vectors", *square, cosine, low=-reach,
                        high=reach),
                heatmap("Opposite signs where supports meet", *square, conflict, low=0),
            ]  # fmt: skip
        parts += [beside(*maps)]
    told = "What tensors do is read from their names; what no rule knows is 'other'."
    return [section("By kind and layer", told, *parts)]


def _cells(found: Inspection, of: Callable[[Tally], float | None]) -> list[list[float | None]]:
    return [
        [of(row[kind]) if kind in row else None for kind in found.kinds]
        for row in found.atlas.values()
    ]


def texts(found: Inspection, labels: list[str]) -> list[str]:
    """Return what was asked for beside the tallies, for a terminal."""
    out = []
    if found.spectra is not None:
        out.append(aligned(["kind", "expert", *_RANKS], _rank_rows(found, labels), _SPECTRA))
        if len(labels) > 1:
            head = ["kind", "pair", "overlap", "by chance"]
            out.append(aligned(head, _overlap_rows(found, labels), _SPECTRA))
    if found.connectivity is not None:
        out.append(aligned(_LINE, _line_rows(found), _SPECTRA))
    if found.similarity is not None:
        head, rows = _similar_rows(found)
        forms = dict.fromkeys(head[1:], ".3f")
        out.append(f"linear CKA on {found.similarity.inputs} inputs\n{aligned(head, rows, forms)}")
    return out


def sections(found: Inspection, labels: list[str]) -> list[str]:
    """Return what was asked for beside the tallies, for a page."""
    out = []
    if found.spectra is not None:
        out.append(_spectra(found, labels))
    if found.connectivity is not None:
        out.append(_connectivity(found))
    if found.similarity is not None:
        out.append(_similarity(found))
    return out


_RANKS = ["effective rank", "stable rank", "of"]
_LINE = ["line", "start score", "stop score", "worst score", "barrier"]


def _spectra(found: Inspection, labels: list[str]) -> str:
    spectra = found.spectra
    assert spectra is not None
    size = f"{spectra.rank} dimensions" if spectra.rank else f"{spectra.energy:.0%} of the energy"
    names = list(spectra.matrices)
    places = {
        label: [name for name in group if name in spectra.matrices]
        for label, group in found.names_by_layer.items()
    }
    places = {label: group for label, group in places.items() if group}
    ranks = np.array([spectra.mean(group, "effective_rank") for group in places.values()])
    series = {label: ranks[:, i].tolist() for i, label in enumerate(labels)}
    parts = [
        lines("Effective rank of task vectors", list(places), series, form=".0f", x_label="layer"),
        table(["kind", "expert", *_RANKS], _rank_rows(found, labels), _SPECTRA),
    ]
    if len(labels) > 1:
        by = [[_overlap(found, cell) for cell in row] for row in _matrix_cells(found, places)]
        kinds = _matrix_kinds(found)
        known = [value for row in by for value in row if value is not None]
        square = list(places), kinds
        parts += [
            beside(
                heatmap("Overlap of leading subspaces", *square, by, low=0,
                        high=max(known, default=1.0) or 1.0),
                heatmap("The same by pair of experts", labels, labels,
                        spectra.mean(names, "overlap").tolist(), low=0),
            ),
            table(["kind", "pair", "overlap", "by chance"], _overlap_rows(found, labels), _SPECTRA),
        ]  # fmt: skip
    return section(
        "Spectra",
        f"Subspaces of {size}, on each matrix's shorter side. Overlap is the mean squared cosine "
        "of their principal angles: 1 for equal ones. Effective rank is the entropy of the "
        "singular values, as a count of directions. Means over matrices.",
        *parts,
    )


def _matrix_kinds(found: Inspection) -> list[str]:
    assert found.spectra is not None
    return [
        kind
        for kind, names in found.names_by_kind.items()
        if any(name in found.spectra.matrices for name in names)
    ]


def _matrix_cells(found: Inspection, places: dict[str, list[str]]) -> list[list[list[str]]]:
    return [
        [[name for name in group if found.kind[name] == kind] for kind in _matrix_kinds(found)]
        for group in places.values()
    ]


def _overlap(found: Inspection, names: list[str]) -> float | None:
    assert found.spectra is not None
    return mean(found.spectra.mean(names, "overlap")) if names else None


def _rank_rows(found: Inspection, labels: list[str]) -> list[list]:
    spectra, rows = found.spectra, []
    assert spectra is not None
    for kind in _matrix_kinds(found):
        names = [name for name in found.names_by_kind[kind] if name in spectra.matrices]
        effective, stable = (spectra.mean(names, of) for of in ("effective_rank", "stable_rank"))
        side = round(sum(spectra.matrices[name].side for name in names) / len(names))
        for i, label in enumerate(labels):
            rows.append([kind, label, float(effective[i]), float(stable[i]), side])
    return rows


def _overlap_rows(found: Inspection, labels: list[str]) -> list[list]:
    spectra, rows = found.spectra, []
    assert spectra is not None
    for kind in _matrix_kinds(found):
        names = [name for name in found.names_by_kind[kind] if name in spectra.matrices]
        overlap, chance = spectra.mean(names, "overlap"), float(spectra.mean(names, "chance"))
        for i in range(len(labels)):
            for j in range(i):
                rows.append([kind, f"{labels[j]} – {labels[i]}", float(overlap[i, j]), chance])
    return rows


def _line_rows(found: Inspection) -> list[list]:
    assert found.connectivity is not None
    rows = []
    for line in found.connectivity.lines:
        scores = [point.score for point in line.curve.points]
        worst = min(scores) if line.higher_is_better else max(scores)
        rows.append([_ends(line.start, line.stop), scores[0], scores[-1], worst, line.barrier])
    return rows


def _ends(start: str, stop: str) -> str:
    return " – ".join(short([start, stop]))


def _connectivity(found: Inspection) -> str:
    assert found.connectivity is not None
    walked = found.connectivity.lines
    places = [f"{point.weight:g}" for point in walked[0].curve.points]
    series = {
        _ends(line.start, line.stop): [point.score for point in line.curve.points]
        for line in walked
    }
    return section(
        "Lines between models",
        "The score of every mixture of two models, from the first (0) to the second (1). The "
        "barrier is how far the worst point lies below the straight line between the ends: 0 means "
        "that both lie in one basin, where averages have a chance.",
        lines("Score along the line", places, series, x_label="share of the second", zero=False),
        table(_LINE, _line_rows(found), _SPECTRA),
    )


def _similar_rows(found: Inspection) -> tuple[list[str], list[list]]:
    similar = found.similarity
    assert similar is not None
    names = short(similar.models)
    pairs_of = [(j, i) for i in range(len(names)) for j in range(i)]
    head = ["block", *(f"{names[j]} – {names[i]}" for j, i in pairs_of)]
    rows = [
        [block, *(float(similar.cka[b, i, j]) for j, i in pairs_of)]
        for b, block in enumerate(similar.blocks)
    ]
    return head, rows


def _similarity(found: Inspection) -> str:
    similar = found.similarity
    assert similar is not None
    head, rows = _similar_rows(found)
    series = {head[k]: [row[k] for row in rows] for k in range(1, len(head))}
    places = [block.rsplit(".", 1)[-1] for block in similar.blocks]
    return section(
        "What blocks compute",
        f"Linear CKA of the blocks' outputs on the same {similar.inputs} inputs: 1 if two models "
        "represent them alike up to rotation and scale, about 0 if not at all.",
        lines("Similarity of representations", places, series, form=".2f", x_label="block"),
        table(head, rows, dict.fromkeys(head[1:], ".3f")),
    )


def mean(matrix: np.ndarray) -> float | None:
    """Return the mean over pairs of experts, None without any."""
    found = pairs(matrix)
    return float(found.mean()) if found.size else None


def short(labels: Sequence[str]) -> list[str]:
    """Return labels without the folders that all of them share."""
    cut = [label.rstrip("/").rsplit("/", 1)[-1] for label in labels]
    return cut if len(set(cut)) == len(cut) and all(cut) else list(labels)
