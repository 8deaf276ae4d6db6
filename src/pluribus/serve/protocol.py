"""Requests of OpenAI's protocol, read strictly.

What would change an answer and is not done here is refused; what does not is taken and ignored.
"""

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from pluribus.core.errors import nearest
from pluribus.serve.errors import ApiError, wrong

TOP = 20  # likely tokens beside each one
STOPS = 16  # stop texts
INPUTS = 2048  # texts of one request for embeddings, as OpenAI's

# Taken and ignored: they change nothing that a client could see in an answer.
HARMLESS = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "prediction", "parallel_tool_calls", "stream_obfuscation"),
}
# Taken where they ask for what is done anyway.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "top_k": (0, -1),
    "min_p": (0,),
    "add_special_tokens": (True,),
    "skip_special_tokens": (True,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
}

# What a message may hold beside role, content and name: of an answer that is sent back, mostly.
TOLD = {"refusal", "annotations", "reasoning_content", "reasoning", "workers"}
UNCALLED: Mapping[str, tuple[Any, ...]] = {"tool_calls": ([],), "function_call": (), "audio": ()}


def _stops(value: Any) -> list[str]:
    if value is None:
        return []
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError("expected a text or a list of texts")
    if len(found) > STOPS:
        raise ValueError(f"{len(found)} stop texts are given; at most {STOPS} are taken")
    if not all(found):
        raise ValueError("an empty stop text would stop every answer before it begins")
    return found


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _prompts(value: Any) -> list[str | list[int]]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("expected a text, a list of texts, token ids, or a list of lists of them")
    if not value:
        raise ValueError("is empty; give at least one")
    if all(isinstance(one, str) for one in value):
        return value
    if all(_is_id(one) for one in value):
        return [value]
    if all(isinstance(row, list) and all(_is_id(one) for one in row) for row in value):
        if not all(value):
            raise ValueError("holds a list without token ids")
        return value
    raise ValueError("expected a text, a list of texts, token ids, or a list of lists of them")


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = []
        for part in value:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                raise ValueError("only parts of type 'text' are read here")
            if not isinstance(part.get("text"), str):
                raise ValueError("a part of type 'text' has a text")
            parts.append(part["text"])
        return "".join(parts)
    raise ValueError("expected a text, or a list of {type: text, text: ...}")


_TEXT = {"type": "string", "minLength": 1}
_NULL = {"type": "null"}
_TEXTS = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": STOPS}, _NULL]}


def prompts_schema(vocabulary: int | None = None, most: int | None = None) -> dict[str, Any]:
    """Return the schema of prompts: at most so many, of ids below the vocabulary's size."""
    one: dict[str, Any] = {"type": "integer", "minimum": 0}
    if vocabulary is not None:
        one["maximum"] = vocabulary - 1
    ids = {"type": "array", "items": one, "minItems": 1}
    several: dict[str, Any] = {"type": "array", "minItems": 1}
    if most is not None:
        several["maxItems"] = most
    return {"anyOf": [_TEXT, {**several, "items": _TEXT}, ids, {**several, "items": ids}]}


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}

Stops = Annotated[Any, AfterValidator(_stops), WithJsonSchema(_TEXTS)]
Prompts = Annotated[Any, AfterValidator(_prompts), WithJsonSchema(prompts_schema())]
Content = Annotated[Any, AfterValidator(_content), WithJsonSchema(_CONTENT)]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class StreamOptions(_Request):
    """What a stream holds beside its text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Message(_Request):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _said(cls, value: Any) -> Any:
        """An assistant may have said nothing."""
        if isinstance(value, Mapping) and value.get("role") == "assistant":
            return {**value, "content": "" if (said := value.get("content")) is None else said}
        return value


class _Writes(_Request):
    model: str
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stops = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    @property
    def stops(self) -> list[str]:
        """Stop texts."""
        return self.stop or []

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class Chat(_Writes):
    """A request to /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP)


class Completion(_Writes):
    """A request to /v1/completions."""

    prompt: Prompts
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=TOP)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)


class Embedding(_Request):
    """A request to /v1/embeddings."""

    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)


