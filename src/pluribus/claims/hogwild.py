"""Workers that see each other's words do less twice: a small model that was never told of workers.

A model is trained on lists: twelve letters, some of them again (what another has listed), then the
rest in any order. Two workers then list letters at once, each seeing the other's list grow in the
place where the model was shown a finished one. Beside them: two that do not see each other, and one
alone, in as many steps.
"""

import torch
from torch import Tensor, nn

from pluribus.claims import Check, Claim, OnStep
from pluribus.core.optional import optional
from pluribus.tasks.specialise import threads
from pluribus.tasks.views import generator

LETTERS, LISTED = 26, 12
START, SEP = 26, 27
WIDTH, LAYERS, HEADS = 96, 3, 4
STEPS, BATCH, RATE = 1500, 64, 2e-3
PROBLEMS, TAKES = 100, 6

CLAIM = Claim(
    name="hogwild",
    title="Workers that read each other's words as they appear do more, and less of it twice",
    paper="arXiv:2504.06261",
    data="100 lists of twelve letters; two workers list what is missing, six letters each",
    model="a Llama of 3 layers and width 96 (0.4 M), trained on whole lists by one writer",
    metric="distinct letters of the list that were named, and letters named twice, a problem",
    checks=(
        Check(
            text="distinct letters: shared, over 1.15 of two who don't see each other",
            left="shared",
            right="independent x 1.15",
            each=True,
        ),
        Check(
            text="distinct letters: shared, over 1.6 of one worker",
            left="shared",
            right="single x 1.6",
            each=True,
        ),
        Check(
            text="letters named twice: shared, at most 0.6 of two who don't see each other",
            left="shared_twice",
            right="independent_twice x 0.6",
            at_most=True,
            each=True,
        ),
    ),
)


def measure(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return mean distinct and doubled letters of a problem, for one seed."""
    from pluribus.decode.hogwild import Reader

    with threads(1):
        reader = Reader(trained(seed, on_step))
        out: dict[str, float] = {}
        for name, workers, see in (
            ("shared", 2, True),
            ("independent", 2, False),
            ("single", 1, False),
        ):
            rng = generator(seed, name, "workers")
            lists = generator(seed, "problems", "workers")
            distinct, doubled = 0, 0
            for number in range(PROBLEMS):
                given = torch.randperm(LETTERS, generator=lists)[:LISTED].tolist()
                named = write(reader, given, workers, rng, see=see)
                right = [letter for letter in named if letter in given]
                distinct += len(set(right))
                doubled += len(right) - len(set(right))
                if on_step is not None and number % 10 == 9:
                    on_step(f"workers: {name}", number + 1, PROBLEMS)
            out[name], out[f"{name}_twice"] = distinct / PROBLEMS, doubled / PROBLEMS
    return out | {
        "independent x 1.15": 1.15 * out["independent"],
        "single x 1.6": 1.6 * out["single"],
        "independent_twice x 0.6": 0.6 * out["independent_twice"],
    }


def write(
    reader: object, given: list[int], workers: int, rng: torch.Generator, *, see: bool
) -> list[int]:
    """Return the letters that workers name, TAKES each, drawn at temperature 1."""
    from pluribus.decode.hogwild import KVBlock, Reader, Sampling, SharedView

    assert isinstance(reader, Reader)
    common, own = KVBlock("list"), [KVBlock(str(number)) for number in range(workers)]
    nothing = [KVBlock("nothing") for _ in own]  # in place of the other's list
    named: list[int] = []
    sampling = Sampling(temperature=1.0)
    with reader.sharing(), torch.inference_mode():
        reader.read([common], [START, *given])
        rows = []
        for number, block in enumerate(own):
            others = [one for one in own if one is not block] if see else [nothing[number]]
            if not see:
                reader.read([common, nothing[number]], [SEP])
            rows.append([common, *others, block])
        view = SharedView(rows, reader.rotation)
        tokens = [[SEP]] * workers
        for _ in range(TAKES):
            logits = reader.step(view, tokens)
            tokens = [[sampling.draw(row, rng)] for row in logits]
            named += [token for (token,) in tokens]
    return named


def documents(rng: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Return lists as (count, 27) tokens, and which tokens are the rest (to be learned)."""
    rows, learned = [], []
    for _ in range(count):
        letters = torch.randperm(LETTERS, generator=rng)[:LISTED]
        order = letters[torch.randperm(LISTED, generator=rng)]
        listed = int(torch.randint(LISTED, (1,), generator=rng))
        parts = [
            torch.tensor([START]),
            letters,
            torch.tensor([SEP]),
            order[:listed],
            torch.tensor([SEP]),
            order[listed:],
        ]
        rows.append(torch.cat(parts))
        learned.append(torch.arange(2 * LISTED + 3) >= LISTED + 3 + listed)
    return torch.stack(rows), torch.stack(learned)


def trained(seed: int, on_step: OnStep | None = None, steps: int = STEPS) -> nn.Module:
    """Return the model, trained on lists by one writer."""
    hf = optional("transformers", "hf", "the claim on workers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=LETTERS + 2,
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                max_position_embeddings=64,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    rng = generator(seed, "documents", "workers")
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50) * (1 - step / steps)
        ids, learned = documents(rng, BATCH)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[learned[:, 1:]], ids[:, 1:][learned[:, 1:]])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if on_step is not None and step % 50 == 49:
            on_step("training on lists", step + 1, steps)
    return model.eval()
