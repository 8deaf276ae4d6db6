"""The recipe of a mixture of experts: mergekit-moe's, and gates that are trained.

    base_model: base/                 # attention, norms, embeddings
    architecture: mixtral             # or qwen2_moe, qwen3_moe, deepseek_moe; else what fits
    gate_mode: hidden                 # hidden_last, hidden_avg, cheap_embed, random,
    experts_per_token: 2              #   uniform_random, or (ours) trained
    dtype: bfloat16
    experts:
      - source_model: maths/
        positive_prompts: ["Solve for x"]
        negative_prompts: ["Dear all"]
        noise_scale: 0.0              # standard deviation of noise on the block's weights
        residual_scale: 1.0           # factor of what the block adds
        data: maths.jsonl             # ours: texts it is for; gates learn from them
    shared_experts: [...]
    seed: 0                           # ours: of all that is drawn
    train: {texts: 500, steps: 0, lr: 0.001}    # ours: see `Training`

Paths are looked for beside the recipe first. An unknown key is an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from pydantic import Field, FiniteFloat, ValidationError, model_validator

from pluribus.core.errors import RecipeError
from pluribus.recipe.schema import FloatType, Reference, Strict
from pluribus.recipe.single import Placed, fault, single
from pluribus.recipe.text import Document

Mode = Literal[
    "hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random", "trained"
]
PROMPTED = ("hidden", "hidden_last", "hidden_avg", "cheap_embed")
Count = Annotated[int, Gt(0)]


class Expert(Strict):
    """A dense model whose feed-forward blocks are one expert of every layer."""

    source_model: Reference
    positive_prompts: list[str] | None = None
    negative_prompts: list[str] | None = None
    noise_scale: Annotated[FiniteFloat, Ge(0)] | None = None
    residual_scale: FiniteFloat | None = None
    data: str | None = None


class Training(Strict):
    """How gates are trained: to tell whose text a token is from, then on the mixture's loss."""

    texts: Count = 500  # of each expert, at most; a fifth of them are held out
    max_length: Count = 128  # tokens of a text
    tokens: Count = 2000  # of each expert that a layer's classifier learns from, at most
    ridge: Annotated[float, Gt(0)] = 1e-3  # weight of the squared norm
    steps: Annotated[int, Ge(0)] = 0  # of language-modelling loss, gates alone changing
    lr: Annotated[float, Gt(0)] = 1e-3
    batch_size: Count = 8
    balance: Annotated[float, Ge(0)] = 0.0  # weight of the load-balancing term


class MoeRecipe(Placed):
    """A mixture as a user writes it. `load` reads one; nothing is opened yet."""

    base_model: Reference
    experts: list[Expert]
    gate_mode: Mode = "hidden"
    dtype: FloatType = None
    experts_per_token: Count = 2
    shared_experts: list[Expert] | None = None
    architecture: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    train: Training = Field(default_factory=Training)

    @property
    def folder(self) -> Path | None:
        """Where the recipe lies, if it is a file."""
        return self._folder

    @property
    def shared(self) -> list[Expert]:
        """The shared experts, if any."""
        return self.shared_experts or []

    @model_validator(mode="after")
    def _consistent(self) -> "MoeRecipe":
        count = len(self.experts)
        if not count:
            raise ValueError("experts: at least one is needed")
        if self.experts_per_token > count:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, and there "
                f"{'is' if count == 1 else 'are'} {count} expert{'s' * (count > 1)}; give at most "
                "as many"
            )
        if self.gate_mode in PROMPTED:
            self._prompted()
        if self.gate_mode == "trained":
            if count < 2:
                raise ValueError("gate_mode trained needs two experts to choose between")
            for entry in self.experts:
                if entry.data is None:
                    raise ValueError(
                        f"gate_mode trained learns from data, and {entry.source_model} has none; "
                        "give each expert a file of texts that it is for"
                    )
        return self

    def _prompted(self) -> None:
        for entry in self.experts:
            if not entry.positive_prompts:
                raise ValueError(
                    f"gate_mode {self.gate_mode} is made of prompts, and {entry.source_model} has "
                    "no positive_prompts; give some, or take gate_mode random or trained"
                )
        asked = [(entry.positive_prompts, entry.negative_prompts or []) for entry in self.experts]
        if len(asked) > 1 and all(one == asked[0] for one in asked):
            raise ValueError(
                "all experts have the same prompts, so all would get the same gate; give each "
                "prompts of what it alone is for"
            )
        told = [bool(entry.positive_prompts) for entry in self.shared]
        if any(told) and not all(told):
            raise ValueError("give positive_prompts to all shared experts or to none")


def load(path: str | Path) -> MoeRecipe:
    """Read a recipe. Raises MissingError or RecipeError saying what is wrong, and in which line."""
    path = Path(path).expanduser()
    document = single(path, "a recipe of a mixture of experts")
    return of(document.value, str(path), document, path.parent)


def of(
    told: Any,
    where: str = "recipe",
    document: Document | None = None,
    folder: Path | None = None,
) -> MoeRecipe:
    """Return the recipe that plain values say. Raises RecipeError."""
    if not isinstance(told, Mapping):
        raise RecipeError(
            f"{where}: a recipe of a mixture of experts is keys with values, base_model and "
            f"experts among them, not {type(told).__name__}"
        )
    others = {"merge_method": "merge", "tune_method": "tune", "parts": "route build"}
    for key, command in others.items():
        if key in told:
            raise RecipeError(
                f"{where}: this is a recipe with {key}; run it with: pluribus {command} {where}"
            )
    try:
        recipe = MoeRecipe.model_validate(told, context={"folder": folder})
    except ValidationError as error:
        raise RecipeError(fault(error, where, document)) from None
    recipe._folder = folder
    return recipe
