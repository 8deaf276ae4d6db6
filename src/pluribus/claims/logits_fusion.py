"""Dynamic logits fusion: small experts lift a large base, with weights found at every byte.

Byte-level models (see `_bytes`). Two small experts of one base are tuned on STAR dialogues of
different families, X and Y; nobody says which domain a text is of, and the six families of Z are
those neither expert has seen. Figures are the percentage of bytes whose likeliest prediction is
right, with teacher forcing, and bits per 100 bytes.

    static a        large base + a of both experts' shifts; 0.5 is a choice made with hindsight
    dynamic         one expert at each byte, weight from the grid 0, 0.1 ... 2
    own, a          the domain's own expert with a fixed weight; `own, dynamic` with the search's

`large tuned` is the large base tuned on dialogues of all families, which fusion stands in for:
both the ratio of scores, as the paper counts, and the share of the gap are given. With the
experts `X` and `source`, which have nothing in common, the criterion is known to fail: it matches
distances, and does not know who is right. That is reported, not asserted.

On seeds 0, 1, 2 both experts lift the large base everywhere (X by 11 points, Y 7 to 8, Z 0.8 to
1.7), and the search for one expert's weight is better than the best of four fixed ones. But the
small expert of the right domain, alone, is 6 points better than the fusion of both, and still 0.6
to 1.0 better than the large base moved by it alone: tuning teaches these experts far more than the
large base is ahead. Weak becomes stronger here, not strong.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pluribus.claims import Check, Claim, OnStep, _bytes
from pluribus.core.optional import optional
from pluribus.tasks.specialise import threads

DOMAINS = ("X", "Y", "Z")
EXPERTS = ("X", "Y")
FIXED = (0.5, 1.0, 1.5, 2.0)
UNRELATED = ("X", "source")


def _checks() -> Iterator[Check]:
    def check(text: str, domain: str, left: str, right: str, margin: float, **how: Any) -> Check:
        named = (f"{domain}/{name}/accuracy" for name in (left, right))
        return Check(
            text=f"{domain}: {text}",
            left=next(named),
            right=next(named),
            margin=margin,
            each=True,
            **how,
        )

    for domain in DOMAINS:
        yield check(
            "the premise, large base over small base", domain, "large base", "small base", 0
        )
    for domain in DOMAINS:
        margin = 1.5 if domain in EXPERTS else 0.5
        yield check("both experts over the large base", domain, "dynamic", "large base", margin)
    for domain in DOMAINS:
        for expert in EXPERTS:
            yield check(
                f"both experts over the small expert {expert} alone",
                domain,
                "dynamic",
                f"expert {expert}",
                2.0,
            )
    for domain in DOMAINS:
        seen = domain in EXPERTS  # there the sum of both holds the right expert's whole shift
        yield check(
            "over the static sum of both", domain, "dynamic", "static 1", 2.0, asserted=not seen
        )
    for domain in EXPERTS:
        dynamic = f"{domain}/own, dynamic/accuracy"
        for which, margin in (("best", -0.4), ("worst", 2.0)):
            yield Check(
                text=f"{domain}: own expert, over the {which} of four fixed weights",
                left=dynamic,
                right=f"{domain} {which} fixed weight",
                margin=margin,
                each=True,
            )
    for domain in EXPERTS:
        yield Check(
            text=f"{domain}: bits per 100 bytes below the large base's",
            left=f"{domain}/large base/bits",
            right=f"{domain}/dynamic/bits",
            each=True,
        )
    for domain in DOMAINS:
        yield check("over static 0.5", domain, "dynamic", "static 0.5", 0.0, asserted=False)
    for domain in UNRELATED:
        for other in ("large base", "static 0.5"):
            yield check(
                f"over the {other}",
                f"unrelated experts, {domain}",
                "dynamic",
                other,
                0.0,
                asserted=False,
            )


CLAIM = Claim(
    name="logits-fusion",
    title="Small experts of related domains lift a large base, and nobody says which one to ask",
    paper="arXiv:2406.15480",
    data=_bytes.DATA,
    model=_bytes.MODEL,
    metric="percent of unseen bytes predicted right, teacher-forced",
    checks=tuple(_checks()),
)


def measure(seed: int, on_step: OnStep | None = None) -> Mapping[str, float]:
    """Return all figures for one seed. Raises DataError without the dialogues."""
    optional("transformers", "hf", "the claim logits-fusion")
    with threads(1):
        return _measured(_bytes.bed(seed, on_step))


def _measured(bed: _bytes.Bed) -> dict[str, float]:
    from pluribus.decode import DynamicFusion, StaticFusion

    out: dict[str, float] = {}
    large = bed.base("large")
    both = _fused(bed, EXPERTS)
    for number, domain in enumerate(DOMAINS):
        windows = bed.windows(domain)

        def note(name: str, system: Any, place: str = domain, on: Any = windows) -> _bytes.Told:
            told = _bytes.told(system, on)
            out[f"{place}/{name}/accuracy"], out[f"{place}/{name}/bits"] = told.accuracy, told.bits
            return told

        base = note("large base", large).accuracy
        tuned = note("large tuned", bed.tuned("large", "dialogues")).accuracy
        note("small base", bed.base("small"))
        for expert in EXPERTS:
            note(f"expert {expert}", bed.tuned("small", expert))
        for alpha in (1.0, 0.5):
            both.fuser = StaticFusion(alpha=alpha)
            note(f"static {alpha:g}", both)
        both.fuser = DynamicFusion()
        dynamic = note("dynamic", both)
        out.update({f"{domain} weight of {r}": w for r, w in dynamic.weights.items()})
        out[f"{domain} ratio of scores"] = 100 * dynamic.accuracy / tuned
        out[f"{domain} share of the gap"] = 100 * (dynamic.accuracy - base) / (tuned - base)
        for name, fuser in {
            "bracket": DynamicFusion(mode="bracket"),
            "targets selected": DynamicFusion(targets="selected"),
        }.items():
            both.fuser = fuser
            note(f"dynamic, {name}", both)
        if domain in EXPERTS:
            own = _fused(bed, (domain,))
            note("own, dynamic", own)
            fixed = []
            for alpha in FIXED:
                own.fuser = StaticFusion(alpha=alpha)
                fixed.append(note(f"own, {alpha:g}", own).accuracy)
            out[f"{domain} best fixed weight"] = max(fixed)
            out[f"{domain} worst fixed weight"] = min(fixed)
        if bed.on_step is not None:
            bed.on_step("fusion", number + 1, len(DOMAINS) + len(UNRELATED))
    _unrelated(bed, out)
    return out


def _unrelated(bed: _bytes.Bed, out: dict[str, float]) -> None:
    """Note what becomes of experts that have nothing to do with each other."""
    from pluribus.decode import DynamicFusion, StaticFusion

    both = _fused(bed, UNRELATED)
    fusers = {
        "static 1": StaticFusion(),
        "static 0.5": StaticFusion(alpha=0.5),
        "dynamic": DynamicFusion(),
        "dynamic, targets selected": DynamicFusion(targets="selected"),
    }
    for number, domain in enumerate(UNRELATED):
        windows = bed.windows(domain)
        place = f"unrelated experts, {domain}"
        systems: dict[str, Any] = {"large base": bed.base("large")}
        systems |= {f"expert {one}": bed.tuned("small", one) for one in UNRELATED}
        for name, system in {**systems, **fusers}.items():
            if name in fusers:
                both.fuser, system = system, both
            told = _bytes.told(system, windows)
            out[f"{place}/{name}/accuracy"], out[f"{place}/{name}/bits"] = told.accuracy, told.bits
            if name == "dynamic":
                out.update({f"{place}: weight of {r}": w for r, w in told.weights.items()})
        if bed.on_step is not None:
            done, whole = len(DOMAINS) + number + 1, len(DOMAINS) + len(UNRELATED)
            bed.on_step("fusion", done, whole)


def _fused(bed: _bytes.Bed, experts: tuple[str, ...]) -> Any:
    """Return the large base with small experts, each in the role of its name."""
    from pluribus.decode import DynamicFusion, Fused

    roles = {"large": bed.base("large"), "base": bed.base("small")}
    return Fused(roles | {name: bed.tuned("small", name) for name in experts}, DynamicFusion())
