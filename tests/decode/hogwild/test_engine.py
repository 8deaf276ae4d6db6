"""Workers: layouts, steps that move, answers, endings."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1]))  # tests are collected without a package

from members import tiny, tokenizer  # type: ignore[import-not-found]

from pluribus.core.errors import InputError
from pluribus.decode.hogwild import HogwildEngine, PromptFormat, Sampling
from pluribus.decode.hogwild.answer import boxed, finished
from pluribus.decode.hogwild.engine import _Run

SHORT = PromptFormat(
    system="{count}: {names}",
    history="\n",
    others="o ",
    mark=" ...",
    own="m ",
    split=" s ",
    prefix="{name}{step}: ",
    openings=("plan ",),
    check="again? ",
    force=" so \\boxed{",
)
PLAIN = 70  # the number of a token that is some letter


class Script:
    """Draws a text for each worker, whatever the model thinks; then one letter for ever."""

    def __init__(self, engine, *texts):
        self.queues = [engine.encode(text) if isinstance(text, str) else text for text in texts]

    def draw(self, logits, rng):
        queue = self.queues[rng.initial_seed()]  # a worker's number, for seed 0
        token = queue.pop(0) if queue else PLAIN
        assert logits[token] > -torch.inf
        return token


def engine(workers=2, layout="combined", positions=512, **more):
    given = {"fmt": SHORT, "check_every": 0, "answer_tokens": 0} | more
    return HogwildEngine(tiny(1, positions=positions), tokenizer(), layout, workers, **given)


@pytest.mark.parametrize("layout", ["combined", "interleaved"])
@pytest.mark.parametrize("compat", [False, True])
def test_a_finished_step_moves_to_all(layout, compat):
    made = engine(layout=layout, compat=compat)
    script = Script(made, "One thing.\n\n", "two is long, and goes on for a good while yet")
    with made.reader.sharing(), torch.inference_mode():
        run = _Run(made, "what?", script, 0, None)
        while run.workers[0].count < 2:
            run.step()
        assert made.decode(run.history) == "Alice1: plan One thing.\n\n"
        assert run.workers[0].step_text() == "Alice2: "
        before = run.workers[1].block.n()
        run.step()
        assert run.workers[1].block.n() == before + 1
    late = 1 if compat else 0  # as in the authors' code, the last token is read in the next step
    assert run.common.n() == len(run.prompt) + len(run.history) - late
    assert run.workers[0].block.n() == len(made.encode("Alice2: ")) + late
    assert "two is" in run.workers[1].step_text()
    assert run.text().startswith("Alice1: plan One thing.\n\nAlice2: ")


def test_contiguous_work_stays():
    made = engine(layout="contiguous")
    out = made.run("what?", 30, sampling=Script(made, "One.\n\nTwo.\n\n", "x"))
    assert out.history == ""
    assert out.per_worker["Alice"].startswith("Alice1: plan One.\n\nTwo.\n\n")
    assert (out.steps, out.tokens) == (30, 60)


@pytest.mark.parametrize("layout", ["combined", "interleaved", "contiguous"])
def test_one_worker_writes_what_the_model_writes(layout):
    made = engine(1, layout, ban=())
    out = made.run("a fine film", 40, sampling=Sampling())
    model, text = made.reader.model, out.per_worker["Alice"]
    prompt = made.prompt("a fine film")
    prompt += made.encode("\n") if layout != "contiguous" else []
    prompt += made.encode("Alice1: plan ")
    ids = torch.tensor([prompt])
    expected = model.generate(
        ids, max_new_tokens=40, do_sample=False, suppress_tokens=[0], pad_token_id=0
    )
    assert text == made.decode(expected[0, len(prompt) - len(made.encode("Alice1: plan ")) :])


def test_workers_read_each_other_at_once():
    """The first worker's token changes what the second thinks in that very step."""
    made = engine()
    seen = []
    for letter in ("a", "b"):
        with made.reader.sharing(), torch.inference_mode():
            run = _Run(made, "what?", Script(made, letter, "c"), 0, None)
            run.step()
            pending = [worker.pending for worker in run.active]
            seen.append(made.reader.step(run.view, pending)[1])
    assert not torch.allclose(seen[0], seen[1])


def test_an_answer_ends_all():
    made = engine(3)
    out = made.run("6 times 7", 60, sampling=Script(made, "hm", "It is \\boxed{4{2}}.", "well"))
    assert (out.answer, out.answered_by) == ("4{2}", "Bob")
    assert out.steps < 60
    assert [event["kind"] for event in out.trace] == ["answer"]


