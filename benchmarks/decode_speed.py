"""What fusing costs beside running its members, and what drafting gains.

    python benchmarks/decode_speed.py                             a large model, base, expert
    python benchmarks/decode_speed.py --experts 3 --threads 1

Random Llamas of SmolLM2's width and vocabulary: the large one has `--layers` layers, base and
experts the first `--small` of them and noise. In one process, in turn, `--repeats` times, for
batches of 1 and 8 (`--batches`):

    prefill   the prompt's first forward pass
    step      one forward pass of one token a row after it, all in turn, median of `--steps`
    token     whole `generate`, greedy, seconds a token

each for every member alone, and for `Fused` with three fusers: `static`, and `logits_fusion` with
its grid and with `bracket`. What matters is the fusion over the sum of its members, in each repeat:
at most 1.10 for prefill and step. (`token` flatters the fusion: members pay for the loop, too.)

Then `SpeculativeDecoder` over plain sampling from the same up-scaled model (EFT), batch 1. How much
of a draft is accepted depends on how far the large model is from the small one, so layers that only
the large one has are scaled by each of `--apart`; at least 1.5 is asked where acceptance allows.

Prints JSON; the static fusion's log-probabilities are compared with its formula first.
"""

import argparse
import inspect
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

WIDTH, INNER, HEADS, GROUPS = 576, 1536, 9, 3
PEAKED = 8.0  # factor of the output matrix: random models are near uniform otherwise
LIMIT, WANTED = 1.10, 1.5


def llama(layers: int, vocabulary: int, seed: int) -> Any:
    """Return a random model whose predictions are peaked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.lm_head.weight.mul_(PEAKED)
    return model


def members(given, apart: float = 1.0) -> dict[str, Any]:
    """Return a large model, a base of its first layers, and experts: the base with noise."""
    large = llama(given.layers, given.vocabulary, 0)
    for layer in large.model.layers[given.small :]:
        layer.self_attn.o_proj.weight.mul_(apart)
        layer.mlp.down_proj.weight.mul_(apart)
    found = {"large": large}
    for number in range(given.experts + 1):
        small = llama(given.small, given.vocabulary, 1)
        own = small.state_dict()
        rng = torch.Generator().manual_seed(number)
        for name, tensor in large.state_dict().items():
            if name in own:
                noise = torch.randn(tensor.shape, generator=rng) * tensor.std()
                own[name].copy_(tensor + (0.05 * noise if number else 0.0))
        found[f"expert{number}" if number else "base"] = small
    return found


def check(models: dict[str, Any], fused: Any, ids: torch.Tensor) -> None:
    """Raise AssertionError unless the static fusion is its formula."""
    logs = {role: model(input_ids=ids).logits.log_softmax(-1) for role, model in models.items()}
    moved = logs["large"]
    for role in models:
        if role.startswith("expert"):
            moved = moved + logs[role] - logs["base"]
    found = fused(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, moved.log_softmax(-1), rtol=1e-4, atol=1e-3)


def prefilled(model: Any, ids: torch.Tensor) -> tuple[float, dict[str, Any]]:
    """Return seconds of a prefill, and the cache as the model takes it."""
    began = time.perf_counter()
    passed = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    seconds = time.perf_counter() - began
    takes = inspect.signature(type(model).forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # transformers renamed it
    return seconds, {name: getattr(passed, name)}


def stepped(runs: dict[str, Any], ids: torch.Tensor, caches: dict[str, Any], given) -> Any:
    """Return each one's median seconds a step: all take a step in turn, so drift hits all alike."""
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(given.steps):
        token = ids[:, number : number + 1]
        for name, enter in runs.items():
            model = enter()
            began = time.perf_counter()
            model(input_ids=token, use_cache=True, logits_to_keep=1, **caches[name])
            seen[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seen.items()}


def generated(model: Any, ids: torch.Tensor, given) -> float:
    """Return seconds a token of a whole greedy `generate`."""
    mask = torch.ones_like(ids)
    began = time.perf_counter()
    model.generate(ids, attention_mask=mask, max_new_tokens=given.steps, do_sample=False)
    return (time.perf_counter() - began) / given.steps


