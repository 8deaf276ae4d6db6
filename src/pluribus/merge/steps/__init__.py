"""Named steps of merge methods, to be joined with `>>`; a step is one file here.

    from pluribus.merge.steps import elect, mean, trim

    trim(density=0.2) >> elect() >> mean()

The names are the steps' classes; the modules they live in bear the same names.
"""

from pluribus.core.registry import STEPS

__all__ = list(STEPS)

for _name in STEPS:
    globals()[_name] = STEPS[_name]
