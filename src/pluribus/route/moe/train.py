"""Gates learned from texts: whose text is a token from?

Stage 1, in each layer alone, on what the base's feed-forward block takes in there:

    W = argmin  mean over experts e of mean over e's tokens x of -log softmax(W x)_e
                + ridge / 2 |W diag(s)|^2,        x: (d,), W: (t, d), s: root mean square of x
    G = W / T,   T: the temperature with the best likelihood on held-out texts

A gate then gives the chance that a token is from each expert's text, as far as the base's states
at that layer tell. It is a softmax regression without intercept, because a mixture's gate has none.

Stage 2, optional: AdamW steps of the assembled model's language-modelling loss with the gates
alone changing, plus `balance` times Fedus et al.'s t sum_e f_e P_e (JMLR 2022, equation 4; f: share
of choices, P: mean probability). What has the least held-out loss is kept, stage 1 included.
A single expert a token has weight 1 whatever the gate says, which has no gradient; gates that will
be used at top 1 learn at top 2.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pluribus.core.errors import InputError
from pluribus.core.shapes import Float, Int
from pluribus.route.moe.gates import OnStep, finite
from pluribus.route.moe.recipe import Training
from pluribus.route.recipe import tokens as batches
from pluribus.route.router import _temperature

MEMORY = 1 << 30  # bytes of hidden states that are held at a time
ROUNDS = 100  # of L-BFGS
Texts = Mapping[str, Sequence[str]]


@dataclass
class TrainingReport:
    """How well gates tell experts' texts apart, on held-out texts."""

    accuracy: list[float]  # of tokens, by layer
    loss: list[float]  # cross-entropy in nats, by layer
    temperature: list[float]
    before: float | None = None  # held-out loss of the mixture, nats a token, after stage 1
    after: float | None = None  # and after stage 2
    history: list[tuple[int, float]] = field(default_factory=list)  # step, held-out loss


