"""The models that a mixture is made of: opened, compared, and laid out as its tensors.

Everything here reads headers and configurations only.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pluribus.core.dtypes import dtype as dtype_of
from pluribus.core.errors import (
    InputError,
    MismatchError,
    listing,
)
from pluribus.core.optional import optional
from pluribus.core.refs import ModelRef
from pluribus.core.source import Source
from pluribus.core.weights import Weights
from pluribus.recipe.run import located_ref
from pluribus.route.moe.choose import ROUTED, chosen, configuration
from pluribus.route.moe.layouts import LAYOUTS
from pluribus.route.moe.layouts._layout import GIVEN, Facts, Layer, Layout, Mlp, Sizes
from pluribus.route.moe.recipe import Expert, MoeRecipe
from pluribus.route.moe.sources import Changed, Zeros
from pluribus.tokenizer import TokenizerError, load_vocab

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
BLOCK = re.compile(r"model\.layers\.(\d+)\.mlp\.(.+)")


class Parts(NamedTuple):
    """Everything that a mixture is made of, opened and found to fit."""

    base: Weights
    config: dict[str, Any]  # the base's, whole
    experts: list[Weights]
    shared: list[Weights]
    names: list[str]  # of the experts
    layout: Layout
    facts: Facts
    sizes: Sizes
    warnings: list[str]

    @property
    def layers(self) -> int:
        """How many layers the base has."""
        return int(self.config["num_hidden_layers"])

    @property
    def width(self) -> int:
        """Hidden width."""
        return int(self.config["hidden_size"])


def opened(recipe: MoeRecipe) -> Parts:
    """Open a recipe's models and find the architecture for them.

    Raises MissingError, FormatError, MismatchError for models that do not fit together, RecipeError
    if no architecture fits them.
    """

    def open_model(ref: ModelRef) -> Weights:
        return Weights.open(located_ref(ref, recipe.folder), label=str(ref))

    base = open_model(recipe.base_model)
    config = configuration(base)
    sizes = Sizes(len(recipe.experts), recipe.experts_per_token, len(recipe.shared))
    facts = chosen(recipe, config, sizes)
    layout = LAYOUTS[facts.name]()
    experts = [open_model(entry.source_model) for entry in recipe.experts]
    shared = [open_model(entry.source_model) for entry in recipe.shared]
    notes = [f"{facts.name}: {note}" for note in layout.notes(config)]
    blocks = _blocks(base, config)
    for model in [*experts, *shared]:
        notes += _fits(model, base, config, blocks)
    alike = len({str(entry.source_model) for entry in recipe.experts}) == 1 < len(experts)
    if alike and not any(entry.noise_scale for entry in recipe.experts):
        notes.append(
            "all experts are the same model: until it is trained, the mixture computes what one of "
            "them does"
        )
    if recipe.gate_mode == "trained":
        for entry in recipe.experts:
            if entry.positive_prompts or entry.negative_prompts:
                notes.append("gate_mode trained learns from data alone; prompts are not used")
                break
    names = _named([Path(str(entry.source_model)).name for entry in recipe.experts])
    return Parts(base, config, experts, shared, names, layout, facts, sizes, notes)


def _named(names: Sequence[str]) -> list[str]:
    """Return names, numbered where they would be the same."""
    return [
        f"{name}#{names[: i + 1].count(name)}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


# -- fitting together ------------------------------------------------------------------------------


def _blocks(base: Weights, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the base's feed-forward tensors. Raises MismatchError for others."""
    found = {name: spec.shape for name, spec in base.spec.items() if BLOCK.fullmatch(name)}
    layers, d, wide = (
        int(config[key]) for key in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )
    shapes = {"gate_proj": (wide, d), "up_proj": (wide, d), "down_proj": (d, wide)}
    wanted = {
        f"model.layers.{layer}.mlp.{part}.weight": shape
        for layer in range(layers)
        for part, shape in shapes.items()
    }
    if found != wanted:
        odd = next(n for n in {**wanted, **found} if found.get(n) != wanted.get(n))
        raise MismatchError(
            f"{base.label}: {odd} is {_shape(found.get(odd))}, and a mixture's expert has "
            f"{_shape(wanted.get(odd))} there. {ROUTED[0].upper()}{ROUTED[1:]}"
        )
    return found


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else str(list(shape))


