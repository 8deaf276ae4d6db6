"""mergekit and pluribus on the same checkpoints, as whole processes, start-up included.

    python benchmarks/merge_speed.py --mergekit .venv-mergekit/bin/python --size 0.36

Generates a base and three fine-tunes (bf16, Llama shape), then runs every recipe with both programs
in turn and prints wall time, the ratio, peak memory, and the floor: the time to read all inputs and
write the output once with plain system calls. Nothing else should run on the machine.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

RECIPES = {
    "linear": ({"normalize": True}, {"weight": 1.0}, False),
    "slerp": ({"t": 0.4}, {}, True),
    "ties": ({}, {"weight": 1.0, "density": 0.2}, True),
    "dare_ties": ({}, {"weight": 1.0, "density": 0.5}, True),
    "della": ({}, {"weight": 1.0, "density": 0.5}, True),
    "breadcrumbs": ({}, {"weight": 1.0, "density": 0.9, "gamma": 0.01}, True),
    "model_stock": ({}, {}, True),
    "sce": ({"select_topk": 0.1}, {}, True),
    "karcher": ({}, {}, False),
}
# hidden, layers, intermediate, vocabulary
SHAPES = {
    0.01: (256, 4, 704, 8000),
    0.36: (1024, 24, 2816, 32000),
    1.0: (2048, 16, 5632, 32000),
    3.0: (3072, 24, 8192, 64000),
    8.0: (4096, 32, 11008, 128256),
}
FLOOR = """
import os, sys
*inputs, out = sys.argv[1:]
buffer = bytearray(8 << 20)
size = 0
for name in inputs:
    with open(name, "rb", buffering=0) as file:
        size = max(size, os.path.getsize(name))
        while file.readinto(buffer):
            pass
with open(out, "wb", buffering=0) as file:
    left = size
    while left > 0:
        left -= file.write(memoryview(buffer)[: min(left, len(buffer))])
