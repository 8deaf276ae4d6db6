"""Mixtures of experts assembled from dense models, as transformers reads them.

    from pluribus.route import moe
    report = moe.assemble(moe.load("moe.yml"), "out/")
    AutoModelForCausalLM.from_pretrained("out/")

Attention, norms and embeddings are the base's, an expert is a model's feed-forward blocks, and
gates are made of prompts, at random, or trained on texts of each expert (see `train`).
"""

from pluribus.route.moe.assemble import MoeReport, assemble
from pluribus.route.moe.recipe import MoeRecipe, load, of
from pluribus.route.moe.routes import Routes, routes

__all__ = ["MoeRecipe", "MoeReport", "Routes", "assemble", "load", "of", "routes"]
