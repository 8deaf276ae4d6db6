"""Labelled texts and the encoder that reads them, for the recipe of a transfer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pluribus.core.errors import InputError, MissingError, listing, nearest
from pluribus.core.optional import optional
from pluribus.recipe.lines import read
from pluribus.route.transfer import Examples, Target
from pluribus.tasks.views import generator

if TYPE_CHECKING:
    from pluribus.route.transfer._recipe import SourceRecipe, TransferRecipe

Dealt = tuple[Target, tuple[str, ...]]
Rows = list[dict[str, str]]


def encoder(folder: str) -> tuple[nn.Module, Any]:
    """Open an encoder and its tokenizer with transformers; no code that comes along is run.

    Raises MissingError for a folder that is none, ExtraError without transformers.
    """
    hf = optional("transformers", "hf", "an encoder from a folder")
    if not (Path(folder).expanduser() / "config.json").is_file():
        raise MissingError(
            f"{folder}: no config.json in it; base_model is a folder that transformers opens, with "
            "config.json, a tokenizer and the weights"
        )
    logging = hf.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = hf.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = hf.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except MemoryError:
        raise
    except Exception as error:  # a configuration can make transformers raise anything
        told = str(error).strip().splitlines()
        raise MissingError(
            f"{folder}: no encoder that can be opened ({told[0] if told else type(error).__name__})"
            "; look at its config.json, tokenizer and weights"
        ) from None
    finally:
        if shown:
            logging.enable_progress_bar()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return model.eval(), tokenizer


def tasks(
    recipe: "TransferRecipe", tokenizer: Any
) -> tuple[Callable[["SourceRecipe"], Dealt], Callable[[], Dealt]]:
    """Return what deals a source, and what deals the target. Files are read here, all of them.

    Raises MissingError, FormatError or InputError for files that do not do.
    """
    from pluribus.route.transfer._recipe import MOST_VAL

    found = {
        source.name: read(recipe.place(source.data), True)[: recipe.limit]
        for source in recipe.sources
        if source.data is not None
    }
    own = recipe.target
    assert own.data is not None
    few = read(recipe.place(own.data), True)
    more = {
        split: read(recipe.place(path), True)
        for split, path in (("val", own.val), ("test", own.test))
        if path is not None
    }

    def examples(rows: Rows, classes: Sequence[str]) -> Examples:
        place = {name: i for i, name in enumerate(classes)}
        odd = [row["answer"] for row in rows if row["answer"] not in place]
        if odd:
            raise InputError(
                f"the answer {odd[0]!r} is none of the classes that the training rows have: "
                f"{listing(classes)}.{nearest(odd[0], classes)}"
            )
        made = tokenizer(
            [row["text"] for row in rows],
            truncation=True,
            max_length=recipe.max_length,
            padding=True,
            return_tensors="pt",
        )
        x = {key: made[key].to(recipe.device) for key in ("input_ids", "attention_mask")}
        y = torch.tensor([place[row["answer"]] for row in rows], device=recipe.device)
        return Examples(x, y)

    def dealt(name: str, rows: Rows, labels: int | None, others: dict[str, Rows]) -> Dealt:
        rng = generator(recipe.seed, name, "transfer/labels")
        rows = [rows[i] for i in torch.randperm(len(rows), generator=rng).tolist()]
        if labels is not None and labels > len(rows):
            raise InputError(f"{name} has {len(rows)} rows; labels: {labels} is more")
        if "val" in others:
            train, val = rows[:labels], others["val"]
        else:
            cut = (
                labels
                if labels is not None and labels < len(rows)
                else len(rows) - -(-len(rows) // 4)
            )
            train, val = rows[:cut], rows[cut:][:MOST_VAL]
            known = {row["answer"] for row in train}
            val = [row for row in val if row["answer"] in known]
        classes = tuple(sorted({row["answer"] for row in train}))
        if len(classes) < 2:
            raise InputError(
                f"{name}: the rows to train on have {len(classes)} kind of answer; give rows of at "
                "least two"
            )
        splits = {"train": train, "val": val, "test": others.get("test")}
        made = {split: examples(some, classes) for split, some in splits.items() if some}
        return Target(**made), classes

    def source(told: "SourceRecipe") -> Dealt:
        return dealt(told.name, found[told.name], None, {})

    def target() -> Dealt:
        return dealt(own.name, few, own.labels, more)

    target()  # what is wrong with it is said before the sources train
    return source, target
