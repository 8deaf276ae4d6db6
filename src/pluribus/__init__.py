"""Out of many, one: merge, compress and compare fine-tuned models."""

__version__ = "0.1.0"
