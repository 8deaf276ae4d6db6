"""Workers that share a cache, beside one worker, the model alone, and keys that are turned anew.

    python benchmarks/hogwild_speed.py MODEL

MODEL is a folder with a causal language model, such as SmolLM2-135M-Instruct. A prompt of 512
tokens is read once; then each of W workers writes `--steps` tokens in the combined layout. In turn,
`--repeats` times, medians:

    w1, w2, w4   pluribus: tokens/s of all workers   w2 at least 1.5 of w1, w4 at least 2.3
    plain        the model alone with transformers' own cache, one row
    keys2, keys4 the form that turns keys and copies the cache for each reader (our own slow one)

and the bytes of the cache at the end (w4 at most 1.3 of w1), and the largest difference of logits
between both forms over `--exact` steps in three layouts with 1, 2 and 3 workers (at most 1e-3).
Prints JSON.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "decode" / "hogwild"))
import turned_keys

from pluribus.decode.hogwild import KVBlock, Reader, SharedView

PROMPT, HEADING = 512, 8


def rows_of(layout: str, workers: int, made):
    """Return (common, first heading, second heading, own blocks, rows)."""
    common, head, mark = made(), made(), made()
    own = [made() for _ in range(workers)]
    rows = []
    for w in range(workers):
        others = own[w + 1 :] + own[:w]
        rows.append(
            {
                "combined": [common, head, *others, mark, own[w]]
                if workers > 1
                else [common, own[w]],
                "interleaved": [common, own[w]],
                "contiguous": [common, *others, mark, own[w]],
            }[layout]
        )
    return common, head, mark, own, rows


def drawn(rng, size: int, count: int) -> list[int]:
    return torch.randint(size, (count,), generator=rng).tolist()


def ours(reader: Reader, workers: int, steps: int, size: int) -> tuple[float, int]:
    """Seconds of the steps, and bytes at their end."""
    rng = torch.Generator().manual_seed(0)
    common, head, mark, own, rows = rows_of("combined", workers, KVBlock)
    with reader.sharing():
        reader.read([common], drawn(rng, size, PROMPT))
        if workers > 1:
            reader.read([common, head], drawn(rng, size, HEADING))
            reader.read([common, head, mark], drawn(rng, size, HEADING))
        view = SharedView(rows, reader.rotation)
        tokens = [drawn(rng, size, 1) for _ in own]
        reader.step(view, tokens)
        began = time.perf_counter()
        for _ in range(steps):
            logits = reader.step(view, tokens)
            tokens = [[int(row)] for row in logits.argmax(1)]
        return time.perf_counter() - began, view.nbytes()


def plain(model, steps: int, size: int) -> float:
    rng = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        out = model(torch.tensor([drawn(rng, size, PROMPT)]), use_cache=True, logits_to_keep=1)
        cache = out.past_key_values if "past_key_values" in out else out.cache
        name = "cache" if "cache" in out else "past_key_values"
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, use_cache=True, **{name: cache})
        began = time.perf_counter()
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, use_cache=True, **{name: cache})
        return time.perf_counter() - began


def keys(model, frequencies, workers: int, steps: int, size: int) -> float:
    rng = torch.Generator().manual_seed(0)
    layers = model.config.num_hidden_layers
    common, head, mark, own, rows = rows_of("combined", workers, lambda: turned_keys.Block(layers))
    turned_keys.step(model, [[common]], [drawn(rng, size, PROMPT)], frequencies)
    turned_keys.step(model, [[common, head]], [drawn(rng, size, HEADING)], frequencies)
    turned_keys.step(model, [[common, head, mark]], [drawn(rng, size, HEADING)], frequencies)
    tokens = [drawn(rng, size, 1) for _ in own]
    turned_keys.step(model, rows, tokens, frequencies)
    began = time.perf_counter()
    for _ in range(steps):
        logits = turned_keys.step(model, rows, tokens, frequencies)
        tokens = [[int(row)] for row in logits.argmax(1)]
    return time.perf_counter() - began


def difference(model, reader: Reader, layout: str, workers: int, steps: int, size: int) -> float:
    frequencies, layers = reader.rotation.frequencies, model.config.num_hidden_layers
    rng = torch.Generator().manual_seed(1)
    one = rows_of(layout, workers, KVBlock)
    other = rows_of(layout, workers, lambda: turned_keys.Block(layers))
    worst = 0.0
    for part in range(3):
        tokens = drawn(rng, size, 24)
        first = [[one[0]], [other[0]]] if part else [[], []]
        with reader.sharing():
            reader.read([*first[0], one[part]], tokens)
        turned_keys.step(model, [[*first[1], other[part]]], [tokens], frequencies)
    for number in range(steps):
        tokens = [drawn(rng, size, 1 + (number % 16 == 5) * w) for w in range(workers)]
        with reader.sharing():
            found = reader.step(SharedView(one[4], reader.rotation), tokens)
        expected = turned_keys.step(model, other[4], tokens, frequencies)
        worst = max(worst, float((found - expected).abs().max()))
        if layout != "contiguous" and number % 20 == 19:
            one[3][0].move_into(one[0], reader.rotation)
            other[3][0].move_into(other[0], frequencies)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--exact", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    reader = Reader(model)
    size = model.config.vocab_size
    frequencies = reader.rotation.frequencies
    seen: dict[str, list[float]] = {}
    bytes_at: dict[str, int] = {}
    for repeat in range(given.repeats):
        for workers in (1, 2, 4):
            seconds, used = ours(reader, workers, given.steps, size)
            seen.setdefault(f"w{workers}", []).append(workers * given.steps / seconds)
            bytes_at[f"w{workers}"] = used
        seen.setdefault("plain", []).append(given.steps / plain(model, given.steps, size))
        for workers in (2, 4):
            seconds = keys(model, frequencies, workers, given.steps, size)
            seen.setdefault(f"keys{workers}", []).append(workers * given.steps / seconds)
        now = {name: round(found[-1], 2) for name, found in seen.items()}
        print(f"{repeat + 1}: {now}", file=sys.stderr, flush=True)
    middle = {name: statistics.median(found) for name, found in seen.items()}
    table = {
        "model": model.config.model_type,
        "values": sum(p.numel() for p in model.parameters()),
        "prompt": PROMPT,
        "steps": given.steps,
        "threads": given.threads,
        "tokens_per_second": {
            name: {
                "median": round(middle[name], 2),
                "min": round(min(v), 2),
                "max": round(max(v), 2),
            }
            for name, v in seen.items()
        },
        "over_w1": {n: round(v / middle["w1"], 3) for n, v in middle.items()},
        "over_keys": {f"w{w}": round(middle[f"w{w}"] / middle[f"keys{w}"], 2) for w in (2, 4)},
        "cache_mb": {name: round(used / 2**20, 2) for name, used in bytes_at.items()},
        "cache_over_w1": {n: round(used / bytes_at["w1"], 3) for n, used in bytes_at.items()},
        "largest_difference": {
            f"{layout}, {workers}": difference(model, reader, layout, workers, given.exact, size)
            for layout in ("combined", "interleaved", "contiguous")
            for workers in (1, 2, 3)
        }
        if given.exact
        else {},
        "versions": {
            name: __import__("importlib.metadata").metadata.version(name)
            for name in ("pluribus", "torch", "transformers")
        }
        | {"python": platform.python_version()},
        "processors": os.cpu_count(),
    }
    print(json.dumps(table, indent=1))
    if given.out:
        given.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
