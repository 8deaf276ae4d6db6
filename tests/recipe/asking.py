"""Recipes over the tiny models of the fixture `root`, and what they are planned to do."""

from pluribus.recipe import Recipe, plan


def recipe(root, **values) -> Recipe:
    return Recipe.of(values, folder=root)


def jobs(root, **values):
    (planned,) = plan(recipe(root, **values))
    return {job.name: job for job in planned.plan.jobs}


def models(*names, **parameters):
    return [{"model": name, "parameters": parameters} for name in names]


def layer(k: int, rest: str = "mlp.up_proj") -> str:
    return f"model.layers.{k}.{rest}.weight"
