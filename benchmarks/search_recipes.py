"""Sixty trials of recipe search beside every method's default recipe.

    python benchmarks/search_recipes.py --zoo demo8 --seeds 0,1,2

For each seed of a zoo: the validation and test score (mean accuracy over the specialists' own, in
percent) of every merge method with its default parameters; of the best of them by validation; and
of the recipe that each algorithm finds by validation in `--trials` trials of
examples/search/ZOO.yml. The test split is looked at once, for the recipe chosen. Prints JSON.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

from pluribus.core.errors import PluribusError
from pluribus.core.merger import facts
from pluribus.core.registry import MERGERS
from pluribus.recipe import Recipe
from pluribus.search import recipe_space, run
from pluribus.search.objective import ZooObjective

EXAMPLES = Path(__file__).parents[1] / "examples" / "search"


def defaults(objective: ZooObjective, tasks: list[str]) -> dict[str, tuple[Recipe, float]]:
    """Validation scores of the default recipe of every method that takes these models."""
    out = {}
    for name in MERGERS:
        known = facts(MERGERS[name])
        given = {"merge_method": name, "models": [{"model": task} for task in tasks], "seed": 0}
        if known.base != "ignored":
            given["base_model"] = "base"
        try:
            recipe = Recipe.of(given)
            objective.plan(recipe)
            out[name] = (recipe, objective(recipe, {})["score"])
        except (PluribusError, TypeError) as error:  # e.g. for two models only, or needs a file
            print(f"  {name}: left out: {str(error)[:90]}", file=sys.stderr)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--zoo", default="demo8")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--algorithms", default="evolution,tpe,cma,random")
    parser.add_argument("--space", type=Path, help="Default: examples/search/ZOO.yml")
    given = parser.parse_args()
    path = given.space or EXAMPLES / f"{given.zoo}.yml"
    rows = []
    for seed in map(int, given.seeds.split(",")):
        objective = ZooObjective(zoo=given.zoo, seed=seed)
        on_test = ZooObjective(zoo=given.zoo, seed=seed, split="test")
        space = recipe_space.load(path, check=False)
        made = recipe_space.RecipeSpace(space.space, objective, space.folder, space.where)
        made.check()
        began = time.perf_counter()
        found = defaults(objective, list(objective.built().experts))
        best = max(found, key=lambda name: found[name][1])
        row = {
            "seed": seed,
            "defaults_val": {name: round(score, 3) for name, (_, score) in found.items()},
            "best_default": best,
            "best_default_val": found[best][1],
            "best_default_test": on_test(found[best][0], {})["score"],
            "best_default_test_of_all": max(
                on_test(recipe, {})["score"] for recipe, _ in found.values()
            ),
            "defaults_s": round(time.perf_counter() - began, 1),
        }
        for algorithm in given.algorithms.split(","):
            study = run(
                made.space,
                made.evaluate,
                algorithm,
                given.trials,
                seed=seed,
                on_error="record",
            )
            recipe = made.recipe(study.best_value)
            row[algorithm] = {
                "val": study.best.scores["score"],
                "test": on_test(recipe, {})["score"],
                "method": recipe.merge_method,
                "found_at": study.best.number,
                "failed": sum(trial.status == "failed" for trial in study.trials),
                "seconds": round(study.seconds, 1),
            }
            print(f"seed {seed} {algorithm}: {row[algorithm]}", file=sys.stderr, flush=True)
        rows.append(row)
    summary = {}
    for algorithm in given.algorithms.split(","):
        for split in ("val", "test"):
            gaps = [row[algorithm][split] - row[f"best_default_{split}"] for row in rows]
            summary[f"{algorithm} - best default, {split}"] = {
                "mean": round(statistics.fmean(gaps), 2),
                "per_seed": [round(gap, 2) for gap in gaps],
            }
    versions = {"python": platform.python_version(), "cpus": os.cpu_count()}
    print(
        json.dumps(
            {"zoo": given.zoo, "trials": given.trials, "rows": rows, "summary": summary} | versions
        )
    )


if __name__ == "__main__":
    main()
