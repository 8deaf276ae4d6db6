"""Small models behind a server, and asking engines without one."""

import queue
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "decode"))  # tests have no package
from members import moved, tiny, tokenizer, trio  # type: ignore[import-not-found]

from pluribus.serve.sampling import Sampling
from pluribus.serve.writing import Ask, Done, Failed, Piece, Prompt

__all__ = ["moved", "tiny", "tokenizer", "trio"]
WAIT = 60.0


class Told:
    """One answer's events."""

    def __init__(self, ids, most=8, **changes):
        sampling = {k: changes.pop(k) for k in ("temperature", "top_p", "seed") if k in changes}
        self.queue = queue.Queue()
        changes.setdefault("log_probs", 0)
        self.ask = Ask(ids, Sampling(max_tokens=most, **sampling), self.queue.put, **changes)
        self.text, self.tokens, self.prompt, self.done = "", [], None, None

    def next(self):
        event = self.queue.get(timeout=WAIT)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Prompt):
            self.prompt = event.likely
        elif isinstance(event, Piece):
            self.text += event.text
            self.tokens += event.tokens
        elif isinstance(event, Done):
            self.done = event
            self.tokens += event.ended
        return event

    def all(self):
        while self.done is None:
            self.next()
        return self

    @property
    def ids(self):
        return [one.token for one in self.tokens]


def rows(lengths, seed=0, vocabulary=330):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(5, vocabulary, (n,), generator=rng).tolist() for n in lengths]


@torch.no_grad()
def greedy(model, ids, most, ends=(0,)):
    """The likeliest tokens, each by a pass over everything before it: slow, and obvious."""
    written = list(ids)
    for _ in range(most):
        written.append(int(model(torch.tensor([written])).logits[0, -1].argmax()))
        if written[-1] in ends:
            break
    return written[len(ids) :]
