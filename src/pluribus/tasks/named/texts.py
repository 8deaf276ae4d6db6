"""Text classification: fourteen sets, each with a prompt and a word for every class."""

from collections.abc import Callable
from functools import partial

from pluribus.tasks import sets
from pluribus.tasks.scorers import ACCURACY, MATTHEWS
from pluribus.tasks.task import Example, Examples, Prompt, Task, Text
from pluribus.tasks.texts import TextRow

REVIEW = Prompt(template="Review: {text}\nSentiment:")
ENTAILS = Prompt(
    template="Premise: {text}\nHypothesis: {pair}\nDoes the premise entail the hypothesis?",
    words={"entailment": "yes", "not_entailment": "no"},
)
PROMPTS = {
    "sst2": REVIEW,
    "trec": Prompt(
        template="Question: {text}\nThe answer is a kind of:",
        words={
            **{"ABBR": "abbreviation", "DESC": "description", "ENTY": "thing"},
            **{"HUM": "person", "LOC": "place", "NUM": "number"},
        },
    ),
    "mr": REVIEW,
    "subj": Prompt(template="Sentence: {text}\nThis sentence is"),
    "cr": REVIEW,
    "mpqa": Prompt(template="Phrase: {text}\nSentiment:"),
    "ag_news": Prompt(
        template="News: {text}\nTopic:",
        words={
            **{"Business": "business", "Sci/Tech": "technology"},
            **{"Sports": "sports", "World": "world"},
        },
    ),
    "clinc150": Prompt(template="Request: {text}\nIntent:", words={"oos": "out of scope"}),
    "banking77": Prompt(template="Bank customer: {text}\nIntent:"),
    "cola": Prompt(
        template="Sentence: {text}\nIs this sentence grammatical?",
        words={"acceptable": "yes", "unacceptable": "no"},
    ),
    "rte": ENTAILS,
    "mrpc": Prompt(
        template="First: {text}\nSecond: {pair}\nDo both sentences mean the same?",
        words={"paraphrase": "yes", "not_paraphrase": "no"},
    ),
    "sick": Prompt(
        template="Premise: {text}\nHypothesis: {pair}\nIs the hypothesis true?",
        words={"contradiction": "no", "entailment": "yes", "neutral": "maybe"},
    ),
    "wnli": ENTAILS,
}


def load(name: str, flip: bool = False) -> Examples:
    """Return the texts with the indices of their classes, in alphabetical order or its reverse."""
    found = sets.texts(name)
    last = len(found.classes) - 1
    index: Callable[[int], int] = (lambda label: last - label) if flip else (lambda label: label)

    def rows(split: list[TextRow]) -> list[Example]:
        return [Example(Text(row.text, row.pair or ""), index(row.label)) for row in split]

    classes = found.classes[::-1] if flip else found.classes
    return Examples(rows(found.test), rows([*found.train, *found.dev]), classes)


TASKS = [
    Task(
        name=name,
        load=partial(load, name, flip=name == "cola"),  # 1 means acceptable, as in GLUE
        score=MATTHEWS if name == "cola" else ACCURACY,
        prompt=prompt,
        data=(name, sets.TEXTS),
    )
    for name, prompt in PROMPTS.items()
]
GROUPS = {"text14": tuple(PROMPTS)}
