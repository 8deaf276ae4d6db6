"""Mixture-of-experts architectures of transformers that dense models are assembled into.

A file here is one: which bases fit, what its config.json says, and what its tensors are called.
"""

from pluribus.core.registry import Registry

LAYOUTS = Registry(__name__, "__pluribus_layout__", "mixture-of-experts architecture")
