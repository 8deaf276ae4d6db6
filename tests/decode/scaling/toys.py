"""Worlds small enough to be worked by hand: a tree of steps, a table of scores."""

from pluribus.decode.scaling.interface import Completion


class Tree:
    """Goes on from a prefix with that prefix's children in turn, again and again.

    A step that ends with "|" stops at the separator; any other ends the text. Each letter is a
    token. What was asked for is in `asked`: (prefix, n, settings).
    """

    def __init__(self, children):
        self.children, self.asked, self._next = children, [], {}

    def sample(self, prompt, n=1, *, prefix="", stop=(), max_tokens=99, **settings):
        self.asked.append((prefix, n, {"stop": stop, "max_tokens": max_tokens, **settings}))
        found = []
        for _ in range(n):
            at = 0 if settings["temperature"] == 0 else self._next.get(prefix, 0)
            self._next[prefix] = at + 1
            own = self.children[prefix]
            step = own[at % len(own)]
            parted = step.endswith("|")
            if parted and "|" not in stop:  # whole: goes on to the end by first children
                text = step
                while text.endswith("|"):
                    text += self.children[prefix + text][0]
                found.append(Completion(text, len(text), "end"))
                continue
            text = step.removesuffix("|")
            found.append(Completion(text, len(text), "stop" if parted else "end"))
        return found

    @property
    def requests(self):
        return [(prefix, n) for prefix, n, _ in self.asked]


class Table:
    """A process verifier: a score for each text that grows step by step."""

    def __init__(self, scores):
        self.scores, self.asked = scores, []

    def score(self, problem, candidate):
        self.asked.append("".join(candidate))
        return [self.scores["".join(candidate[: i + 1])] for i in range(len(candidate))]


class Outcomes:
    """An outcome verifier: one score for the whole text."""

    def __init__(self, scores):
        self.scores = scores

    def score(self, problem, candidate):
        return [self.scores["".join(candidate)]]


def said(*texts, tokens=1):
    """Completions that ended by themselves."""
    return [Completion(text, tokens) for text in texts]
