"""DELLA with a sign vote: the same pass as `della_linear`, ended by an election."""

from functools import partial

from pluribus.kernels import della_linear

values = della_linear.values
fused = partial(della_linear.fused, vote=True)
