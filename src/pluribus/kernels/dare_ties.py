"""DARE with a sign vote: the same pass as `dare_linear`, ended by an election."""

from functools import partial

from pluribus.kernels import dare_linear

values = dare_linear.values
fused = partial(dare_linear.fused, vote=True)
