"""Language models, classifiers and zoos as systems, against slow and obvious versions."""

import inspect
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pluribus.core.errors import InputError, MismatchError, MissingError
from pluribus.core.weights import Weights
from pluribus.tasks.evaluate import evaluate, evaluate_all
from pluribus.tasks.scorers import EXACT
from pluribus.tasks.systems import Classifier, ZooSystem, digest_of, zoo_tasks
from pluribus.tasks.task import Example, Examples, Prompt, Task, Text

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))
import tiny_model

from pluribus.tasks.language import CausalLM

QUESTIONS = [
    "Review: a fine film\nSentiment:",
    "Review: dull, tired and far too long for what little it has to say\nSentiment:",
    "Q:",
    "Request: 12 34 56\nIntent:",
    "Question: is it so ?\nAnswer:",
]
CHOICES = [" positive", " no", " out of scope", " accept reservations", " no way", " x"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model.tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model.model()


def lm(model, tokenizer, **more):
    return CausalLM(model=model, tokenizer=tokenizer, **more)


@torch.inference_mode()
def slowly(model, tokenizer, question, choice):
    """One whole text at a time, no padding, no cache: the mean log p of the choice's tokens."""
    start, whole = tokenizer(question)["input_ids"], tokenizer(question + choice)["input_ids"]
    assert whole[: len(start)] == start
    likely = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    rest = range(len(start), len(whole))
    return sum(likely[i - 1, whole[i]].item() for i in rest) / len(rest)


@pytest.mark.parametrize("budget", [1, 60, 4096])
def test_choices_score_as_one_text_at_a_time(model, tokenizer, budget):
    scores, cut = lm(model, tokenizer, batch_tokens=budget).choice_scores(QUESTIONS, CHOICES)
    wanted = [[slowly(model, tokenizer, q, c) for c in CHOICES] for q in QUESTIONS]
    torch.testing.assert_close(scores, torch.tensor(wanted), atol=1e-4, rtol=0)
    assert cut == 0
    assert scores.std(0).min() > 0.05  # the questions matter


def test_choices_of_one_token_need_no_second_pass(model, tokenizer):
    words = [" positive", " negative"]
    assert all(len(tokenizer(word)["input_ids"]) == 1 for word in words)
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    scores, _ = lm(model, tokenizer).choice_scores(QUESTIONS, words)
    hook.remove()
    assert len(calls) == 1
    wanted = [[slowly(model, tokenizer, q, c) for c in words] for q in QUESTIONS]
    torch.testing.assert_close(scores, torch.tensor(wanted), atol=1e-4, rtol=0)


def test_a_model_without_a_cache_scores_the_same(model, tokenizer):
    class Plain(torch.nn.Module):
        config = model.config

        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask, position_ids, use_cache=False):
            out = self.inner(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
            )
            return type(out)(logits=out.logits)

    ours, _ = lm(model, tokenizer).choice_scores(QUESTIONS, CHOICES)
    theirs, _ = lm(Plain(), tokenizer).choice_scores(QUESTIONS, CHOICES)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


SHOTS = "".join(f"{question} positive\n" for question in QUESTIONS)


def counted(model, monkeypatch):
    """Return a list that is told the shape of what every pass of a model reads."""
    read = []
    forward = model.forward

    def seen(input_ids=None, **given):
        read.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **given)

    seen.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", seen)
    return read


@pytest.mark.parametrize("budget", [60, 4096])
def test_worked_examples_are_read_once(model, tokenizer, budget, monkeypatch):
    """Scores are those of whole texts, and nobody reads the examples again."""
    asked = [SHOTS + question for question in QUESTIONS]
    wanted = [[slowly(model, tokenizer, q, c) for c in CHOICES] for q in asked]
    read = counted(model, monkeypatch)
    scores, _ = lm(model, tokenizer, batch_tokens=budget).choice_scores(asked, CHOICES)
    torch.testing.assert_close(scores, torch.tensor(wanted), atol=1e-4, rtol=0)
    examples = len(tokenizer(SHOTS)["input_ids"])
    assert read[0][0] == 1
    assert read[0][1] >= examples - 1
    longest = max(len(tokenizer(q + c)["input_ids"]) for q in QUESTIONS for c in CHOICES)
    assert all(length <= longest for _, length in read[1:])


