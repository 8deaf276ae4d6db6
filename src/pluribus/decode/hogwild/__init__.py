"""Hogwild! inference: workers of one model write at the same time and read each other's tokens."""

from pluribus.decode.hogwild.blocks import KVBlock
from pluribus.decode.hogwild.engine import LAYOUTS, HogwildEngine, HogwildResult, Layout
from pluribus.decode.hogwild.prompts import PromptFormat
from pluribus.decode.hogwild.reader import Reader
from pluribus.decode.hogwild.rotation import Rotation
from pluribus.decode.hogwild.sampling import Sampling
from pluribus.decode.hogwild.view import SharedView

__all__ = [
    "LAYOUTS",
    "HogwildEngine",
    "HogwildResult",
    "KVBlock",
    "Layout",
    "PromptFormat",
    "Reader",
    "Rotation",
    "Sampling",
    "SharedView",
]
