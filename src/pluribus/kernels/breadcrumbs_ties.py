"""Breadcrumbs with a sign vote: the same pass as `breadcrumbs`, ended by an election."""

from functools import partial

from pluribus.kernels import breadcrumbs

values = breadcrumbs.values
fused = partial(breadcrumbs.fused, vote=True)
