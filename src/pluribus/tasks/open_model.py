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

EXPERT = re.compile(r"experts\.\d+\.|_moe\.(input|output)_linear\.")


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
    if _named_otherwise(model, weights):
        model = _converted(type(model), config, weights, kind)
    else:
        _put(model, weights)
    return model.to(device).eval(), tokenizer


def _named_otherwise(model: nn.Module, weights: Weights) -> bool:
    """Whether a layer's experts have names of their own in the file, as mixtures' do."""
    own = model.state_dict()
    lacking = any("experts." in name or "_moe." in name for name in own if name not in weights)
    return lacking and any(EXPERT.search(name) for name in weights)


def _converted(kind: Any, config: Any, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """Let transformers put names of files into its own. Raises MismatchError as `_put`."""
    from transformers.utils import logging

    before, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # what does not fit is told below
    logging.disable_progress_bar()
    try:
        model, told = kind.from_pretrained(
            None,
            config=config,
            state_dict={name: weights[name] for name in weights},
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    finally:
        logging.set_verbosity(before)
        if shown:
            logging.enable_progress_bar()
    if lacking := sorted(told["missing_keys"]):
        raise MismatchError(
            f"{weights.label} lacks {listing(lacking)} of {kind.__name__}; does its config.json "
            "belong to these tensors?"
        )
    if extra := sorted(told["unexpected_keys"]):
        raise MismatchError(f"{kind.__name__} has no {listing(extra)} ({weights.label})")
    if other := sorted({str(key[0]) for key in told["mismatched_keys"]}):
        raise MismatchError(
            f"{weights.label}: {listing(other)} of {kind.__name__} is of another shape, or some of "
            "its experts are missing"
        )
    return model


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
