"""A server's file (YAML): models by name, keys, limits, where they run.

    models:
      merged: out/merged                                  # whatever `pluribus generate` opens
      quick: {reference: small+adapter, dtype: bfloat16, device: "cuda:0"}
      fused: {models: {large: ..., base: ...}, fuser: {kind: eft}}         # a stack, written here
      far: {endpoint: "https://host/v1", model: its-name, key_env: FAR_KEY}
      voted: {scale: merged, strategy: self_consistency(n=8)}            # see `serve.recipes`
      together: {hogwild: out/merged, workers: 2}
    keys: [PLURIBUS_KEY]                                  # environment variables, not the keys
    limits: {max_prompt_tokens: 8192, max_new_tokens: 2048, max_concurrent: 64}
    device: cpu        dtype: float32        specialists: true

Paths are looked for beside the file first.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from pluribus.core.errors import InputError, MissingError, PluribusError, RecipeError, nearest
from pluribus.decode.stack import STACKS, Stack
from pluribus.decode.stack import read as read_stack
from pluribus.recipe.schema import Strict
from pluribus.recipe.single import Placed, fault, single
from pluribus.serve.recipes import Hogwild, Scale

PLACE = 200  # characters of a model's name, at most


class Limits(Strict):
    """What one request, and all together, may take."""

    max_prompt_tokens: int = Field(
        default=1 << 20, ge=1
    )  # the model's own context is a limit in any case
    max_new_tokens: int = Field(
        default=4096, ge=1
    )  # and what is written without max_tokens, at most
    max_choices: int = Field(default=128, ge=1)  # n, and prompts of one request times n
    max_concurrent: int = Field(default=256, ge=1)  # requests that run or wait; more are told 429
    max_body_bytes: int = Field(default=4 << 20, ge=1)
    rows: int = Field(default=16, ge=1)  # answers that one model writes at a time
    grace_seconds: float = Field(
        default=30.0, ge=0
    )  # for running requests when the server is to stop
    read_seconds: float = Field(default=30.0, gt=0)  # for a client to send its request
    write_seconds: float = Field(default=30.0, gt=0)  # for a client to take some of its answer
    max_connections: int = Field(default=800, ge=2)  # open ones; idle ones make room for new ones


class Local(Strict):
    """A model that runs here."""

    reference: str = Field(min_length=1)
    device: str | None = None  # the server's
    dtype: str | None = None
    embed: Literal["mean", "no"] = "mean"  # embeddings: the mean of the last hidden states


class Endpoint(Strict):
    """A model behind somebody's OpenAI-compatible server."""

    endpoint: str
    model: str = Field(min_length=1)
    key_env: str | None = None  # the environment variable with the key
    timeout_seconds: float = Field(default=120.0, gt=0)

    @model_validator(mode="after")
    def _address(self) -> "Endpoint":
        parts = urlsplit(self.endpoint)  # a ValueError for an address that cannot be split
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(f"endpoint {self.endpoint!r} is no address; expected https://host/v1")
        return self

    @property
    def url(self) -> str:
        """The address up to and with /v1, without a slash at its end."""
        return self.endpoint.rstrip("/")

    @property
    def host(self) -> str:
        """Whose it is, without what an address may hold beside."""
        return str(urlsplit(self.endpoint).hostname)

    def key(self) -> str | None:
        """Return the key. Raises MissingError if its variable is not set, InputError for no key."""
        if self.key_env is None:
            return None
        found = os.environ.get(self.key_env, "").strip()
        if not found:
            raise MissingError(f"{self.key_env} is not set; {self.host} needs the key in it")
        if not found.isascii() or not found.isprintable():
            raise InputError(f"{self.key_env} holds characters that no header can; look at it")
        return found


Member = Local | Endpoint | Stack | Hogwild | Scale


