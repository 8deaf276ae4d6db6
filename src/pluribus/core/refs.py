"""Model references: `path-or-repo[@revision][+lora[@revision]]`, or the same as a mapping.

Text is sugar: whatever names an existing file or folder is taken as it stands, so paths may hold
`@`, `+`, spaces and colons. Structured references are exact.
"""

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pluribus.core.errors import InputError

EXPECTED = "give a path, an address, org/name, or {model: ..., lora: ...}"


class Place(BaseModel):
    """A local path, an http(s) address, or a hub repository, with an optional revision."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if os.path.exists(os.path.expanduser(value)) or "://" in value or "@" not in value:
            return {"path": value}
        path, _, revision = value.rpartition("@")
        return {"path": path, "revision": revision}

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


class ModelRef(BaseModel):
    """A model, optionally with a LoRA on top of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: Place
    lora: Place | None = None
    override_architecture: str | None = None

    @classmethod
    def of(cls, what: Any) -> "ModelRef":
        """Read a reference from text, a path or a mapping. Raises InputError for anything else."""
        try:
            return cls.model_validate(what)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            why = f"{place}: {first['msg']}" if place else "it is none of these"
            raise InputError(f"{_brief(what)} is not a model: {EXPECTED} ({why})") from None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, dict) and isinstance(value.get("model"), dict):
            inner = value["model"]
            if "path" in inner and isinstance(inner["path"], dict):
                return {**value, "model": inner["path"]}
            return value
        if not isinstance(value, str):
            return value
        if os.path.exists(os.path.expanduser(value)) or "://" in value or "+" not in value:
            return {"model": value}
        # The split that leaves an existing path on the left wins; else the last "+".
        cuts = [i for i, c in enumerate(value) if c == "+"]
        cut = next((i for i in cuts if os.path.exists(os.path.expanduser(value[:i]))), cuts[-1])
        return {"model": value[:cut], "lora": value[cut + 1 :]}

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)


def _brief(what: Any) -> str:
    """Say what something is: a tensor by its shape, anything else cut short."""
    if hasattr(what, "shape"):
        return f"{type(what).__name__} of shape {list(what.shape)}"
    told = repr(what)
    return told if len(told) <= 200 else f"{told[:200]}..."
