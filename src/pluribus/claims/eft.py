"""Emulated fine-tuning: a large base moved by what tuning did to a small one, on real text.

Byte-level models (see `_bytes`): small and large bases, each tuned on dialogues and on source, so
that the large tuned model, which up-scaling stands in for, is there to compare with. Figures are
bits per 100 bytes of unseen text of the domain, with teacher forcing.

    up-scaled     log large base + log small tuned - log small base
    down-scaled   log small base + log large tuned - log large base
    dial l        large base, l of the dialogues' shift and 1 - l of the source's

Speculative decoding draws at temperature 1 from the up-scaled model, drafts by the small tuned one,
k from 5 on and adapted. That nothing is lost is checked on the models themselves: the distribution
of a byte that is drafted and checked, summed over all 256 drafts and both outcomes of the check,
against the fusion's own.

On seeds 0, 1, 2 the up-scaled model goes 45 to 49 % of the way from large base to large tuned, but
is not the 10 better than the small tuned one that the claim says: tuning gains some four times what
the large base is ahead of the small one here. (With a small base of 150 steps instead of 800, seed
0, it was 39 better on dialogues and 43 on source, so the ratio may well be why.)
"""

import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pluribus.claims import Check, Claim, OnStep, _bytes
from pluribus.core.optional import optional
from pluribus.core.shapes import Float, Int
from pluribus.tasks.specialise import threads

DOMAINS = ("dialogues", "source")
DIAL = (0.0, 0.25, 0.5, 0.75, 1.0)  # the dialogues' share; the source's is the rest
FILTER = 0.95
PROMPTS, PROMPT, NEW = 12, 32, 64  # prompts a domain, their bytes, bytes written after each


def _checks() -> Iterator[Check]:
    for domain in DOMAINS:
        up = f"{domain}/up-scaled/bits"
        yield Check(
            text=f"{domain}: the premise, the large base below the small base",
            left=f"{domain}/small base/bits",
            right=f"{domain}/large base/bits",
            each=True,
        )
        yield Check(
            text=f"{domain}: up-scaled below the small tuned model",
            left=f"{domain}/small tuned/bits",
            right=up,
            margin=10.0,
            each=True,
        )
        yield Check(
            text=f"{domain}: up-scaled below the large base",
            left=f"{domain}/large base/bits",
            right=up,
            margin=5.0,
            each=True,
        )
        yield Check(
            text=f"{domain}: percent of the way from large base to large tuned",
            left=f"{domain} recovered",
            margin=20.0,
            each=True,
        )
        yield Check(
            text=f"{domain}: down-scaled below the small base",
            left=f"{domain}/small base/bits",
            right=f"{domain}/down-scaled/bits",
            margin=20.0,
            each=True,
        )
        yield Check(
            text=f"{domain}: largest rise as the dial turns to it",
            left=f"{domain} dial's largest rise",
            margin=1.0,
            each=True,
            at_most=True,
        )
    for domain in DOMAINS:
        yield Check(
            text=f"{domain}: speculative and direct distribution apart, millionths of mass",
            left=f"{domain} speculation off by",
            margin=10.0,
            each=True,
            at_most=True,
        )
        yield Check(
            text=f"{domain}: drafts accepted, percent",
            left=f"{domain} accepted",
            margin=50.0,
            each=True,
        )
        yield Check(
            text=f"{domain}: forward passes of the large model for 100 bytes",
            left=f"{domain} large forwards",
            margin=60.0,
            each=True,
            at_most=True,
        )
        yield Check(
            text=f"{domain}: speed of speculative over plain decoding",
            left=f"{domain} speculative speed",
            margin=1.5,
            asserted=False,
            each=True,
        )
        yield Check(
            text=f"{domain}: shift only inside the top 0.95 of mass, below the shift everywhere",
            left=f"{domain}/up-scaled/bits",
            right=f"{domain}/up-scaled, filtered/bits",
            asserted=False,
            each=True,
        )


CLAIM = Claim(
    name="eft",
    title="A large base moved by a small model's tuning beats both, and drafts of the small serve",
    paper="arXiv:2310.12962",
    data=_bytes.DATA,
    model=_bytes.MODEL,
    metric="bits per 100 bytes of unseen text, teacher-forced; lower is better",
    checks=tuple(_checks()),
)


def measure(seed: int, on_step: OnStep | None = None) -> Mapping[str, float]:
    """Return all figures for one seed. Raises DataError without the dialogues."""
    optional("transformers", "hf", "the claim eft")
    with threads(1):
        return _measured(_bytes.bed(seed, on_step))


