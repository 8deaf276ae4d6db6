"""Who may come in: keys, how many at a time, and whether the server is about to stop."""

import hashlib
import hmac
from collections.abc import Sequence

from pluribus.serve.errors import ApiError

BUSY_SECONDS = 1  # after which a client that was refused may ask again


class Gate:
    """Counts requests and checks keys. Keys are kept as digests, so that none is ever printed."""

    def __init__(self, keys: Sequence[str], most: int) -> None:
        self._keys = [_digest(key) for key in keys]
        self.most = most
        self.inside = 0
        self.closing = False

    @property
    def locked(self) -> bool:
        """Whether a key is needed."""
        return bool(self._keys)

    def check(self, header: str | None) -> None:
        """Raise ApiError unless `Authorization` holds a key; time does not tell how near it was."""
        if not self._keys:
            return
        kind, _, given = (header or "").partition(" ")
        found = _digest(given.strip())
        fits = [hmac.compare_digest(found, key) for key in self._keys]  # all of them, always
        if kind.lower() != "bearer" or not any(fits):
            said = "no API key is given" if not header else "this API key is not known here"
            raise ApiError(
                401, f"{said}; send it as 'Authorization: Bearer KEY'", code="invalid_api_key"
            )

    def enter(self) -> None:
        """Count a request in. Raises ApiError 503 when closing and 429 when full."""
        if self.closing:
            raise ApiError(503, "the server is stopping; ask again later", retry_after=5)
        if self.inside >= self.most:
            raise ApiError(
                429,
                f"{self.most} requests are being answered already; ask again in a moment",
                code="rate_limit_exceeded",
                retry_after=BUSY_SECONDS,
            )
        self.inside += 1

    def leave(self) -> None:
        """Count a request out."""
        self.inside -= 1


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
