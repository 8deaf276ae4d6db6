"""Gates from prompts, and at random: one row an expert in every layer, (l, t, d).

    hidden, hidden_last   row = unit(mean over prompts of h_l at the last token - the same of
                          negative prompts)
    hidden_avg            the same of the mean of h_l over the prompt's tokens
    cheap_embed           row = unit(unit(sum of the tokens' embeddings) - the same of negative
                          prompts), alike in all layers
    random                standard normal
    uniform_random        uniform in +-1 / sqrt(d), as a linear layer begins

h_l: (s, d), what layer l of the base takes in. The computations are those of mergekit-moe 0.1.5, in
float32 where it rounds the base to bfloat16. Each prompt is run by itself: its padding counts the
padding of a batch in the mean of hidden_avg, here there is none.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pluribus.core.errors import InputError, NonFiniteError
from pluribus.core.shapes import Float
from pluribus.route.moe.recipe import Expert

OnStep = Callable[[str, int, int], None]
DEGENERATE = 5.0  # condition number beyond which gates are hard to tell apart


def of_prompts(
    model: nn.Module,
    tokenizer: Any,
    experts: Sequence[Expert],
    average: bool,
    on_step: OnStep | None = None,
) -> Float[Tensor, "l t d"]:
    """Return gates of hidden states at the last token, or on average over tokens.

    Raises InputError for a prompt without tokens, NonFiniteError for states that are not finite.
    """

    def state(prompt: str) -> Tensor:
        ids = tokens(tokenizer, prompt).to(next(model.parameters()).device)
        with torch.no_grad():
            out = model(input_ids=ids[None], output_hidden_states=True, use_cache=False)
        found = torch.stack(out.hidden_states[:-1])[:, 0].float()  # (l, s, d)
        finite(found, f"hidden states of the prompt {prompt[:60]!r}")
        return found.mean(1) if average else found[:, -1]

    rows = []
    for number, expert in enumerate(experts):
        row = torch.stack([state(prompt) for prompt in expert.positive_prompts or ()]).mean(0)
        if expert.negative_prompts:
            row = row - torch.stack([state(p) for p in expert.negative_prompts]).mean(0)
        rows.append(_unit(row).cpu())
        if on_step is not None:
            on_step("gates", number + 1, len(experts))
    return torch.stack(rows, 1)


def of_embeddings(
    embed: Float[Tensor, "v d"], tokenizer: Any, experts: Sequence[Expert], layers: int
) -> Float[Tensor, "l t d"]:
    """Return gates of token embeddings. Raises as `of_prompts`."""
    finite(embed, "the base's embeddings")

    def state(prompts: Sequence[str]) -> Tensor:
        ids = torch.cat([tokens(tokenizer, prompt) for prompt in prompts])
        if int(ids.max()) >= len(embed):
            raise InputError(
                f"the tokenizer gives token {int(ids.max())}, and the base has rows for "
                f"{len(embed)}; does the tokenizer belong to the base?"
            )
        return _unit(embed[ids].float().sum(0))

    rows = []
    for expert in experts:
        row = state(expert.positive_prompts or ())
        if expert.negative_prompts:
            row = row - state(expert.negative_prompts)
        rows.append(_unit(row))
    return torch.stack(rows).expand(layers, -1, -1).clone()


def at_random(
    layers: int, count: int, width: int, uniform: bool, seed: int
) -> Float[Tensor, "l t d"]:
    """Return random gates: standard normal, or uniform in +-1 / sqrt(d)."""
    rng = torch.Generator().manual_seed(seed)
    if uniform:
        drawn = torch.rand(layers, count, width, generator=rng)
        return (2 * drawn - 1) / math.sqrt(width)
    return torch.randn(layers, count, width, generator=rng)


def tokens(tokenizer: Any, prompt: str) -> Tensor:
    """Return a prompt's token ids (s,), after the token that begins texts if there is one."""
    text = (tokenizer.bos_token or "") + prompt
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"the tokenizer makes no token of the prompt {prompt!r}; give it words")
    return torch.tensor(ids)


def conditions(gates: Float[Tensor, "l t d"], centred: bool = False) -> list[float]:
    """Return each layer's condition number: how nearly its gates are multiples of each other.

    A softmax is blind to what all rows share, and trained rows sum to about 0: `centred` takes
    their mean off first, and the t - 1 largest singular values of what is left.
    """
    if not centred:
        return [float(torch.linalg.cond(rows.double())) for rows in gates]
    values = torch.linalg.svdvals((gates - gates.mean(1, keepdim=True)).double())
    return (values[:, 0] / values[:, max(gates.shape[1] - 2, 0)]).tolist()


def degenerate(found: Sequence[float]) -> str | None:
    """Return a warning about layers whose gates are nearly alike, or None."""
    bad = [layer for layer, value in enumerate(found) if not value <= DEGENERATE]
    if not bad:
        return None
    where = f"{len(bad)} of {len(found)} layers" if len(bad) < len(found) else "all layers"
    return (
        f"gates of {where} are nearly alike (condition number up to {max(found):.3g}, more than "
        f"{DEGENERATE:g}): some experts will hardly be used; give prompts that differ more, or "
        "data and gate_mode trained"
    )


def finite(values: Tensor, what: str) -> None:
    """Raise NonFiniteError, naming the first layer (of l, ...) that holds NaN or infinity."""
    broken = ~values.isfinite().flatten(1).all(1)
    if bool(broken.any()):
        where = f" at layer {int(broken.nonzero()[0])}" if values.ndim == 3 else ""
        raise NonFiniteError(f"{what} are not finite{where}; look at the base's weights")


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-8)
