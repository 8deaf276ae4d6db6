"""The OpenAPI document: what requests may hold, and what answers and errors look like.

It is made for one server: names of models, limits and sizes of vocabularies are its own. Rules
between two fields are told in words (`top_logprobs` with `logprobs`, `best_of` with `n`, `n` times
prompts within `max_choices`, prompt and `max_tokens` within the context).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from pluribus.serve import protocol
from pluribus.serve.served import Served

if TYPE_CHECKING:
    from pluribus.serve.app import Api

Schema = dict[str, Any]
REFUSED = (400, 404, 408, 413, 415, 429, 500, 502, 503, 504)
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
EVENT: Schema = {"type": "object", "required": ["data"], "properties": {"data": TEXT}}


def documented(
    answer: str | None, *statuses: int, request: str | None = None, locked: bool = True
) -> dict[str, Any]:
    """Return what the document says of a route: schemas by name, and statuses that refuse."""
    told = statuses or (REFUSED if request else ())
    codes = [*told, 401] if locked else list(told)
    refused = {code: {"description": "Refused", "content": _json("Error")} for code in codes}
    if answer == "Health":  # which says what is wrong with it
        refused = {503: {"description": "Stopping, or broken", "content": _json("Health")}}
    done: dict[str, Any] = {"text/plain": {"schema": TEXT}}
    if answer is not None:
        done = _json(answer)
    if request in ("Chat", "Completion"):
        done["text/event-stream"] = {"itemSchema": EVENT}  # as OpenAPI 3.2 has it
    responses = {200: {"description": "Done", "content": done}, **refused}
    extra: dict[str, Any] = {"security": [{"key": []}, {}]} if locked else {}
    if request is not None:
        extra["requestBody"] = {"required": True, "content": _json(request)}
    return {"responses": responses, "openapi_extra": extra, "response_model": None}


def describe(app: FastAPI, api: "Api") -> None:
    """Put the schemas, and the key, into the application's document."""
    made = app.openapi()
    for path in made["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # FastAPI's own, which is never given
            done = operation["responses"]["200"]["content"]
            if "text/plain" in done:
                done.pop("application/json", None)
    parts = made.setdefault("components", {})
    parts["schemas"] = {**protocol.schemas(), **ANSWERS}
    for name in ("Chat", "Completion", "Embedding"):
        _fit(parts["schemas"][name], api)
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    app.openapi_schema = made


def _fit(schema: Schema, api: "Api") -> None:
    """Put a server's own names and limits into a request's schema."""
    fields, limits = schema["properties"], api.limits
    fields["model"] = {"type": "string", "enum": list(api.members)}
    for name in ("max_tokens", "max_completion_tokens", "n"):
        for kind in fields.get(name, {}).get("anyOf", ()):
            if kind.get("type") == "integer":
                kind["maximum"] = limits.max_choices if name == "n" else limits.max_new_tokens
    sizes = [one.vocabulary for one in api.members.values() if isinstance(one, Served)]
    for name in ("prompt", "input"):
        if name in fields:
            most = limits.max_choices if name == "prompt" else protocol.INPUTS
            fields[name] = protocol.prompts_schema(max(sizes, default=None), most)
    if "dimensions" in fields:
        widths = {getattr(one, "width", None) for one in api.members.values()}
        fields["dimensions"] = {"enum": [*sorted(w for w in widths if w), None]}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _object(required: Mapping[str, Schema], **others: Schema) -> Schema:
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **others},
        "additionalProperties": False,
    }


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_TOKEN = {"token": TEXT, "logprob": NUMBER, "bytes": _list(COUNT)}
_USAGE = _object(
    {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
    completion_tokens_details=_object({"reasoning_tokens": COUNT}),
)
_REASON: Schema = {"enum": ["stop", "length"]}
_PROBS = _object(
    {
        "tokens": _list(TEXT),
        "token_logprobs": _list(_or_null(NUMBER)),
        "top_logprobs": _or_null(
            _list(_or_null({"type": "object", "additionalProperties": NUMBER}))
        ),
        "text_offset": _list(COUNT),
    }
)
_CHAT_PROBS = _object(
    {
        "content": _list(_object({**_TOKEN, "top_logprobs": _list(_object(_TOKEN))})),
        "refusal": {"type": "null"},
    }
)
_MESSAGE = _object(
    {"role": {"const": "assistant"}, "content": TEXT, "refusal": {"type": "null"}},
    reasoning_content=TEXT,
    workers={"type": "object", "additionalProperties": TEXT},
)
_CARD = _object({"id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT})


def _answer(name: str, choice: Schema) -> Schema:
    return _object(
        {
            "id": TEXT,
            "object": {"const": name},
            "created": COUNT,
            "model": TEXT,
            "choices": _list(choice),
            "usage": _USAGE,
        }
    )


ANSWERS: dict[str, Schema] = {
    "ChatAnswer": _answer(
        "chat.completion",
        _object(
            {
                "index": COUNT,
                "message": _MESSAGE,
                "logprobs": _or_null(_CHAT_PROBS),
                "finish_reason": _REASON,
            }
        ),
    ),
    "CompletionAnswer": _answer(
        "text_completion",
        _object(
            {"index": COUNT, "text": TEXT, "logprobs": _or_null(_PROBS), "finish_reason": _REASON}
        ),
    ),
    "EmbeddingAnswer": _object(
        {
            "object": {"const": "list"},
            "model": TEXT,
            "data": _list(
                _object(
                    {
                        "object": {"const": "embedding"},
                        "index": COUNT,
                        "embedding": {"anyOf": [_list(NUMBER), TEXT]},
                    }
                )
            ),
            "usage": _object({"prompt_tokens": COUNT, "total_tokens": COUNT}),
        }
    ),
    "Models": _object({"object": {"const": "list"}, "data": _list(_CARD)}),
    "Model": _CARD,
    "Health": _object(
        {
            "status": {"enum": ["ok", "stopping", "failed"]},
            "requests": COUNT,
            "models": {
                "type": "object",
                "additionalProperties": _object(
                    {"batched": {"type": "boolean"}, "running": COUNT, "waiting": COUNT}, died=TEXT
                ),
            },
        },
        reason=TEXT,
    ),
    "Error": _object(
        {
            "error": _object(
                {
                    "message": TEXT,
                    "type": TEXT,
                    "param": _or_null(TEXT),
                    "code": _or_null(TEXT),
                }
            )
        }
    ),
}
