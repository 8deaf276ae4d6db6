"""What workers are told: how the text before them is laid out, and how steps are marked."""

from collections.abc import Sequence
from dataclasses import dataclass

from pluribus.core.errors import InputError


@dataclass(frozen=True)
class PromptFormat:
    """Texts around the problem and the workers' steps; every one may be replaced.

    `system` may hold {count} and {names}, `prefix` {name} and {step}; `openings` are
    the workers' first words, the last one's also those of all who follow.
    """

    system: str = (
        "{count} assistants named {names} solve one problem together. They think at the same time "
        "and read what the others write while it is being written. Finished paragraphs stand under "
        "'Shared work', in the order in which they were finished; paragraphs that others are still "
        "writing stand under 'Being written by the others' and end in '...'. Your own paragraph "
        "comes last. Write short paragraphs. Don't do what another one is doing already: if "
        "somebody is ahead of you, take another part or check theirs. Whoever knows the final "
        "answer writes it as \\boxed{{answer}}."
    )
    history: str = "\n\n### Shared work\n\n"
    others: str = "### Being written by the others\n\n"
    mark: str = " ...\n\n"
    own: str = "### My paragraph\n\n"
    split: str = "\n\n### What I write (the others go on above)\n\n"
    prefix: str = "**{name} [{step}]:** "
    openings: tuple[str, ...] = ("Let me propose how we split this.", "Hi, I'm ready.")
    check: str = "Quick check: is what I'm doing redundant (yes or no)? "
    force: str = "\n\nTime is up. The final answer is \\boxed{"

    def problem(self, names: Sequence[str], text: str) -> str:
        """Return the message that all workers share."""
        told = self.system.format(count=len(names), names=", ".join(names))
        return f"{told}\n\nProblem: {text}"

    def begins(self, name: str, step: int) -> str:
        """Return the words that a worker's step begins with."""
        return self.prefix.format(name=name, step=step)

    def opening(self, number: int) -> str:
        """Return a worker's first words."""
        if number < len(self.openings):
            return self.openings[number]
        return self.openings[-1] if self.openings else ""


def names_of(workers: int | Sequence[str]) -> tuple[str, ...]:
    """Return the workers' names. Raises InputError for none, or one twice."""
    known = ("Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Heidi")
    if isinstance(workers, int):
        if workers < 1:
            raise InputError(f"{workers} workers; give at least one")
        found = [*known[:workers], *(f"Worker {n + 1}" for n in range(len(known), workers))]
    else:
        found = [name.strip() for name in workers]
    if not found or not all(found) or len(set(found)) < len(found):
        raise InputError(f"workers {', '.join(map(repr, found)) or 'none'}; give each its own name")
    return tuple(found)
