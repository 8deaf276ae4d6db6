"""Members as what `pluribus.decode.scaling` calls generators: samples for one job.

A model here writes them in its batch, beside what others ask of it; an endpoint is asked from the
server's loop. Both stop once the job is cancelled: a model before its next token, an endpoint by
closing the connection.
"""

import asyncio
import concurrent.futures
import queue
from collections.abc import Sequence
from typing import Any

from pluribus.core.errors import InputError
from pluribus.decode.scaling.interface import Completion, Generator, Prompt
from pluribus.serve import prompts
from pluribus.serve.errors import ApiError, stopping, told
from pluribus.serve.remote import Remote
from pluribus.serve.sampling import Sampling
from pluribus.serve.served import Served
from pluribus.serve.works import Job, Left
from pluribus.serve.writing import Ask, Done, Event, Failed, Piece

NOT_TAKEN = (400, 422)  # how endpoints say that they don't know a field


class Asking:
    """Draws for a job: the question is what the client said, and what is drawn is counted.

    No completion is longer than the job allows, unless this one is `free`.
    """

    def __init__(self, job: Job, inner: Generator, free: bool = False) -> None:
        self.job, self.inner, self.free = job, inner, free
        self.continues = getattr(inner, "continues", True)
        self.question = question(job.said)

    def count(self, text: str) -> int:
        """Return how many tokens a text has; 0 where only an endpoint knows."""
        own = getattr(self.inner, "count", None)
        return 0 if own is None else own(text)

    def sample(
        self,
        prompt: Prompt,
        n: int = 1,
        *,
        temperature: float = 0.8,
        top_p: float = 1.0,
        max_tokens: int = 2048,
        stop: Sequence[str] = (),
        seed: int = 0,
        prefix: str = "",
    ) -> list[Completion]:
        """Return n continuations. Raises Left once the job is cancelled."""
        if self.job.cancelled:
            raise Left
        own = prompt == self.question
        made = self.inner.sample(
            self.job.said if own else prompt,
            n,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens if self.free else min(max_tokens, self.job.max_tokens),
            stop=stop,
            seed=seed,
            prefix=prefix,
        )
        self.job.written += sum(one.tokens for one in made)
        if own and not prefix and not isinstance(self.inner, Here):
            self.job.read = made[0].prompt_tokens
        return made


class Here:
    """A model here, asked through its engine."""

    continues = True

    def __init__(self, one: Served, job: Job) -> None:
        self.one, self.job = one, job
        self.talks = not isinstance(job.said, str)

    def count(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(self.one.tokenizer(text, add_special_tokens=False)["input_ids"])

    def sample(
        self,
        prompt: Prompt,
        n: int = 1,
        *,
        temperature: float = 0.8,
        top_p: float = 1.0,
        max_tokens: int = 2048,
        stop: Sequence[str] = (),
        seed: int = 0,
        prefix: str = "",
    ) -> list[Completion]:
        """Return n continuations, drawn side by side.

        Raises InputError for a prompt without room, what the model raises, or Left.
        """
        read = self._read(prompt, prefix)
        longest = max(
            [len(read.ids)]
            + [m["input_ids"].shape[1] for m in read.inputs.get("member_inputs", {}).values()]
        )
        most = max_tokens if self.one.room is None else min(max_tokens, self.one.room - longest)
        if most < 1 and prefix:  # what was written has filled the context
            return [Completion("", 0, "length", prompt_tokens=longest) for _ in range(n)]
        if most < 1 or not read.ids:
            raise InputError(
                f"a prompt of {longest} tokens was to be read; {self.one.name!r} takes 1 to "
                f"{self.one.room}"
            )
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        asks = []
        for i in range(n):
            sampling = Sampling(
                max_tokens=most, temperature=temperature, top_p=top_p, seed=(seed + i) % (1 << 63)
            )

            def send(event: Event, i: int = i) -> None:
                events.put((i, event))

            asks.append(
                Ask(
                    read.ids,
                    sampling,
                    send,
                    (*stop, *read.stop),
                    inputs=read.inputs,
                    part=self.one.part,
                )
            )

        def cancel() -> None:
            for ask in asks:
                ask.cancel()

        self.job.hold(cancel)
        try:
            self._submit(asks)
            return self._collected(events, n, len(read.ids), stop)
        finally:
            cancel()  # those that are done don't mind
            self.job.drop(cancel)

    def _submit(self, asks: Sequence[Ask]) -> None:
        try:
            for ask in asks:
                self.one.engine.submit(ask)
        except RuntimeError:
            raise stopping(self.one.name) from None

    def _read(self, prompt: Prompt, prefix: str) -> prompts.Read:
        one = self.one
        if isinstance(prompt, str) and not self.talks:
            return prompts.of_text(one.model, one.tokenizer, prompt, prefix)
        said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return prompts.of_messages(one.model, one.tokenizer, said, prefix)

    def _collected(
        self, events: "queue.SimpleQueue[tuple[int, Event]]", n: int, read: int, stop: Sequence[str]
    ) -> list[Completion]:
        texts = [""] * n
        done: list[Done | None] = [None] * n
        while not all(done):
            i, event = events.get()
            if isinstance(event, Failed):
                raise told(event.error)
            if isinstance(event, Piece):
                texts[i] += event.text
            elif isinstance(event, Done):
                if event.reason == "cancelled":
                    self.job.written += event.written
                    raise Left
                done[i] = event
        made = []
        for text, one in zip(texts, done, strict=True):
            assert one is not None
            stopped = one.stop if one.stop in stop else None
            finish = "length" if one.reason == "length" else "stop" if stopped else "end"
            made.append(
                Completion(text, one.written, finish, prompt_tokens=read, stopped_at=stopped)
            )
        return made


class Passing:
    """Posts for `pluribus.agents.OpenAICompatible` through the server's own connection."""

    def __init__(self, far: Remote, job: Job) -> None:
        self.far, self.job = far, job
        self.base = f"the endpoint of {far.name!r}"

    def post(self, path: str, body: Any, *, refusable: bool = False) -> Any:
        """Return the answer; None if a `refusable` request is not understood.

        Raises ApiError as the endpoint says, or Left.
        """
        asked = asyncio.run_coroutine_threadsafe(self.far.ask(path[1:], body), self.job.loop)
        self.job.hold(asked.cancel)
        try:
            return asked.result()
        except concurrent.futures.CancelledError:
            raise Left from None
        except ApiError as error:
            if refusable and error.status in NOT_TAKEN:
                return None
            raise
        finally:
            self.job.drop(asked.cancel)


def generator(one: Served | Remote, job: Job, continuation: Any = "none") -> Asking:
    """Return what draws from a member for a job."""
    if isinstance(one, Served):
        return Asking(job, Here(one, job))
    from pluribus.agents import OpenAICompatible

    api = "completions" if isinstance(job.said, str) else "chat"
    inner = OpenAICompatible(
        one.endpoint.url,
        one.endpoint.model,
        api=api,
        continuation=continuation,
        client=Passing(one, job),
    )
    return Asking(job, inner)


def question(said: prompts.Messages | str) -> str:
    """Return a conversation as one text: the user's words alone, if there is nothing else."""
    if isinstance(said, str):
        return said
    if len(said) == 1 and said[0]["role"] == "user":
        return said[0]["content"]
    return prompts.plain(said).removesuffix("Assistant:").rstrip()
