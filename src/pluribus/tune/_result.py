"""What tuning returns: coefficients, how they came about, and the model the merge engine makes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pluribus.core.chain import Chain, parse
from pluribus.core.coefficients import Coefficients
from pluribus.core.errors import InputError
from pluribus.core.pool import Pool
from pluribus.core.weights import Weights
from pluribus.tune._fit import Log

if TYPE_CHECKING:
    from pluribus.tune._mask import ConcreteMask

FILE = "coefficients.safetensors"


def _absolute(place: str) -> str:
    """Return a reference with its local paths made absolute; `model+adapter` has two."""
    parts = [(part, Path(part).expanduser()) for part in place.split("+")]
    return "+".join(str(path.resolve()) if path.exists() else part for part, path in parts)


@dataclass(frozen=True, eq=False)
class Tuned:
    """A tuned composition.

    `coefficients` rebuild the model without any data. `weights` is what the merge engine makes of
    them, the same bits as `pluribus merge` makes of the exported recipe.
    """

    pool: Pool
    coefficients: Coefficients
    method: Any  # the tuner, with its settings
    of: str = ""  # steps the task vectors pass first
    log: Log = field(default_factory=Log)
    mask: "ConcreteMask | None" = None  # the logits behind the coefficients' masks, if learned

    @property
    def chain(self) -> Chain:
        """The merge method that replays the result."""
        from pluribus.merge.steps.blend import Blend

        last = Blend(coefficients=self.coefficients)
        return (parse(self.of) >> last) if self.of else Chain((last,))

    @cached_property
    def weights(self) -> Weights:
        """The merged weights, in memory, in the base's element types."""
        from pluribus.engine.driver import merge

        return merge(self.pool, self.chain)

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row a step: its number, loss, losses by task, and agreement where it was taken."""
        return [step._asdict() for step in self.log.steps]

    @property
    def warnings(self) -> list[str]:
        """What was odd."""
        return list(self.log.warnings)

    def recipe(self, file: str = FILE, models: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the static recipe that replays the result, as YAML's plain values.

        `file` is where the coefficients are (see `save`), relative to the recipe. `models` gives
        the experts' and the base's ("base") references (paths, `model+adapter`, hub names) where
        they were not opened from folders. Raises InputError for models in memory without one.
        """
        given = dict(models or {})
        for label, weights in {"base": self.pool.base, **self.pool.experts}.items():
            if label in given or weights is None:
                continue
            place = weights.folder if weights.folder is not None else Path(weights.label)
            if not place.expanduser().exists():
                raise InputError(
                    f"{label} was given in memory, so a recipe cannot name it; give models="
                    f"{{{label!r}: path}}"
                )
            given[label] = str(place)
        places = {label: _absolute(place) for label, place in given.items()}
        parameters: dict[str, Any] = {"file": file, "digest": self.coefficients.digest}
        if self.of:
            parameters["of"] = self.of
        return {
            "merge_method": "blend",
            "base_model": places["base"],
            "models": [{"model": places[label]} for label in self.pool.experts],
            "parameters": parameters,
        }

    def report(self) -> dict[str, Any]:
        """Return what is worth keeping beside the model, for JSON."""
        from pluribus import __version__

        steps = self.log.steps
        rows = self.coefficients.table()
        return {
            "pluribus": __version__,
            "method": type(self.method).__name__.lower(),
            "settings": {k: str(v) if callable(v) else v for k, v in asdict(self.method).items()},
            "experts": list(self.coefficients.experts),
            "steps": len(steps),
            "skipped": self.log.skipped,
            "stopped": self.log.stopped,
            "kept_step": self.log.best,
            "loss": [steps[0].loss, steps[-1].loss] if steps else [],
            "warnings": self.warnings,
            "notes": list(self.log.notes),
            "coefficients": {name: list(values) for name, values in rows},
            "history": self.history,
        }

    def save(
        self,
        out: str | Path,
        *,
        models: Mapping[str, str] | None = None,
        overwrite: bool = False,
        on_progress: Callable[[Any], None] | None = None,
    ) -> Weights:
        """Write the merged model as a folder, with the coefficients, recipe and history beside it.

        Appears under its name only when whole. Returns the merged weights.
        """
        import tempfile

        import yaml

        from pluribus.engine.driver import Options, execute, plan_pool

        with tempfile.TemporaryDirectory() as scratch:
            kept = Path(scratch) / FILE
            self.coefficients.save(kept)
            files = {FILE: kept.read_bytes()}
        files["tuning.json"] = json.dumps(self.report(), indent=1, default=str).encode()
        try:
            recipe = yaml.safe_dump(self.recipe(models=models), sort_keys=False)
        except InputError:
            recipe = None  # models in memory have no recipe; the coefficients rebuild them
        if recipe is not None:
            files["recipe.yml"] = recipe.encode()
        plan = plan_pool(self.pool, self.chain)
        return execute(plan, out, Options(overwrite=overwrite), on_progress, files).weights
