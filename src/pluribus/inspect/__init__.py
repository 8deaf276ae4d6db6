"""How fine-tuned models relate before they are merged: `inspect(pool)`.

    found = inspect(Pool("base", ["code", "prose"]))
    print(found.table())
    report.save("report.html", found.html())

Two streaming passes over the files in bounded memory; every figure is exact. Spectra, lines between
models and the similarity of what they compute are measured on request. `difference` tells what
changed between any two checkpoints.
"""

from pluribus.inspect.difference import Difference, difference
from pluribus.inspect.inspection import Inspection, inspect
from pluribus.inspect.tally import Tally

__all__ = ["Difference", "Inspection", "Tally", "difference", "inspect"]
