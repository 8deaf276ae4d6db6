"""The recipe of a transfer: a frozen encoder, source adapters, a target with few labels, methods.

    base_model: minilm/                  # a folder that transformers opens, or `zoo: text6`
    layers: .*layer\\.\\d+\\.output\\.LayerNorm      # whole names; both may be left out where
    placement: post_norm                 # the encoder is of a known kind
    bottleneck: 24
    sources:
      - {name: reviews, data: reviews.jsonl}         # trained here, or
      - {name: topics, adapter: topics.safetensors}  # as an earlier run wrote it
    source_epochs: 5
    target: {name: tickets, data: tickets.jsonl, labels: 32, test: later.jsonl}
    method: scalearn                     # of METHODS; its own settings are `parameters`
    compare: [single_adapter]            # also measured, in the same run
    steps: 300

Files of texts have rows {"text": ..., "answer": ...}; the answers of the training rows are the
classes. Of a zoo, sources and target are its tasks and have no files. `labels` training rows are
drawn by the seed. Without `val`, rows that were not drawn validate, or else a quarter of them all.
Paths are looked for beside the recipe first.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Gt
from pydantic import Field, ValidationError, model_validator

from pluribus.core.errors import InputError, RecipeError, nearest
from pluribus.recipe.schema import Strict
from pluribus.recipe.single import Placed, fault, single
from pluribus.recipe.text import Document

Plain = dict[str, Any]
Count = Annotated[int, Gt(0)]
Rate = Annotated[float, Gt(0)]

Name = Literal[
    "scalearn",
    "scalearn_uniform",
    "scalearn++",
    "scalearn_uniform++",
    "adapter_fusion",
    "single_adapter",
]
KNOWN = (  # where adapters stand in encoders of known kinds, the first that matches
    (r"(.*\.)?layer\.\d+\.output\.LayerNorm", "post_norm"),  # BERT, RoBERTa, MiniLM
    (r"(.*\.)?layer\.\d+\.output_layer_norm", "post_norm"),  # DistilBERT
    (r"(.*\.)?blocks\.\d+\.down", "behind"),  # the zoos' own
    (r"(.*\.)?layer\.\d+\.output\.dense", "behind"),  # ViT
    (r"(.*\.)?layers\.\d+\.(fc2|mlp\.fc2|mlp\.Wo|mlp\.down_proj)", "behind"),
    (r"(.*\.)?h\.\d+\.mlp\.c_proj", "behind"),  # GPT-2
)
MOST_VAL = 300  # rows that validate, unless a file says which


class SourceRecipe(Strict):
    """One source: texts with answers, an adapter that was saved, or a zoo's task by its name."""

    name: str
    data: str | None = None
    adapter: str | None = None


class TargetRecipe(Strict):
    """The target's rows."""

    name: str
    data: str | None = None
    val: str | None = None
    test: str | None = None
    labels: Count | None = None  # rows to train on; all of `data` by default


