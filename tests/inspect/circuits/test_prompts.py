"""Tasks, tokens and positions; and what is refused."""

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package

import head_models  # type: ignore[import-not-found]

from pluribus.core.errors import InputError, MismatchError
from pluribus.inspect.circuits import Prompt, PromptTask, Stage, encode, tasks

WORDS = head_models.tokenizer


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_tasks(name):
    """Twins differ in one place; spans are what they say; the same seed gives the same prompts."""
    task = tasks.get(name)
    drawn = task.generate(3, 60)
    assert drawn == task.generate(3, 60)
    assert drawn != task.generate(4, 60)
    for prompt in drawn:
        assert prompt.clean != prompt.corrupt
        assert prompt.answer != prompt.alternative
        assert prompt.options[0] == prompt.answer
        assert prompt.alternative in prompt.options
        assert prompt.answer not in prompt.also
        for first, last in prompt.spans.values():
            assert prompt.clean[first:last].strip(" ,.") == prompt.clean[first:last]
    if name != "greater_than_pairs":  # the tokenizer has single digits
        made = task.fitting(WORDS(), 3, 20)
        assert len(made) == 20
        assert made.clean.shape == made.corrupt.shape
        assert ((made.clean != made.corrupt).sum(1) == 1).all()


def test_two_names_by_hand():
    prompt = tasks.IOI.generate(0, 1)[0]
    said = {name: prompt.clean[first:last] for name, (first, last) in prompt.spans.items()}
    assert said["S1"] == said["S2"] == prompt.alternative.strip()
    assert said["IO"] == prompt.answer.strip()
    first, last = prompt.spans["S2"]
    twin = prompt.clean[:first] + prompt.answer.strip() + prompt.clean[last:]
    assert prompt.corrupt == twin
    assert prompt.clean.count(said["IO"]) == 1


@pytest.mark.parametrize("name", ["colored_objects", "colored_objects_natural"])
def test_colors_by_hand(name):
    for prompt in tasks.get(name).generate(1, 40):
        said = {name: prompt.clean[first:last] for name, (first, last) in prompt.spans.items()}
        colors = [one.strip().lower() for one in prompt.options]
        assert said["right"] == colors[0]
        assert {said["wrong1"], said["wrong2"]} == set(colors[1:])
        assert said["asked"] == said["object"]
        assert prompt.spans["asked"][0] > prompt.spans["object"][0]
        assert f"{said['right']} {said['object']}" in prompt.clean
        # the twin asks for the object of the alternative's colour
        other = re.split(r"\W", prompt.corrupt[prompt.spans["asked"][0] :])[0]
        assert f"{prompt.alternative.strip().lower()} {other}" in prompt.clean


def test_later_years_by_hand():
    for prompt in tasks.get("greater_than").generate(0, 40):
        year = int(prompt.clean[prompt.spans["year"][0]])
        below = int(prompt.corrupt[prompt.spans["year"][0]])
        assert below < int(prompt.alternative) < year < int(prompt.answer) <= 9
        assert {int(one) for one in (prompt.answer, *prompt.also)} == set(range(year, 10))
    for prompt in tasks.get("greater_than_pairs").generate(0, 40):
        year = int(prompt.clean[slice(*prompt.spans["year"])])
        below = int(prompt.corrupt[slice(*prompt.spans["year"])])
        assert below < int(prompt.alternative) < year < int(prompt.answer)
        assert {int(one) for one in (prompt.answer, *prompt.also)} == set(range(year + 1, 100))


def test_positions():
    made = tasks.IOI.fitting(WORDS(), 0, 12)
    tokenizer = WORDS()
    for row, prompt in enumerate(made.prompts):
        end = int(made.ends[row])
        ids = tokenizer(prompt.clean)["input_ids"]
        assert made.clean[row, : end + 1].tolist() == ids
        assert not made.clean[row, end + 1 :].any()
        place = int(made.position("S2")[row])
        assert tokenizer.decode([ids[place]]).strip() == prompt.alternative.strip()
        assert int(made.position("S1+1")[row]) == int(made.position("S1")[row]) + 1
        assert int(made.position("END")[row]) == end
        assert tokenizer.decode([int(made.answers[row])]) == prompt.answer
    part = made.part(2, 5)
    assert len(part) == 3
    assert part.clean.shape[1] == int(part.ends.max()) + 1
    assert part.position("IO").tolist() == made.position("IO")[2:5].tolist()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("S3", "no position 'S3'; they have END, IO, S1, S2"),
        ("S2+9", r"S2\+9 lies behind the end"),
        ("S2+x", "write NAME or NAME"),
    ],
)
def test_no_such_position(name, said):
    made = tasks.IOI.fitting(WORDS(), 0, 4)
    with pytest.raises(InputError, match=said):
        made.position(name)


def test_positions_that_some_prompts_lack():
    one, other = tasks.COLORED_OBJECTS_NATURAL.generate(0, 2)
    spans = {name: where for name, where in other.spans.items() if name != "wrong2"}
    lacking = Prompt(other.clean, other.corrupt, other.answer, other.alternative, spans)
    made = encode(WORDS(), [one, lacking])
    made.position("wrong1")
    with pytest.raises(InputError, match=r"1 prompts have no 'wrong2', such as"):
        made.position("wrong2")


def test_twins_of_different_length():
    prompt = Prompt("When Mary went", "When Mary and Tom went", " John", " Mary")
    with pytest.raises(MismatchError, match=r"3 and 5 tokens.*' went' \| 'When' ' Mary' ' and' '"):
        encode(WORDS(), [prompt])


def test_answers_of_several_tokens():
    prompt = Prompt("Mary went to the park", "John went to the park", " zyzzyva", " Mary")
    with pytest.raises(InputError, match=r"the answer ' zyzzyva' is not one token.*'zz'.*choose"):
        encode(WORDS(), [prompt])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: encode(WORDS(), []), "no prompts"),
        (lambda: tasks.get("ioo"), "Did you mean 'ioi'"),
        (lambda: tasks.get("greater_than_pairs").fitting(WORDS(), 0, 3), "0 of 60 prompts fit"),
        (lambda: Stage("a", "o"), "side is logits, q, k or v"),
        (lambda: Stage("a", "q"), "logits are of no stage"),
        (lambda: Stage("a", "q", "b", "large"), "all, positive or negative"),
    ],
)
def test_refused(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_a_task_of_ones_own():
    task = PromptTask("mine", "words", lambda rng: rng.choice(tasks.IOI.generate(0, 3)))
    assert len(task.fitting(WORDS(), 0, 5)) == 5
