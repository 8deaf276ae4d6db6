"""Modes: what is asked, read and counted."""

from dataclasses import replace

import pytest

from pluribus.agents import Scripted
from pluribus.agents.thinking import ByStrategy, CoT, Direct, Task
from pluribus.agents.thinking.modes import choice, marked, try_all
from pluribus.agents.thinking.spelled import modes
from pluribus.core.errors import InputError, RecipeError
from pluribus.decode.scaling import Budget, SelfConsistency
from pluribus.decode.scaling.answers import number
from pluribus.decode.scaling.interface import Completion, Problem
from pluribus.tasks.suites import suite

PROBLEM = Problem(question="Is it?", answer="Yes", extract=choice(("Yes", "No")))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Answer: Yes", "Yes"),
        ("The answer is no. Or rather, answer: yes.\nDone", "yes."),
        ("so #### 42\nmore", "42"),
        (r"thus \boxed{7}", "7"),
        ("**Answer:** `42`", "42"),
        ("I cannot say", None),
        ("Answer:", None),
        ("<think>the answer is No</think>Yes", None),
        ("<think>the answer is No</think>Final answer: Yes", "Yes"),
    ],
)
def test_the_last_mark(text, wanted):
    assert marked(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("yes", "Yes"),
        ("**No**.", "No"),
        ("No, since it is not", "No"),
        ("(yes) it is", "Yes"),
        ("Nobody knows", None),
        ("", None),
        ("...", None),
        ("Maybe. Yes", None),
    ],
)
def test_choices(text, wanted):
    assert choice(("Yes", "No"))(text) == wanted


def test_direct_asks_for_ten_tokens_and_reads_what_it_gets():
    model = Scripted(["Yes", "No because of one two three four five six seven eight", "Perhaps"])
    first, second, third = (Direct().run(PROBLEM, model) for _ in range(3))
    assert (first.answer, first.tokens, first.parsed) == ("Yes", 1, True)
    assert (second.answer, second.tokens) == ("No", 10)
    assert (third.answer, third.parsed) == (None, False)
    asked = model.asked[0]
    assert asked.prompt.startswith("Is it?\n\n")
    assert "without reasoning" in asked.prompt
    assert (asked.max_tokens, asked.temperature, asked.n) == (10, 0.0, 1)


def test_thoughts_need_a_mark():
    model = Scripted(["It is so.\nAnswer: Yes", "It is so. Yes"])
    first, second = (CoT().run(PROBLEM, model) for _ in range(2))
    assert (first.answer, first.tokens) == ("Yes", 5)
    assert second.answer is None
    assert second.tokens == 4
    assert "step by step" in model.asked[0].prompt
    assert model.asked[0].max_tokens == 1024
    sums = Problem(question="3 + 5", answer="8", extract=number)
    assert CoT().run(sums, Scripted(["Answer: it is 8.0 apples"])).answer == "8"


def test_a_budget_cuts_a_thought_short():
    attempt = CoT().run(PROBLEM, Scripted(["well then Answer: Yes"]), Budget(tokens=3))
    assert (attempt.answer, attempt.tokens) == (None, 3)


def test_tokens_are_those_written_in_truth():
    thinks = Scripted([Completion("Yes", 400)])
    assert Direct().run(PROBLEM, thinks).tokens == 400


def test_a_strategy_votes_over_marked_thoughts():
    said = ["a Answer: No", "b Answer: Yes", "Answer: Yes", "No"]
    mode = ByStrategy(strategy=SelfConsistency(n=4))
    attempt = mode.run(PROBLEM, Scripted(lambda asked: said))
    assert (attempt.answer, attempt.tokens) == ("Yes", 3 + 3 + 2 + 1)
    assert mode.name == "self_consistency"
    assert mode.most_tokens == 4 * 2048
    assert ByStrategy(strategy=SelfConsistency(n=4), most_tokens=99).most_tokens == 99


