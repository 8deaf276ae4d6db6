"""The learned verifier: labels by roll-outs worked by hand, and a head that is the optimum."""

import sys
from pathlib import Path

import pytest
import torch
from toys import Tree

from pluribus.agents import LocalModel
from pluribus.core.errors import FormatError, InputError, MissingError
from pluribus.decode.scaling import Problem
from pluribus.decode.scaling.verifiers.head import Head, Labelled, hidden, roll_out
from pluribus.decode.stack import Opened

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests have no package
from members import tiny, tokenizer  # type: ignore[import-not-found]


@pytest.fixture(scope="module")
def model():
    return LocalModel(Opened(tiny(0), tokenizer()))


def whole(text):
    return text


def test_labels_are_shares_of_right_rollouts():
    # From the root a|z and a|w in turn; from a| four roll-outs: z w z w, of which z is right.
    children = {"": ["a|z"], "a|": ["z", "w", "z", "y"]}
    problem = Problem(question="q", answer="a|z", extract=whole)
    rows = roll_out([problem], Tree(children), traces=1, rollouts=4, separator="|")
    assert [(row.steps, row.label) for row in rows] == [(("a|",), 0.5), (("a|", "z"), 1.0)]


def rows(texts, labels):
    problem = Problem(question="Review:")
    return [Labelled(problem, (text,), label) for text, label in zip(texts, labels, strict=True)]


def test_states_are_those_of_one_pass(model):
    problem, steps = Problem(question="Review:"), [" a fine", " film", ""]
    words = model.tokenizer
    parts = [words(text)["input_ids"] for text in ("Review:", " a fine", " film")]
    with torch.no_grad():
        out = model.model(
            torch.tensor([[token for part in parts for token in part]]), output_hidden_states=True
        )
    ends = [len(parts[0]) + len(parts[1]) - 1, sum(map(len, parts)) - 1]
    wanted = out.hidden_states[-1][0][[*ends, ends[1]]].double()
    torch.testing.assert_close(hidden(model, problem, steps), wanted)


def test_the_head_is_the_optimum_and_tells_good_from_bad(model):
    good, bad = [" a fine film", " fine fine", " funny"], [" dull", " a tired one", " dull dull"]
    labelled = rows(good + bad, [1.0, 0.9, 1.0, 0.0, 0.1, 0.0])
    head = Head.train(model, labelled, decay=0.1)
    scores = [head.score(row.problem, list(row.steps))[0] for row in labelled]
    assert min(scores[:3]) > max(scores[3:])
    # At the optimum of the bias the mean score is the mean label; of a weight, the gradient is 0.
    labels = torch.tensor([row.label for row in labelled], dtype=torch.float64)
    told = torch.tensor(scores, dtype=torch.float64)
    assert float(told.mean()) == pytest.approx(float(labels.mean()), abs=1e-4)
    x = torch.stack([hidden(model, row.problem, list(row.steps))[-1] for row in labelled])
    spread = x.std(0)
    z = (x - x.mean(0)) / spread
    slope = z.T @ (told - labels) / len(labels) + 0.1 * head.weight * spread
    assert float(slope.abs().max()) < 1e-3
    assert len(head.score(labelled[0].problem, ["a", " fine", " film"])) == 3


def test_it_is_saved_and_read(model, tmp_path):
    head = Head.train(model, rows([" fine", " dull"], [1.0, 0.0]))
    head.save(tmp_path / "head.safetensors")
    again = Head.load(model, tmp_path / "head.safetensors")
    problem = Problem(question="Review:")
    assert again.score(problem, [" film"]) == pytest.approx(head.score(problem, [" film"]))
    with pytest.raises(MissingError, match="no such head"):
        Head.load(model, tmp_path / "no.safetensors")
    (tmp_path / "bad").write_text("hello")
    with pytest.raises(FormatError, match="no head of a verifier"):
        Head.load(model, tmp_path / "bad")
    wide = LocalModel(Opened(tiny(0, width=64), tokenizer()))
    with pytest.raises(FormatError, match="another model"):
        Head.load(wide, tmp_path / "head.safetensors")


def test_what_is_refused(model):
    with pytest.raises(InputError, match="two different labels"):
        Head.train(model, rows([" fine", " dull"], [1.0, 1.0]))
    with pytest.raises(InputError, match="traces is 0"):
        roll_out([], Tree({}), traces=0)
    with pytest.raises(InputError, match="has no answer"):
        roll_out([Problem(question="q")], Tree({}))
