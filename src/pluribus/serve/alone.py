"""Models whose rows cannot be batched: one answer at a time, by their own `generate`.

Tokens are chosen as in the batch: the logits of each step go to the answer, and `generate` is told
that only the chosen token is possible.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pluribus.core.optional import optional
from pluribus.core.shapes import Bool, Float, Int
from pluribus.serve.sampling import likely_rows
from pluribus.serve.writing import Prompt, Writing


class _Choice:
    """Chooses as the answer says, in place of `generate`."""

    def __init__(self, writing: Writing, told: Callable[[], None]) -> None:
        self.writing, self.told = writing, told

    def __call__(
        self, input_ids: Int[Tensor, "b s"], scores: Float[Tensor, "b v"]
    ) -> Float[Tensor, "b v"]:
        token = self.writing.take(scores[0])
        self.told()
        only = torch.full_like(scores, -torch.inf)
        only[:, token] = 0
        return only


class _Enough:
    """Stops `generate` when the answer is finished, or nobody waits for it."""

    def __init__(self, writing: Writing) -> None:
        self.writing = writing

    def __call__(self, input_ids: Int[Tensor, "b s"], scores: Any, **_: Any) -> Bool[Tensor, " b"]:
        done = self.writing.finished or self.writing.ask.cancelled
        return torch.full((len(input_ids),), done, device=input_ids.device, dtype=torch.bool)


def write(model: Any, writing: Writing, told: Callable[[], None]) -> None:
    """Write one answer; `told` is called after each token. Raises what the model raises."""
    hf = optional("transformers", "hf", "serving a language model")
    ask = writing.ask
    inputs: dict[str, Any] = dict(ask.inputs)
    if not inputs:
        device = next(model.parameters()).device
        ids = torch.tensor([list(ask.ids)], device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if ask.part is not None:
        inputs["weights"] = ask.part
    if ask.echo:
        logits = model(**inputs).logits[0, :-1]
        after = inputs["input_ids"][0, 1:].cpu()
        ask.send(Prompt(likely_rows(logits, after, ask.log_probs or 0)))
    if ask.sampling.max_tokens == 0:
        writing.empty()
        return
    settings = hf.GenerationConfig(
        max_new_tokens=ask.sampling.max_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model.generate(
        **inputs,
        generation_config=settings,
        logits_processor=hf.LogitsProcessorList([_Choice(writing, told)]),
        stopping_criteria=hf.StoppingCriteriaList([_Enough(writing)]),
    )
    if not writing.finished:
        writing.drop()