class TransferRecipe(Placed):
    """A transfer as a user writes it. `load` reads one; nothing is opened yet."""

    method: Name
    parameters: Plain = Field(default_factory=dict)
    compare: list[Name] = Field(default_factory=list)
    zoo: str | None = None
    zoo_sizes: Plain = Field(default_factory=dict)
    base_model: str | None = None
    layers: str | None = None
    placement: Literal["behind", "post_norm"] | None = None
    bottleneck: Count | None = None
    sources: Annotated[list[SourceRecipe], Field(min_length=1)]
    source_epochs: Count = 30
    source_lr: Rate = 3e-4
    target: TargetRecipe
    epochs: Count = 30
    steps: Count | None = None
    batch_size: Count = 32
    lr: Rate | None = None
    head_lr: Rate | None = None
    max_length: Count = 64
    limit: Count = 2000  # rows of each source
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "cpu"

    @model_validator(mode="after")
    def _consistent(self) -> "TransferRecipe":
        if (self.zoo is None) == (self.base_model is None):
            raise ValueError("give base_model, a folder that transformers opens, or a zoo")
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"source {name!r} is named twice; give each its own name")
            if "/" in name or name in (".", ".."):
                raise ValueError(f"source {name!r}: names become file names; leave out the /")
        if self.placement is not None and self.layers is None:
            raise ValueError("placement says how adapters stand at layers; give those too")
        for source in self.sources:
            given = [key for key in ("data", "adapter") if getattr(source, key) is not None]
            if len(given) == 2:
                raise ValueError(f"source {source.name}: give data to train on, or an adapter")
            if self.zoo is None and not given:
                raise ValueError(f"source {source.name} has neither data nor an adapter")
            if self.zoo is not None and "data" in given:
                raise ValueError(f"source {source.name}: a zoo's tasks have their own data")
        own = [key for key in ("data", "val", "test") if getattr(self.target, key) is not None]
        if self.zoo is not None and own:
            raise ValueError(f"target: a zoo's tasks have their own {own[0]}")
        if self.zoo is None and self.target.data is None:
            raise ValueError("target has no data; give a file of rows with text and answer")
        return self

    def on(self, device: str) -> "TransferRecipe":
        """Return the same transfer on another device."""
        return self.model_copy(update={"device": device})


class Ran(NamedTuple):
    """What a recipe came to."""

    results: Plain  # TransferResult by method, the recipe's own first
    sources: Plain  # AdapterSet by name
    trained: tuple[str, ...]  # sources that this run trained
    model: Any
    classes: tuple[str, ...]
    rows: dict[str, int]  # by split of the target


def load(path: str | Path) -> TransferRecipe:
    """Read a recipe. Raises MissingError or RecipeError saying what is wrong, and in which line."""
    path = Path(path).expanduser()
    document = single(path, "a recipe of a transfer")
    recipe = of(document.value, str(path), document)
    recipe._folder = path.parent
    return recipe


def of(told: Any, where: str = "recipe", document: Document | None = None) -> TransferRecipe:
    """Return the recipe that plain values say. Raises RecipeError."""
    if not isinstance(told, Mapping):
        raise RecipeError(f"{where}: a recipe of a transfer is keys with values, such as method:")
    if "method" not in told and "parts" in told:
        raise RecipeError(f"{where}: this is a composite's; run it with: pluribus route build")
    try:
        return TransferRecipe.model_validate(told)
    except ValidationError as error:
        raise RecipeError(fault(error, where, document)) from None


