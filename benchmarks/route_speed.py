"""A batch of mixed inputs over low-rank parts: routed, beside PEFT and beside merging per sample.

    python benchmarks/route_speed.py                                      whole inputs
    python benchmarks/route_speed.py --tokens 1 --width 1024 --depth 4    a step of decoding

A transformer over `--tokens` tokens and eight LoRA parts on all its linear layers; 32 inputs, each
for one part, shuffled. In one process, in turn, `--repeats` times, medians of `--steps`:

    base     the base alone, one batch
    routed   `Routed`, weights given, one batch                        at most 1.35 of base
    mixed    the same with two parts an input; with all eight
    peft     the inputs sorted by adapter, `set_adapter` for each group  at least 3 of routed
    names    PEFT's own mixed batches (`adapter_names=`)
    merging  each input through its own merged weights                  at least 10 of routed

and switching a model to another expert in place, at most 0.15 of loading that expert's checkpoint:

    load       `load_state_dict` of the file, which the system has in memory
    load_cold  the same after the system was told to forget the file
    masked     `Routed.switch` among masked parts, low_rank: among low-rank ones
    kept       the same among low-rank parts whose tensors are kept (`keep=8`)
    store      `load_into` of the bank of masks, from its file

Prints JSON; all outputs of one kind are compared first.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from pluribus.route import LowRank, Routed, from_store

PARTS, BATCH = 8, 32


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (b, s, d)."""
        b, s, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, d // 64, 64).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, s, d))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def network(width: int, depth: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(depth))).eval()


def parts(base: nn.Module, rank: int) -> dict[str, dict[str, LowRank]]:
    rng = torch.Generator().manual_seed(1)
    return {
        f"part{number}": {
            name: LowRank(
                0.05 * torch.randn(rank, t.shape[1], generator=rng),
                0.05 * torch.randn(len(t), rank, generator=rng),
            )
            for name, t in base.state_dict().items()
            if t.ndim == 2
        }
        for number in range(PARTS)
    }


def with_peft(width: int, depth: int, rank: int, found: dict) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["qkv", "out", "up", "down"])
    model = peft.get_peft_model(network(width, depth), config, adapter_name="part0")
    for number in range(1, PARTS):
        model.add_adapter(f"part{number}", config)
    state = model.state_dict()
    for label, part in found.items():
        for name, delta in part.items():
            stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            state[f"{stem}A.{label}.weight"].copy_(delta.a)
            state[f"{stem}B.{label}.weight"].copy_(delta.b)
    return model.eval()


def timed(run, steps: int, before=lambda: None) -> float:
    run()
    times = []
    for _ in range(steps):
        before()
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measured(given) -> dict[str, list[float]]:
    base = network(given.width, given.depth)
    found = parts(base, given.rank)
    routed = Routed(network(given.width, given.depth), found)
    other = with_peft(given.width, given.depth, given.rank, found)
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(BATCH, given.tokens, given.width, generator=rng)
    order = torch.randperm(BATCH, generator=rng) % PARTS
    names = [f"part{number}" for number in order.tolist()]
    one = nn.functional.one_hot(order, PARTS).float()
    two = one + 0.5 * nn.functional.one_hot((order + 3) % PARTS, PARTS)
    every = torch.rand(BATCH, PARTS, generator=rng)

    def in_groups() -> torch.Tensor:
        out = torch.empty_like(x)
        for number in range(PARTS):
            rows = (order == number).nonzero().flatten()
            other.set_adapter(f"part{number}")  # type: ignore[operator]
            out[rows] = other(x[rows])
        return out

    def merging() -> torch.Tensor:
        rows = [
            functional_call(base, routed.materialise(name), (x[i : i + 1],))
            for i, name in enumerate(names)
        ]
        return torch.cat(rows)

    runs = {
        "base": lambda: base(x),
        "routed": lambda: routed(x, weights=one),
        "mixed2": lambda: routed(x, weights=two),
        "mixed8": lambda: routed(x, weights=every),
        "peft": in_groups,
        "names": lambda: other(x, adapter_names=names),
        "merging": merging,
    }
    seen: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        expected = runs["routed"]()
        for name in ("peft", "names", "merging"):
            torch.testing.assert_close(runs[name](), expected, rtol=1e-3, atol=1e-3)
        for repeat in range(given.repeats):
            for name, run in runs.items():
                seen[name].append(timed(run, given.steps if name != "merging" else 1))
                print(
                    f"{repeat + 1}: {name:8s} {seen[name][-1]:.4f} s", file=sys.stderr, flush=True
                )
    seen["sizes"] = [
        routed.report()["base_bytes"] / 2**20,
        routed.report()["parts_bytes"] / 2**20,
    ]
    return seen


