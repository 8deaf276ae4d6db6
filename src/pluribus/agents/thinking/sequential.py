"""A confidence sequence for a mean, by betting: it may be looked at after every observation.

Waudby-Smith and Ramdas, JRSS-B 2024, https://arxiv.org/abs/2010.09686, section 4: who bets against
"the mean is m" on x_i in [0, 1] has the capital

    K+(m) = mean over f of prod_i (1 + f (x_i - m) / m)          bets that the mean is above m
    K-(m) = mean over f of prod_i (1 + f (m - x_i) / (1 - m))    that it is below

after n observations, which exceeds 2 / alpha at any time with probability alpha / 2 at most if m is
the mean (Ville). m is refused once it has. K+ falls and K- grows with m, so what is left is an
interval; its ends are found by bisection. f are fixed shares that are staked, an equal part of the
capital behind each, like the paper's bets on a grid. With price 0, bets against "no difference" win
and lose nothing on problems where both modes do equally well.
"""

import math
from collections.abc import Iterable

from pluribus.core.errors import InputError

SHARES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8)
HALVINGS = 40


class ConfidenceSequence:
    """An interval for the mean of observations in [low, high], at level 1 - alpha at all times."""

    def __init__(self, low: float, high: float, alpha: float = 0.05) -> None:
        """Raise InputError for an empty range, or alpha outside (0, 1)."""
        if not low < high or not math.isfinite(high - low):
            raise InputError(f"observations lie in [{low}, {high}]; give a finite low below high")
        if not 0 < alpha < 1:
            raise InputError(f"alpha is {alpha}; give a share between 0 and 1, such as 0.05")
        self.low, self.high, self.alpha = float(low), float(high), alpha
        self._seen: list[float] = []

    def __len__(self) -> int:
        """Return how many observations there are."""
        return len(self._seen)

    def add(self, values: Iterable[float]) -> None:
        """Take observations, in their order. Raises InputError for one outside the range."""
        slack = 1e-9 * (self.high - self.low)
        for value in values:
            if not self.low - slack <= value <= self.high + slack:
                raise InputError(
                    f"an observation is {value:g}, outside [{self.low:g}, {self.high:g}]: the "
                    "bounds on value and tokens don't hold; give a mode's most_tokens as they are"
                )
            self._seen.append(min(1.0, max(0.0, (value - self.low) / (self.high - self.low))))

    @property
    def mean(self) -> float:
        """The mean so far; nan without observations."""
        if not self._seen:
            return math.nan
        return self.low + (self.high - self.low) * sum(self._seen) / len(self._seen)

    @property
    def interval(self) -> tuple[float, float]:
        """The values that are not refused; the whole range without observations."""
        lower = self._edge(self._seen)
        upper = 1 - self._edge([1 - x for x in self._seen])
        if lower > upper:  # everything was refused, which has probability alpha at most
            lower = upper = (lower + upper) / 2
        span = self.high - self.low
        return self.low + span * lower, self.low + span * upper

    def sign(self, at: float = 0.0) -> int:
        """Return 1 if the mean is proven above `at`, -1 if below, 0 if undecided."""
        m = (at - self.low) / (self.high - self.low)
        if m <= 0 or m >= 1:
            return (m < 0) - (m > 1)
        above = self._refuses(self._seen, m)
        below = self._refuses([1 - x for x in self._seen], 1 - m)
        return int(above) - int(below)

    def _refuses(self, seen: list[float], m: float) -> bool:
        """Return whether bets that the mean is above m have ever won enough."""
        enough = 2 / self.alpha * len(SHARES)
        capital = [1.0] * len(SHARES)
        for x in seen:
            odds = (x - m) / m
            capital = [c * (1 + f * odds) for c, f in zip(capital, SHARES, strict=True)]
            if sum(capital) >= enough:
                return True
        return False

    def _edge(self, seen: list[float]) -> float:
        """Return the largest m that is refused from above, within 2^-40; 0 if none is."""
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if middle > 0 and self._refuses(seen, middle):
                low = middle
            else:
                high = middle
        return low
