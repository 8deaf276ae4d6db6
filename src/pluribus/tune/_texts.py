"""Texts that language models are tuned on: read from files, strictly, and dealt in batches."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pluribus.core.errors import FormatError, InputError, MissingError
from pluribus.loss import LOSSES, needs

if TYPE_CHECKING:
    from pluribus.tune._recipe import TuneRecipe


def read(path: str, labelled: bool) -> list[dict[str, str]]:
    """Read a file of texts: JSON objects with `text` (and `answer`), or plain lines.

    Raises MissingError, FormatError with the line that is at fault, InputError if there is no text,
    or no answer to one where `labelled` asks for them.
    """
    if Path(path).is_dir():
        raise InputError(f"{path}: is a folder; data is a file of texts, such as texts.jsonl")
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file of texts") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text ({error.reason})") from None
    found: list[dict[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not path.endswith(".jsonl"):
            found.append({"text": line})
            continue
        try:
            row = json.loads(line)
            given = {"text": row["text"], **({"answer": row["answer"]} if "answer" in row else {})}
        except (ValueError, KeyError, TypeError):
            raise FormatError(f'{path}, line {number}: expected {{"text": ...}}') from None
        for key, value in given.items():
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise FormatError(f"{path}, line {number}: {key} is {value!r}, which is no text")
        kept = {key: str(value) for key, value in given.items()}
        if not kept["text"].strip():
            continue
        if labelled and not kept.get("answer", "").strip():
            raise InputError(
                f"{path}, line {number}: the objective needs labels; give rows "
                '{"text", "answer"}, with an answer that is not empty'
            )
        found.append(kept)
    if not found:
        raise InputError(f"{path}: holds no text")
    if labelled and not path.endswith(".jsonl"):
        raise InputError(
            f'{path}: the objective needs labels; give rows {{"text", "answer"}} in a .jsonl file'
        )
    return found


class Texts:
    """Texts in batches of tokens, in a new order at every reading."""

    def __init__(self, rows: list[dict[str, str]], tokenizer: Any, recipe: "TuneRecipe") -> None:
        self.rows, self.tokenizer, self.recipe, self.readings = rows, tokenizer, recipe, 0
        self.labelled = needs(LOSSES[recipe.objective]) == "labels"

    def __len__(self) -> int:
        return -(-len(self.rows) // self.recipe.batch_size)

    def __iter__(self) -> Any:
        import torch

        rng = torch.Generator().manual_seed(self.recipe.seed + 1000 * self.readings)
        self.readings += 1
        order = torch.randperm(len(self.rows), generator=rng)
        for part in order.split(self.recipe.batch_size):
            rows = [self.rows[int(i)] for i in part]
            told = self.tokenizer(
                [row["text"] for row in rows],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self.recipe.max_length,
            )
            inputs = {key: told[key] for key in ("input_ids", "attention_mask")}
            if not self.labelled:
                yield inputs
                continue
            yield inputs, torch.tensor([self._first(row["answer"]) for row in rows])

    def _first(self, answer: str) -> int:
        tokens = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise InputError(f"the tokenizer makes no token of the answer {answer!r}")
        return tokens[0]