def test_writing_behind_worked_examples_is_the_same(model, tokenizer, monkeypatch):
    asked = [SHOTS + question for question in QUESTIONS]
    with monkeypatch.context() as apart:
        apart.setattr("pluribus.core.beginning.LEAST", 1 << 30)
        wanted = lm(model, tokenizer).write(asked, 8, ("\n",))
    read = counted(model, monkeypatch)
    assert lm(model, tokenizer).write(asked, 8, ("\n",)) == wanted
    assert len({*wanted[0]}) > 1
    assert read[0][0] == 1
    assert all(length < read[0][1] for _, length in read[1:])


def test_a_beginning_is_read_apart_only_where_a_cache_can_stand_for_it(model, tokenizer):
    from transformers import MistralConfig, MistralForCausalLM

    from pluribus.core import beginning

    rows = [[1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 9, 9]]
    assert beginning.common(rows) == 2  # one token of each is left
    assert beginning.common([[5], [5, 6]]) == 0
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    kept = beginning.read(model, ids)
    twice = beginning.repeated(kept, 2)
    assert kept.get_seq_length() == twice.get_seq_length() == 6
    assert kept.layers[0].keys.shape[0] == 1
    assert twice.layers[0].keys.shape[0] == 2
    windowed = MistralForCausalLM(
        MistralConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                      num_attention_heads=2, num_key_value_heads=1, sliding_window=4)
    ).eval()  # fmt: skip
    assert beginning.read(windowed, ids) is None
    assert beginning.read(torch.nn.Linear(2, 2), ids) is None


def test_choices_that_merge_with_the_question_are_tokenised_together(model, tokenizer):
    """Without a space, `posi` + `tive` is the one token `positive`: nothing of it is shared."""
    question = "Review: fine\nSentiment: posi"
    whole = tokenizer(question + "tive")["input_ids"]
    shared = len(tokenizer("Review: fine\nSentiment:")["input_ids"])
    assert len(whole) == shared + 1
    scores, _ = lm(model, tokenizer).choice_scores([question], ["tive", "x"])
    with torch.inference_mode():
        likely = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    assert scores[0, 0].item() == pytest.approx(likely[-2, whole[-1]].item(), abs=1e-4)


def test_greedy_writing_is_greedy_one_token_at_a_time(model, tokenizer):
    answers, _ = lm(model, tokenizer, batch_tokens=64).write(QUESTIONS, 8, ())
    for question, answer in zip(QUESTIONS, answers, strict=True):
        ids = tokenizer(question)["input_ids"]
        start = len(ids)
        with torch.inference_mode():
            while len(ids) < start + 8:
                ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
                if ids[-1] == tokenizer.eos_token_id:
                    break
        told = tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert answer == told.lstrip("\n ")


def test_writing_ends_before_a_stop_text(model, tokenizer):
    (free,), _ = lm(model, tokenizer).write(QUESTIONS[:1], 12, ())
    stop = free[3:5]
    steps = []
    hook = model.register_forward_hook(lambda *_: steps.append(1))
    (cut,), _ = lm(model, tokenizer).write(QUESTIONS[:1], 12, (stop,))
    hook.remove()
    assert cut == free[: free.find(stop)]
    assert len(steps) < 12


def test_long_questions_lose_their_beginning_and_the_report_says_so(tokenizer):
    model = tiny_model.model(positions=48)
    task = review_task([("film " * 60, 0), ("fine", 1)])
    report = evaluate(lm(model, tokenizer), task)
    assert report.notes == ("1 questions were too long and lost their beginning",)
    with pytest.raises(InputError, match="no room for 60 tokens"):
        lm(model, tokenizer).write(QUESTIONS, 60, ())


