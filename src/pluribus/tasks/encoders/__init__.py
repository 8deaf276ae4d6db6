"""Encoders of the zoos: a module from inputs (b, ...) to features (b, d), one kind a file.

Each has `width`, the d of its features, and is built from plain values alone, which name it in the
cache. None keeps state outside its state dict, and none uses chance.
"""
