"""Members that answer by thinking longer: workers that write at once, and strategies over samples.

    Together   the answer that a worker or the finisher gave; what the workers wrote leads to it
    Scaled     the sample that a strategy chose

`max_tokens` is what one writer may write: each worker, the finisher, each sample. What is counted
is all that was drawn.
"""

import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pluribus.core.errors import InputError, RecipeError, nearest
from pluribus.serve.errors import wrong
from pluribus.serve.members import Asking, generator, question
from pluribus.serve.prompts import Messages, of_messages, of_text
from pluribus.serve.recipes import Hogwild, Scale
from pluribus.serve.remote import Remote
from pluribus.serve.served import Served
from pluribus.serve.works import Job, Left, Works
from pluribus.serve.writing import Thought

SPARE = 32  # tokens of room for each worker's headings


class Together:
    """Workers of one model that write at once; one request at a time."""

    part = None

    def __init__(self, name: str, model: Any, tokenizer: Any, recipe: Hogwild) -> None:
        """Raise InputError for a model whose cache workers cannot share."""
        from pluribus.decode.hogwild import HogwildEngine

        self.name, self.recipe = name, recipe
        self.created = int(time.time())
        self.default = recipe.max_steps
        self.workers = HogwildEngine(
            model, tokenizer, recipe.layout, recipe.workers, answer_tokens=recipe.answer_tokens
        )
        self.engine = Works(name, self.solve, 1)

    def close(self) -> None:
        """Cut off what runs."""
        self.engine.close()

    def read(self, said: Messages | str) -> tuple[int | None, int | None]:
        """Return the prompt's tokens, with the instructions, and what each worker may add.

        Raises ApiError for an empty problem.
        """
        problem = question(said)
        if not problem.strip():
            raise wrong("the problem is empty; give a text")
        size = len(self.workers.prompt(problem))
        limit = self.workers.reader.limit
        count = len(self.workers.names)
        return size, None if limit is None else (limit - size) // count - SPARE

    def solve(self, job: Job) -> None:
        """Let workers and finisher write. Raises Left between passes if the job is cancelled."""
        names = self.workers.names
        last = time.monotonic()

        def go_on() -> bool:
            nonlocal last
            now = time.monotonic()
            self.engine.counts.steps += 1
            self.engine.counts.on_step(now - last, len(names))
            last = now
            return not job.cancelled

        def on_token(worker: int, text: str) -> None:
            job.send(Thought(text, names[worker]))

        self.workers.answer_tokens = min(self.recipe.answer_tokens, job.max_tokens)
        out = self.workers.run(
            question(job.said),
            job.max_tokens,
            sampling=self._sampling(job),
            seed=secrets.randbelow(1 << 31) if job.seed is None else job.seed,
            on_token=on_token,
            go_on=go_on,
        )
        job.written = out.tokens + out.finisher_tokens
        if job.cancelled:
            raise Left
        # Without an answer, what the workers wrote is all that there is.
        job.tell(out.text if out.answer is None else out.answer, out.answer is not None, out.tokens)

    def _sampling(self, job: Job) -> Any:
        from pluribus.decode.hogwild import Sampling

        if job.fixed:
            return Sampling()
        sampling = Sampling.of(self.workers.reader.model)
        for given in (self.recipe, job):
            told = {"temperature": given.temperature, "top_p": given.top_p}
            sampling = replace(sampling, **{n: x for n, x in told.items() if x is not None})
        return sampling


