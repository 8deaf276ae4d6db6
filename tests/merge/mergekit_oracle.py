"""Run the real mergekit on arrays; for its interpreter (MERGEKIT_PYTHON), not ours.

    mergekit_oracle.py INPUTS.npz CASES.json OUTPUTS.npz

INPUTS: "base/<tensor>" and "<k>/<tensor>". CASES: a list of {"method", "parameters", "base": bool,
"experts": count, "tensors": names, "seed"}. OUTPUTS: "<case number>/<tensor>" in float32 and
".../float64" from the same numbers widened, or ".../error" with mergekit's message.
"""

import json
import sys

import numpy as np
import torch
from mergekit.merge_methods import merge_tensors


def merge(case: dict, tensors: list[torch.Tensor]) -> np.ndarray:
    """Merge one tensor."""
    return merge_tensors(
        tensors,
        case["method"],
        parameters=case["parameters"],
        base_index=0 if case["base"] else None,
    ).numpy()


def main(inputs: str, cases: str, outputs: str) -> None:
    """Merge every tensor of every case."""
    torch.set_num_threads(1)
    arrays = {name: torch.from_numpy(array) for name, array in np.load(inputs).items()}
    results = {}
    with open(cases) as file:
        todo = json.load(file)
    for number, case in enumerate(todo):
        torch.manual_seed(case["seed"])
        for name in case["tensors"]:
            tensors = [arrays[f"{k}/{name}"] for k in range(case["experts"])]
            if case["base"]:
                tensors.insert(0, arrays[f"base/{name}"])
            key = f"{number}/{name}"
            try:
                results[key] = merge(case, [tensor.clone() for tensor in tensors])
                results[f"{key}/float64"] = merge(case, [tensor.double() for tensor in tensors])
            except Exception as error:
                results[f"{key}/error"] = np.array(f"{type(error).__name__}: {error}")
    np.savez(outputs, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
