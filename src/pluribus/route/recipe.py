"""The recipe of a composite: which base, which parts, which inputs the router learns from.

    parts: low_rank                     # or masks, adapters
    parameters: {rank: 16}              # of pluribus.compress.Twin (low_rank) or TallMasks (masks)
    router: {kind: mlp, features: hidden, epochs: 50}    # or none
    top_k: 1                            # parts an input, at most

    zoo: vision8                        # models, heads and inputs of a zoo, or:

    base_model: base/                   # a causal language model of transformers
    models:
      - {model: math/, data: math.jsonl}     # one text a line: {"text": ...}, or plain lines
      - {model: code/, data: code.txt}       # `adapters`: folders that PEFT wrote
    max_length: 64                      # tokens of a text that are read

Paths are looked for beside the recipe first. A router needs inputs of every part and no labels.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Gt
from pydantic import Field, ValidationError, model_validator

from pluribus.core.errors import RecipeError
from pluribus.recipe.schema import Strict
from pluribus.recipe.single import Placed, WithData, fault, single
from pluribus.recipe.text import Document

Plain = dict[str, Any]
Count = Annotated[int, Gt(0)]


class RouterRecipe(Strict):
    """What `pluribus.route.router.fit` takes, and the features it looks at."""

    kind: Literal["mlp", "linear", "centroids"] = "mlp"
    features: str | None = None  # "hidden" for language models, "output" for a zoo
    hidden: Count | None = None  # width of an mlp; None: twice that of the features
    epochs: Count = 50
    lr: Annotated[float, Gt(0)] = 5e-4
    batch_size: Count = 256
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    uniform_on_nan: bool = False


class RouteRecipe(Placed):
    """A composite as a user writes it. `load` reads one; nothing is opened yet."""

    parts: Literal["low_rank", "masks", "adapters"]
    parameters: Plain = Field(default_factory=dict)
    router: RouterRecipe | Literal["none"] = Field(default_factory=RouterRecipe)
    top_k: Count | None = None
    zoo: str | None = None
    zoo_sizes: Plain = Field(default_factory=dict)
    base_model: str | None = None
    models: Annotated[list[WithData], Field(min_length=1)] | None = None
    max_length: Count = 64
    limit: Count = 500  # inputs of each part that the router sees
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "cpu"

    @model_validator(mode="after")
    def _consistent(self) -> "RouteRecipe":
        if (self.zoo is None) == (self.models is None):
            raise ValueError("give a zoo, or base_model and models")
        if self.zoo is None and self.base_model is None:
            raise ValueError("models need the base_model that they are experts of")
        if self.zoo is not None and self.parts == "adapters":
            raise ValueError("a zoo's experts are whole; take low_rank or masks")
        if self.parts == "adapters" and self.parameters:
            raise ValueError("adapters are taken as they are; leave parameters out")
        if self.router != "none" and self.router.hidden is not None and self.router.kind != "mlp":
            raise ValueError(
                f"router: hidden is the width of an mlp; kind {self.router.kind} has none"
            )
        for entry in self.models or ():
            if self.router != "none" and entry.data is None:
                raise ValueError(
                    f"{entry.model} has no data, which the router learns from; give each model a "
                    "file of texts, or write router: none"
                )
        return self


class Inputs(NamedTuple):
    """What each part's router saw in fitting, and what it did not."""

    train: Mapping[str, Any]
    val: Mapping[str, Any]


class Built(NamedTuple):
    """A composite, what its router's report says, and what else goes into its folder."""

    routed: Any
    report: Any  # RouterReport | None
    tokenizer: Any
    origin: Plain


def load(path: str | Path) -> RouteRecipe:
    """Read a recipe. Raises MissingError or RecipeError saying what is wrong, and in which line."""
    path = Path(path).expanduser()
    document = single(path, "a recipe of a composite")
    recipe = of(document.value, str(path), document)
    recipe._folder = path.parent
    return recipe


def of(told: Any, where: str = "recipe", document: Document | None = None) -> RouteRecipe:
    """Return the recipe that plain values say. Raises RecipeError."""
    if not isinstance(told, Mapping):
        raise RecipeError(
            f"{where}: a recipe of a composite is keys with values, the first of them parts, not "
            f"{type(told).__name__}"
        )
    others = {"merge_method": "merge", "tune_method": "tune", "experts": "route moe"}
    for key, command in others.items():
        if key in told:
            raise RecipeError(
                f"{where}: this is a recipe with {key}; run it with: pluribus {command} {where}"
            )
    try:
        return RouteRecipe.model_validate(told)
    except ValidationError as error:
        raise RecipeError(fault(error, where, document)) from None


