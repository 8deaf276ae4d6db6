"""LoRA in, LoRA out: merge adapters without their base, extract one from a fine-tuned model."""

from pluribus.adapters.combine import merge_adapters
from pluribus.adapters.extract import extract_lora
from pluribus.adapters.report import AdapterReport, ModuleReport

__all__ = ["AdapterReport", "ModuleReport", "extract_lora", "merge_adapters"]