def told(values: list[float], digits: int) -> dict[str, float]:
    """Return the middle and the ends."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def fusing(given) -> Iterator[tuple[str, Any]]:
    """Yield, for every batch, seconds of members and fusions, and fusions over the members' sum."""
    from pluribus.decode import DynamicFusion, Fused, StaticFusion

    models = members(given)
    fused = Fused(models, StaticFusion())
    fusers = {
        "static": StaticFusion(),
        "logits_fusion grid": DynamicFusion(),
        "logits_fusion bracket": DynamicFusion(mode="bracket"),
    }

    def entered(fuser: Any) -> Any:
        fused.fuser = fuser
        return fused

    runs = {name: lambda model=model: model for name, model in models.items()}
    runs |= {name: lambda fuser=fuser: entered(fuser) for name, fuser in fusers.items()}
    rng = torch.Generator().manual_seed(2)
    for batch in given.batches:
        ids = torch.randint(1, given.vocabulary, (batch, given.prompt), generator=rng)
        fused.fuser = fusers["static"]
        check(models, fused, ids[:, :8])
        seen: dict[str, dict[str, list[float]]] = {}

        for repeat in range(-1, given.repeats):  # the first warms up
            prefill = {name: prefilled(enter(), ids)[0] for name, enter in runs.items()}
            caches = {name: prefilled(enter(), ids)[1] for name, enter in runs.items()}
            step = stepped(runs, ids, caches, given)
            token = {name: generated(enter(), ids, given) for name, enter in runs.items()}
            for what, found in (("prefill", prefill), ("step", step), ("token", token)):
                for name, seconds in found.items():
                    if repeat >= 0:
                        seen.setdefault(what, {}).setdefault(name, []).append(seconds)
            print(f"batch {batch}: repeat {repeat + 1}", file=sys.stderr, flush=True)
        over = {}
        for what, by_name in seen.items():
            sums = [sum(by_name[role][r] for role in models) for r in range(given.repeats)]
            over[what] = {
                name: told([a / b for a, b in zip(by_name[name], sums, strict=True)], 3)
                for name in fusers
            }
        yield (
            f"batch {batch}",
            {
                "seconds": {
                    what: {name: told(values, 5) for name, values in by_name.items()}
                    for what, by_name in seen.items()
                },
                "over_the_sum_of_members": over,
                "within_limit": {
                    what: {name: row["median"] <= LIMIT for name, row in over[what].items()}
                    for what in ("prefill", "step")
                },
            },
        )


def drafting(given) -> Iterator[tuple[str, Any]]:
    """Yield, for every distance, what speculative decoding makes of an up-scaled model."""
    from pluribus.decode import SpeculativeDecoder, upscale

    rng = torch.Generator().manual_seed(3)
    ids = torch.randint(1, given.vocabulary, (1, given.prompt), generator=rng)
    for apart in given.apart:
        models = members(given, apart)
        fused = upscale(models["large"], models["expert1"], models["base"])
        decoder = SpeculativeDecoder(fused, draft="tuned")
        seen: dict[str, list[float]] = {"plain": [], "speculative": []}
        drafted = accepted = forwards = written = 0

        def plain(fused=fused) -> None:
            mask = torch.ones_like(ids)
            fused.generate(
                ids, attention_mask=mask, max_new_tokens=given.new, do_sample=True, top_k=0
            )

        for repeat in range(-1, given.repeats):
            torch.manual_seed(repeat + 1)
            seconds = clock(plain)
            chance = torch.Generator().manual_seed(repeat + 1)
            began = time.perf_counter()
            found = decoder.generate(
                ids, max_new_tokens=given.new, do_sample=True, generator=chance
            ).stats
            drafted_in = time.perf_counter() - began
            if repeat >= 0:
                seen["plain"].append(seconds)
                seen["speculative"].append(drafted_in)
                drafted, accepted = drafted + found.drafted, accepted + found.accepted
                forwards, written = forwards + found.forwards["ref"], written + found.written
        gained = [a / b for a, b in zip(seen["plain"], seen["speculative"], strict=True)]
        print(f"apart {apart:g}: {statistics.median(gained):.2f}", file=sys.stderr, flush=True)
        yield (
            f"apart {apart:g}",
            {
                "acceptance": round(accepted / drafted, 3),
                "large_forwards_a_token": round(forwards / written, 3),
                "seconds_a_token": {
                    n: told([t / given.new for t in times], 5) for n, times in seen.items()
                },
                "plain_over_speculative": told(gained, 3),
                "at_least_1.5": statistics.median(gained) >= WANTED,
            },
        )


def clock(run: Callable[[], None]) -> float:
    """Return the seconds of a run."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12, help="of the large model")
    parser.add_argument("--small", type=int, default=4, help="layers of base and experts")
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--experts", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--steps", type=int, default=32, help="tokens after the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens written when drafting")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--apart", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.steps > given.prompt:
        parser.error(
            f"--steps {given.steps}: steps read the prompt's tokens, {given.prompt} of them"
        )
    torch.set_num_threads(given.threads)
    with torch.no_grad():
        table = {
            "models": f"Llamas of width {WIDTH}, {given.layers} and {given.small} layers, "
            f"{given.vocabulary} tokens; {given.experts} expert(s), prompt of {given.prompt}",
            "threads": given.threads,
            "repeats": given.repeats,
            "fusing": dict(fusing(given)),
            "drafting": dict(drafting(given)),
            "versions": {n: version(n) for n in ("pluribus", "torch", "transformers")}
            | {"python": platform.python_version()},
            "processors": os.cpu_count(),
        }
    print(json.dumps(table, indent=1))
    if given.out:
        given.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
