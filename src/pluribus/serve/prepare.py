"""From a request to what is to be written: prompts read, limits checked, answers begun."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from pluribus.serve import prompts, protocol
from pluribus.serve.answers import Answer, Choice
from pluribus.serve.composed import Composed
from pluribus.serve.config import Limits
from pluribus.serve.errors import wrong
from pluribus.serve.flow import Flow
from pluribus.serve.sampling import Sampling
from pluribus.serve.served import Served
from pluribus.serve.works import Job
from pluribus.serve.writing import Ask

SHORT = 16  # tokens of a completion without max_tokens, as OpenAI's
Body = protocol.Chat | protocol.Completion


class Prepared:
    """A request read by its model: what is asked for, and how much was read."""

    def __init__(self, answer: Answer, asks: Sequence[Ask | Job], flow: Flow, read: int) -> None:
        self.answer, self.asks, self.flow, self.read = answer, list(asks), flow, read


def check_count(body: Body, limits: Limits) -> None:
    """Raise ApiError for more answers than one request may ask for, or contradictions."""
    n = body.n or 1
    if isinstance(body, protocol.Chat):
        prompts_given = 1
        if body.top_logprobs is not None and not body.logprobs:
            raise wrong("top_logprobs needs logprobs: true", "top_logprobs")
    else:
        prompts_given = len(body.prompt)
        if body.best_of not in (None, n):
            raise wrong("best_of other than n is not supported here", "best_of")
    if (total := prompts_given * n) > limits.max_choices:
        raise wrong(
            f"{total} answers are asked for in one request; at most {limits.max_choices} are "
            "written",
            "n",
        )


def asked_tokens(body: Body, limits: Limits) -> tuple[int | None, str]:
    """Return the tokens that a request names, and by which key. Raises ApiError over the limit."""
    asked, name = body.max_tokens, "max_tokens"
    if isinstance(body, protocol.Chat) and body.max_completion_tokens is not None:
        asked, name = body.max_completion_tokens, "max_completion_tokens"
    if asked is not None and asked > limits.max_new_tokens:
        raise wrong(f"{name} is {asked}; at most {limits.max_new_tokens} tokens are written", name)
    return asked, name


def most_tokens(
    body: Body, limits: Limits, one: str, read: int, room: int | None, default: int | None = None
) -> int:
    """Return how many tokens may be written, where `room` are left.

    Raises ApiError if they have no room.
    """
    asked, name = asked_tokens(body, limits)
    if asked is None:
        usual = SHORT if isinstance(body, protocol.Completion) else limits.max_new_tokens
        asked = min(default or usual, limits.max_new_tokens)
        asked = asked if room is None else max(1, min(asked, room))
    if room is not None and asked > room:
        raise wrong(
            f"{read} tokens of a prompt and {asked} new ones are more than the {read + room} that "
            f"{one!r} takes; send a shorter prompt or a smaller {name}",
            _prompt_of(body),
            "context_length_exceeded",
        )
    return asked


async def of_model(one: Served, body: Body, limits: Limits) -> Prepared:
    """Read a request for a model here. Raises ApiError."""
    check_count(body, limits)
    asked_tokens(body, limits)
    n = body.n or 1
    if isinstance(body, protocol.Chat):
        read = [await _aside(prompts.of_messages, one.model, one.tokenizer, said(body))]
        texts: list[str | None] = [None]
        count = (body.top_logprobs or 0) if body.logprobs else None
        echo = False
    else:
        read = [await _aside(prompts.of_text, one.model, one.tokenizer, p) for p in body.prompt]
        count, echo = body.logprobs, bool(body.echo)
        texts = [_text(one, p) if echo else None for p in body.prompt]
    flow = Flow()
    asks, choices = [], []
    for (ids, inputs, stop), text in zip(read, texts, strict=True):
        own = inputs.get("member_inputs", {})
        if echo and own and count is not None:
            raise wrong(
                "members of this model read prompts of their own, so the prompt has no common "
                "log-probabilities; leave echo or logprobs out",
                "echo",
            )
        longest = max([len(ids)] + [int(m["input_ids"].shape[1]) for m in own.values()])
        check_ids(one, ids, limits, _prompt_of(body))
        room = None if one.room is None else one.room - longest
        most = most_tokens(body, limits, one.name, longest, room)
        for _ in range(n):
            index = len(asks)
            sampling = Sampling(
                max_tokens=most,
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                seed=_seed(body, index),
                ignore_end=bool(body.ignore_eos),
            )
            asks.append(
                Ask(
                    ids,
                    sampling,
                    flow.sender(index),
                    (*body.stops, *stop),
                    count,
                    echo and count is not None,
                    inputs,
                    one.part,
                )
            )
            choices.append(Choice(index, ids, text, count))
    answer = Answer(kind_of(body), one.name, one.tokenizer, choices)
    return Prepared(answer, asks, flow, sum(len(ids) for ids, _, _ in read))


async def of_composite(one: Composed, body: Body, limits: Limits) -> Prepared:
    """Read a request for workers or a strategy. Raises ApiError, also for what they don't have."""
    check_count(body, limits)
    asked, name = asked_tokens(body, limits)
    if asked == 0:
        raise wrong(f"{name} is 0, and {one.name!r} scores no texts; give 1 or more", name)
    if body.logprobs is not None and body.logprobs is not False:
        raise wrong(
            f"{one.name!r} chooses among texts, which have no log-probabilities; ask a model",
            "logprobs",
        )
    if body.ignore_eos:
        raise wrong(f"{one.name!r} ends as its writers do; leave ignore_eos out", "ignore_eos")
    texts: Sequence[Any]
    if isinstance(body, protocol.Chat):
        texts = [said(body)]
    else:
        if body.echo:
            raise wrong(f"{one.name!r} does not echo prompts; leave echo out", "echo")
        if not all(isinstance(text, str) for text in body.prompt):
            raise wrong(f"{one.name!r} reads texts; give a text, not ids", "prompt")
        texts = body.prompt
    flow = Flow()
    jobs, choices, total = [], [], 0
    for text in texts:
        size, room = await _aside(one.read, text)
        if size is not None:
            check_size(one.name, size, limits, _prompt_of(body))
        if room is not None and (asked or 1) > room:
            raise wrong(
                f"a prompt of {size} tokens leaves room for {max(room, 0)} new ones of each writer "
                f"of {one.name!r}; send a shorter prompt or a smaller {name}",
                _prompt_of(body),
                "context_length_exceeded",
            )
        most = most_tokens(body, limits, one.name, size or 0, room, one.default)
        for again in range(body.n or 1):
            index = len(jobs)
            jobs.append(
                Job(
                    text,
                    most,
                    flow.sender(index),
                    body.temperature,
                    body.top_p,
                    _seed(body, index),
                    tuple(body.stops),
                    asyncio.get_running_loop(),
                )
            )
            choices.append(Choice(index, (), again=bool(again)))
        total += size or 0
    return Prepared(Answer(kind_of(body), one.name, None, choices), jobs, flow, total)


