"""The `tokenizer:` block of a recipe, as mergekit 0.1.5 spells it, and what it asks of `align`.

    tokenizer:
      source: union | base | <model>
      tokens:
        "<|im_start|>":
          source: <model> | {kind: model_token, model, token | token_id} | {kind: zero}
          force: false
      pad_to_multiple_of: 64

Tokens listed here join the output vocabulary. Stricter than mergekit: unknown keys, a forced token
without a source, and a source that lacks the token are errors before any work.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from pluribus.core.errors import RecipeError, nearest
from pluribus.core.refs import ModelRef
from pluribus.tokenizer.align import Alignment, Fill, VocabIn, align
from pluribus.tokenizer.errors import TokenizerError

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelToken(BaseModel):
    """The row of a token, or of an id, in one of the models."""

    model_config = _STRICT
    kind: Literal["model_token"] = "model_token"
    model: ModelRef
    token: str | None = None
    token_id: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> "ModelToken":
        if (self.token is None) == (self.token_id is None):
            raise ValueError("a model_token needs either token or token_id, and not both")
        return self


class Zero(BaseModel):
    """A row of zeros."""

    model_config = _STRICT
    kind: Literal["zero"] = "zero"


def _tag(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "model" if kind is None else str(kind)


TokenSource = Annotated[
    Annotated[ModelToken, Tag("model_token")]
    | Annotated[Zero, Tag("zero")]
    | Annotated[ModelRef, Tag("model")],
    Discriminator(_tag),
]


class TokenConfig(BaseModel):
    """Where one token's row comes from; `force` also replaces the rows models have."""

    model_config = _STRICT
    source: TokenSource | None = None
    force: bool = False

    @model_validator(mode="after")
    def _force_needs_source(self) -> "TokenConfig":
        if self.force and self.source is None:
            raise ValueError("force: true needs a source to take the row from")
        return self


class TokenizerConfig(BaseModel):
    """Which vocabulary the output has, and how the rows of named tokens are made."""

    model_config = _STRICT
    source: Annotated[Literal["union", "base"] | ModelRef, Field(union_mode="left_to_right")] = (
        "union"
    )
    tokens: dict[str, TokenConfig] | None = None
    pad_to_multiple_of: Annotated[int, Field(ge=0)] | None = None  # 0 is none, as in mergekit


def tokenizer_config(
    tokenizer: TokenizerConfig | dict[str, Any] | None = None,
    tokenizer_source: ModelRef | str | None = None,
) -> TokenizerConfig | None:
    """Return the block of a recipe, from either spelling; None if neither is given.

    Raises RecipeError if both are.
    """
    if tokenizer is not None and tokenizer_source is not None:
        raise RecipeError(
            "the recipe has both tokenizer_source and tokenizer; keep tokenizer and write "
            f"'source: {tokenizer_source}' inside it"
        )
    if tokenizer is not None:
        return TokenizerConfig.model_validate(tokenizer)
    if tokenizer_source is not None:
        return TokenizerConfig.model_validate({"source": tokenizer_source})
    return None


def align_models(
    config: TokenizerConfig,
    models: Sequence[VocabIn],
    *,
    base: int | None = None,
    donor: VocabIn | None = None,
) -> Alignment:
    """Align the models as the block says; labels are the models' references as text.

    `donor` is the vocabulary of a `source` model that takes no part in the merge. Raises
    TokenizerError for a model that is not there and for a token that its source lacks.
    """
    fills = {}
    for token, rule in (config.tokens or {}).items():
        if rule.source is not None:
            fills[token] = _fill(token, rule, models)
    return align(
        models,
        base=base,
        source=_source(config, models, donor),
        add=list(config.tokens or {}),
        fills=fills,
        pad_to_multiple_of=config.pad_to_multiple_of,
    )


def _source(
    config: TokenizerConfig, models: Sequence[VocabIn], donor: VocabIn | None
) -> Literal["union", "base"] | int | VocabIn:
    if isinstance(config.source, str):
        return config.source
    labels = [m.label for m in models]
    if str(config.source) in labels:
        return labels.index(str(config.source))
    if donor is None or donor.label != str(config.source):
        raise TokenizerError(
            f"tokenizer source '{config.source}' is not one of the models, and its vocabulary was "
            f"not given.{nearest(str(config.source), [*labels, 'union', 'base'])}"
        )
    return donor


def _fill(token: str, rule: TokenConfig, models: Sequence[VocabIn]) -> Fill:
    source = rule.source
    if isinstance(source, Zero):
        return Fill(force=rule.force)
    ref = source.model if isinstance(source, ModelToken) else source
    labels = [m.label for m in models]
    if str(ref) not in labels:
        raise TokenizerError(
            f"token {token!r}: its source '{ref}' is not one of the models."
            f"{nearest(str(ref), labels)}"
        )
    position = labels.index(str(ref))
    model = models[position]
    if isinstance(source, ModelToken) and source.token_id is not None:
        index = source.token_id
        if index >= model.rows:
            raise TokenizerError(
                f"token {token!r}: id {index} is beyond the {model.rows} rows of '{ref}'"
            )
        return Fill(model=position, index=index, force=rule.force)
    wanted = source.token if isinstance(source, ModelToken) and source.token else token
    index = model.tokens.get(wanted, model.rows)
    if index >= model.rows:
        raise TokenizerError(
            f"token {token!r}: '{ref}' has no row for {wanted!r}.{nearest(wanted, model.tokens)} "
            "To use another token's row write {kind: model_token, model: ..., token: ...}"
        )
    return Fill(model=position, index=index, force=rule.force)
