"""Models that answer by thinking longer: how a server's file describes them.

    together: {hogwild: out/merged, workers: 2, layout: combined}      # workers that write at once
    voted: {scale: merged, strategy: self_consistency(n=8)}            # samples of another model
    best: {scale: far, strategy: {kind: best_of_n, n: 8}, verifier: judge, budget_tokens: 4000}

Keys are the options of `pluribus hogwild` and `pluribus scale`.
"""

from functools import cached_property
from typing import Any, Literal

from pydantic import Field, model_validator

from pluribus.core.errors import RecipeError
from pluribus.recipe.schema import Strict

Verifier = Literal["exact", "unit_tests", "majority", "judge", "head", "implicit_reward"]
KNOWING = ("answer", "tests")  # what verifiers need that no request brings


class Hogwild(Strict):
    """Workers of one model that write at once; see `pluribus.decode.hogwild`."""

    hogwild: str = Field(min_length=1)  # the model's reference
    workers: int | list[str] = 2
    layout: Literal["combined", "interleaved", "contiguous"] = "combined"
    max_steps: int = Field(default=256, ge=1)  # tokens of each worker, where a request names none
    answer_tokens: int = Field(default=16, ge=0)  # for a last answer; 0: none is asked for
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)  # None: the model's
    top_p: float | None = Field(default=None, gt=0, le=1)
    device: str | None = None  # the server's
    dtype: str | None = None

    @model_validator(mode="after")
    def _checked(self) -> "Hogwild":
        from pluribus.decode.hogwild.prompts import names_of

        names_of(self.workers)
        return self


class Scale(Strict):
    """A strategy of `pluribus.decode.scaling` over another model of the file, or an endpoint."""

    scale: str = Field(min_length=1)  # the other one's name
    strategy: str | dict[str, Any]
    verifier: Verifier | None = None
    head: str | None = None  # the file of the verifier `head`
    extract: str = "final"  # where answers stand
    budget_tokens: int | None = Field(default=None, ge=1)  # of one answer, all samples together
    max_tokens: int | None = Field(default=None, ge=1)  # of a sample, where a request names none
    temperature: float = Field(default=0.8, gt=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=42, ge=0)  # of requests at temperature 0
    continuation: Literal["none", "continue_final_message", "prefix"] = "none"  # of an endpoint

    @model_validator(mode="after")
    def _checked(self) -> "Scale":
        from pluribus.decode.scaling.answers import extractor
        from pluribus.decode.scaling.strategies import facts
        from pluribus.decode.scaling.verifiers import VERIFIERS
        from pluribus.decode.scaling.verifiers import facts as judged_by

        extractor(self.extract)
        if facts(self.spender).verifier == "required" and self.verifier is None:
            raise RecipeError(
                f"the strategy {facts(self.spender).name} needs a verifier: majority, judge, head "
                "or implicit_reward"
            )
        if self.verifier and judged_by(VERIFIERS[self.verifier]).needs in KNOWING:
            raise RecipeError(
                f"the verifier {self.verifier} compares with what is known of a problem, and "
                "requests bring none; take majority, judge, head or implicit_reward"
            )
        if (self.verifier == "head") != (self.head is not None):
            raise RecipeError("verifier: head and head: FILE belong together; give both")
        return self

    @cached_property
    def spender(self) -> Any:
        """The strategy. Raises RecipeError for none, or several."""
        from pluribus.decode.scaling.interface import DRAWN
        from pluribus.decode.scaling.spelled import strategies
        from pluribus.decode.scaling.strategies import build

        if not isinstance(self.strategy, str):
            return build(self.strategy)
        found = list(strategies(self.strategy, sampling=DRAWN).values())
        if len(found) != 1:
            raise RecipeError(f"{self.strategy!r} names {len(found)} strategies; give one")
        return found[0]
