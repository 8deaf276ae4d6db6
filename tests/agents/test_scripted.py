"""Scripted models, cassettes and caches: what is said, recorded and kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pluribus
from pluribus.agents import Cached, ChatModel, Replay, Scripted
from pluribus.core.errors import FormatError, InputError, MissingError, OutputError
from pluribus.decode.scaling.interface import Completion

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


def test_a_list_is_said_in_turn():
    model = Scripted(["one", "two words", Completion("three", 9, "length")])
    assert [made.text for made in model.sample("q", 2)] == ["one", "two words"]
    [last] = model.sample(CHAT)
    assert (last.text, last.tokens, last.finish) == ("three", 9, "length")
    assert model.asked[1].prompt == CHAT
    with pytest.raises(InputError, match=r"no line left for request 3: 'Be brief"):
        model.sample(CHAT)


def test_a_function_sees_the_request():
    model = Scripted(lambda asked: [f"{asked.prompt}{asked.seed}{i}" for i in range(asked.n)])
    assert [made.text for made in model.sample("q", 2, seed=7)] == ["q70", "q71"]
    with pytest.raises(InputError, match="gave 1 replies when 3 were asked for"):
        Scripted(lambda asked: ["a"]).sample("q", 3)


def test_rules_are_searched_in_order():
    model = Scripted({"colou?r": ["red", "blue"], "^size": "large", ".": "what?"})
    assert [made.text for made in model.sample("the color", 3)] == ["red", "blue", "blue"]
    assert model.sample("size of it")[0].text == "large"
    assert model.sample("the size")[0].text == "what?"
    assert model.sample("the ", prefix="colour is")[0].text == "blue"
    with pytest.raises(InputError, match="no rule of the script fits"):
        Scripted({"a": "b"}).sample("c")


def test_stops_and_limits_are_kept_to():
    model = Scripted(lambda asked: "a b\n\nc d e")
    [made] = model.sample("q", stop=("\n\n", "e"))
    assert (made.text, made.finish, made.stopped_at, made.tokens) == ("a b", "stop", "\n\n", 2)
    [made] = model.sample("q", max_tokens=4)
    assert (made.text, made.finish, made.tokens) == ("a b\n\nc d", "length", 4)
    [made] = model.sample("q w", max_tokens=5)
    assert (made.finish, made.prompt_tokens) == ("end", 2)


@pytest.mark.parametrize(
    ("prompt", "settings", "said"),
    [
        ("q", {"n": 0}, "n is 0"),
        ("q", {"max_tokens": 0}, "max_tokens 0"),
        ("q", {"temperature": -1}, "temperature is -1"),
        ("q", {"top_p": 0}, "top_p 0"),
        ("q", {"stop": ("",)}, "a stop text is empty"),
        ([], {}, "no message"),
        ([{"role": "boss", "content": "x"}], {}, "expected a role of"),
        ([{"role": "user", "content": 3}], {}, "content that is a text"),
    ],
)
def test_bad_requests(prompt, settings, said):
    with pytest.raises(InputError, match=said):
        Scripted(["a"]).sample(prompt, **settings)


def test_bad_scripts():
    with pytest.raises(InputError, match="no regular expression"):
        Scripted({"(": "a"})
    with pytest.raises(InputError, match="has no reply"):
        Scripted({"a": []})


def test_completions_go_to_plain_values_and_back():
    made = Completion("a", 2, "stop", (-0.5, -1.0), 7, "\n")
    assert Completion.of(json.loads(json.dumps(made.to_dict()))) == made
    assert Completion.of({"text": "a", "tokens": 1, "finish": "end"}) == Completion("a", 1)
    with pytest.raises(InputError, match="expected a completion"):
        Completion.of({"text": "a"})


def test_the_interface_has_one_name_here():
    from pluribus.decode.scaling import Generator

    assert ChatModel is Generator


# -- cassettes -------------------------------------------------------------------------------------


def test_a_cassette_is_recorded_once_and_replayed_without_the_model(tmp_path):
    path = tmp_path / "tape.jsonl"
    model = Scripted(["one", "two", "three"])
    recorder = Replay(path, model)
    said = [recorder.sample(CHAT), recorder.sample(CHAT, seed=1), recorder.sample(CHAT)]
    recorder.close()
    assert [made.text for [made] in said] == ["one", "two", "three"]
    player = Replay(path)
    assert [player.sample(CHAT), player.sample(CHAT, seed=1), player.sample(CHAT)] == said
    assert player.sample(CHAT) == said[0]  # from the beginning again
    assert len(model.asked) == 3
    with pytest.raises(MissingError, match=r"seed=5\) was never recorded"):
        player.sample(CHAT, seed=5)


def test_a_cassette_grows(tmp_path):
    path = tmp_path / "tape.jsonl"
    first = Replay(path, Scripted(["one"]))
    first.sample("q")
    first.close()
    model = Scripted(["two"])
    second = Replay(path, model)
    assert second.sample("q")[0].text == "one"
    assert not model.asked
    assert second.sample("r")[0].text == "two"
    second.close()
    assert len(path.read_text().splitlines()) == 2


def test_cassettes_that_are_none(tmp_path):
    with pytest.raises(MissingError, match="no such cassette"):
        Replay(tmp_path / "tape.jsonl")
    (tmp_path / "tape.jsonl").write_text('{"request": "x"}\n')
    with pytest.raises(FormatError, match="line 1: no line of a cassette"):
        Replay(tmp_path / "tape.jsonl")


# -- caches ----------------------------------------------------------------------------------------


def test_a_cache_asks_once_for_the_same_request(tmp_path):
    model = Scripted(["one", "two", "three", "four", "five"])
    cached = Cached(model, tmp_path / "cache", name="m")
    assert cached.sample("q") == cached.sample("q")
    assert cached.sample("q", seed=1)[0].text == "two"
    assert cached.sample([{"role": "user", "content": "q"}])[0].text == "three"
    assert cached.sample("q", temperature=0)[0].text == "four"
    assert (cached.hits, cached.misses) == (1, 4)
    again = Cached(Scripted([]), tmp_path / "cache", name="m")
    assert again.sample("q")[0].text == "one"
    other = Cached(Scripted(["six"]), tmp_path / "cache", name="other")
    assert other.sample("q")[0].text == "six"
    assert again.count("a b") == 2


def test_a_broken_file_is_written_anew(tmp_path):
    cached = Cached(Scripted(["one", "two"]), tmp_path, name="m")
    cached.sample("q")
    [file] = tmp_path.iterdir()
    for broken in ("", "{", "[]", '{"completions": [{}]}', '{"completions": []}'):
        file.write_text(broken)
        fresh = Cached(Scripted(["new"]), tmp_path, name="m")
        assert fresh.sample("q")[0].text == "new"
        assert cached.sample("q")[0].text == "new"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_bad_caches(tmp_path):
    with pytest.raises(InputError, match="needs the model's name"):
        Cached(Scripted([]), tmp_path, name="")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="no folder for a cache"):
        Cached(Scripted([]), tmp_path / "file" / "cache", name="m")


WRITER = """
import sys
from pluribus.agents import Cached, Scripted
folder, number = sys.argv[1:]
text = f"{number} " * 5000
print("ready", flush=True)
sys.stdin.readline()
for turn in range(20):
    made = Cached(Scripted([text]), folder, name="m").sample(f"q{turn}")[0]
    assert len(set(made.text.split())) == 1  # one writer's whole text, whichever
"""


def test_writers_do_not_harm_each_other(tmp_path):
    source = str(Path(pluribus.__file__).parents[1])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(number)],
            env={**os.environ, "PYTHONPATH": source},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.communicate("go\n")
    assert [worker.returncode for worker in workers] == [0] * 3
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".partial"]
    assert len(list(tmp_path.iterdir())) == 20
