"""The gates of a recipe by its mode, and their training on the assembled model's loss."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pluribus.core.dtypes import narrow
from pluribus.core.errors import InputError
from pluribus.core.optional import optional
from pluribus.core.shapes import Float
from pluribus.core.source import ArraySource, Source, TensorSpec
from pluribus.core.weights import Weights, to_torch
from pluribus.route.moe import gates as made
from pluribus.route.moe import parts as models
from pluribus.route.moe import train as training
from pluribus.route.moe.gates import OnStep
from pluribus.route.moe.parts import Parts
from pluribus.route.moe.recipe import Expert, MoeRecipe
from pluribus.route.moe.train import TrainingReport
from pluribus.tasks.open_model import load as open_model


def gates_of(
    recipe: MoeRecipe,
    parts: Parts,
    texts: Mapping[str, list[str]],
    device: str,
    on_step: OnStep | None,
) -> tuple[Float[Tensor, "l t d"], Float[Tensor, "l e d"] | None, TrainingReport | None]:
    """Return the gates of experts and of a gated shared expert, and how training went."""
    asked: list[Expert] = list(recipe.experts)
    gated = parts.layout.gated_shared
    if gated:
        asked += recipe.shared
    count, mode = len(recipe.experts), recipe.gate_mode
    report = None
    if mode in ("random", "uniform_random"):
        found = made.at_random(
            parts.layers, len(asked), parts.width, mode == "uniform_random", recipe.seed
        )
    elif mode == "cheap_embed":
        embed = parts.base["model.embed_tokens.weight"]
        found = made.of_embeddings(embed, tokenizer_of(parts.base), asked, parts.layers)
    else:
        model, tokenizer = open_model(parts.base, device, "float32")
        if mode == "trained":
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            train, held = training.dealt(texts, recipe.train, recipe.seed)
            rows, report = training.classifiers(
                model, tokenizer, train, held, recipe.train, on_step
            )
            # sigmoid(0): half of the shared expert, until training says otherwise
            found = torch.cat([rows, torch.zeros(len(rows), len(asked) - count, parts.width)], 1)
        else:
            found = made.of_prompts(model, tokenizer, asked, mode == "hidden_avg", on_step)
    return found[:, :count], found[:, count:] if gated else None, report


def tokenizer_of(model: Weights) -> Any:
    """Return the tokenizer of a model's folder. Raises InputError without one."""
    hf = optional("transformers", "hf", "reading prompts")
    try:
        return hf.AutoTokenizer.from_pretrained(model.folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        told = str(error).strip().splitlines()
        raise InputError(
            f"{model.label}: no tokenizer that can be read, which gates of prompts need "
            f"({told[0] if told else type(error).__name__})"
        ) from None


def fine_tuned(
    recipe: MoeRecipe,
    parts: Parts,
    config: Mapping[str, Any],
    rows: Float[Tensor, "l t d"],
    own: Float[Tensor, "l e d"] | None,
    texts: Mapping[str, list[str]],
    report: TrainingReport,
    device: str,
    on_step: OnStep | None,
) -> tuple[Float[Tensor, "l t d"], Float[Tensor, "l e d"] | None]:
    """Train the gates on the assembled model's loss, which is held in memory for that."""
    hf = optional("transformers", "hf", "training gates")
    sources = [lazy(row, "F32") for row in rows]
    shared = [None if own is None else lazy(own[n], "F32") for n in range(parts.layers)]
    found, aliases = models.pieces(
        recipe.model_copy(update={"dtype": "float32"}), parts, sources, shared
    )
    state = {name: to_torch(piece.source) for name, piece in found.items()}
    state |= {name: state[to] for name, to in aliases.items()}
    told = {k: v for k, v in config.items() if k != "model_type"}
    settings = hf.AutoConfig.for_model(config["model_type"], **told)
    model = getattr(hf, f"{parts.facts.family}ForCausalLM").from_pretrained(
        None, config=settings, state_dict=state, dtype=torch.float32
    )
    del state
    model.to(device).eval()
    tokenizer = tokenizer_of(parts.base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    scorers = routers(model, parts.layout.router)
    gated = [
        layer.get_submodule("mlp.shared_expert_gate")
        for layer in model.get_submodule("model.layers").children()
        if own is not None
    ]
    train, held = training.dealt(texts, recipe.train, recipe.seed)
    training.fine_tune(
        model,
        [*scorers, *gated],
        tokenizer,
        train,
        held,
        recipe.train,
        recipe.seed,
        report,
        on_step,
    )
    trained = [
        torch.stack([m.get_parameter("weight").detach().cpu() for m in found])
        for found in (scorers, gated)
        if found
    ]
    return trained[0], None if own is None else trained[1]


def routers(model: nn.Module, where: str) -> list[nn.Module]:
    """Return the modules that score experts, a layer's each; they give logits (n, t) first."""
    layers = model.get_submodule("model.layers")
    return [layer.get_submodule(where) for layer in layers.children()]


def lazy(values: Tensor, kind: str) -> Source:
    """Return a tensor as one of the output, rounded to an element type."""
    array = np.ascontiguousarray(values.numpy().astype(np.float32))
    spec = TensorSpec(kind, tuple(array.shape))
    return ArraySource(narrow(array, spec.kind), spec)
