"""What the server costs beside the model alone, what batching gains, and whether it holds out.

    python benchmarks/serve_speed.py MODEL

MODEL is a folder with a causal language model, such as SmolLM2-135M-Instruct. The server runs in
this process; clients are threads with the official `openai` client. `--repeats` times, medians:

    overhead   milliseconds a streamed token takes beyond `generate` of transformers   at most 5
    batching   tokens/s of 8 clients over those of one                                 at least 2.5
    soak       32 clients for `--soak` seconds: requests, errors, wrong counts, and resident memory
               at a quarter of the time and at its end

Prints JSON; the exit status is 1 if a request of the soak failed.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import threading
import time
import warnings
from pathlib import Path

import openai
import torch

from pluribus.decode.stack import open_reference
from pluribus.serve import Served, background

PROMPT = list(range(40, 72))


def resident() -> float:
    """MB of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def bare(model, tokens: int) -> float:
    ids = torch.tensor([PROMPT])
    began = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return (time.perf_counter() - began) / tokens


def streamed(client, tokens: int) -> float:
    began = time.perf_counter()
    for _ in client.completions.create(
        model="model",
        prompt=PROMPT,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        pass
    return (time.perf_counter() - began) / tokens


def together(client, clients: int, tokens: int) -> float:
    """Tokens/s of some clients at once."""
    threads = [threading.Thread(target=streamed, args=(client, tokens)) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clients * tokens / (time.perf_counter() - began)


def soak(url: str, seconds: float, clients: int) -> dict:
    done, failed = [0] * clients, []
    stop = time.monotonic() + seconds

    def run(number: int) -> None:
        rng = random.Random(number)
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        while time.monotonic() < stop:
            wanted = rng.randint(1, 12)
            prompt = [rng.randint(5, 300) for _ in range(rng.randint(1, 48))]
            try:
                answer = client.completions.create(
                    model="model",
                    prompt=prompt,
                    max_tokens=wanted,
                    extra_body={"ignore_eos": True},
                )
                if answer.usage.completion_tokens != wanted:
                    failed.append(f"{answer.usage.completion_tokens} tokens, not {wanted}")
                done[number] += 1
            except Exception as error:
                failed.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 4)
    early = resident()
    for thread in threads:
        thread.join()
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": sum(done),
        "fewest_of_a_client": min(done),
        "failed": failed[:5],
        "failures": len(failed),
        "resident_mb_at_a_quarter": round(early, 1),
        "resident_mb_at_the_end": round(resident(), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--soak", type=float, default=120.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    opened = open_reference(given.model)
    seen: dict[str, list[float]] = {"bare": [], "streamed": [], "one": [], "eight": []}
    with background({"model": Served("model", *opened, rows=32)}) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        bare(opened.model, 3)
        streamed(client, 3)
        for _ in range(given.repeats):
            seen["bare"].append(1e3 * bare(opened.model, given.tokens))
            seen["streamed"].append(1e3 * streamed(client, given.tokens))
            seen["one"].append(together(client, 1, given.tokens))
            seen["eight"].append(together(client, 8, given.tokens))
            now = {name: round(found[-1], 2) for name, found in seen.items()}
            print(now, file=sys.stderr, flush=True)
        lasted = soak(url, given.soak, 32)
    middle = {name: statistics.median(found) for name, found in seen.items()}
    over = [a - b for a, b in zip(seen["streamed"], seen["bare"], strict=True)]
    gains = [a / b for a, b in zip(seen["eight"], seen["one"], strict=True)]
    table = {
        "values": sum(p.numel() for p in opened.model.parameters()),
        "threads": given.threads,
        "milliseconds_a_token": {n: round(middle[n], 2) for n in ("bare", "streamed")},
        "overhead_ms": {
            "median": round(statistics.median(over), 2),
            "all": [round(x, 2) for x in over],
        },
        "tokens_per_second": {n: round(middle[n], 2) for n in ("one", "eight")},
        "batching": {
            "median": round(statistics.median(gains), 2),
            "all": [round(x, 2) for x in gains],
        },
        "soak": lasted,
        "versions": {
            name: __import__("importlib.metadata").metadata.version(name)
            for name in ("pluribus", "torch", "transformers", "openai")
        }
        | {"python": platform.python_version()},
        "processors": os.cpu_count(),
    }
    print(json.dumps(table, indent=1))
    if given.out:
        given.out.write_text(json.dumps(table, indent=1) + "\n")
    sys.exit(1 if lasted["failures"] else 0)


if __name__ == "__main__":
    main()
