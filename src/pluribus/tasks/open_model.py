"""A causal language model of `Weights`: the architecture their folder's config.json names, filled.

The tensors may be a folder's, a hub repository's, a base with an adapter, or a merge in memory.
Code that comes with a model is never run.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pluribus.core.errors import InputError, MismatchError, MissingError, listing
from pluribus.core.optional import optional
from pluribus.core.weights import Weights
from pluribus.tasks.device import usable


def load(weights: Weights, device: str, dtype: str) -> tuple[nn.Module, Any]:
    """Return the model with these weights, in eval mode, and the tokenizer of their folder.

    Raises MissingError without configuration or tokenizer, MismatchError if the tensors are not the
    architecture's, InputError for an unknown element type or a device that does not work here,
    ExtraError without transformers.
    """
    usable(device)
    hf = optional("transformers", "hf", "evaluating a language model")
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise InputError(f"'{dtype}' is no element type; try float32 or bfloat16")
    folder = weights.folder
    if folder is None or not (Path(folder) / "config.json").is_file():
        raise MissingError(
            f"{weights.label}: no config.json beside the tensors; a language model is a folder "
            "with config.json, a tokenizer and the weights"
        )
    try:
        config = hf.AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = hf.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = hf.AutoModelForCausalLM.from_config(config, dtype=kind)
    except MemoryError:
        raise
    except Exception as error:  # a configuration can make transformers raise anything
        told = str(error).strip().splitlines()
        raise MissingError(
            f"{weights.label}: not a language model that can be opened "
            f"({told[0] if told else type(error).__name__}); look at its config.json and tokenizer"
        ) from None
    _put(model, weights)
    return model.to(device).eval(), tokenizer


def _put(model: nn.Module, weights: Weights) -> None:
    """Copy the weights into a model. Raises MismatchError if they are not its own."""
    own = model.state_dict()
    tied = {tensor.data_ptr() for name, tensor in own.items() if name in weights}
    lacking = [n for n, t in own.items() if n not in weights and t.data_ptr() not in tied]
    if lacking:
        raise MismatchError(
            f"{weights.label} lacks {listing(lacking)} of {type(model).__name__}; does its "
            "config.json belong to these tensors?"
        )
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    given = [name for name in weights if not any(re.search(p, name) for p in ignored)]
    if extra := [name for name in given if name not in own]:
        raise MismatchError(f"{type(model).__name__} has no {listing(extra)} ({weights.label})")
    for name in given:
        value = weights[name]
        if value.shape != own[name].shape:
            raise MismatchError(
                f"{weights.label}: {name} has shape {list(value.shape)}, but "
                f"{list(own[name].shape)} in {type(model).__name__}"
            )
        own[name].copy_(value)