def review_task(rows, train=()):
    prompt = Prompt(template="Review: {text}\nSentiment:")
    examples = Examples(
        [Example(Text(text), label) for text, label in rows],
        [Example(Text(text), label) for text, label in train],
        ("negative", "positive"),
    )
    return Task(name="reviews", load=lambda: examples, prompt=prompt)


def test_shots_stand_before_the_question_and_depend_on_the_seed(model, tokenizer, monkeypatch):
    train = [(f"film {i}", i % 2) for i in range(40)]
    task = review_task([("fine", 1), ("dull", 0)], train)
    asked = []
    monkeypatch.setattr(
        CausalLM,
        "choice_scores",
        lambda self, questions, choices, told: (asked.append(questions), (torch.eye(2), 0))[1],
    )
    for seed in (0, 0, 1):
        evaluate(lm(model, tokenizer, shots=3), task, seed=seed)
    first, again, other = asked
    assert first == again != other
    shots, question = first[0].rsplit("\n\n", 1)
    assert question == "Review: fine\nSentiment:"
    words = ("negative", "positive")
    allowed = {f"Review: {text}\nSentiment: {words[label]}" for text, label in train}
    assert len(set(shots.split("\n\n")) & allowed) == 3
    assert first[1].startswith(shots)
    with pytest.raises(InputError, match="40 examples to draw 41 shots"):
        evaluate(lm(model, tokenizer, shots=41), task)


def test_written_answers_are_scored(model, tokenizer):
    (said,), _ = lm(model, tokenizer).write(["Q: one\nA:"], 6, ("\n",))
    examples = Examples([Example(Text("one"), said), Example(Text("two"), "never said")], [])
    task = Task(
        name="written",
        load=lambda: examples,
        score=EXACT,
        family="answer",
        prompt=Prompt(template="Q: {text}\nA:", max_tokens=6),
    )
    report = evaluate(lm(model, tokenizer), task)
    assert (report.score, report.metric, report.floor) == (0.5, "exact match", None)


def test_opens_folders_and_weights_alike(tmp_path, tokenizer):
    folder = tiny_model.save(tmp_path / "m")
    opened = CausalLM.open(folder)
    scores, _ = opened.choice_scores(QUESTIONS, CHOICES)
    direct, _ = lm(tiny_model.model(), tokenizer).choice_scores(QUESTIONS, CHOICES)
    assert torch.equal(scores, direct)
    assert opened.label == str(folder)
    assert opened.digest() == lm(tiny_model.model(), tokenizer).digest()
    changed = {name: tensor.clone() for name, tensor in Weights.open(folder).items()}
    changed["model.norm.weight"][3] += 1e-3
    other = Weights.of(changed)
    other.folder = folder
    assert CausalLM.open(other).digest() != opened.digest()


def test_says_what_is_wrong_with_a_folder(tmp_path):
    with pytest.raises(MissingError, match="no such file or folder"):
        CausalLM.open(tmp_path / "none")
    folder = tiny_model.save(tmp_path / "m")
    bad = Weights.of({n: t for n, t in Weights.open(folder).items() if "norm" not in n})
    bad.folder = folder
    with pytest.raises(MismatchError, match=r"lacks model\.layers\.0\.input_layernorm\.weight"):
        CausalLM.open(bad)
    more = Weights.of({**Weights.open(folder), "extra": torch.zeros(2)})
    more.folder = folder
    with pytest.raises(MismatchError, match="has no extra"):
        CausalLM.open(more)
    short = dict(Weights.open(folder)) | {"model.norm.weight": torch.ones(7)}
    wrong = Weights.of(short)
    wrong.folder = folder
    with pytest.raises(MismatchError, match=r"model\.norm\.weight has shape \[7\], but \[32\]"):
        CausalLM.open(wrong)
    (folder / "config.json").unlink()
    with pytest.raises(MissingError, match=r"no config\.json beside the tensors"):
        CausalLM.open(folder)
    with pytest.raises(InputError, match="shots is -1"):
        CausalLM(model=tiny_model.model(), tokenizer=None, shots=-1)


