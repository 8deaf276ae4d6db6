"""What happened between two checkpoints, in sentences: `verdicts(difference)`."""

from collections import Counter

from pluribus.core.errors import listing
from pluribus.inspect.change import Change
from pluribus.inspect.compare import HELD, SKETCH
from pluribus.inspect.difference import Difference

SMALL = {"norm"}  # kinds that light fine-tunes touch
MOST = 0.8  # share of the changed matrices that makes an update low rank
FAR = 0.5  # length of the change over the model's: no fine-tune moves so far


def verdicts(found: Difference) -> tuple[str, ...]:
    """Return what happened, the most telling first."""
    out = [*_structure(found), *_numbers(found)]
    changed = [one for one in found.tensors.values() if one.changed and not one.rounded]
    if not changed:
        whole = "all tensors that both have are"
        if any(one.rounded and one.changed for one in found.tensors.values()):
            out.append(f"only element types changed: {whole} the same values, rounded")
        elif any(one.dtype != one.new_dtype for one in found.tensors.values()):
            out.append(f"only element types changed: {whole} the same values")
        elif not any(one.resized for one in found.tensors.values()):
            out.append(f"{whole} the same, bit for bit")
        return tuple(out + _types(found))
    out += _where(found, changed) + _rank(found) + _far(found) + _types(found)
    return tuple(out)


def _structure(found: Difference) -> list[str]:
    out = []
    common = len(found.tensors)
    if found.renamed:
        whose, other = (found.before, found.after)[:: 1 if found.renamed[0] == "-" else -1]
        out.append(f"names of {whose} have the prefix {found.renamed[1:]!r}, those of {other} not")
    if found.removed and found.added and common < 0.5 * (common + len(found.removed)):
        out.append(
            f"different architectures: {common} tensors have a partner, {len(found.removed)} of "
            f"{found.before} and {len(found.added)} of {found.after} have none; the first are "
            f"{next(iter(found.removed))!r} and {next(iter(found.added))!r}"
        )
    else:
        for names, did in ((found.removed, "removed"), (found.added, "added")):
            if names:
                out.append(f"{len(names)} tensors were {did}: {listing(names, 3)}")
    resized = [one for one in found.tensors.values() if one.resized]
    rows = [one for one in resized if one.compared]
    for one in rows[:3]:
        what = "embedding" if one.kind == "embedding" else one.kind
        out.append(
            f"{one.name} ({what}) was resized from {one.shape[0]} to {one.new_shape[0]} rows; the "
            f"{min(one.shape[0], one.new_shape[0])} that both have are compared"
        )
    if len(rows) > 3:
        out.append(
            f"{len(rows) - 3} more tensors were resized: {listing(n.name for n in rows[3:])}"
        )
    if odd := [one for one in resized if not one.compared]:
        first = odd[0]
        out.append(
            f"{len(odd)} tensors have shapes that cannot be compared; the first is {first.name}: "
            f"{list(first.shape)} and {list(first.new_shape)}"
        )
    return out


def _numbers(found: Difference) -> list[str]:
    out = []
    for side, label in enumerate((found.before, found.after)):
        bad = {one.name: one.non_finite[side] for one in found.tensors.values()}
        bad = {name: count for name, count in bad.items() if count}
        if bad:
            out.append(
                f"{label} holds NaN or infinity in {listing(f'{n} ({c})' for n, c in bad.items())}"
            )
    return out


def _where(found: Difference, changed: list[Change]) -> list[str]:
    kinds = {one.kind for one in changed}
    names = [one for one in changed if one.kind not in SMALL and not one.name.endswith("bias")]
    total = len(found.tensors)
    if not names:
        parts = [
            word
            for word, there in (
                ("norms", bool(kinds & SMALL)),
                ("biases", any(one.name.endswith("bias") for one in changed)),
            )
            if there
        ]
        return [f"only {' and '.join(parts)} changed: {len(changed)} of {total} tensors"]
    out = [f"{len(changed)} of {total} tensors changed, {found.model.share:.1%} of the elements"]
    left = [kind for kind, one in found.kinds.items() if not one.changed]
    if left and len(left) < len(found.kinds):
        moved = [kind for kind, one in found.kinds.items() if one.changed]
        few = f"only {listing(moved, 12)} changed"
        out.append(few if len(moved) <= len(left) else f"unchanged: {listing(left, 12)}")
    numbers = [name for name in found.layers if name.isdigit()]
    still = [name for name in numbers if not found.layers[name].changed]
    if still and len(still) < len(numbers):
        moving = [name for name in numbers if name not in still]
        out.append(
            f"layers {_runs(moving)} changed, layers {_runs(still)} did not, of {found.blocks}"
        )
    return out


def _rank(found: Difference) -> list[str]:
    total = found.model
    if not total.matrices:
        return []
    ranks = [one.rank for one in found.tensors.values() if one.rank is not None]
    if total.low_rank >= MOST * total.matrices:
        typical = Counter(ranks).most_common(1)[0][0]
        return [
            f"a low-rank update, as LoRA makes: in {total.low_rank} of {total.matrices} changed "
            f"matrices {max(ranks)} directions or fewer (most often {typical}) hold {HELD:.0%} of "
            "the change"
        ]
    if total.low_rank:
        low = [one.name for one in found.tensors.values() if one.rank is not None]
        return [
            f"a mixed update: {total.low_rank} of {total.matrices} changed matrices are of low "
            f"rank ({listing(low, 3)}), the others dense"
        ]
    return [f"a dense update: in no changed matrix do {SKETCH} directions hold {HELD:.0%} of it"]


def _far(found: Difference) -> list[str]:
    ratio = found.model.ratio
    if ratio > FAR:
        return [
            f"the models lie {ratio:.2f} times the norm of {found.before} apart: {found.after} is "
            "hardly a fine-tune of it"
        ]
    most = max(found.layers, key=lambda name: found.layers[name].ratio)
    return [
        f"the change is {ratio:.2%} of the norm; it is largest in layer {most} "
        f"({found.layers[most].ratio:.2%})"
    ]


def _types(found: Difference) -> list[str]:
    pairs = Counter(
        (one.dtype, one.new_dtype) for one in found.tensors.values() if one.dtype != one.new_dtype
    )
    return [f"{count} tensors went from {a} to {b}" for (a, b), count in pairs.items()]


def _runs(numbers: list[str]) -> str:
    """Write 0, 1, 2, 5 as 0-2, 5."""
    out: list[list[int]] = []
    for number in map(int, numbers):
        if out and number == out[-1][1] + 1:
            out[-1][1] = number
        else:
            out.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in out)