def dealt(
    texts: Mapping[str, list[str]], how: Training, seed: int
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return texts to learn from and a fifth that is held out. Raises InputError for too few."""
    train: dict[str, list[str]] = {}
    held: dict[str, list[str]] = {}
    for name, found in texts.items():
        if len(found) < 2:
            raise InputError(f"{name} has {len(found)} text; its gate needs two to learn and check")
        rng = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(found), generator=rng)[: how.texts].tolist()
        count = max(1, len(order) // 5)
        held[name] = [found[i] for i in order[:count]]
        train[name] = [found[i] for i in order[count:]]
    return train, held


def classifiers(
    model: nn.Module,
    tokenizer: Any,
    train: Texts,
    held: Texts,
    how: Training,
    on_step: OnStep | None = None,
) -> tuple[Float[Tensor, "l t d"], TrainingReport]:
    """Return stage 1's gates and how well they do.

    Layers are taken in groups whose states fit into a gigabyte; the base runs once for each group.
    Raises NonFiniteError for states that are not finite.
    """
    blocks = feed_forward(model)
    width = int(model.config.hidden_size)  # type: ignore[union-attr]
    at_once = max(1, MEMORY // (4 * width * how.tokens * len(train) * 5 // 4))
    gates, report = [], TrainingReport([], [], [])
    for first in range(0, len(blocks), at_once):
        group = blocks[first : first + at_once]
        seen, y = _states(model, group, tokenizer, train, how, how.tokens)
        val, true = _states(model, group, tokenizer, held, how, max(1, how.tokens // 4))
        for place, (x, z) in enumerate(zip(seen, val, strict=True)):
            w = regression(x, y, len(train), how.ridge)
            logits = z @ w.t()
            heat = float(_temperature(logits, true))
            gates.append(w / heat)
            report.temperature.append(heat)
            report.accuracy.append(float((logits.argmax(1) == true).double().mean()))
            report.loss.append(float(cross_entropy(logits / heat, true)))
            if on_step is not None:
                on_step("gates", first + place + 1, len(blocks))
    return torch.stack(gates), report


def feed_forward(model: nn.Module) -> list[nn.Module]:
    """Return the feed-forward blocks of a dense decoder, in order."""
    layers = model.get_submodule("model.layers")
    return [layer.get_submodule("mlp") for layer in layers.children()]


def _states(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    tokenizer: Any,
    texts: Texts,
    how: Training,
    most: int,
) -> tuple[list[Float[Tensor, "n d"]], Int[Tensor, " n"]]:
    """Return what some blocks take in at each token, and whose text the token is from."""
    parts: list[list[Tensor]] = [[] for _ in blocks]
    labels = []
    for number, found in enumerate(texts.values()):
        left = most
        for batch in batches(list(found), tokenizer, how.max_length):
            keep = batch["attention_mask"].bool().flatten().nonzero()[:left, 0]
            for part, x in zip(parts, _inputs(model, blocks, batch), strict=True):
                part.append(x.flatten(0, 1)[keep.to(x.device)].cpu())
            labels.append(torch.full((len(keep),), number))
            left -= len(keep)
            if left <= 0:
                break
    joined = [torch.cat(part) for part in parts]
    for number, x in enumerate(joined):
        finite(x[None], f"hidden states at feed-forward block {number}")
    return joined, torch.cat(labels)


def _inputs(model: nn.Module, blocks: Sequence[nn.Module], batch: Mapping[str, Tensor]) -> list:
    """Run a batch and return what each of some modules was given, (b, s, d)."""
    device = next(model.parameters()).device
    found: dict[int, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for number, block in enumerate(blocks):

            def note(_: nn.Module, given: tuple[Tensor, ...], at: int = number) -> None:
                found[at] = given[0].float()

            stack.callback(block.register_forward_pre_hook(note).remove)
        model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
    return [found[number] for number in range(len(blocks))]


def regression(
    x: Float[Tensor, "n d"], y: Int[Tensor, " n"], count: int, ridge: float
) -> Float[Tensor, "t d"]:
    """Return the weights of stage 1 before their temperature; classes weigh the same."""
    spread = x.square().mean(0).sqrt().clamp(min=1e-6)
    scaled = x / spread
    share = torch.bincount(y, minlength=count).clamp(min=1)
    weight = 1 / share.float()
    w = torch.zeros(count, x.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([w], max_iter=ROUNDS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = cross_entropy(scaled @ w.t(), y, weight=weight) + ridge / 2 * w.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return w.detach() / spread


# -- stage 2 ---------------------------------------------------------------------------------------


def fine_tune(
    model: nn.Module,
    routers: Sequence[nn.Module],
    tokenizer: Any,
    train: Texts,
    held: Texts,
    how: Training,
    seed: int,
    report: TrainingReport,
    on_step: OnStep | None = None,
) -> None:
    """Run stage 2 on an assembled model, in place; `routers` are its gates' modules.

    Parameters of routers are trained, no others. Fills the report. Raises InputError if a loss is
    not finite.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = [p for router in routers for p in router.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    scorers = [router for router in routers if hasattr(router, "top_k")]
    used = int(scorers[0].top_k)  # type: ignore[arg-type]
    report.before = mean_loss(model, tokenizer, held, how)
    report.history.append((0, report.before))
    best = (report.before, [p.detach().clone() for p in trained])
    optimiser = torch.optim.AdamW(trained, lr=how.lr, weight_decay=0.0)
    every = max(1, how.steps // 5)
    stream = _stream(train, tokenizer, how, seed)
    for step in range(1, how.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = how.lr * (1 - (step - 1) / how.steps)
        _top_k(scorers, max(used, min(2, _count(scorers))))
        loss = _step_loss(model, scorers, next(stream), how)
        if not bool(loss.isfinite()):
            raise InputError(f"the loss is {float(loss)} at step {step}; lower train.lr")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        _top_k(scorers, used)
        if step % every == 0 or step == how.steps:
            now = mean_loss(model, tokenizer, held, how)
            report.history.append((step, now))
            if now < best[0]:
                best = (now, [p.detach().clone() for p in trained])
        if on_step is not None:
            on_step("training gates", step, how.steps)
    report.after = best[0]
    with torch.no_grad():
        for parameter, kept in zip(trained, best[1], strict=True):
            parameter.copy_(kept)


def _count(scorers: Sequence[nn.Module]) -> int:
    return len(scorers[0].get_parameter("weight"))


def _top_k(scorers: Sequence[nn.Module], k: int) -> None:
    for scorer in scorers:
        scorer.top_k = k  # type: ignore[assignment]


def _stream(train: Texts, tokenizer: Any, how: Training, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches of all experts' texts in a new order at every reading, for ever."""
    texts = [text for found in train.values() for text in found]
    rng = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(texts), generator=rng).tolist()
        mixed = [texts[i] for i in order]
        yield from batches(mixed, tokenizer, how.max_length, how.batch_size)


def _step_loss(
    model: nn.Module, scorers: Sequence[nn.Module], batch: Mapping[str, Tensor], how: Training
) -> Tensor:
    if not how.balance:
        return token_losses(model, batch).mean()
    scores: list[Tensor] = []
    with ExitStack() as stack:
        for scorer in scorers:

            def note(_: nn.Module, __: Any, out: tuple[Tensor, ...]) -> None:
                scores.append(out[0])

            stack.callback(scorer.register_forward_hook(note).remove)
        loss = token_losses(model, batch).mean()
    mask = batch["attention_mask"].bool().flatten()
    k = int(scorers[0].top_k)  # type: ignore[arg-type]
    terms = [balance(logits[mask.to(logits.device)], k) for logits in scores]
    return loss + how.balance * torch.stack(terms).mean()


def balance(logits: Float[Tensor, "n t"], k: int) -> Float[Tensor, ""]:
    """Return t sum_e f_e P_e: 1 if choices are spread evenly, t / k at most."""
    count = logits.shape[1]
    chosen = logits.topk(k, 1).indices.flatten()
    share = torch.bincount(chosen, minlength=count) / len(chosen)
    return count * (share * logits.float().softmax(1).mean(0)).sum()


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
    """Return the loss of every token but the first of each text, without padding, in nats."""
    device = next(model.parameters()).device
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return losses[mask[:, 1:].flatten().bool()]


def mean_loss(model: nn.Module, tokenizer: Any, held: Texts, how: Training) -> float:
    """Return the mean over experts of the mean loss of a token of their texts, in nats."""
    means = []
    for name, found in held.items():
        total, count = 0.0, 0
        for batch in batches(list(found), tokenizer, how.max_length, how.batch_size):
            with torch.no_grad():
                losses = token_losses(model, batch)
            total, count = total + float(losses.double().sum()), count + len(losses)
        if not count:
            raise InputError(f"held-out texts of {name} have one token each; give longer texts")
        means.append(total / count)
    return sum(means) / len(means)
