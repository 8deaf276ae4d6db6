"""Static merge methods: many checkpoints of one base into one, without training.

A method is one file here, named after it. The package itself is called to merge:

    from pluribus import Pool, merge
    merge(Pool("base/", ["math/", "code/"]), "ties(density=0.2)", "merged/")
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """This package, which is also the function `pluribus.engine.driver.merge`."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Merge; see `pluribus.engine.driver.merge`."""
        from pluribus.engine.driver import merge

        return merge(*arguments, **keywords)


sys.modules[__name__].__class__ = _Callable
