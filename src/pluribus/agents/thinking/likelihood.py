"""A mode that chooses by likelihood, at once or after a thought: for models that follow no form.

    answer = argmax_c  1/|c| sum_j log p(c_j | question, thought, cue, c_<j)      |c|: tokens of c

Nothing has to be read from a text, so no answer is unread. The thought is written greedily; tokens
are its own and those of the answer.
"""

from dataclasses import dataclass

from pluribus.agents.local import LocalModel
from pluribus.agents.thinking.modes import Attempt
from pluribus.core.errors import InputError
from pluribus.core.merger import _checked
from pluribus.decode.scaling._prompts import check_fields, fill
from pluribus.decode.scaling.budget import Budget, Meter
from pluribus.decode.scaling.interface import Generator, Problem

THOUGHT = "Let me think:"


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Takes the likeliest of some answers, after `thinking` tokens of thought at most."""

    choices: tuple[str, ...]
    thinking: int = 0
    template: str = "{question}\n\n"
    thought: str = THOUGHT  # how a thought begins
    cue: str = "Answer:"  # what the answer follows
    name: str = ""

    def __post_init__(self) -> None:
        """Raise InputError for fewer than two choices, two alike, or less than no thought."""
        check_fields("the template", self.template, ("question",))
        if len(self.choices) < 2 or len(set(self.choices)) < len(self.choices):
            raise InputError(
                f"the choices are {', '.join(self.choices) or 'none'}; give two or more that differ"
            )
        if self.thinking < 0:
            raise InputError(f"thinking is {self.thinking} tokens; give 0 or more")
        if not self.name:
            object.__setattr__(self, "name", "cot" if self.thinking else "direct")

    @property
    def most_tokens(self) -> int:
        """The most tokens of one attempt; an answer has one a byte at most, and two around it."""
        return self.thinking + 2 + max(len(f" {one}".encode()) for one in self.choices)

    def run(self, problem: Problem, model: Generator, budget: Budget | None = None) -> Attempt:
        """See `Mode`. Raises InputError for a model that is not on this machine.

        A budget of tokens leaves room for the longest answer, and the rest for the thought.
        """
        if not isinstance(model, LocalModel):
            raise InputError(
                f"likelihoods are those of a local model, not of a {type(model).__name__}; use "
                "Direct and CoT, which read what is written"
            )
        from pluribus.tasks.language import CausalLM

        asked = fill(self.template, question=problem.question)
        said, tokens = "", 0
        most = self.thinking
        if budget is not None and budget.tokens is not None:
            longest = max(model.count(f" {one}") for one in self.choices)
            most = min(most, budget.tokens - longest)
        if most > 0:
            made = Meter(model, budget).sample(
                asked, 1, temperature=0.0, max_tokens=most, prefix=self.thought
            )
            said = self.thought + "".join(one.text for one in made) + "\n"
            tokens = sum(one.tokens for one in made)
        scorer = CausalLM(model=model.model, tokenizer=model.tokenizer)
        read = model.text(asked, said + self.cue)
        scores, _ = scorer.choice_scores([read], [f" {one}" for one in self.choices])
        chosen = self.choices[int(scores[0].argmax())]
        return Attempt(chosen, said, tokens + model.count(f" {chosen}"))


_checked(Likelihood, "likelihood")
