"""Whether a choice still holds: a share of the traffic is asked in both modes.

The net value of the chosen mode over the other is followed by a confidence sequence (see
`sequential`), so it may be looked at after every request. An alarm means that the other mode is now
proven better, with a chance of alpha at most that it isn't.
"""

import zlib

from pluribus.agents.thinking.effect import check_prices
from pluribus.agents.thinking.sequential import ConfidenceSequence
from pluribus.core.errors import InputError

SHARE = 0.05


class Drift:
    """Follows one task in use."""

    def __init__(
        self,
        *,
        value: float = 1.0,
        price: float = 0.0,
        most_tokens: int = 0,
        share: float = SHARE,
        alpha: float = 0.05,
    ) -> None:
        """`most_tokens` bounds what either mode writes; it is needed where tokens have a price.

        Raises InputError for a number out of range.
        """
        check_prices(value, price)
        if not 0 < share <= 1:
            raise InputError(f"the share is {share}; give above 0 to 1, such as {SHARE}")
        if price > 0 and most_tokens < 1:
            raise InputError(
                "tokens have a price; give most_tokens, a bound on those of one answer"
            )
        self.value, self.price, self.share = value, price, share
        reach = value + price * most_tokens
        self._sequence = ConfidenceSequence(-reach, reach, alpha)

    def asks(self, request: str) -> bool:
        """Return whether this request is asked in both modes; the same request, the same answer."""
        return zlib.crc32(request.encode()) / 2**32 < self.share

    def add(self, chosen: tuple[bool, int], other: tuple[bool, int]) -> bool:
        """Take (right, tokens) of both modes and return whether there is an alarm.

        Raises InputError for more tokens than the bound.
        """
        gained = self.value * (int(chosen[0]) - int(other[0]))
        self._sequence.add([gained - self.price * (chosen[1] - other[1])])
        return self.alarm

    @property
    def alarm(self) -> bool:
        """Whether the other mode is proven better than the chosen one."""
        return self._sequence.sign() < 0

    @property
    def net(self) -> tuple[float, float]:
        """The interval of the chosen mode's net value over the other's; it holds at all times."""
        return self._sequence.interval

    def __len__(self) -> int:
        """Return how many requests were asked in both modes."""
        return len(self._sequence)
