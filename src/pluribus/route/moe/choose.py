"""Which architecture a recipe's models are assembled into, and why not another."""

import re
from collections.abc import Mapping
from typing import Any

from pluribus.core.errors import MismatchError, MissingError, RecipeError
from pluribus.core.optional import optional
from pluribus.core.weights import Weights
from pluribus.route.moe.layouts import LAYOUTS
from pluribus.route.moe.layouts._layout import Facts, Layout, Sizes
from pluribus.route.moe.recipe import MoeRecipe

ROUTED = (
    "mixtures that transformers has no architecture for are composites: see `pluribus route build`"
)


def configuration(model: Weights) -> dict[str, Any]:
    """Return a model's configuration with transformers' defaults. Raises MissingError."""
    hf = optional("transformers", "hf", "assembling a mixture of experts")
    if model.folder is None or not (model.folder / "config.json").is_file():
        raise MissingError(
            f"{model.label}: no config.json beside the tensors; base and experts are folders of "
            "dense decoders as transformers writes them"
        )
    told = model.config()
    if told.get("model_type") not in bases():
        raise _unsupported(model, told)
    try:
        return hf.AutoConfig.from_pretrained(model.folder, local_files_only=True).to_dict()
    except MemoryError:
        raise
    except Exception as error:  # a configuration can make transformers raise anything
        lines = str(error).strip().splitlines()
        raise MissingError(
            f"{model.label}: its config.json cannot be read "
            f"({lines[0] if lines else type(error).__name__})"
        ) from None


def bases() -> list[str]:
    """Return the model types of dense models that some architecture takes."""
    found = [kind for name in LAYOUTS for kind in _facts(name).bases]
    return list(dict.fromkeys(found))


def _facts(name: str) -> Facts:
    return LAYOUTS[name].__pluribus_layout__  # type: ignore[attr-defined]


def _unsupported(model: Weights, told: Mapping[str, Any]) -> MismatchError:
    kind = told.get("model_type")
    some = told.get("num_local_experts") or told.get("num_experts") or told.get("n_routed_experts")
    what = "is a mixture of experts already" if some else f"is of type {kind!r}"
    return MismatchError(
        f"{model.label} {what}; mixtures are assembled from dense {', '.join(bases())} models. "
        f"{ROUTED[0].upper()}{ROUTED[1:]}"
    )


def chosen(recipe: MoeRecipe, config: Mapping[str, Any], sizes: Sizes) -> Facts:
    """Return the architecture that a recipe names, or the first that fits its base and experts.

    A shared expert with prompts wants a gate, one without wants none. Raises RecipeError with the
    reason of each that does not fit.
    """
    names = list(LAYOUTS)
    if recipe.architecture is not None:
        wanted = _plain(recipe.architecture)
        titles = {name: (name, *_facts(name).titles) for name in names}
        names = [n for n in names if any(_plain(t).startswith(wanted) for t in titles[n])]
        if not names or not wanted:
            raise RecipeError(
                f"architecture {recipe.architecture!r}: there are {', '.join(LAYOUTS)}. {ROUTED}"
            )
    prompted = any(entry.positive_prompts for entry in recipe.shared)
    reasons = []
    fitting = []
    for name in sorted(names, key=lambda name: _facts(name).rank):
        facts = _facts(name)
        layout: Layout = LAYOUTS[name]()
        reason = layout.refusal(config, sizes)
        if config["model_type"] not in facts.bases:
            reason = f"is made of {', '.join(facts.bases)}, not {config['model_type']}"
        elif reason is None and sizes.shared and prompted and not layout.gated_shared:
            reason = "has no gate for a shared expert, so it takes no prompts for one"
        elif reason is None and layout.gated_shared and not prompted and _asks(recipe):
            reason = "has a gate for the shared expert, which needs positive_prompts"
        if reason is None:
            fitting.append(facts)
        reasons.append(f"{name} {reason}")
    if not fitting:
        raise RecipeError(f"no architecture fits: {'; '.join(reasons)}. {ROUTED}")
    return fitting[0]


def _asks(recipe: MoeRecipe) -> bool:
    """Return whether a gated shared expert would need prompts."""
    return recipe.gate_mode not in ("random", "uniform_random", "trained")


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
