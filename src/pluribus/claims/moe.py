"""Mixtures of experts: gates trained on texts choose better than gates of prompts.

Three domains: grade-school maths with solutions (gsm8k), film reviews (mr), news (ag_news). The
base is a Llama of 1.3 M parameters with a tokenizer of its own, both trained here on all three;
each expert is the base with its feed-forward blocks trained further on one domain, so a mixture
whose gates are always right computes exactly the expert. Experts share attention, norms and
embeddings with the base, and all weights are compared at the same steps.

Figures are perplexities on test rows: exp of the loss of a token, of the mean over domains of it.
`own expert` is each domain's expert on its own domain: what a router that knows a text's domain
would get, and no mixture is expected to beat. `longer` is the base trained for as many more
steps as all experts together, on all domains at once: what one would do who has all the data in one
place. Task arithmetic's scale is the best on validation rows of a grid. Prompts are the first words
of training rows; trained gates learn from rows of the training split, and all choices among steps
use rows of it that are held out.

On seeds 0, 1, 2 trained gates are the best at top 1, and close a fifth (top 2: a quarter) of the
way from the base to the own experts, with three quarters of the weight on the right one. At top 2
two kinds of prompt gates come near them on seed 0. Steps on the mixture's loss change nothing to
speak of, and `longer` is better than any mixture.
"""

import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pluribus.claims import Check, Claim, OnStep
from pluribus.core.optional import optional
from pluribus.tasks import sets
from pluribus.tasks.specialise import threads

DOMAINS = {"maths": "gsm8k", "films": "mr", "news": "ag_news"}
WIDTH, INNER, LAYERS, TOKENS = 128, 512, 4, 2000
LENGTH, BATCH = 64, 16  # tokens of a text, texts of a step
BASE_STEPS, EXPERT_STEPS, GATE_STEPS = 500, 200, 40
BASE_RATE, EXPERT_RATE = 3e-3, 1e-3
ROWS = {"train": 3000, "val": 100, "test": 200}  # of each domain
GATE_TEXTS, PROMPTS, WORDS = 250, 10, 20
GRID = tuple(round(0.1 * step, 1) for step in range(1, 11))
GATES = ("random", "cheap_embed", "hidden", "hidden_avg", "trained", "trained_steps")
TOP_1, TOP_2 = "moe trained top 1", "moe trained top 2"
State = dict[str, Tensor]

CLAIM = Claim(
    name="moe",
    title="Gates trained on experts' texts beat static merges, and gates of prompts at top 1",
    paper="Own; beside the gates of mergekit-moe 0.1.5",
    data="gsm8k, mr, ag_news: 3,000 training and 200 test rows each, 64 tokens a row",
    model="Llama, 4 layers of width 128, 1.3 M parameters; three experts' feed-forward blocks",
    metric="perplexity on test rows (exp of the mean loss over 3 domains); lower is better",
    checks=(
        Check(text="trained gates, top 1, below the base", left="base", right=TOP_1, each=True),
        Check(
            text="trained gates, top 1, below the best task arithmetic",
            left="task arithmetic",
            right=TOP_1,
            each=True,
        ),
        Check(
            text="trained gates, top 1, below the average", left="average", right=TOP_1, each=True
        ),
        Check(
            text="trained gates, top 2, below the best task arithmetic",
            left="task arithmetic",
            right=TOP_2,
            each=True,
        ),
        *(
            Check(
                text=f"trained gates below {mode}, top 1",
                left=f"moe {mode} top 1",
                right=TOP_1,
                each=True,
            )
            for mode in ("random", "cheap_embed", "hidden", "hidden_avg")
        ),
        *(
            Check(
                text=f"trained gates below {mode}, top 2",
                left=f"moe {mode} top 2",
                right=TOP_2,
                each=True,
                asserted=mode in ("random", "hidden"),
            )
            for mode in ("random", "cheap_embed", "hidden", "hidden_avg")
        ),
        *(
            Check(
                text=f"{mode}, top {top}, below the base",
                left="base",
                right=f"moe {mode} top {top}",
                asserted=False,
            )
            for mode in ("cheap_embed", "hidden", "hidden_avg")
            for top in (1, 2)
        ),
        Check(text="trained gates: top 2 below top 1", left=TOP_1, right=TOP_2, asserted=False),
        *(
            Check(
                text=f"steps of the mixture's own loss lower it, top {top}",
                left=f"moe trained top {top}",
                right=f"moe trained with steps top {top}",
                asserted=False,
            )
            for top in (1, 2)
        ),
        Check(
            text="trained gates, top 2, reach each domain's own expert",
            left="own expert",
            right=TOP_2,
            asserted=False,
        ),
        Check(
            text="trained gates, top 2, below the base trained on for longer on all domains",
            left="longer",
            right=TOP_2,
            asserted=False,
        ),
    ),
)


