"""Named tasks: all of them load, their prompts and words fit, groups and misspellings."""

import subprocess
import sys

import numpy as np
import pytest

from pluribus import tasks
from pluribus.core.errors import FormatError, InputError
from pluribus.tasks import named, texts
from pluribus.tasks.task import Example, Prompt, Task, Text

TEXT14 = [
    *("sst2", "trec", "mr", "subj", "cr", "mpqa", "ag_news"),
    *("clinc150", "banking77", "cola", "rte", "mrpc", "sick", "wnli"),
]


def test_groups_hold_what_they_say():
    groups = named.groups()
    assert {name: len(members) for name, members in groups.items()} == {
        "vision10": 10,
        "text14": 14,
        "bbh": 27,
    }
    assert sorted(groups["text14"]) == sorted(TEXT14)
    assert len(named.names()) == 10 + 14 + 27 + 2
    everything = named.expand(["vision10", "text14", "bbh", "gsm8k", "strategyqa"])
    assert sorted(task.name for task in everything) == named.names()


def test_expanding_keeps_the_order_and_drops_doubles():
    found = named.expand(["gsm8k", "sst2", "text14", "gsm8k"])
    assert [task.name for task in found[:3]] == ["gsm8k", "sst2", "trec"]
    assert len(found) == 15


def test_the_package_names_them_too():
    assert tasks.get("sst2") is named.get("sst2")
    assert tasks.names() == named.names()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sst3", r"no task is called 'sst3'; .* the groups .*text14.* Did you mean 'sst2'\?"),
        ("bbh/navigat", "Did you mean 'bbh/navigate'"),
        ("bbh", "'bbh' is a group of 27 tasks: bbh/boolean_expressions"),
    ],
)
def test_says_what_was_meant(name, message):
    with pytest.raises(InputError, match=message):
        named.get(name)


def test_naming_tasks_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from pluribus import tasks; tasks.get('sst2'); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["digits", "mnist", "gtsrb", "omniglot", "pneumoniamnist"])
def test_vision_tasks_load(name, real_data):
    examples = named.get(name).load()
    assert named.get(name).family == "image"
    labels = {row.target for row in examples.test}
    assert labels <= set(range(len(examples.classes)))
    assert examples.test[0].input.dtype == np.uint8


SIZES = {
    "sst2": (7792, 1821, 2),
    "trec": (5452, 500, 6),
    "clinc150": (18200, 5500, 151),
    "banking77": (10003, 3080, 77),
    "cola": (8543, 1028, 2),
    "rte": (2488, 277, 2),
    "mrpc": (4076, 1725, 2),
    "sick": (5000, 4927, 3),
    "strategyqa": (2061, 229, 2),
    "gsm8k": (3500, 1319, 0),
    "bbh/navigate": (150, 100, 0),
}


@pytest.mark.parametrize("name", [*TEXT14, "strategyqa", "gsm8k", "bbh/navigate", "bbh/snarks"])
def test_text_tasks_load_and_can_be_asked(name, real_data):
    task = named.get(name)
    examples = task.load()
    if name in SIZES:
        assert (len(examples.train), len(examples.test), len(examples.classes)) == SIZES[name]
    assert task.prompt is not None
    question = task.prompt.ask(examples.test[0])
    assert examples.test[0].input.text in question
    assert examples.test[0].input.pair in question
    assert question == question.rstrip()
    choices = task.prompt.choices(examples.classes)
    assert len(set(choices)) == len(examples.classes)
    assert all(choice.startswith(" ") and choice.strip() for choice in choices)
    unknown = set(task.prompt.words) - set(examples.classes)
    assert not unknown


def test_every_bbh_task_has_rows(real_data):
    for name in named.groups()["bbh"]:
        assert len(named.get(name).load().test) >= 59


def test_cola_counts_acceptable_as_one(real_data):
    examples = named.get("cola").load()
    assert examples.classes == ("unacceptable", "acceptable")
    assert named.get("cola").metric == "matthews"
    acceptable = sum(row.target for row in examples.test) / len(examples.test)
    assert acceptable == pytest.approx(0.69, abs=0.01)


def test_shots_read_as_worked_examples():
    prompt = Prompt(template="Text: {text}\nKind:", words={"oos": "none of these"})
    shots = [Example(Text("one"), 1), Example(Text("two"), 0)]
    classes = ("card_arrival?", "oos")
    assert prompt.choices(classes) == [" card arrival", " none of these"]
    assert prompt.before(shots, classes) == (
        "Text: one\nKind: none of these\n\nText: two\nKind: card arrival\n\n"
    )
    written = [Example(Text("3 + 4"), "7", "3 + 4 = 7\n#### 7"), Example(Text("1"), "1")]
    assert prompt.before(written, ()) == (
        "Text: 3 + 4\nKind: 3 + 4 = 7\n#### 7\n\nText: 1\nKind: 1\n\n"
    )


def test_rows_that_do_not_fit_a_task_are_refused(own_folders):
    data, _ = own_folders
    texts.write(data / "gsm8k.jsonl.gz", [{"question": "q", "answer": "a", "split": "test"}])
    with pytest.raises(FormatError, match="gsm8k has a row whose final is None"):
        named.get("gsm8k").load()
    texts.write(data / "strategyqa.jsonl.gz", [{"question": "q", "label": "?", "split": "test"}])
    with pytest.raises(FormatError, match=r"strategyqa has the label '\?'"):
        named.get("strategyqa").load()
    texts.write(data / "bbh.jsonl.gz", [{"task": "other", "split": "test"}])
    with pytest.raises(FormatError, match="no test rows"):
        named.get("bbh/navigate").load()


def test_other_packages_add_tasks(monkeypatch):
    own = Task(name="own", load=lambda: pytest.fail("not read before it is asked for"))

    class Point:
        name = "own"

        def load(self):
            return own

    monkeypatch.setattr(named, "entry_points", lambda group: [Point()])
    named._known.cache_clear()
    try:
        assert named.get("own") is own
    finally:
        named._known.cache_clear()