def _fits(
    model: Weights, base: Weights, config: Mapping[str, Any], blocks: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Return what is odd about an expert. Raises MismatchError if it is of another kind."""
    own = configuration(model)
    if own["model_type"] != config["model_type"]:
        raise MismatchError(
            f"{model.label} is of type {own['model_type']!r}, and the base {base.label} of type "
            f"{config['model_type']!r}; experts are fine-tunes of one architecture"
        )
    for name, shape in blocks.items():
        found = model.spec.get(model.aliases.get(name, name))
        if found is None or found.shape != shape:
            given = None if found is None else found.shape
            raise MismatchError(
                f"{model.label}: {name} is {_shape(given)}, and {list(shape)} in the base "
                f"{base.label}; experts must have the base's sizes"
            )
    for name in ("num_hidden_layers", "hidden_act"):
        if own.get(name) != config.get(name):
            raise MismatchError(
                f"{model.label}: {name} is {own.get(name)}, and {config.get(name)} in the base"
            )
    return _same_tokens(model, base)


def _same_tokens(model: Weights, base: Weights) -> list[str]:
    """Return lesser oddities. Raises MismatchError if they number the same tokens otherwise."""
    if model.folder == base.folder:
        return []
    try:
        mine, theirs = (load_vocab(w.folder, label=w.label).tokens for w in (model, base))  # type: ignore[arg-type]
    except TokenizerError:
        sizes = [w.config().get("vocab_size") for w in (model, base)]
        if sizes[0] == sizes[1]:
            return []
        return [f"{model.label} has {sizes[0]} rows for tokens, and the base {sizes[1]}"]
    moved = [token for token, index in theirs.items() if mine.get(token, index) != index]
    if moved or not set(mine) & set(theirs):
        token = moved[0] if moved else next(iter(theirs))
        raise MismatchError(
            f"{model.label} has another vocabulary than the base {base.label}: token {token!r} is "
            f"{mine.get(token)} in the one and {theirs[token]} in the other; give it the base's "
            "with: pluribus tokensurgeon"
        )
    lacking = [token for token in theirs if token not in mine]
    more = [token for token in mine if token not in theirs]
    notes = []
    if lacking:
        notes.append(f"{model.label} lacks {len(lacking)} of the base's tokens: {listing(lacking)}")
    if more:
        notes.append(
            f"{model.label} has {len(more)} tokens beyond the base's, which the mixture does not "
            f"know: {listing(more)}"
        )
    return notes


# -- laying out ------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A tensor of the output and the label of the model it is from."""

    source: Source
    label: str


def pieces(
    recipe: MoeRecipe, parts: Parts, gates: Sequence[Source], own: Sequence[Source | None]
) -> tuple[dict[str, Piece], dict[str, str]]:
    """Return the output's tensors by name, and their aliases.

    `gates` are each layer's (t, d), `own` the shared expert's (1, d) or None.
    """
    base = parts.base
    found: dict[str, Piece] = {}
    kept: dict[str, tuple[int, ...]] = {}
    for name, spec in base.spec.items():
        if not BLOCK.fullmatch(name):
            kind = _kind(recipe, spec.dtype) if spec.kind.is_float else spec.dtype
            found[name] = Piece(Changed(base.source(name), kind), base.label)
            kept[name] = spec.shape
    for layer in range(parts.layers):
        made = Layer(
            [_mlp(recipe, parts, layer, n) for n in range(len(parts.experts))],
            gates[layer],
            [_mlp(recipe, parts, layer, n, True) for n in range(len(parts.shared))],
            own[layer],
        )
        for name, source in parts.layout.tensors(layer, made).items():
            found[name] = Piece(source, "experts")
    first = next(iter(kept))
    for name, shape in parts.layout.added(kept).items():
        found[name] = Piece(Zeros(_kind(recipe, base.spec[first].dtype), shape), "zeros")
    aliases = {name: to for name, to in base.aliases.items() if to in kept}
    return found, aliases


def kind_of_gates(recipe: MoeRecipe, base: Weights) -> str:
    """Return the element type of gates: the recipe's, else that of the base's blocks."""
    return _kind(recipe, base.spec["model.layers.0.mlp.gate_proj.weight"].dtype)


def _kind(recipe: MoeRecipe, own: str) -> str:
    return dtype_of(recipe.dtype).name if recipe.dtype else own


def _mlp(recipe: MoeRecipe, parts: Parts, layer: int, number: int, shared: bool = False) -> Mlp:
    model = (parts.shared if shared else parts.experts)[number]
    entry: Expert = (recipe.shared if shared else recipe.experts)[number]
    made = []
    for part in PROJECTIONS:
        name = f"model.layers.{layer}.mlp.{part}.weight"
        kind = _kind(recipe, parts.base.spec[name].dtype)
        made.append(
            Changed(
                model.source(name),
                kind,
                noise=entry.noise_scale or 0.0,
                scale=_factor(entry) if part == "down_proj" else 1.0,
                seed=recipe.seed,
                name=f"{'shared' if shared else 'expert'}/{number}/{name}",
            )
        )
    return Mlp(*made)


def _factor(entry: Expert) -> float:
    return 1.0 if entry.residual_scale is None else entry.residual_scale


def written_config(recipe: MoeRecipe, parts: Parts) -> dict[str, Any]:
    """Return the output's config.json: what the architecture knows of the base's, and its own.

    Raises MismatchError if tensors beside the experts would not be the architecture's.
    """
    hf = optional("transformers", "hf", "assembling a mixture of experts")
    family = parts.facts.family
    cls = getattr(hf, f"{family}Config", None)
    if cls is None:
        raise InputError(f"this transformers has no {family}; a newer release may")
    known = set(cls().to_dict()) - set(GIVEN)
    told = {k: v for k, v in parts.config.items() if k in known or k == "head_dim"}
    if told.get("head_dim") is None:
        told.pop("head_dim", None)
    config = cls(**(told | parts.layout.config(parts.config, parts.sizes)))
    config.architectures = [f"{family}ForCausalLM"]
    _check_tensors(hf, config, parts)
    found = config.to_dict()
    found["dtype"] = recipe.dtype or dtype_of(kind_of_gates(recipe, parts.base)).torch
    found["architectures"] = [f"{family}ForCausalLM"]
    # transformers renames some on writing; older releases read the names that layouts give.
    return parts.layout.config(parts.config, parts.sizes) | found


def _check_tensors(hf: Any, config: Any, parts: Parts) -> None:
    """Raise MismatchError if the base's tensors beside the experts are not the architecture's."""
    import torch

    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    ours = parts.layout.router.split(".")[0]
    inside = re.compile(rf"model\.layers\.\d+\.({ours}|shared_mlp)\.")
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not inside.match(name)
    }
    kept = {n: spec.shape for n, spec in parts.base.spec.items() if not BLOCK.fullmatch(n)}
    kept |= {n: kept[to] for n, to in parts.base.aliases.items() if to in kept}
    kept |= parts.layout.added(kept)
    if config.tie_word_embeddings:
        kept.setdefault("lm_head.weight", wanted.get("lm_head.weight", ()))
    lost = [name for name in kept if name not in wanted]
    if lost:
        raise MismatchError(
            f"{parts.facts.name} has no place for {listing(lost)} of {parts.base.label}; {ROUTED}"
        )
    for name, shape in wanted.items():
        if kept.get(name) != shape:
            raise MismatchError(
                f"{parts.base.label}: {name} is {_shape(kept.get(name))}, and {list(shape)} in "
                f"{type(model).__name__}; {ROUTED}"
            )