def test_the_finisher_asks_for_an_answer():
    made = engine(answer_tokens=5)
    out = made.run("what?", 8, sampling=Script(made, "x", "y"), save_at=[4])
    assert (out.answered_by, set(out.saved)) == ("finisher", {4})
    given = made.prompt("what?") + made.encode("\n") + made.encode("o ")
    for name in made.names:
        given += made.encode(out.per_worker[name]) + made.encode(SHORT.mark)
    given += made.encode(SHORT.force)
    expected = made.reader.model.generate(
        torch.tensor([given]), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    text = made.decode(expected[0, len(given) :])
    assert out.answer == (boxed("\\boxed{" + text) or text.split("\n")[0].strip())


def test_one_may_end_and_others_go_on():
    made = engine(3, allow_end=True)
    end = made.tokenizer.eos_token_id
    out = made.run("what?", 20, sampling=Script(made, [PLAIN, end], "x", "y"))
    assert (out.steps, out.tokens) == (20, 2 + 20 + 20)
    assert {"kind": "end", "worker": "Alice"}.items() <= out.trace[0].items()
    out = made.run("what?", 20, sampling=Script(made, [end], [PLAIN, end], [end]))
    assert out.steps == 2


def test_the_end_is_banned_unless_allowed():
    made = engine()
    with pytest.raises(AssertionError):  # the script's own: the token stands at -inf
        made.run("what?", 3, sampling=Script(made, [made.tokenizer.eos_token_id], "x"))
    with pytest.raises(AssertionError):
        made.run("what?", 3, sampling=Script(made, "#", "x"))


def test_new_steps_begin_with_a_question_at_times():
    made = engine(check_every=10)
    out = made.run("what?", 60, sampling=Script(made, "One thing here.\n\n" * 4, "y"))
    steps = [event["text"] for event in out.trace if event["kind"] == "step"]
    assert steps[0] == "Alice1: plan One thing here.\n\n"
    assert steps[1] == "Alice2: again? One thing here.\n\n"


def test_pieces_make_the_text():
    made = engine()
    told = {0: "", 1: ""}

    def on_token(worker, piece):
        told[worker] += piece

    text = "Größe 😀, ja? " * 6
    out = made.run(
        "what?", 300, sampling=Script(made, text + "\\boxed{1}", text), on_token=on_token
    )
    assert told[0] == out.per_worker["Alice"]
    assert told[0].startswith("Alice1: plan Größe 😀")
    assert out.per_worker["Bob"].startswith(told[1][:60])


def test_seeds():
    made = engine()
    warm = Sampling(temperature=1.0)
    texts = [made.run("what?", 12, sampling=warm, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_by_hand():
    logits = torch.tensor([3.0, 2.0, 1.0, -torch.inf])
    rng = torch.Generator().manual_seed(0)
    assert Sampling().draw(logits, rng) == 0
    drawn = [Sampling(temperature=2.0).draw(logits, rng) for _ in range(3000)]
    share = torch.tensor([drawn.count(i) / 3000 for i in range(4)])
    torch.testing.assert_close(share, (logits / 2).softmax(0), rtol=0, atol=0.04)
    assert {Sampling(1.0, top_k=2).draw(logits, rng) for _ in range(200)} == {0, 1}
    chances = logits.softmax(0)  # 0.665, 0.245, 0.090
    assert 0.66 < chances[0] < 0.67
    assert {Sampling(1.0, top_p=0.66).draw(logits, rng) for _ in range(200)} == {0}
    assert {Sampling(1.0, top_p=0.67).draw(logits, rng) for _ in range(200)} == {0, 1}


def test_boxes_and_paragraphs():
    assert boxed("a \\boxed{1} and \\boxed{\\frac{1}{2}} b") == "\\frac{1}{2}"
    assert boxed("\\boxed{1} and \\boxed{2") == "1"
    assert boxed("nothing {1}") is None
    for text, whole in (
        ("So it is.\n\n", True),
        ("好。\n \n\n", True),
        ("a:\n\n- ", False),
        ("So it is\n\n", False),
        ("So it is.\n", False),
        ("\n\n", False),
    ):
        assert finished(text) is whole


def test_bad_input():
    for more, message in (
        ({"workers": 0}, "0 workers"),
        ({"workers": ["A", "A"]}, "its own name"),
        ({"workers": []}, "none"),
        ({"layout": "combine"}, "one of combined"),
        ({"check_every": -1}, "0 or more"),
    ):
        with pytest.raises(InputError, match=message):
            engine(**more)
    made = engine(positions=64)
    with pytest.raises(InputError, match="problem is empty"):
        made.run(" ")
    with pytest.raises(InputError, match="0 steps"):
        made.run("x", 0)
    with pytest.raises(InputError, match="the model takes 64"):
        made.run("review " * 80)
    with pytest.warns(UserWarning, match="made for 64 positions"):
        made.run("x", 48, sampling=Script(made, "x", "y"))
    for bad in (
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -1},
        {"temperature": float("nan")},
    ):
        with pytest.raises(InputError):
            Sampling(**bad)