def build(recipe: RouteRecipe, on_step: Any = None) -> Built:
    """Open the models, make the composite, and fit its router. Raises PluribusError."""
    from pluribus.tasks.device import usable

    usable(recipe.device)
    if recipe.zoo is not None:
        return _of_zoo(recipe, on_step)
    return _of_folders(recipe, on_step)


def _of_zoo(recipe: RouteRecipe, on_step: Any) -> Built:
    from pluribus.tasks import zoo as zoos

    assert recipe.zoo is not None
    zoos.check_sizes(recipe.zoo, recipe.zoo_sizes)
    zoo = zoos.build(recipe.zoo, recipe.seed, on_step=on_step, **recipe.zoo_sizes)
    inputs = {task: data.split("train").x[: recipe.limit] for task, data in zoo.tasks.items()}
    val = {task: data.split("val").x[: recipe.limit] for task, data in zoo.tasks.items()}
    routed = _composed(recipe, zoo.module(), zoo.base, zoo.experts, "output", zoo.heads)
    routed.to(recipe.device)
    origin = {"zoo": recipe.zoo, "seed": recipe.seed, "sizes": recipe.zoo_sizes}
    return Built(routed, _fitted(recipe, routed, Inputs(inputs, val)), None, origin)


def _of_folders(recipe: RouteRecipe, on_step: Any) -> Built:
    from pluribus.core.weights import Weights
    from pluribus.recipe.lines import read
    from pluribus.tasks.open_model import load as opened

    assert recipe.models is not None
    assert recipe.base_model is not None
    names = [entry.name or Path(entry.model).name for entry in recipe.models]
    if len(set(names)) < len(names):
        raise RecipeError("two models have the same name; give each a name: of its own")
    texts = {
        name: read(recipe.place(entry.data), False)[: recipe.limit]
        for name, entry in zip(names, recipe.models, strict=True)
        if entry.data is not None and recipe.router != "none"
    }
    base = recipe.place(recipe.base_model)
    places = {n: recipe.place(e.model) for n, e in zip(names, recipe.models, strict=True)}
    module, tokenizer = opened(Weights.open(base), recipe.device, "float32")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    routed = _composed(recipe, module, base, places, "hidden", None)
    batches = {
        name: list(tokens([row["text"] for row in rows], tokenizer, recipe.max_length))
        for name, rows in texts.items()
    }
    held = {name: max(1, len(found) // 5) for name, found in batches.items()}
    inputs = Inputs(
        {name: found[held[name] :] or found for name, found in batches.items()},
        {name: found[: held[name]] for name, found in batches.items()},
    )
    del on_step
    return Built(routed, _fitted(recipe, routed, inputs), tokenizer, {})


def tokens(texts: list[str], tokenizer: Any, length: int, size: int = 16) -> Iterator[Plain]:
    """Yield texts in batches as a transformers model takes them, padded on the right."""
    tokenizer.padding_side = "right"
    for start in range(0, len(texts), size):
        made = tokenizer(
            texts[start : start + size],
            truncation=True,
            max_length=length,
            padding=True,
            return_tensors="pt",
        )
        yield {key: made[key] for key in ("input_ids", "attention_mask")}


def _composed(
    recipe: RouteRecipe, module: Any, base: Any, experts: Mapping[str, Any], usual: str, heads: Any
) -> Any:
    from pluribus.route import build as builders

    given = None if isinstance(recipe.router, str) else recipe.router.features
    settings: Plain = {"features": given or usual, "top_k": recipe.top_k, "heads": heads}
    if recipe.parts == "adapters":
        return builders.from_adapters(module, experts, **settings)
    from pluribus.compress import TallMasks, Twin

    kinds = {"low_rank": Twin, "masks": TallMasks}
    parameters = dict(recipe.parameters)
    if recipe.parts == "masks":
        parameters.setdefault("mask_lambda", "l1")
    try:
        method = kinds[recipe.parts](**parameters)
    except TypeError as error:
        raise RecipeError(f"parameters: {error}".replace("__init__()", recipe.parts)) from None
    return builders.from_store(module, method.fit(base, experts), **settings)


def _fitted(recipe: RouteRecipe, routed: Any, inputs: Inputs) -> Any:
    from pluribus.route.fit import fit_router

    if isinstance(recipe.router, str):
        return None
    settings = recipe.router.model_dump(exclude={"features"})
    return fit_router(routed, inputs.train, inputs.val, seed=recipe.seed, **settings)