def _member(value: Any) -> Member:
    """Read one model; faults keep their place in the file."""
    if isinstance(value, BaseModel):
        return value  # type: ignore[return-value]
    if isinstance(value, str):
        value = {"reference": value}
    if not isinstance(value, Mapping):
        raise ValueError(
            "a model is a reference (path, hub name), a stack {models, fuser}, an endpoint "
            "{endpoint, model, key_env}, workers {hogwild, workers}, or samples {scale, strategy}"
        )
    kind: type[BaseModel] = Local
    if "endpoint" in value:
        kind = Endpoint
    elif "models" in value or "fuser" in value:
        kind = Stack
    elif "hogwild" in value:
        kind = Hogwild
    elif "scale" in value:
        kind = Scale
    try:
        return kind.model_validate(value)  # type: ignore[return-value]
    except ValidationError as error:
        lines: list[InitErrorDetails] = []
        for one in error.errors():
            said = one["msg"].removeprefix("Value error, ")
            said = {"missing": "is missing", "too_short": "at least one is needed"}.get(
                one["type"], said
            )
            told = PydanticCustomError("value_error", "{said}", {"said": said})
            lines.append(InitErrorDetails(type=told, loc=one["loc"], input=one.get("input")))
        raise ValidationError.from_exception_data(kind.__name__, lines) from None


def _named(models: dict[str, Any]) -> dict[str, Any]:
    for name in models:
        if not name.strip() or len(name) > PLACE or not name.isprintable():
            raise ValueError(f"{name!r} is no name: 1 to {PLACE} printable characters")
    return models


class Server(Placed):
    """What is served, to whom, within which limits."""

    models: Annotated[
        dict[str, Annotated[Any, BeforeValidator(_member)]], AfterValidator(_named)
    ] = Field(min_length=1)
    keys: list[str] = Field(default_factory=list)
    limits: Limits = Field(default_factory=Limits)
    device: str = "cpu"
    dtype: str = "float32"
    specialists: bool = True  # also serve NAME:PART, the single models inside composites and stacks

    def secrets(self) -> tuple[str, ...]:
        """Return the keys. Raises MissingError for a variable that is not set or empty."""
        for name in self.keys:
            if not os.environ.get(name, "").strip():
                raise MissingError(
                    f"the environment variable {name} is not set, and clients' keys are to be in "
                    f"it; export {name}=... first"
                )
        return tuple(os.environ[name].strip() for name in self.keys)


def read(path: str | Path) -> Server:
    """Read a server's file.

    Raises MissingError, or RecipeError with file, line and the nearest key.
    """
    path = Path(path).expanduser()
    document = single(path, "a server's file")
    try:
        server = Server.model_validate(document.value)
    except ValidationError as error:
        raise RecipeError(fault(error, str(path), document)) from None
    for name, member in server.models.items():
        try:
            if isinstance(member, Stack):
                member._folder = path.parent
                _check_stack(member)
            elif isinstance(member, Scale):
                _check_over(name, member, server.models)
        except PluribusError as error:
            line = document.line(("models", name))
            raise RecipeError(f"{path}:{line}: models.{name}: {error}") from None
    server._folder = path.parent
    return server


def _check_over(name: str, member: Scale, models: Mapping[str, Member]) -> None:
    """Raise RecipeError unless a strategy draws from a model of the file, or a part of one."""
    fit = [n for n, one in models.items() if not isinstance(one, Hogwild | Scale)]
    if member.scale not in fit and member.scale.partition(":")[0] not in fit:
        raise RecipeError(
            f"scale names {member.scale!r}; strategies draw from the file's models and endpoints: "
            f"{', '.join(fit) or 'there are none'}.{nearest(member.scale, fit)}"
        )


def _check_stack(stack: Stack) -> None:
    from pluribus.decode._prompts import check_templates
    from pluribus.decode.fusers import build as fuser_of

    fuser_of(stack.fuser).check_roles(list(stack.models))
    check_templates(stack.prompts, list(stack.models))


def of(
    reference: str | Path, device: str | None = None, dtype: str | None = None, name: str = ""
) -> Server:
    """Return what a reference serves: a server's file, or one model or stack under its name.

    `device` and `dtype` go before the file's.
    """
    path = Path(reference).expanduser()
    is_yaml = path.suffix in (".yml", ".yaml")
    if is_yaml and not STACKS.takes(path):
        server = read(path)
    elif is_yaml:
        stack = read_stack(path)  # says at once what is wrong with it
        server = Server(models={name or path.stem: stack})
        server._folder = path.parent
    else:
        known = str(reference).rstrip("/")
        server = Server(models={name or Path(known).name or known: str(reference)})
    changed = {
        key: value for key, value in (("device", device), ("dtype", dtype)) if value is not None
    }
    if not changed:
        return server
    made = server.model_copy(update=changed)
    made._folder = server._folder
    return made