"""


def shapes(size: float) -> dict[str, tuple[int, ...]]:
    hidden, layers, inner, vocab = SHAPES[size]
    out = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for part in "qkvo":
            out[f"{at}self_attn.{part}_proj.weight"] = (hidden, hidden)
        out[f"{at}mlp.gate_proj.weight"] = (inner, hidden)
        out[f"{at}mlp.up_proj.weight"] = (inner, hidden)
        out[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        out[f"{at}input_layernorm.weight"] = (hidden,)
        out[f"{at}post_attention_layernorm.weight"] = (hidden,)
    out["model.norm.weight"] = (hidden,)
    out["lm_head.weight"] = (vocab, hidden)
    return out


def generate(folder: Path, size: float) -> None:
    """Write base, e0, e1, e2: the base is random, each expert adds a tenth of that in noise."""
    import torch

    from pluribus.core.formats.safetensors import header_bytes
    from pluribus.core.source import TensorSpec

    hidden, layers, inner, vocab = SHAPES[size]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    specs = {name: TensorSpec("BF16", shape) for name, shape in shapes(size).items()}
    files = []
    for name in ("base", "e0", "e1", "e2"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        files.append((folder / name / "model.safetensors").open("wb"))
        files[-1].write(header_bytes(specs, {"format": "pt"})[0])
    draw = torch.Generator().manual_seed(0)
    for spec in specs.values():
        base = torch.randn(spec.shape, generator=draw) * 0.02
        for number, file in enumerate(files):
            value = base
            if number:
                value = base.bfloat16().float() + torch.randn(spec.shape, generator=draw) * 0.002
            raw = value.bfloat16().reshape(-1).view(torch.uint8).numpy()
            file.write(memoryview(raw))
    for file in files:
        file.close()


def recipe(folder: Path, method: str) -> Path:
    shared, each, with_base = RECIPES[method]
    names = ["e0"] if method == "slerp" else ["e0", "e1", "e2"]
    models = [{"model": str(folder / name), "parameters": each} for name in names]
    text = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if shared:
        text["parameters"] = shared
    if with_base:
        text["base_model"] = str(folder / "base")
    path = folder / f"{method}.yml"
    path.write_text(json.dumps(text))  # JSON is YAML
    return path


def timed(command: list[str]) -> tuple[float, float]:
    """Return wall seconds and peak resident MB of a process; raise if it fails."""
    # As installed: else every start compiles what pip has not compiled before.
    with_bytecode = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    with (
        open(os.devnull, "wb") as null,
        subprocess.Popen(
            command, stdout=null, stderr=subprocess.PIPE, env=with_bytecode
        ) as process,
    ):
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said.decode()[-2000:]}")
    return seconds, usage.ru_maxrss / 1000


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--mergekit", help="python of an environment with mergekit")
    arguments.add_argument("--size", type=float, default=0.36, choices=sorted(SHAPES))
    arguments.add_argument("--methods", default=",".join(RECIPES))
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--peer-runs", type=int, default=1)
    arguments.add_argument("--dir", type=Path, default=Path("bench-data"))
    arguments.add_argument("--device", default="cpu", help="where pluribus computes")
    arguments.add_argument("--out", type=Path, help="write the results as JSON")
    arguments.add_argument("--keep", action="store_true", help="keep the generated checkpoints")
    options = arguments.parse_args()
    folder = (options.dir / f"{options.size}B").resolve()
    if not (folder / "done").exists():
        # In a process of its own: children inherit the peak memory of the one that starts them.
        maker = multiprocessing.get_context("spawn").Process(
            target=generate, args=(folder, options.size)
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"generating {folder} failed")
        (folder / "done").touch()
    inputs = [folder / name / "model.safetensors" for name in ("base", "e0", "e1", "e2")]
    rows = []
    for method in options.methods.split(","):
        path = recipe(folder, method)
        used = inputs[1:] if method in ("linear", "karcher") else inputs
        used = inputs[:2] if method == "slerp" else used
        floors, ours, theirs = [], [], []
        out = folder / "out"
        for turn in range(options.runs):  # in turn: a machine has fast and slow minutes
            command = [sys.executable, "-c", FLOOR, *map(str, used), str(folder / "floor")]
            floors.append(timed(command))
            (folder / "floor").unlink()
            shutil.rmtree(out, ignore_errors=True)
            merge = [sys.executable, "-m", "pluribus", "merge", str(path), str(out)]
            ours.append(timed([*merge, "--device", options.device]))
            shutil.rmtree(out, ignore_errors=True)
            if options.mergekit and turn < options.peer_runs:
                peer = [options.mergekit, "-m", "mergekit.scripts.run_yaml", str(path), str(out)]
                theirs.append(timed([*peer, "--no-write-model-card", "--no-copy-tokenizer"]))
                shutil.rmtree(out, ignore_errors=True)
        row = {
            "method": method,
            "size": options.size,
            "floor_s": statistics.median(s for s, _ in floors),
            "pluribus_s": statistics.median(s for s, _ in ours),
            "pluribus_spread_s": [min(s for s, _ in ours), max(s for s, _ in ours)],
            "pluribus_peak_mb": max(mb for _, mb in ours),
        }
        if theirs:
            row |= {
                "mergekit_s": statistics.median(s for s, _ in theirs),
                "mergekit_spread_s": [min(s for s, _ in theirs), max(s for s, _ in theirs)],
                "mergekit_peak_mb": max(mb for _, mb in theirs),
            }
            row["ratio"] = row["mergekit_s"] / row["pluribus_s"]
        rows.append(row)
        print(
            f"{method:12s} pluribus {row['pluribus_s']:6.2f} s {row['pluribus_peak_mb']:5.0f} MB"
            + (
                f"   mergekit {row['mergekit_s']:7.2f} s {row['mergekit_peak_mb']:5.0f} MB"
                f"   {row['ratio']:5.1f}x"
                if theirs
                else ""
            )
            + f"   floor {row['floor_s']:5.2f} s ({row['pluribus_s'] / row['floor_s']:.2f}x)",
            flush=True,
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps({"environment": environment(options), "rows": rows}, indent=1)
        )
    if not options.keep:
        shutil.rmtree(folder)


def environment(options: argparse.Namespace) -> dict[str, object]:
    import numpy
    import torch

    from pluribus import __version__

    found = {
        "size": options.size,
        "device": options.device,
        "runs": options.runs,
        "peer_runs": options.peer_runs,
        "processors": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "pluribus": __version__,
        "numpy": numpy.__version__,
        "torch": torch.__version__,
    }
    if options.device != "cpu":
        found["device"] = torch.cuda.get_device_name(options.device)
    if options.mergekit:
        ask = "import importlib.metadata as m; print(m.version('mergekit'), m.version('torch'))"
        said = subprocess.run([options.mergekit, "-c", ask], capture_output=True, text=True)
        found["mergekit"], found["mergekit_torch"] = said.stdout.split()
    return found


if __name__ == "__main__":
    main()
