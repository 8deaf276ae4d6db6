"""Answers under way, one step at a time: what the searches have in common.

A step ends with the separator, which stays with it. A path has ended when the model said so, was
cut at the limit, or wrote an empty step. An endpoint that does not tell its own end from a stop
text is caught by the last of these, at the price of one more call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pluribus.decode.scaling._run import Run
from pluribus.decode.scaling.interface import Candidate


@dataclass(frozen=True)
class Path:
    """What was written so far."""

    steps: tuple[str, ...] = ()
    tokens: int = 0
    ended: bool = False
    cut: bool = False  # ended by a limit: no finished answer
    score: float = 0.0  # the aggregate

    @property
    def text(self) -> str:
        """All steps as one."""
        return "".join(self.steps)


def extend(
    run: Run,
    paths: Sequence[Path],
    separator: str,
    *,
    most: int,
    whole: bool = False,
) -> list[Path]:
    """Return each path with one step more, in order; fewer once the budget is spent.

    Equal paths share a request, whose completions differ. `most` is the limit of a step's tokens;
    `whole` goes on to the end. Paths that have ended are returned as they are.
    """
    copies: dict[tuple[str, ...], int] = {}
    for path in paths:
        if not path.ended:
            copies[path.steps] = copies.get(path.steps, 0) + 1
    written = {
        steps: run.sample(
            count,
            prefix="".join(steps),
            stop=run.sampling.stop if whole else (*run.sampling.stop, separator),
            max_tokens=run.sampling.max_tokens if whole else most,
        )
        for steps, count in copies.items()
    }
    found = []
    for path in paths:
        if path.ended:
            found.append(path)
            continue
        if not written[path.steps]:
            continue
        made = written[path.steps].pop(0)
        parted = made.finish == "stop" and made.stopped_at in (None, separator)
        goes_on = parted and not whole and bool(made.text.strip())
        step = made.text + separator if goes_on else made.text
        found.append(
            replace(
                path,
                steps=(*path.steps, step) if step else path.steps,
                tokens=path.tokens + made.tokens,
                ended=not goes_on,
                cut=made.finish == "length",
            )
        )
    return found


def judged(run: Run, paths: Sequence[Path]) -> list[Path]:
    """Return the paths with their scores."""
    return [replace(path, score=run.value(path.steps)) if path.steps else path for path in paths]


def candidate(run: Run, path: Path) -> Candidate:
    """Return a path as a candidate, judged."""
    return run.candidate(
        path.text,
        path.tokens,
        finished=path.ended and not path.cut,
        steps=path.steps or ("",),
    )


def to_the_end(run: Run, paths: Sequence[Path], separator: str) -> list[Path]:
    """Return the best path, finished: what is done if a search ends without a finished one.

    If the budget is spent it stays unfinished.
    """
    if not paths:
        return []
    top = max(paths, key=lambda path: path.score)
    run.tell("finishing", text=top.text)
    return extend(run, [top], separator, most=run.sampling.max_tokens, whole=True) or [top]
