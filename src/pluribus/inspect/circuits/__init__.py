"""Which attention heads a language model uses for a task, and whether tasks share them.

    heads = HeadModel(model)
    prompts = tasks.IOI.fitting(tokenizer, seed=0, n=64)
    circuit = discover(heads, tasks.IOI, prompts)
    ablate(heads, prompts, circuit.stage("movers").heads, "mean").mean_difference

Merullo et al., Circuit Component Reuse Across Tasks, ICLR 2024, https://arxiv.org/abs/2310.08744.
"""

from pluribus.inspect.circuits import tasks
from pluribus.inspect.circuits.circuit import Circuit, Overlap, discover, overlap
from pluribus.inspect.circuits.endings import Endings
from pluribus.inspect.circuits.measure import Score, ablate, evaluate, force_attention
from pluribus.inspect.circuits.model import Cache, HeadModel
from pluribus.inspect.circuits.patching import (
    Effects,
    activation_patch,
    attribution,
    path_patch,
    screened,
)
from pluribus.inspect.circuits.prompts import Prompt, Prompts, PromptTask, Stage, encode

__all__ = [
    "Cache",
    "Circuit",
    "Effects",
    "Endings",
    "HeadModel",
    "Overlap",
    "Prompt",
    "PromptTask",
    "Prompts",
    "Score",
    "Stage",
    "ablate",
    "activation_patch",
    "attribution",
    "discover",
    "encode",
    "evaluate",
    "force_attention",
    "overlap",
    "path_patch",
    "screened",
    "tasks",
]
