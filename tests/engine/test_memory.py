"""Peak memory is set by the budget, not by the model."""

import json
import shutil

import pytest

CODE = """
import json, re, sys
from pathlib import Path
from pluribus.core.pool import Pool
from pluribus.engine.driver import Options, merge
from pluribus.merge.ties import Ties
folder, scope, memory = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
experts = {name: folder / name for name in ("e0", "e1", "e2")}
options = Options(threads=2) if memory == 0 else Options(threads=2, memory=memory)
merge(Pool(folder / "base", experts), Ties(density=0.2, scope=scope), folder / f"out-{scope}",
      options=options, overwrite=True, resume=False)
# Not ru_maxrss, which a child inherits from the process that started it.
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps({"peak": peak / 1024,
                  "torch": "torch" in sys.modules}))
"""
MAKE = """
import sys
from pathlib import Path
import numpy as np
from pluribus.core.formats.safetensors import header_bytes
from pluribus.core.source import TensorSpec
folder, rows = Path(sys.argv[1]), int(sys.argv[2])
specs = {"embed.weight": TensorSpec("BF16", (rows, 1000)),
         **{f"layers.{i}.weight": TensorSpec("BF16", (rows // 4, 500)) for i in range(4)}}
head = header_bytes(specs, {})[0]
for number, name in enumerate(("base", "e0", "e1", "e2")):
    (folder / name).mkdir(parents=True)
    # Seven blocks over and over: to draw all of them takes longer than to merge them.
    base, tune = (np.random.default_rng(seed).standard_normal((7, 1 << 20), np.float32)
                  for seed in (0, number))
    with open(folder / name / "model.safetensors", "wb") as file:
        file.write(head)
        for spec in specs.values():
            for start in range(0, spec.size, 1 << 20):
                size = min(1 << 20, spec.size - start)
                values = base[start // (1 << 20) % 7, :size].copy()
                if number:
                    values += 0.1 * tune[start // (1 << 20) % 7, :size]
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_peak_memory_stays_in_the_budget_and_does_not_grow_with_the_model(tmp_path, child):
    """300 MB of bf16 a model, one embedding of 100 M elements; and a quarter of that."""
    peaks = {}
    for label, rows in (("whole", 100_000), ("quarter", 25_000)):
        process = child(MAKE, tmp_path / label, rows)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        for scope in ("tensor", "model"):
            process = child(CODE, tmp_path / label, scope, 0)
            said, errors = process.communicate()
            assert process.returncode == 0, errors
            told = json.loads(said)
            assert not told["torch"]
            peaks[label, scope] = told["peak"]
            shutil.rmtree(tmp_path / label / f"out-{scope}")
        shutil.rmtree(tmp_path / label)
    print({f"{label}, {scope}": round(peak) for (label, scope), peak in peaks.items()})
    for scope in ("tensor", "model"):
        assert peaks["whole", scope] <= 700
        # An exact cut sets aside up to 64 MB of a large tensor's values.
        aside = 64 if scope == "tensor" else 0
        assert peaks["whole", scope] <= 1.15 * peaks["quarter", scope] + aside