def switching(given) -> dict[str, float]:
    """Seconds to load an expert's checkpoint into a model, and to switch to it in place."""
    from pluribus.compress import TallMasks, open_store
    from pluribus.core.weights import Weights

    base = network(given.width, given.depth)
    state = {name: t.clone() for name, t in base.state_dict().items()}
    rng = torch.Generator().manual_seed(3)
    experts = {
        label: {n: t + 0.02 * torch.randn(t.shape, generator=rng) for n, t in state.items()}
        for label in ("a", "b", "c")
    }
    routed = Routed(network(given.width, given.depth), parts(base, given.rank))
    with tempfile.TemporaryDirectory() as folder:
        for label, expert in {"base": state, **experts}.items():
            Weights.of(expert).save(Path(folder) / f"{label}.safetensors")
        TallMasks(mask_lambda=0.4).fit(state, experts).save(Path(folder) / "bank")
        bank = open_store(Path(folder) / "bank", Path(folder) / "base.safetensors")

        masked = from_store(network(given.width, given.depth), bank)
        file = Path(folder) / "b.safetensors"

        def load() -> None:
            from safetensors.torch import load_file

            base.load_state_dict(load_file(file))

        def forget() -> None:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        turn = iter(range(10**9))
        out = {
            "load": timed(load, given.steps),
            "load_cold": timed(load, given.steps, before=forget),
            "masked": timed(lambda: masked.switch("abc"[next(turn) % 3]), given.steps),
            "store": timed(lambda: bank.load_into(base, "abc"[next(turn) % 3]), given.steps),
            "low_rank": timed(lambda: routed.switch(f"part{next(turn) % PARTS}"), given.steps),
        }
        routed.switch(None)
        routed.keep = PARTS
        for number in range(PARTS):
            routed.switch(f"part{number}")
        out["kept"] = timed(lambda: routed.switch(f"part{next(turn) % PARTS}"), given.steps)
    routed.switch(None)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    seen = measured(given)
    sizes = seen.pop("sizes")
    middle = {name: statistics.median(times) for name, times in seen.items()}
    table = {
        "network": f"transformer, {given.width} x {given.depth}, {given.tokens} tokens, "
        f"batch {BATCH}",
        "parts": PARTS,
        "rank": given.rank,
        "threads": given.threads,
        "seconds": {
            name: {
                "median": round(middle[name], 4),
                "min": round(min(t), 4),
                "max": round(max(t), 4),
            }
            for name, t in seen.items()
        },
        "over_base": {n: round(t / middle["base"], 3) for n, t in middle.items() if n != "base"},
        "over_routed": {
            n: round(middle[n] / middle["routed"], 2) for n in ("peft", "names", "merging")
        },
        "base_mb": round(sizes[0], 1),
        "parts_mb": round(sizes[1], 1),
        "switching_s": {n: round(t, 5) for n, t in switching(given).items()},
        "versions": {
            name: __import__("importlib.metadata").metadata.version(name)
            for name in ("pluribus", "torch", "peft")
        }
        | {"python": platform.python_version()},
        "processors": os.cpu_count(),
    }
    table["switching_over_load"] = {
        n: round(table["switching_s"][n] / table["switching_s"]["load"], 3)
        for n in ("load_cold", "masked", "low_rank", "kept", "store")
    }
    print(json.dumps(table, indent=1))
    if given.out:
        given.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