def said(body: protocol.Chat) -> list[dict[str, str]]:
    """Return the messages of a request."""
    return [{"role": m.role, "content": m.content} for m in body.messages]


def kind_of(body: Body) -> Any:
    """Return which of the two protocols a request is of."""
    return "chat" if isinstance(body, protocol.Chat) else "text"


def check_ids(one: Served, ids: Sequence[int], limits: Limits, param: str) -> None:
    """Raise ApiError for a prompt without tokens, too many, or ids that are no token."""
    check_size(one.name, len(ids), limits, param, one.room)
    if (bad := next((i for i in ids if not 0 <= i < one.vocabulary), None)) is not None:
        raise wrong(f"{bad} is no token: ids are 0 to {one.vocabulary - 1}", param)


def check_size(one: str, size: int, limits: Limits, param: str, room: int | None = None) -> None:
    """Raise ApiError for a prompt without tokens, or more than the limit or the context."""
    if not size:
        raise wrong(f"the tokenizer of {one!r} makes no tokens of an empty text", param)
    most = min(limits.max_prompt_tokens, room or limits.max_prompt_tokens)
    if size > most:
        raise wrong(
            f"the prompt has {size} tokens; {one!r} takes {most}", param, "context_length_exceeded"
        )


def _prompt_of(body: Body) -> str:
    return "messages" if isinstance(body, protocol.Chat) else "prompt"


def _seed(body: Body, index: int) -> int | None:
    return None if body.seed is None else (body.seed + index) % (1 << 63)


def _text(one: Served, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    check = [i for i in prompt if 0 <= i < one.vocabulary]
    return one.tokenizer.decode(check, clean_up_tokenization_spaces=False)


async def _aside(work: Callable[..., Any], *given: Any) -> Any:
    """Read a prompt off the loop, which others wait for."""
    return await asyncio.to_thread(work, *given)
