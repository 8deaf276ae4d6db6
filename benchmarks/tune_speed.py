"""One step of layer-wise AdaMerging, ours beside FusionBench's, on the same module and inputs.

    python benchmarks/tune_speed.py --fusionbench OTHER/bin/python

OTHER is an environment with what benchmarks/fusionbench.txt names.

A transformer over 50 tokens (CLIP ViT-B/32's number) and eight experts of it, 16 inputs a task and
step, as in the paper. Four things are timed in processes of their own, in turn, `--repeats` times:

    plain        one forward and backward pass a task through one model, weight gradients included
    read         reading all task vectors once
    pluribus     a step of AdaMerging().fit
    fusionbench  a step of LayerWiseAdaMergingAlgorithm's loop (its own merged model and entropy)

The figure that matters is pluribus / (plain + read), at most 1.25, and fusionbench / pluribus, at
least 1.5. Peak memory is the process's resident peak less what it had before the models were made.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

TASKS, BATCH, TOKENS, CLASSES = 8, 16, 50, 10


def network(width: int, depth: int):
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            b, s, d = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, d // 64, 64).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + self.out(mixed.transpose(1, 2).reshape(b, s, d))
            return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            self.norm = nn.LayerNorm(width)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.norm(x.mean(1))

    torch.manual_seed(0)
    return Encoder()


def bed(arguments):
    import torch

    torch.set_num_threads(arguments.threads)
    base = network(arguments.width, arguments.depth)
    experts = []
    for number in range(TASKS):
        expert = network(arguments.width, arguments.depth)
        rng = torch.Generator().manual_seed(number + 1)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=rng))
        experts.append(expert)
    rng = torch.Generator().manual_seed(99)
    heads = [torch.randn(CLASSES, arguments.width, generator=rng) for _ in range(TASKS)]
    inputs = [torch.randn(BATCH, TOKENS, arguments.width, generator=rng) for _ in range(TASKS)]
    return base, experts, heads, inputs


def resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def plain(arguments):
    import torch

    before = resident()
    base, _, heads, inputs = bed(arguments)
    times = []
    for _ in range(arguments.steps + 1):
        began = time.perf_counter()
        for parameter in base.parameters():
            parameter.grad = None
        for head, x in zip(heads, inputs, strict=True):
            logs = torch.nn.functional.linear(base(x), head).log_softmax(1)
            (-(logs.exp() * logs).sum(1).mean()).backward()
        times.append(time.perf_counter() - began)
    return times[1:], resident() - before


def read(arguments):
    import torch

    before = resident()
    base, experts, _, _ = bed(arguments)
    start = torch.nn.utils.parameters_to_vector(base.parameters()).detach()
    taus = [torch.nn.utils.parameters_to_vector(e.parameters()).detach() - start for e in experts]
    times = []
    for _ in range(arguments.steps + 1):
        began = time.perf_counter()
        for tau in taus:
            tau.sum()
        times.append(time.perf_counter() - began)
    return times[1:], resident() - before


def pluribus(arguments):
    import torch

    from pluribus import Pool
    from pluribus.tune import AdaMerging, ModuleForward

    before = resident()
    base, experts, heads, inputs = bed(arguments)
    names = [f"t{number}" for number in range(TASKS)]
    pool = Pool(base, dict(zip(names, experts, strict=True)))
    tables = {n: {"weight": head} for n, head in zip(names, heads, strict=True)}
    marks = []
    streams = {n: [x] for n, x in zip(names, inputs, strict=True)}
    tuned = AdaMerging(steps=arguments.steps + 2, resident=not arguments.streamed).fit(
        pool,
        ModuleForward(base, tables),
        streams,
        on_step=lambda *_: marks.append(time.perf_counter()),
    )
    peak = resident() - before
    coefficients = torch.tensor([values for _, values in tuned.coefficients.table()])
    took = [b - a for a, b in itertools.pairwise(marks)]
    return took[1:], peak, float(coefficients.double().sum())


def fusionbench(arguments):
    import torch
    from fusion_bench.method.adamerging.entropy_loss import entropy_loss
    from fusion_bench.models.wrappers.layer_wise_fusion import (
        LayerWiseMergedModel,
        get_layer_wise_weights,
    )

    before = resident()
    base, experts, heads, inputs = bed(arguments)
    weights = get_layer_wise_weights(TASKS, len(list(base.parameters())), 0.3)
    module = LayerWiseMergedModel(weights, base, experts, clamp_weights=True)
    optimiser = torch.optim.Adam([module.merge_weight], lr=1e-3)
    module.merge_weights()
    times = []
    for _ in range(arguments.steps + 2):
        began = time.perf_counter()
        for head, x in zip(heads, inputs, strict=True):
            loss = entropy_loss(torch.nn.functional.linear(module(x), head))
            loss.backward(retain_graph=True)
        optimiser.step()
        optimiser.zero_grad()
        module.merge_weights()
        times.append(time.perf_counter() - began)
    total = float(module.merge_weight.detach().clamp(0, 1).double().sum())
    return times[2:], resident() - before, total


KINDS = {"plain": plain, "read": read, "pluribus": pluribus, "fusionbench": fusionbench}


def versions(python: str) -> str:
    code = (
        "import importlib.metadata as m; print(', '.join(f'{p} {m.version(p)}' for p in "
        "('pluribus', 'fusion-bench', 'torch') if any(d.name == p for d in m.distributions())))"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def child(arguments, kind: str) -> dict:
    python = arguments.fusionbench if kind == "fusionbench" else sys.executable
    command = [python, __file__, "--child", kind, "--width", str(arguments.width)]
    command += ["--depth", str(arguments.depth), "--steps", str(arguments.steps)]
    command += ["--threads", str(arguments.threads)] + ["--streamed"] * arguments.streamed
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{kind} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--fusionbench", help="python of an environment that has fusion-bench")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streamed", action="store_true", help="ours with resident=False")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        times, peak, *rest = KINDS[arguments.child](arguments)
        print(json.dumps({"times": times, "peak_mb": peak, "sum": rest[0] if rest else None}))
        return
    kinds = [k for k in KINDS if k != "fusionbench" or arguments.fusionbench]
    seen: dict[str, list[float]] = {kind: [] for kind in kinds}
    peaks: dict[str, float] = {}
    sums: dict[str, float] = {}
    for repeat in range(arguments.repeats):
        for kind in kinds:
            found = child(arguments, kind)
            seen[kind] += found["times"]
            peaks[kind] = max(peaks.get(kind, 0.0), found["peak_mb"])
            sums[kind] = found["sum"]
            median = statistics.median(found["times"])
            print(f"{repeat + 1}: {kind:12s} {median:7.3f} s a step", file=sys.stderr, flush=True)
    middle = {kind: statistics.median(times) for kind, times in seen.items()}
    values = sum(p.numel() for p in network(arguments.width, arguments.depth).parameters())
    floor = middle["plain"] + middle["read"]
    table = {
        "network": f"transformer, {arguments.width} x {arguments.depth}, {TOKENS} tokens",
        "values": values,
        "experts": TASKS,
        "batch": BATCH,
        "threads": arguments.threads,
        "resident": not arguments.streamed,
        "seconds": {
            kind: {
                "median": round(middle[kind], 4),
                "min": round(min(t), 4),
                "max": round(max(t), 4),
            }
            for kind, t in seen.items()
        },
        "peak_mb": {kind: round(peak, 1) for kind, peak in peaks.items()},
        "experts_and_base_mb": round((TASKS + 1) * values * 4 / 2**20, 1),
        "over_plain_and_read": round(middle["pluribus"] / floor, 3),
        "coefficient_sums": sums,
        "versions": {"ours": versions(sys.executable), "python": platform.python_version()},
        "processors": os.cpu_count(),
    }
    if "fusionbench" in middle:
        table["fusionbench_over_pluribus"] = round(middle["fusionbench"] / middle["pluribus"], 3)
        table["versions"]["peer"] = versions(arguments.fusionbench)
    print(json.dumps(table, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