def run(recipe: TransferRecipe, on_step: Any = None) -> Ran:
    """Train sources that have no adapter yet, then the target by each method.

    Raises PluribusError saying what was given and what to do.
    """
    from pluribus.route.adapters import AdapterSet, sites
    from pluribus.route.transfer import SingleAdapter, fit
    from pluribus.tasks.device import usable

    usable(recipe.device)
    methods = {name: _method(name, recipe) for name in dict.fromkeys([recipe.method])}
    methods |= {name: _method(name, None) for name in recipe.compare if name not in methods}
    bed = _zoo(recipe, on_step) if recipe.zoo is not None else _texts(recipe)
    model = bed.model.to(recipe.device)
    layers, placement = _places(recipe, model)
    width = min(sites(model, layers).values())
    made = SingleAdapter(
        layers=layers,
        placement=placement,  # type: ignore[arg-type]
        bottleneck=recipe.bottleneck or max(1, width // 16),
        lr=recipe.source_lr,
    )
    common: Plain = {"features": bed.features, "batch_size": recipe.batch_size, "seed": recipe.seed}
    common["on_step"] = on_step
    sources, trained = {}, []
    for source in recipe.sources:
        if source.adapter is not None:
            sources[source.name] = AdapterSet.load(recipe.place(source.adapter), model)
            continue
        data, classes = bed.source(source)
        told = fit(
            model,
            {},
            data,
            len(classes),
            made,
            epochs=recipe.source_epochs,
            patience=5,
            **common,
        )
        sources[source.name] = told.export()
        trained.append(source.name)
    data, classes = bed.target()
    results = {
        name: fit(
            model,
            sources,
            data,
            len(classes),
            method,
            epochs=recipe.epochs,
            steps=recipe.steps,
            lr=recipe.lr if name == recipe.method else None,
            head_lr=recipe.head_lr,
            **common,
        )
        for name, method in methods.items()
    }
    rows = {n: len(s.y) for n in ("train", "val", "test") if (s := getattr(data, n)) is not None}
    return Ran(results, sources, tuple(trained), model, tuple(classes), rows)


def _method(name: str, recipe: TransferRecipe | None) -> Any:
    from pluribus.route.transfer import METHODS

    method = METHODS[name]
    if recipe is None or not recipe.parameters:
        return method
    known = [key for key in method.__dataclass_fields__ if key not in ("scope", "shape")]
    for key in recipe.parameters:
        if key not in known:
            raise RecipeError(
                f"parameters: {name} has no {key!r}; there are: {', '.join(known)}."
                f"{nearest(str(key), known)}"
            )
    try:
        return replace(method, **recipe.parameters)
    except TypeError as error:
        raise RecipeError(f"parameters: {error}") from None


def _places(recipe: TransferRecipe, model: Any) -> tuple[str, str]:
    """Return the pattern of the layers, and the placement. Raises InputError for unknown kinds."""
    from pluribus.route.adapters import sites

    if recipe.layers is not None:
        return recipe.layers, recipe.placement or "behind"
    for pattern, placement in KNOWN:
        try:
            sites(model, pattern)
        except InputError:
            continue
        return pattern, placement
    raise InputError(
        f"where a {type(model).__name__} has its feed-forward outputs is not known; say it: "
        r"layers: .*mlp\.down (a regular expression for whole module names)"
    )


class Bed(NamedTuple):
    """An encoder, and where tasks come from."""

    model: Any
    features: str
    source: Any  # SourceRecipe -> (Target, classes)
    target: Any  # () -> (Target, classes)


def _zoo(recipe: TransferRecipe, on_step: Any) -> Bed:
    import torch

    from pluribus.route.transfer import Examples, Target
    from pluribus.tasks import zoo as zoos
    from pluribus.tasks.views import generator

    assert recipe.zoo is not None
    zoos.check_sizes(recipe.zoo, recipe.zoo_sizes)
    zoo = zoos.build(recipe.zoo, recipe.seed, on_step=on_step, **recipe.zoo_sizes)
    for name in [*(s.name for s in recipe.sources if s.adapter is None), recipe.target.name]:
        if name not in zoo.tasks:
            raise InputError(
                f"zoo {recipe.zoo} has no task {name!r}; there are: {', '.join(zoo.tasks)}."
                f"{nearest(name, zoo.tasks)}"
            )

    def task(name: str, order: Any) -> Any:
        data = zoo.tasks[name].to(recipe.device)
        splits = (data.train.at(order), data.val.first(MOST_VAL), data.test)
        return Target(*(Examples(*split) for split in splits)), data.classes

    def source(told: SourceRecipe) -> Any:
        count = min(len(zoo.tasks[told.name].train.y), recipe.limit)
        data, classes = task(told.name, torch.arange(count))
        return data._replace(test=None), classes

    def target() -> Any:
        rng = generator(recipe.seed, recipe.target.name, "transfer/labels")
        order = torch.randperm(len(zoo.tasks[recipe.target.name].train.y), generator=rng)
        return task(recipe.target.name, order[: recipe.target.labels])

    return Bed(zoo.module(), "output", source, target)


def _texts(recipe: TransferRecipe) -> Bed:
    from pluribus.route.transfer._texts import encoder, tasks

    assert recipe.base_model is not None
    model, tokenizer = encoder(recipe.place(recipe.base_model))
    source, target = tasks(recipe, tokenizer)
    return Bed(model, "hidden", source, target)
