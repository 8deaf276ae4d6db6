"""Texts that language models are tuned on, dealt in batches of tokens."""

from typing import TYPE_CHECKING, Any

from pluribus.core.errors import InputError
from pluribus.loss import LOSSES, needs

if TYPE_CHECKING:
    from pluribus.tune._recipe import TuneRecipe


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
