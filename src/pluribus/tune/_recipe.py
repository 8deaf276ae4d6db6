"""The recipe of a tuning run: which models, which inputs, which method.

    tune_method: adamerging
    parameters: {steps: 200, lr: 0.001}
    objective: entropy                  # or kl, cross_entropy (needs labels)

    zoo: vision8                        # models, heads and inputs of a zoo, or:

    base_model: base/                   # causal language models of transformers
    models:
      - {model: math/, data: math.jsonl}     # one text a line: {"text": ...}, or plain lines
      - {model: code/, data: code.txt}
    max_length: 64                      # tokens of a text that are read

For language models the outputs are the scores of the token after each text; with labels, rows are
{"text", "answer"} and the label is the answer's first token. For a zoo, `split` says which inputs
are read ("test", unlabelled, is what the papers adapt on; the labels are not looked at unless the
objective needs them, and then "test" is refused). Paths are looked for beside the recipe first.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Gt
from pydantic import Field, ValidationError, model_validator

from pluribus.core.errors import InputError, RecipeError
from pluribus.core.optional import optional
from pluribus.core.pool import Pool
from pluribus.loss import LOSSES, needs
from pluribus.recipe.lines import read
from pluribus.recipe.single import Placed, WithData, fault, single
from pluribus.recipe.text import Document
from pluribus.tune import TUNERS
from pluribus.tune._model import Forward, ModuleForward
from pluribus.tune._texts import Texts

Plain = dict[str, Any]
Count = Annotated[int, Gt(0)]


class TuneRecipe(Placed):
    """A tuning run as a user writes it. `load` reads one; nothing is opened yet."""

    tune_method: str
    parameters: Plain = Field(default_factory=dict)
    objective: str = "entropy"
    objective_parameters: Plain = Field(default_factory=dict)
    zoo: str | None = None
    zoo_sizes: Plain = Field(default_factory=dict)
    split: Literal["test", "val", "train"] = "test"
    base_model: str | None = None
    models: Annotated[list[WithData], Field(min_length=1)] | None = None
    batch_size: Count = 16
    max_length: Count = 64
    limit: Count | None = None  # inputs of each task, at most
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "cpu"

    @model_validator(mode="after")
    def _consistent(self) -> "TuneRecipe":
        if self.zoo is None and (self.base_model is None or self.models is None):
            raise ValueError("give a zoo, or base_model and models")
        if self.zoo is None and self.models is not None:
            lacking = [entry.model for entry in self.models if entry.data is None]
            if lacking:
                raise ValueError(f"{lacking[0]} has no data; give each model the texts of its task")
        return self

    def on(self, device: str) -> "TuneRecipe":
        """Return the same run on another device."""
        return self.model_copy(update={"device": device})


class Run(NamedTuple):
    """What a recipe comes to."""

    method: Any
    pool: Pool
    forward: Forward
    streams: Mapping[str, Any]
    objective: Any
    models: dict[str, str]  # where each model is, for the recipe that replays the result


def load(path: str | Path) -> TuneRecipe:
    """Read a recipe. Raises MissingError or RecipeError saying what is wrong, and in which line."""
    path = Path(path).expanduser()
    document = single(path, "a tuning recipe")
    return of(document.value, path, document)


def of(told: Any, path: Path | None = None, document: Document | None = None) -> TuneRecipe:
    """Return the recipe that plain values say; `document` knows the lines they stand on."""
    where = str(path) if path is not None else "recipe"
    if not isinstance(told, Mapping):
        raise RecipeError(
            f"{where}: a tuning recipe is keys with values, the first of them tune_method, not "
            f"{type(told).__name__}"
        )
    if "merge_method" in told:
        raise RecipeError(f"{where}: this is a merge recipe; run it with: pluribus merge {where}")
    try:
        recipe = TuneRecipe.model_validate(told)
    except ValidationError as error:
        raise RecipeError(fault(error, where, document)) from None
    recipe._folder = path.parent if path is not None else None
    return recipe


def prepare(recipe: TuneRecipe, on_step: Any = None) -> Run:
    """Open models and inputs. Raises PluribusError saying what was given and what to do."""
    from pluribus.tasks.device import usable

    usable(recipe.device)
    method = TUNERS.build(recipe.tune_method, recipe.parameters)
    objective = LOSSES.build(recipe.objective, recipe.objective_parameters)
    labelled = needs(objective) == "labels"
    if recipe.zoo is not None:
        return _of_zoo(recipe, method, objective, labelled, on_step)
    return _of_folders(recipe, method, objective, labelled)


def _of_zoo(recipe: TuneRecipe, method: Any, objective: Any, labelled: bool, on_step: Any) -> Run:
    from pluribus.tasks import zoo as zoos

    assert recipe.zoo is not None
    if labelled and recipe.split == "test":
        raise InputError(
            "the objective learns from labels, and split: test would learn from those it is "
            "scored on; write split: val or train"
        )
    zoos.check_sizes(recipe.zoo, recipe.zoo_sizes)  # before they become keywords
    zoo = zoos.build(recipe.zoo, recipe.seed, on_step=on_step, **recipe.zoo_sizes)
    models: dict[str, str] = {}
    base: Any = zoo.base
    experts: dict[str, Any] = dict(zoo.experts)
    if recipe.base_model is not None:
        base = models["base"] = recipe.place(recipe.base_model)
    for entry in recipe.models or ():
        name = entry.name or Path(entry.model).stem
        if name not in zoo.tasks:
            raise InputError(
                f"{entry.model}: zoo {recipe.zoo} has no task {name!r}; name the files after the "
                f"tasks ({', '.join(zoo.tasks)}), or give each its name:"
            )
        experts[name] = models[name] = recipe.place(entry.model)
    streams = {
        task: _Cut(data.split(recipe.split), recipe.batch_size, recipe.limit, recipe.seed, labelled)
        for task, data in zoo.tasks.items()
    }
    return Run(
        method, Pool(base, experts), _zoo_forward(zoo, recipe.device), streams, objective, models
    )


def _zoo_forward(zoo: Any, device: str) -> ModuleForward:
    heads = {t: {n: x.to(device) for n, x in head.items()} for t, head in zoo.heads.items()}
    return ModuleForward(zoo.module().to(device), heads)


class _Cut:
    """A split in batches, in a new order at every reading; labels only if asked for."""

    def __init__(self, split: Any, size: int, limit: int | None, seed: int, labelled: bool) -> None:
        self.x, self.y = split.x[:limit], split.y[:limit]
        self.size, self.seed, self.labelled, self.readings = size, seed, labelled, 0

    def __len__(self) -> int:
        return -(-len(self.x) // self.size)

    def __iter__(self) -> Any:
        import torch

        rng = torch.Generator().manual_seed(self.seed + 1000 * self.readings)
        self.readings += 1
        for rows in torch.randperm(len(self.x), generator=rng).split(self.size):
            yield (self.x[rows], self.y[rows]) if self.labelled else self.x[rows]


def _of_folders(recipe: TuneRecipe, method: Any, objective: Any, labelled: bool) -> Run:
    hf = optional("transformers", "hf", "tuning language models")

    from pluribus.tasks.open_model import load as opened

    assert recipe.base_model is not None
    assert recipe.models is not None
    base = recipe.place(recipe.base_model)
    places = {
        entry.name or Path(entry.model).name: recipe.place(entry.model) for entry in recipe.models
    }
    if len(places) < len(recipe.models):
        raise RecipeError("two models have the same name; give each a name: of its own")
    pool = Pool(base, places)  # says first what is missing or does not fit
    if not Path(base).is_dir():
        raise InputError(f"{base}: give the base as a model folder with its config and tokenizer")
    texts = {
        name: read(recipe.place(entry.data or ""), labelled)[: recipe.limit]
        for entry, name in zip(recipe.models, places, strict=True)
    }
    assert pool.base is not None
    with _quiet(hf):
        model, tokenizer = opened(pool.base, recipe.device, "float32")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    streams = {name: Texts(found, tokenizer, recipe) for name, found in texts.items()}

    def last(module: Any, inputs: Mapping[str, Any], task: str) -> Any:
        return module(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]

    forward = ModuleForward(model, call=last)
    return Run(method, pool, forward, streams, objective, {"base": base, **places})


@contextmanager
def _quiet(hf: Any) -> Iterator[None]:
    """Keep transformers from drawing bars of its own."""
    logging = hf.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
