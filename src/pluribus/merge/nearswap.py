"""NearSwap: take the expert where it is close to the base, and move by at most t elsewhere.

alchemonaut, 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001; mergekit
`nearswap`.

    k      = min(t / max(|theta_1 - theta_0|, 1e-6), 1)         (n,)
    merged = k theta_1 + (1 - k) theta_0                        (n,)

So an update is clipped to [-t, t]. Deviates from mergekit: a negative t, which there changes
nothing, is an error. One pass.
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float, namespace
from pluribus.core.merger import NonNegative, merger


@merger("nearswap", experts=(1, 1))
@dataclass(frozen=True, kw_only=True)
class NearSwap:
    """Expert where near, clipped where far."""

    t: NonNegative  # largest move of an element

    def __call__(
        self, base: Float[Array, " n"], experts: Float[Array, "1 n"]
    ) -> Float[Array, " n"]:
        """Merge one block."""
        xp = namespace(base)
        gap = xp.clip(abs(experts[0] - base), min=1e-6)
        share = xp.clip(self.t / gap, max=1.0)
        return experts[0] * share + base * (1 - share)
