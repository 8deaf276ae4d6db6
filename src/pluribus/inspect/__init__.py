"""How fine-tuned models relate before they are merged: `inspect(pool)`.

    found = inspect(Pool("base", ["code", "prose"]))
    print(found.table())
    report.save("report.html", found.html())

Two streaming passes over the files in bounded memory; every figure is exact.
"""

from pluribus.inspect.inspection import Inspection, inspect
from pluribus.inspect.tally import Tally

__all__ = ["Inspection", "Tally", "inspect"]
