"""Configuration of a model that gets another tokenizer: its vocabulary's size and token ids."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pluribus.core.errors import listing

Config = dict[str, Any]
TAKEN = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "mask_token_id"),
    "padding_side",
)  # from the donor also where the model says nothing
IDS = (
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids"),
    *("forced_decoder_ids", "sequence_bias"),
)  # lists of ids in generation settings, which mean nothing in another vocabulary


def moved(
    config: Mapping[str, Any],
    donor: Mapping[str, Any],
    rows: int,
    rows_before: int,
    new_id: Callable[[int], int | None],
) -> tuple[Config, list[str]]:
    """Return a config.json or generation_config.json for the donor's vocabulary, and warnings.

    Token ids are the donor's where it names them; others follow their token by `new_id` and become
    null, with a warning, if the donor has no such token.
    """
    out = copy.deepcopy(dict(config))
    told = dict(_told(donor))
    sections = [out, *(value for value in out.values() if isinstance(value, dict))]
    sized = [part for part in sections if isinstance(part.get("vocab_size"), int)]
    main = [part for part in sized if part["vocab_size"] == rows_before] or sized[:1]
    lost = []
    for part in main:
        part["vocab_size"] = rows
    for part in sections:
        for key, value in part.items():
            if not key.endswith("_token_id"):
                continue
            if key in told:
                part[key] = told[key]
            elif isinstance(value, int):
                part[key] = new_id(value)
            elif isinstance(value, list):
                part[key] = [i for i in map(new_id, value) if i is not None] or None
            if part[key] is None and value is not None and told.get(key, value) is not None:
                lost.append(key)
    for part in (main or [out])[:1]:
        for key in TAKEN:
            if key in told and not any(key in section for section in sections):
                part[key] = told[key]
        if "padding_side" in told:
            part["padding_side"] = told["padding_side"]
    dropped = [key for key in IDS if out.pop(key, None) is not None]
    notes = []
    if lost:
        names = listing(dict.fromkeys(lost))
        notes.append(f"the donor has no token for {names}: set to null")
    if dropped:
        notes.append(f"{listing(dropped)} named tokens of the old vocabulary: taken out")
    return out, notes


def _told(donor: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what a donor's configuration says of tokens; its outermost part last."""
    nested = (value for value in donor.values() if isinstance(value, dict))
    for part in (*nested, donor):
        for key, value in part.items():
            if key in TAKEN or key.endswith("_token_id"):
                yield key, value