def measure(seed: int, on_step: OnStep | None = None) -> Mapping[str, float]:
    """Return losses of base, experts, merges and mixtures. Raises DataError without the sets."""
    optional("transformers", "hf", "the claim moe")
    rows = {split: {name: texts(of, split) for name, of in DOMAINS.items()} for split in ROWS}
    with threads(1), tempfile.TemporaryDirectory(prefix="pluribus-moe-") as place:
        return _Bed(rows, Path(place), seed, on_step).measured()


def texts(name: str, split: str) -> list[str]:
    """Return texts of a set; validation rows are the last of the training split."""
    kept = "test" if split == "test" else "train"
    found = [_text(row) for row in sets.records(name) if row["split"] == kept]
    if split == "test":
        return found[: ROWS["test"]]
    train, val = found[: ROWS["train"]], found[ROWS["train"] : ROWS["train"] + ROWS["val"]]
    return val if split == "val" else train


def _text(row: Mapping[str, Any]) -> str:
    if "question" in row:
        return re.sub("<<.*?>>", "", f"{row['question']} {row['answer']}").replace("\n", " ")
    return str(row["text"])


class _Bed:
    """Base and experts of one seed, and what is made of them."""

    def __init__(
        self,
        rows: Mapping[str, Mapping[str, list[str]]],
        place: Path,
        seed: int,
        on_step: OnStep | None,
    ) -> None:
        self.rows, self.place, self.seed, self.on_step = rows, place, seed, on_step
        train = rows["train"]
        self.tokenizer = tokenizer([text for found in train.values() for text in found])
        self.tensors = {
            split: {name: self.encoded(found) for name, found in domains.items()}
            for split, domains in rows.items()
        }
        torch.manual_seed(seed)
        self.model = model(len(self.tokenizer), self.tokenizer.eos_token_id)
        joint = torch.cat([*self.tensors["train"].values()])
        self.train(joint, BASE_STEPS, BASE_RATE, "base")
        self.base = self.state()
        self.experts: dict[str, State] = {}
        for name in DOMAINS:
            self.model.load_state_dict(self.base)
            ids = self.tensors["train"][name]
            self.train(ids, EXPERT_STEPS, EXPERT_RATE, f"expert {name}", ".mlp.")
            self.experts[name] = self.state()
        self.model.load_state_dict(self.base)
        self.train(joint, len(DOMAINS) * EXPERT_STEPS, EXPERT_RATE, "longer", ".mlp.")
        self.longer = self.state()

    def encoded(self, found: Sequence[str]) -> Tensor:
        """Return texts as tokens (n, s) between end marks, -1 where a text is over."""
        end = self.tokenizer.eos_token_id
        ids = [[end, *self.tokenizer(text)["input_ids"], end][:LENGTH] for text in found]
        return torch.tensor([row + [-1] * (LENGTH - len(row)) for row in ids])

    def state(self) -> State:
        """Return a copy of the model's tensors."""
        return {name: t.detach().clone() for name, t in self.model.state_dict().items()}

    def train(self, ids: Tensor, steps: int, rate: float, told: str, only: str = "") -> None:
        """Train parameters whose name holds `only`; the rate falls linearly to 0."""
        rng = torch.Generator().manual_seed(self.seed)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(only in name)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, weight_decay=0.01)
        self.model.train()
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 20) * (1 - step / steps)
            batch = ids[torch.randint(len(ids), (BATCH,), generator=rng)]
            loss = losses(self.model, batch).mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            if self.on_step is not None:
                self.on_step(told, step + 1, steps)
        self.model.eval()

    def scores(self, which: State | nn.Module, split: str = "test") -> dict[str, float]:
        """Return the loss on each domain."""
        if isinstance(which, nn.Module):
            scored = which
        else:
            self.model.load_state_dict(which)
            scored = self.model
        found = {}
        for name, ids in self.tensors[split].items():
            with torch.no_grad():
                found[name] = float(
                    torch.cat([losses(scored, part) for part in ids.split(50)]).mean()
                )
        return found

    def added(self, scale: float) -> State:
        """Return the base plus the sum of what experts learned, times a scale."""
        return {
            name: value + scale * sum(expert[name] - value for expert in self.experts.values())
            for name, value in self.base.items()
        }

    # -- figures -----------------------------------------------------------------------------------

    def measured(self) -> dict[str, float]:
        """Return every figure."""
        out: dict[str, float] = {}

        def note(name: str, found: Mapping[str, float]) -> None:
            out[name] = math.exp(sum(found.values()) / len(found))
            out.update({f"{name} {domain}": math.exp(loss) for domain, loss in found.items()})

        note("base", self.scores(self.base))
        each = {name: self.scores(expert) for name, expert in self.experts.items()}
        for name, found in each.items():
            note(f"expert {name}", found)
        note("own expert", {name: each[name][name] for name in each})
        note("longer", self.scores(self.longer))
        note("average", self.scores(self.added(1 / len(self.experts))))
        grid = [(sum(self.scores(self.added(s), "val").values()), s) for s in GRID]
        out["task arithmetic scale"] = min(grid)[1]
        note("task arithmetic", self.scores(self.added(min(grid)[1])))
        self.save("base", self.base)
        for name, expert in self.experts.items():
            self.save(name, expert)
        for mode in GATES:
            for top in (1, 2):
                self.mixture(mode, top, note, out)
        return out

    def save(self, name: str, state: State) -> None:
        """Write tensors as a model folder; beside an expert, the texts that gates learn from."""
        self.model.load_state_dict(state)
        self.model.save_pretrained(self.place / name)  # type: ignore[operator]
        self.tokenizer.save_pretrained(self.place / name)
        if name in DOMAINS:
            lines = [json.dumps({"text": t}) for t in self.rows["train"][name][:GATE_TEXTS]]
            (self.place / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")

    def mixture(
        self,
        mode: str,
        top: int,
        note: Callable[[str, Mapping[str, float]], None],
        out: dict[str, float],
    ) -> None:
        """Assemble a mixture, score it, and note how often its gates are right."""
        from pluribus.route import moe

        hf = optional("transformers", "hf", "the claim moe")
        entries = [
            {
                "source_model": name,
                "data": f"{name}.jsonl",
                "positive_prompts": [
                    " ".join(text.split()[:WORDS]) for text in self.rows["train"][name][:PROMPTS]
                ],
            }
            for name in DOMAINS
        ]
        stepped = mode == "trained_steps"
        how: dict[str, Any] = {"max_length": LENGTH, "steps": GATE_STEPS if stepped else 0}
        recipe = {
            "base_model": "base",
            "gate_mode": "trained" if stepped else mode,
            "experts_per_token": top,
            "experts": entries,
            "seed": self.seed,
            "train": how,
        }
        folder = self.place / f"{mode}-{top}"
        moe.assemble(moe.of(recipe, folder=self.place), folder, on_step=self.on_step)
        made = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
        name = f"moe {mode.replace('_steps', ' with steps')} top {top}"
        note(name, self.scores(made))
        test = {domain: found[:50] for domain, found in self.rows["test"].items()}
        shares = moe.routes(folder, test, tuple(DOMAINS), max_length=LENGTH).mean()
        own = [row[number] for number, row in enumerate(shares)]
        out[f"{name} weight of the own expert"] = 100 * sum(own) / len(own)


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the loss of every token but the first of each text, (n,), in nats."""
    logits = model(input_ids=ids.clamp(min=0)).logits[:, :-1]
    wanted = ids[:, 1:].flatten()
    each = nn.functional.cross_entropy(
        logits.flatten(0, 1), wanted, ignore_index=-1, reduction="none"
    )
    return each[wanted >= 0]


def tokenizer(found: Sequence[str]) -> Any:
    """Return a byte-level BPE tokenizer of some texts."""
    hf = optional("transformers", "hf", "the claim moe")
    kit = optional("tokenizers", "hf", "the claim moe")
    made = kit.Tokenizer(kit.models.BPE())
    made.pre_tokenizer = kit.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = kit.decoders.ByteLevel()
    trainer = kit.trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=["<end>"],
        initial_alphabet=kit.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(found, trainer)
    marks = {"bos_token": "<end>", "eos_token": "<end>", "pad_token": "<end>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **marks)


def model(rows: int, end: int) -> nn.Module:
    """Return an untrained base."""
    hf = optional("transformers", "hf", "the claim moe")
    config = hf.LlamaConfig(
        vocab_size=rows,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return hf.LlamaForCausalLM(config)