Kind = TypeVar("Kind", bound=_Request)


def read(kind: type[Kind], raw: bytes) -> tuple[Kind, dict[str, Any]]:
    """Return a request of this kind, and its JSON. Raises ApiError with status 400."""
    try:
        value = json.loads(raw, parse_float=_number)
        # No halves of surrogate pairs, and no NaN or infinity, which JSON has no words for.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise wrong("the body is nested too deeply") from None
    except UnicodeError:
        raise wrong("the body holds text that is not Unicode") from None
    except ValueError as error:
        raise wrong(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise wrong(f"the body is a JSON {_name(value)}; expected an object")
    try:
        made = kind.model_validate(value)
    except ValidationError as error:
        raise _fault(error) from None
    except RecursionError:
        raise wrong("the body is nested too deeply") from None
    _check(made, "", HARMLESS, NEUTRAL)
    for i, message in enumerate(getattr(made, "messages", ())):
        _check(message, f"messages.{i}.", TOLD, UNCALLED)
    if (options := getattr(made, "stream_options", None)) is not None:
        _check(options, "stream_options.", set(), {})
    return made, value


def _check(
    made: BaseModel, where: str, harmless: AbstractSet[str], neutral: Mapping[str, tuple[Any, ...]]
) -> None:
    """Raise ApiError for a field that would change the answer, or that nobody knows."""
    for name, value in (made.model_extra or {}).items():
        if value is None or name in harmless:
            continue
        place = f"{where}{name[:100]}"
        if name not in neutral:
            hint = nearest(name[:100], [*type(made).model_fields, *neutral])
            raise wrong(f"unknown parameter {place!r}.{hint}", place, "unknown_parameter")
        if not any(_same(value, one) for one in neutral[name]):
            said = f"{place} is not supported here; leave it out"
            raise wrong(said, place, "unsupported_parameter")


def _same(value: Any, one: Any) -> bool:
    """Whether two are equal as JSON has it: 0 and 0.0 are, 0 and false are not."""
    return value == one and isinstance(value, bool) == isinstance(one, bool)


def _fault(error: ValidationError) -> ApiError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return wrong(f"{where} is missing", where, "missing_required_parameter")
    given = first.get("input")
    shown = "" if isinstance(given, dict | list) else f", not {str(given)[:80]!r}"
    return wrong(f"{where}: {said}{shown}", where, "invalid_value")


def _number(text: str) -> float | int:
    """Return a number; JSON does not tell 1.0 from 1."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 1 << 63 else value


def _name(value: Any) -> str:
    return {list: "array", str: "text", bool: "boolean", type(None): "null"}.get(
        type(value), "number"
    )


def schemas() -> dict[str, Any]:
    """Return the JSON schemas of all requests, by name."""
    from pydantic.json_schema import models_json_schema

    kinds: list[tuple[type[BaseModel], Literal["validation"]]] = [
        (kind, "validation") for kind in (Chat, Completion, Embedding)
    ]
    _, found = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    made = found["$defs"]
    for name in ("Chat", "Completion", "Embedding"):
        _closed(made[name], HARMLESS, NEUTRAL)
    _closed(made["StreamOptions"], set(), {})
    _closed(made["Message"], TOLD, UNCALLED)
    said = made.pop("Message")
    roles = said["properties"].pop("role")["enum"]
    own = {**said["properties"], "role": {"enum": [role for role in roles if role != "assistant"]}}
    answer = {**said["properties"], "role": {"const": "assistant"}}
    answer["content"] = {"anyOf": [*_CONTENT["anyOf"], _NULL]}
    made["Message"] = {
        "anyOf": [{**said, "properties": own}, {**said, "properties": answer, "required": ["role"]}]
    }
    return made


def _closed(
    schema: dict[str, Any], harmless: AbstractSet[str], neutral: Mapping[str, tuple[Any, ...]]
) -> None:
    """Put the fields that are ignored into a schema, and allow no others."""
    for name in sorted(harmless):
        schema["properties"].setdefault(name, {})
    for name, values in neutral.items():
        schema["properties"][name] = {"enum": [*values, None]}
    schema["additionalProperties"] = False
