"""Path patching of all heads: the fast engine beside the plain one, in the same run.

    python benchmarks/circuit_speed.py MODEL

MODEL is a folder with a causal language model, such as SmolLM2-135M-Instruct. On IOI prompts, paths
to the logits and to the queries of three late heads are patched by both engines. The plain one runs
the whole model once (logits) or twice (queries) for a sender; two of them are timed, then
`--senders`, spread evenly over all, and what the others added is taken for each of all. The fast
one patches all senders. Both engines' clean and corrupted runs are counted, once. In turn,
`--repeats` times, medians; effects of the senders that both patched are compared. Prints JSON:
milliseconds a sender, ratio (at least 5), peak memory of either in a process of its own.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from pluribus.inspect.circuits import HeadModel, path_patch, tasks


def opened(folder: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return HeadModel(model), AutoTokenizer.from_pretrained(folder)


def receivers_of(heads: HeadModel):
    late = heads.layers * 4 // 5
    return {"logits": "logits", "queries": [(late, head, "q") for head in range(3)]}


def senders_of(heads: HeadModel, receivers, count: int):
    top = heads.layers if receivers == "logits" else receivers[0][0]
    every = [(layer, head) for layer in range(top) for head in range(heads.heads)]
    count = min(count, len(every))
    return every, [every[(2 * i + 1) * len(every) // (2 * count)] for i in range(count)]


def timed(heads: HeadModel, prompts, receivers, senders, engine):
    began = time.perf_counter()
    found = path_patch(heads, prompts, receivers, senders=senders, engine=engine)
    return found, time.perf_counter() - began


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(given: argparse.Namespace) -> None:
    """Run one engine alone and print the process's peak before and after."""
    heads, tokenizer = opened(given.model)
    prompts = tasks.IOI.fitting(tokenizer, 0, given.prompts)
    receivers = receivers_of(heads)["queries"]
    before = peak_mb()
    senders = senders_of(heads, receivers, 2)[given.memory == "plain"]
    path_patch(heads, prompts, receivers, senders=senders, engine=given.memory)
    print(json.dumps({"model_loaded_mb": round(before), "peak_mb": round(peak_mb())}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--senders", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", choices=("fast", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    if given.memory:
        memory(given)
        return
    heads, tokenizer = opened(given.model)
    prompts = tasks.IOI.fitting(tokenizer, 0, given.prompts)
    rows = {}
    for name, receivers in receivers_of(heads).items():
        every, some = senders_of(heads, receivers, given.senders)
        seconds: dict[str, list[float]] = {"fast": [], "plain": []}
        worst = 0.0
        for repeat in range(given.repeats):
            found, fast = timed(heads, prompts, receivers, every, "fast")
            _, two = timed(heads, prompts, receivers, some[:: len(some) - 1], "plain")
            slow, many = timed(heads, prompts, receivers, some, "plain")
            each = (many - two) / (len(some) - 2)
            seconds["fast"].append(fast / len(every))
            seconds["plain"].append((two + each * (len(every) - 2)) / len(every))
            for layer, head in some:
                one, other = (f.differences[layer, head] for f in (found, slow))
                worst = max(worst, float((one - other).abs().max()))
            print(
                f"{name} {repeat + 1}: {seconds['plain'][-1] / seconds['fast'][-1]:.1f}",
                file=sys.stderr,
                flush=True,
            )
        ratios = [b / a for a, b in zip(seconds["fast"], seconds["plain"], strict=True)]
        rows[name] = {
            "senders": len(every),
            "plain_senders_timed": len(some),
            "ms_a_sender": {
                engine: {
                    "median": round(1000 * statistics.median(told), 2),
                    "min": round(1000 * min(told), 2),
                    "max": round(1000 * max(told), 2),
                }
                for engine, told in seconds.items()
            },
            "ratio": round(statistics.median(ratios), 1),
            "ratios": [round(ratio, 1) for ratio in ratios],
            "largest_difference": worst,
        }
    peaks = {}
    for engine in ("fast", "plain"):
        command = [sys.executable, __file__, given.model, "--memory", engine]
        command += ["--prompts", str(given.prompts), "--threads", str(given.threads)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks[engine] = json.loads(told)
    table = {
        "model": heads.model.config.model_type,
        "layers": heads.layers,
        "heads": heads.heads,
        "prompts": given.prompts,
        "threads": given.threads,
        "paths_to": rows,
        "memory": peaks,
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