def image_task(images, labels):
    rows = [Example(image, label) for image, label in zip(images, labels, strict=True)]
    return Task(name="pictures", load=lambda: Examples(rows, [], ("dark", "light")), family="image")


def test_classifier_sees_scaled_images():
    images = np.zeros((5, 4, 4, 3), np.uint8)
    images[3:] = 255
    seen = []

    def forward(x):
        seen.append(x)
        return torch.stack((0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5), 1)

    report = evaluate(
        Classifier(forward=forward, batch_size=2), image_task(images, [0, 0, 1, 1, 1])
    )
    assert [tuple(x.shape) for x in seen] == [(2, 3, 4, 4), (2, 3, 4, 4), (1, 3, 4, 4)]
    assert seen[2].max() == 1
    assert report.score == 0.8
    assert report.standard_error == pytest.approx(math.sqrt(0.8 * 0.2 / 5))
    assert report.floor == 0.6
    assert report.weights is None


def test_classifier_takes_arrays_modules_and_its_own_batches():
    task = image_task(np.arange(32, dtype=np.uint8).reshape(2, 4, 4), [0, 1])
    by_sum = Classifier(
        forward=lambda x: np.stack((100 - x, x - 100), 1),
        prepare=lambda images: np.array([image.sum(dtype=float) for image in images]),
    )
    assert evaluate(by_sum, task).score == 0.5  # 120 and 376: both light
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    first = evaluate(Classifier(forward=module), task).weights
    assert first == digest_of(module.state_dict())
    with torch.no_grad():
        module[1].weight[1, 7] += 1e-4
    assert evaluate(Classifier(forward=module), task).weights != first


def test_classifier_is_told_the_shape_that_is_expected():
    task = image_task(np.zeros((3, 4, 4), np.uint8), [0, 1, 0])
    with pytest.raises(MismatchError, match=r"shape \[3, 7\] for 3 rows .* expected \[3, 2\]"):
        evaluate(Classifier(forward=lambda x: torch.zeros(len(x), 7)), task)
    written = Task(name="w", load=lambda: Examples([Example(Text("a"), "b")], []))
    with pytest.raises(InputError, match="asks for written answers"):
        evaluate(Classifier(forward=lambda x: x), written)


def test_language_models_need_a_prompt(model, tokenizer):
    with pytest.raises(InputError, match="pictures has no prompt"):
        evaluate(lm(model, tokenizer), image_task(np.zeros((1, 4, 4), np.uint8), [0]))


def test_zoo_scores_equal_the_zoos_own():
    from pluribus.tasks.zoo import build

    sizes = {"train": 100, "val": 20, "test": 60, "width": 16, "depth": 1}
    zoo = build("demo8", 0, cache=False, epochs=10, threads=1, **sizes)
    average = {n: sum(e[n] for e in zoo.experts.values()) / 8 for n in zoo.base}
    systems = [
        ZooSystem(zoo=zoo, state=zoo.base, label="base"),
        ZooSystem(zoo=zoo, state=average, label="average"),
    ]
    experts = {f"demo8/{t}": ZooSystem(zoo=zoo, state=e) for t, e in zoo.experts.items()}
    reports = evaluate_all(systems, zoo_tasks(zoo), specialists=experts)
    for name, value in zoo.scores(average).items():
        found = reports.get("average", f"demo8/{name}")
        assert found is not None
        assert found.score == value
        assert found.normalised == zoo.normalised(average)[name]
    assert (
        reports.get("base", "demo8/rot90").weights != reports.get("average", "demo8/rot90").weights
    )
    with pytest.raises(InputError, match="no task of it; its tasks are demo8/"):
        evaluate(systems[0], image_task(np.zeros((1, 4, 4), np.uint8), [0]))
