"""Text of tokens as they come: characters only once they are whole, and never a stop text.

`Decoder` gives what a token adds, so that all pieces together are the text of all tokens. `Stops`
holds text back for as long as it could be the beginning of a stop text.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

BROKEN = "\ufffd"  # what decoders write for bytes that are no character (yet)


class Decoder:
    """Turns ids into text, one at a time.

    Ids that came before are decoded with a new one as far as they can matter: tokenizers strip or
    add a space by what stands before.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.known = 0  # ids whose text cannot change any more
        self.told = ""  # text after those of the window before, as far as it was given out

    def put(self, token: int) -> str:
        """Return the text that is certain once this token is there."""
        self.ids.append(token)
        whole = self._decode(self.ids)
        fixed = _fixed(whole)
        # Tokenizers with bytes as a fallback write a whole run of them anew when one more does not
        # fit: what was told stays, once the run is over.
        certain = fixed == whole or fixed.startswith(self.told)
        new = fixed[len(self.told) :] if certain else ""
        self.told += new
        if new and fixed == whole:
            # A window of one token of context is enough from here on.
            self.ids = self.ids[self.known :]
            self.known = len(self.ids)
            self.told = self._decode(self.ids)
        return new

    def end(self) -> str:
        """Return what is left: a character that was never finished."""
        whole = self._decode(self.ids)
        new = whole[len(self.told) :]
        self.told = whole
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _fixed(text: str) -> str:
    """Return a text without the broken characters at its end that can still become another one.

    A character has four bytes at most, so three may be waiting.
    """
    end = len(text)
    while end > max(0, len(text) - 3) and text[end - 1] == BROKEN:
        end -= 1
    return text[:end]


class Released(NamedTuple):
    """Text that may be shown, and the stop text that follows it, if one does."""

    text: str
    stop: str | None


class Stops:
    """Cuts a text at the first of some stop texts."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""

    def put(self, text: str) -> Released:
        """Return what is certain to precede a stop text, and which one was found."""
        self.held += text
        found = [(at, stop) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda one: one[0])
            shown, self.held = self.held[:at], ""
            return Released(shown, stop)
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        shown = self.held[: len(self.held) - keep]
        self.held = self.held[len(shown) :]
        return Released(shown, None)

    def end(self) -> str:
        """Return what was held back: no stop text came of it."""
        shown, self.held = self.held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of a text begin a stop text."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes of one token, also of one that is only a part of a character."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if BROKEN not in text:
        return text.encode("utf-8", "replace")
    name = tokenizer.convert_ids_to_tokens(token)
    if isinstance(name, str):
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        alphabet = _byte_letters()
        if all(letter in alphabet for letter in name):
            return bytes(alphabet[letter] for letter in name)
    return text.encode()


def token_text(tokenizer: Any, token: int) -> str:
    """Return a token as answers name it: its text, or `bytes:\\x..` for a part of a character."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if BROKEN not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes(tokenizer, token))


@cache
def _byte_letters() -> dict[str, int]:
    """Return the letters by which byte-level tokenizers write bytes (GPT-2, section 2.2).

    Printable bytes of Latin-1 stand for themselves; the others follow from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]
    letters.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return letters
