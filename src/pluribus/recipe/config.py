"""What a merge changes in config.json, and what the inputs' configurations say about each other."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from pluribus.core.errors import RecipeError
from pluribus.core.weights import Weights
from pluribus.recipe.layout import Stack

COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "depth"),
    *("encoder_layers", "decoder_layers", "max_window_layers"),
)
# Fields that hold layer numbers, not one value a layer.
NUMBERS = ("mlp_only_layers", "full_attn_idxs", "cross_attention_layers", "attn_layer_indices")
# What changes a model's meaning without changing a shape.
TELLING = (
    *("hidden_act", "hidden_activation", "activation_function", "rope_theta", "rope_scaling"),
    *("rope_parameters", "max_position_embeddings", "n_positions", "num_attention_heads", "n_head"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_eps", "sliding_window"),
    *("num_experts_per_tok", "attn_logit_softcapping", "final_logit_softcapping"),
    *("partial_rotary_factor", "layer_types"),
)
Config = Mapping[str, Any]


def architecture(config: Config, override: str | None = None) -> str | None:
    """Return the architecture a configuration names, or None."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else config.get("model_type")
    return override or first


def compare(models: Sequence[tuple[str, Config, str | None]], *, allow_crimes: bool) -> list[str]:
    """Return warnings about (label, config, override_architecture) that differ from the first.

    Raises RecipeError for different architectures, unless crimes are allowed.
    """
    told = [(label, config, architecture(config, over)) for label, config, over in models if config]
    notes = []
    for label, config, kind in told[1:]:
        first, expected, wanted = told[0]
        if kind != wanted:
            text = f"{label} is {kind}, but {first} is {wanted}"
            if not allow_crimes:
                raise RecipeError(
                    f"{text}; merging different architectures needs allow_crimes "
                    "(--allow-crimes), and tensors of the same names and shapes"
                )
            notes.append(f"{text}: different architectures are merged")
        for part, mine, others in _parts(config, expected):
            for key in TELLING:
                if key in mine and key in others and mine[key] != others[key]:
                    notes.append(
                        f"{label} has {part}{key} = {_short(mine[key])}, but {first} has "
                        f"{_short(others[key])}; the merge takes the latter or its base's"
                    )
    return notes


def _parts(one: Config, other: Config) -> list[tuple[str, Config, Config]]:
    nested = [key for key in one if isinstance(one[key], dict) and key.endswith("_config")]
    return [
        ("", one, other),
        *((f"{key}.", one[key], other[key]) for key in nested if isinstance(other.get(key), dict)),
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def restacked(config: Config, stacks: Sequence[Stack]) -> tuple[dict[str, Any], list[str]]:
    """Return changes to config.json for new numbers of layers, and warnings."""
    changed = copy.deepcopy(dict(config))
    notes = []
    for stack in stacks:
        after = len(stack.layers)
        sources = [(part.weights, layer) for part, layer in stack.layers]
        untouched = after == stack.before and all(
            layer == i for i, (_, layer) in enumerate(sources)
        )
        if untouched and len({id(weights) for weights, _ in sources}) == 1:
            continue
        fields = _count_fields(changed, stack)
        if not fields and config:
            notes.append(
                f"config.json names no number of layers equal to {stack.before}, so it was not "
                f"set to {after}; correct it by hand"
            )
        for path, keys in fields:
            table = _at(changed, path)
            for key in keys:
                table[key] = after
            for key in list(table):
                values = _relayered(key, path, stack, sources)
                if values is not None:
                    table[key] = values
    return {key: changed[key] for key in changed if changed[key] != config.get(key)}, notes


def _count_fields(config: Config, stack: Stack) -> list[tuple[tuple[str, ...], list[str]]]:
    """Return the tables that hold the stack's number of layers, with the fields that do."""
    words = set(stack.family.split("."))
    seeing = bool(words & {"visual", "vision_tower", "vision_model"})
    hearing = bool(words & {"audio_tower", "audio_model"})
    tables: list[tuple[str, ...]] = [()]
    tables += [(key,) for key, value in config.items() if isinstance(value, dict)]
    out = []
    for path in tables:
        named = path[0] if path else ""
        if seeing != ("vision" in named) and (seeing or "vision" in named):
            continue
        if hearing != ("audio" in named) and (hearing or "audio" in named):
            continue
        table = _at(config, path)
        keys = [key for key in COUNTS if table.get(key) == stack.before]
        if "encoder" in words:
            keys = [key for key in keys if "decoder" not in key]
        if "decoder" in words:
            own = [key for key in keys if "decoder" in key]
            keys = own or [key for key in keys if "encoder" not in key]
        if any(not isinstance(table[key], bool) for key in keys):
            out.append((path, keys))
    return out


def _at(config: Any, path: Sequence[str]) -> Any:
    for key in path:
        config = config[key]
    return config


def _relayered(
    key: str, path: Sequence[str], stack: Stack, sources: Sequence[tuple[Weights, int]]
) -> list[Any] | None:
    """Return a per-layer list of the output, taken from the layers it is made of."""
    told = [_at(weights.config(), path).get(key) for weights, _ in sources]
    if not all(isinstance(values, list) for values in told):
        return None
    if key in NUMBERS:
        pairs = enumerate(zip(told, sources, strict=True))
        return [i for i, (values, (_, layer)) in pairs if layer in values]
    part = next(part for part, _ in stack.layers)
    count = part.layers.count(stack.family)
    about_layers = any(w in key for w in ("layer", "block", "pattern", "window", "attn", "moe"))
    if not about_layers or len(told[0]) != count:
        return None
    pairs = zip(told, sources, strict=True)
    return [values[layer] for values, (_, layer) in pairs if layer < len(values)]


def with_vocabulary(config: Config, rows: int) -> dict[str, Any]:
    """Return changes to config.json for a new number of embedding rows."""
    changes: dict[str, Any] = {}
    if "vocab_size" in config:
        changes["vocab_size"] = rows
    for key in ("text_config", "decoder"):
        inner = config.get(key)
        if isinstance(inner, dict) and "vocab_size" in inner:
            changes[key] = {**inner, "vocab_size": rows}
    return changes or ({"vocab_size": rows} if config else {})