def _measured(bed: _bytes.Bed) -> dict[str, float]:
    from pluribus.decode import dial, upscale

    out: dict[str, float] = {}
    small, large = bed.base("small"), bed.base("large")
    between = dial(small, {domain: bed.tuned("small", domain) for domain in DOMAINS}, large)
    for domain in DOMAINS:
        windows = bed.windows(domain)
        tuned = {size: bed.tuned(size, domain) for size in _bytes.SIZES}
        up = upscale(large, tuned["small"], small)
        systems: dict[str, Any] = {
            "small base": small,
            "large base": large,
            "small tuned": tuned["small"],
            "large tuned": tuned["large"],
            "up-scaled": up,
            "up-scaled, filtered": upscale(large, tuned["small"], small, top_p_filter=FILTER),
            "down-scaled": upscale(small, tuned["large"], large),
        }
        bits = {}
        for name, system in systems.items():
            bits[name] = _note(out, f"{domain}/{name}", system, windows)
        gap = bits["large base"] - bits["large tuned"]
        out[f"{domain} recovered"] = 100 * (bits["large base"] - bits["up-scaled"]) / gap
        turned = []
        for share in DIAL:
            between.set_weights(dict(zip(DOMAINS, (share, 1 - share), strict=True)))
            turned.append(_note(out, f"{domain}/dial {share:g}", between, windows))
        if domain != DOMAINS[0]:
            turned.reverse()
        out[f"{domain} dial's largest rise"] = max(b - a for a, b in pairwise(turned))
        out.update({f"{domain} {name}": value for name, value in _drafting(bed, up, domain)})
    return out


def _note(out: dict[str, float], name: str, system: Any, windows: Int[Tensor, "n s"]) -> float:
    told = _bytes.told(system, windows)
    out[f"{name}/bits"], out[f"{name}/accuracy"] = told.bits, told.accuracy
    return told.bits


def _drafting(bed: _bytes.Bed, fused: Any, domain: str) -> Iterator[tuple[str, float]]:
    """Yield what drafting gains after prompts of the domain, and whether it is exact."""
    from pluribus.decode import SpeculativeDecoder

    windows = bed.windows(domain)
    prompts = windows[:: max(1, len(windows) // PROMPTS), :PROMPT][:PROMPTS]
    decoder = SpeculativeDecoder(fused, draft="tuned")
    rng = torch.Generator().manual_seed(bed.seed)
    drafted = accepted = forwards = written = 0
    drafting = plain = 0.0
    for number, prompt in enumerate(prompts):
        began = time.perf_counter()
        found = decoder.generate(prompt[None], max_new_tokens=NEW, do_sample=True, generator=rng)
        drafting += time.perf_counter() - began
        drafted += found.stats.drafted
        accepted += found.stats.accepted
        forwards += found.stats.forwards["ref"]
        written += found.stats.written
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(bed.seed)
            began = time.perf_counter()
            fused.generate(prompt[None], max_new_tokens=NEW, do_sample=True, top_k=0)
            plain += time.perf_counter() - began
        if bed.on_step is not None:
            bed.on_step(f"{domain}: speculative decoding", number + 1, len(prompts))
    yield "accepted", 100 * accepted / drafted
    yield "large forwards", 100 * forwards / written
    yield "speculative speed", plain / drafting
    yield "speculation off by", 1e6 * apart(fused, prompts[0])


def apart(fused: Any, prompt: Int[Tensor, " s"]) -> float:
    """Return the total variation between a checked byte's distribution and the fusion's own.

    The second byte after a prompt is the first that is drafted. With q the draft's distribution, a
    the probabilities of acceptance and r what is drawn from after a refusal, it is y with

        q(y) a(y) + sum_d q(d) (1 - a(d)) r(y)
    """
    from pluribus.decode import SpeculativeDecoder

    decoder = SpeculativeDecoder(fused, draft="tuned", k=1)
    first = int(prompt[-1])  # any byte will do
    read = torch.cat((prompt, prompt[-1:]))[None]
    with torch.no_grad():
        direct = fused(input_ids=read, use_cache=False).logits[0, -1].double().exp()
    written = torch.zeros_like(direct)
    for draft in range(len(direct)):
        chance = _Refusing([first, draft])
        decoder.generate(prompt[None], max_new_tokens=3, do_sample=True, chance=chance)
        q, r = (found.double() for found in chance.seen[1:3])
        written[draft] += q[draft] * chance.asked[0]
        written += q[draft] * (1 - chance.asked[0]) * r
    return float((written - direct).abs().sum() / 2)


class _Refusing:
    """Chance that draws the bytes it is given, refuses drafts, and remembers what it was shown."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.seen: list[Float[Tensor, " v"]] = []
        self.asked: list[float] = []

    def token(self, probabilities: Float[Tensor, " v"]) -> int:
        """See `Chance`."""
        self.seen.append(probabilities)
        number = len(self.seen) - 1
        return self.tokens[number] if number < len(self.tokens) else 0

    def accepts(self, probability: float) -> bool:
        """See `Chance`."""
        self.asked.append(probability)
        return False