class Scaled:
    """A strategy over samples of another member; as many requests at a time as `threads`."""

    part = None

    def __init__(self, name: str, over: Served | Remote, recipe: Scale, threads: int = 16) -> None:
        """Raise InputError for a strategy or verifier that the other one is not fit for."""
        self.name, self.over, self.recipe = name, over, recipe
        self.created = int(time.time())
        self.default = recipe.max_tokens
        self.judge = self._judge()
        self._check()
        self.engine = Works(name, self.solve, threads)

    def close(self) -> None:
        """Cut off what runs."""
        self.engine.close()

    def read(self, said: Messages | str) -> tuple[int | None, int | None]:
        """Return the prompt's tokens and what a sample may add to it; None: an endpoint knows."""
        one = self.over
        if isinstance(one, Remote):
            return None, None
        text = isinstance(said, str)
        found = (of_text if text else of_messages)(one.model, one.tokenizer, said)  # type: ignore[arg-type]
        own = found.inputs.get("member_inputs", {}).values()
        longest = max([len(found.ids)] + [int(m["input_ids"].shape[1]) for m in own])
        return longest, None if one.room is None else one.room - longest

    def solve(self, job: Job) -> None:
        """Spend a budget on the job. Raises Left, what models raise, or InputError."""
        from pluribus.decode.scaling import Budget, Problem, Sampling
        from pluribus.decode.scaling.answers import extractor

        recipe = self.recipe
        own = job.fixed
        seed = recipe.seed if own else secrets.randbelow(1 << 31)
        sampling = Sampling(
            temperature=recipe.temperature if own or job.temperature is None else job.temperature,
            top_p=recipe.top_p if own or job.top_p is None else job.top_p,
            max_tokens=job.max_tokens,
            stop=job.stop,
            seed=seed if job.seed is None else job.seed,
        )
        asking = generator(self.over, job, recipe.continuation)
        problem = Problem(question=asking.question, extract=extractor(recipe.extract))
        done = replace(recipe.spender, sampling=sampling).run(
            problem, asking, self._verifier(asking, sampling), Budget(tokens=recipe.budget_tokens)
        )
        if job.cancelled:
            raise Left
        chosen = done.chosen
        if chosen is None:
            job.tell("", False, job.written)
            return
        job.tell(chosen.text, chosen.finished, max(job.written - chosen.tokens, 0))

    def _verifier(self, asking: Asking, sampling: Any) -> Any:
        """Return the verifier of one job: those that call a model count what they use."""
        from pluribus.decode.scaling import VERIFIERS

        if self.recipe.verifier is None or self.judge is not None:
            return self.judge
        kind: Any = VERIFIERS[self.recipe.verifier]
        if self.recipe.verifier == "majority":
            return kind(asking, sampling=sampling)
        return kind(Asking(asking.job, asking.inner, free=True))  # a grade is no answer

    def _judge(self) -> Any:
        """Return a verifier that looks into the model, between two tokens of others; else None."""
        from pluribus.agents import LocalModel
        from pluribus.decode.scaling import VERIFIERS
        from pluribus.decode.scaling.verifiers import facts
        from pluribus.decode.stack import Opened

        name, one = self.recipe.verifier, self.over
        if name is None or (needs := facts(VERIFIERS[name]).needs) == "generator":
            return None
        if isinstance(one, Remote):
            raise InputError(f"the verifier {name} looks into a model, and an endpoint shows none")
        kind: Any = VERIFIERS[name]
        if needs == "fused":
            return _Between(one, kind.of(one.model))
        reader = LocalModel(Opened(one.model, one.tokenizer))
        return _Between(one, kind.load(reader, Path(str(self.recipe.head))))

    def _check(self) -> None:
        from pluribus.decode.scaling.strategies import facts

        known = facts(self.recipe.spender)
        goes_on = isinstance(self.over, Served) or self.recipe.continuation != "none"
        if known.continues and not goes_on:
            raise InputError(
                f"{known.name} goes on from what was written; say how the endpoint of "
                f"{self.over.name!r} does (continuation), or take a strategy of whole samples"
            )


class _Between:
    """A verifier that runs the model: in the model's thread, between two tokens."""

    def __init__(self, one: Served, inner: Any) -> None:
        self.one, self.inner = one, inner

    def score(self, problem: Any, candidate: list[str]) -> list[float]:
        """Return the scores."""
        return self.one.engine.call(lambda: self.inner.score(problem, candidate)).result()


Composed = Together | Scaled


def over(name: str, recipe: Scale, members: Mapping[str, Any]) -> Served | Remote:
    """Return the member that a strategy draws from.

    Raises RecipeError unless it is a model that writes, or an endpoint.
    """
    known = [n for n, one in members.items() if isinstance(one, Served | Remote) and n != name]
    if recipe.scale not in known:
        raise RecipeError(
            f"scale names {recipe.scale!r}; strategies draw from the file's models and endpoints: "
            f"{', '.join(known) or 'there are none'}.{nearest(recipe.scale, known)}"
        )
    found = members[recipe.scale]
    if isinstance(found, Served) and not found.writes:
        raise RecipeError(f"scale names {recipe.scale!r}, which only makes embeddings")
    return found