class Together(Scripted):
    """Answers rows of several prompts."""

    def __init__(self):
        super().__init__(lambda asked: "Yes" if "1" in asked.prompt else "So. Answer: No and no")
        self.requests = 0

    def sample_many(self, prompts, seeds, **settings):
        self.requests += 1
        return [self.sample(p, seed=s, **settings)[0] for p, s in zip(prompts, seeds, strict=True)]


@pytest.mark.parametrize("mode", [Direct(seed=3), CoT(max_tokens=3, temperature=0.5)])
def test_problems_are_asked_together_as_each_would_be(mode):
    problems = [replace(PROBLEM, question=f"Is it {i}?") for i in range(3)]
    alone, model = Together(), Together()
    wanted = [mode.run(one, alone) for one in problems]
    assert try_all(mode, problems, model) == wanted
    assert len({one.answer for one in wanted}) == 2
    assert (model.requests, alone.requests) == (1, 0)
    assert model.asked == alone.asked  # prompts, seeds, temperature and limits


def test_problems_are_asked_one_by_one_where_a_request_cannot_tell_them_apart():
    problems, votes = [PROBLEM, PROBLEM], ByStrategy(strategy=SelfConsistency(n=2))
    model = Together()
    assert len(try_all(Direct(), problems, model, Budget(tokens=5))) == 2  # of each problem
    assert len(try_all(votes, problems, model)) == 2
    assert model.requests == 0
    assert len(try_all(Direct(), problems, Scripted(["Yes", "No"]))) == 2


def test_modes_as_text():
    direct, cot, vote = modes("direct, cot,self_consistency(n=3, confidence=0.9)", max_tokens=50)
    assert (direct.name, direct.most_tokens) == ("direct", 10)
    assert (cot.name, cot.most_tokens) == ("cot", 50)
    assert (vote.name, vote.most_tokens) == ("self_consistency(n=3, confidence=0.9)", 150)
    with pytest.raises(RecipeError, match="no list of modes"):
        modes("direct,,cot")
    with pytest.raises(RecipeError, match="self_consistency"):
        modes("self_consistenc")
    with pytest.raises(InputError, match="best_of_n needs a verifier"):
        modes("direct, best_of_n")


def test_refused():
    with pytest.raises(InputError, match=r"needs {question}"):
        CoT(template="Think")
    with pytest.raises(InputError, match="template is empty"):
        Direct(template=" ")
    with pytest.raises(InputError, match="max_tokens"):
        Direct(max_tokens=0)
    with pytest.raises(InputError, match="is no strategy"):
        ByStrategy(strategy="vote")
    with pytest.raises(InputError, match="differ by more than case"):
        choice(("a", "A"))
    with pytest.raises(InputError, match="the choices are A;"):
        choice(("A",))


def test_tasks_that_cannot_be_measured():
    yes = Problem(question="q", answer="Yes")
    with pytest.raises(InputError, match="the task t has no problem"):
        Task.of("t", [])
    with pytest.raises(InputError, match="problem 2 of t has no answer"):
        Task.of("t", [yes, Problem(question="q")])
    with pytest.raises(InputError, match="all 2 problems of t have the answer 'Yes'"):
        Task.of("t", [yes, yes])
    two = [yes, Problem(question="q", answer="No")]
    with pytest.raises(InputError, match="mean 'needs_state'"):
        Task.of("t", two, {"need_state": True})
    with pytest.raises(InputError, match="says nothing of implicit_pattern"):
        Task.of("t", two, {"needs_state": True})
    with pytest.raises(InputError, match="shows 6 images, which needs an endpoint for vision"):
        Task.of_suite("faces", 30)


def test_a_suite_as_a_task():
    made = Task.of_suite("exceptions", 30, seed=2)
    items = suite("exceptions", 30, seed=2)
    assert [one.question for one in made.problems] == [one.prompt for one in items]
    assert [one.answer for one in made.problems] == [one.answer for one in items]
    assert made.problems[0].find("b.") == "B"
    assert [name for name, has in made.traits.items() if has] == [
        "implicit_pattern",
        "exceptions_dominate",
    ]
