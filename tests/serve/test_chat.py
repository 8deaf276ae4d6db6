"""The terminal client: commands, pipes, a terminal's look, Ctrl-C; and servers in the process."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from rich.console import Console
from server_help import greedy, moved, tiny, tokenizer  # type: ignore[import-not-found]
from serving import answering, background  # type: ignore[import-not-found]

from pluribus.cli import main
from pluribus.core.errors import FormatError, InputError, NetworkError, PluribusError
from pluribus.serve import Served
from pluribus.serve.chat import HELP, Chat
from pluribus.serve.client import Client
from pluribus.serve.prompts import PLAIN_STOP, plain

ESCAPE = "\x1b"


class Parrot:
    """A client whose models say their name and what they were told."""

    def __init__(self, stops_after=None):
        self.stops_after = stops_after
        self.closed = 0
        self.asked = []

    def models(self):
        return ["large", "small"]

    def stream(self, model, messages, **settings):
        self.asked.append((model, messages, settings))
        if messages[-1]["content"] == "fail":
            raise InputError("it broke")
        try:
            for number, piece in enumerate((f"**{model}**", " says ", messages[-1]["content"])):
                if number == self.stops_after:
                    raise KeyboardInterrupt
                yield piece
        finally:
            self.closed += 1


def talk(lines, client=None, terminal=False, **settings):
    out, errors = io.StringIO(), []
    console = Console(file=out, force_terminal=terminal, width=60, height=20)
    made = Chat(client or Parrot(), console, errors.append, **settings)
    given = iter([*lines])

    def read():
        line = next(given, None)
        if line is None:
            raise EOFError
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    made.run(read)
    return made, out.getvalue(), errors


def test_a_conversation_goes_on():
    client = Parrot()
    made, out, errors = talk(["hello", "", "again"], client, system="Be kind.", temperature=0.5)
    assert out == "**large** says hello\n**large** says again\n"
    assert errors == []
    model, messages, settings = client.asked[1]
    assert model == "large"
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[2]["content"] == "**large** says hello"
    assert settings == {"temperature": 0.5}
    assert len(made.messages) == 4


def test_commands(tmp_path):
    saved = tmp_path / "talk.json"
    lines = ["a", "/use small", "/models", "b", "/compare", "/compare c", f"/save {saved}"]
    _, out, errors = talk(lines)
    assert errors == []
    told = out.splitlines()
    assert told[1:5] == ["small answers", "  large", "* small", "**small** says b"]
    both = ["== large", "**large** says b", "== small", "**small** says b"]
    assert told[5:9] == both
    assert told[9:13] == [line.replace("says b", "says c") for line in both]
    kept = json.loads(saved.read_text())
    assert kept["model"] == "small"
    assert [m["content"] for m in kept["messages"]] == [
        *("a", "**large** says a"),
        *("b", "**small** says b"),
        *("c", "**small** says c"),
    ]
    _, out, _ = talk(["a", "/clear", "b", f"/save {tmp_path / 'talk.md'}", "/quit", "never"])
    assert (
        tmp_path / "talk.md"
    ).read_text() == "**user**\n\nb\n\n**assistant**\n\n**large** says b\n"
    assert "never" not in out
    client = Parrot()
    talk(["/system Be brief.", "a", "/system", "b"], client)
    assert [m[0]["role"] for _, m, _ in client.asked] == ["system", "user"]
    assert all(line.split()[0] in talk(["/help"])[1] for line in HELP)


def test_what_is_refused(tmp_path):
    (tmp_path / "there.md").write_text("kept")
    lines = [
        *("/use smal", "/usr x", "/compare", "/save", f"/save {tmp_path / 'there.md'}"),
        *(f"/save {tmp_path / 'no' / 'x.md'}", "fail", "ok"),
    ]
    made, out, errors = talk(lines)
    for said, one in zip(
        (
            *("Did you mean 'small'", "no command /usr.*", "nothing was asked", "a file's name"),
            *("exists; choose another", "No such file", "it broke"),
        ),
        errors,
        strict=True,
    ):
        assert said.rstrip(".*") in one
    assert out == "**large** says ok\n"
    assert (tmp_path / "there.md").read_text() == "kept"
    assert made.failed
    with pytest.raises(PluribusError, match="there are: large, small"):
        talk([], model="big")


def test_answers_cannot_steer_the_terminal():
    """Models write anything; a terminal is not to obey them."""
    _, out, _ = talk(["a\x1b]0;title\x07\x9b31mb\tc"], terminal=True)
    assert "\x1b]" not in out
    assert "\x9b" not in out
    assert "\x07" not in out
    assert "a]0;title31mb" in out
    _, out, _ = talk(["a\x1b[31mb"])  # what is piped on is what was said
    assert "a\x1b[31mb" in out


def test_a_comparison_that_fails_forgets_nothing(tmp_path):
    class Failing(Parrot):
        def stream(self, model, messages, **settings):
            if fails:
                raise InputError("it broke")
            return super().stream(model, messages, **settings)

    fails: list = []
    made, _, errors = talk(["a"], Failing())
    kept = list(made.messages)
    fails.append(1)
    made.take("/compare")
    assert len(errors) == 2
    assert made.messages == kept
    made.take("/save ~nobody-of-this-name/x.md")
    assert "nobody-of-this-name" in errors[-1]


class Workers(Parrot):
    """Two write before the answer comes."""

    def stream(self, model, messages, thought=None, **settings):
        for n in range(3):
            for worker in ("Alice", "Bob"):
                if thought is not None:
                    thought(worker, f"{worker.lower()}\x1b[2J {n} ")
                    yield ""
        yield "the answer"


def test_workers_are_seen_side_by_side():
    made, out, errors = talk(["a"], Workers(), terminal=True)
    assert errors == []
    assert made.messages[1]["content"] == "the answer"
    assert "\x1b[2J" not in out
    console = Console(file=io.StringIO(), width=30, height=6)
    own = Chat(Workers(), console, pytest.fail)
    console.print(own._side_by_side({"Alice": "first\x1b[2J\nsecond line", "Bob": "x" * 20}))
    shown = [line.split() for line in console.file.getvalue().splitlines()]
    assert shown == [["Alice", "Bob"], ["first[2J", "x" * 13], ["second", "line", "x" * 7]]
    assert talk(["a"], Workers())[1] == "the answer\n"


def test_a_small_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=20, height=2)
    Chat(Parrot(), console, pytest.fail).ask("hello " * 30)
    assert "says" in console.file.getvalue()


def test_servers_that_break_off_or_say_nonsense():
    for sent, error, said in (
        (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', NetworkError, "broke off"),
        (b"data: 3\n\n", FormatError, "no JSON object"),
        (b"data: {\n\n", FormatError, "no JSON"),
        (b'data: {"choices": null}\n\ndata: [DONE]\n\n', None, ""),
        (b'data: {"choices": [3, {"delta": 4}]}\n\ndata: [DONE]\n\n', None, ""),
    ):
        with answering(200, sent) as (url, _):
            client = Client(url)
            if error is None:
                assert list(client.stream("m", [])) == []
            else:
                with pytest.raises(error, match=said):
                    list(client.stream("m", []))
            client.close()
    with pytest.raises(InputError, match="no header can"):
        Client("http://127.0.0.1:1", "kéy")


def test_ctrl_c_stops_the_answer_alone():
    client = Parrot(stops_after=2)
    made, out, errors = talk(["a", KeyboardInterrupt, "b"], client)
    assert out == "**large** says \n(stopped)\n\n**large** says \n(stopped)\n"
    assert errors == []
    assert client.closed == 2  # the server was told
    assert made.messages[1]["content"] == "**large** says "


def test_a_terminal_sets_markdown():
    _, out, _ = talk(["hello", "/compare x"], terminal=True)
    assert ESCAPE in out
    assert "\x1b[1mlarge\x1b[0m says x" in out
    plain_text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert "large ──" in plain_text
    assert ESCAPE not in talk(["hello", "/compare x"])[1]


# -- with models -----------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    base = tiny(1)
    for name, model in {"large": tiny(0), "base": base, "expert": moved(base, 2)}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "mix.yml").write_text(
        "models: {large: large, base: base, expert: expert}\nfuser: {kind: logits_fusion}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, lines, *arguments):
    out, err = io.StringIO(), io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as stop:
            main(["chat", *arguments])
    return int(stop.value.code or 0), out.getvalue(), err.getvalue()


def answer(model, question, most):
    words = tokenizer()
    ids = words(plain([{"role": "user", "content": question}]))["input_ids"]
    found = [i for i in greedy(model, ids, most) if i != 0]
    return words.decode(found, skip_special_tokens=True).partition(PLAIN_STOP)[0]


def test_a_stack_beside_its_members(place, monkeypatch):
    from pluribus.decode.stack import build, read

    code, out, err = run(monkeypatch, ["/compare film"], "mix.yml", "--max-new-tokens", "6")
    assert (code, err) == (0, "")
    assert ESCAPE not in out
    models = {
        "mix": build(read("mix.yml")).model,
        "mix:large": tiny(0),
        "mix:base": tiny(1),
        "mix:expert": moved(tiny(1), 2),
    }
    expected = "".join(f"== {n}\n{answer(m, 'film', 6)}\n" for n, m in models.items())
    assert out == expected


def test_json_and_quiet(place, monkeypatch):
    told = run(monkeypatch, ["film", "a"], "base", "--max-new-tokens", "4", "--quiet")
    first = answer(tiny(1), "film", 4)
    assert told[1].startswith(f"{first}\n")
    code, out, err = run(
        monkeypatch, ["film"], "base", "--max-new-tokens", "4", "--json", "--system", "S"
    )
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["model"] == "base"
    assert [m["role"] for m in found["messages"]] == ["system", "user", "assistant"]


def test_a_server_that_there_is(place, monkeypatch):
    monkeypatch.setenv("TALK_KEY", "k")
    with background({"one": Served("one", tiny(3), tokenizer())}, keys=("k",)) as url:
        asked = [url[:-3], "--key-env", "TALK_KEY", "--max-new-tokens", "5"]
        code, out, err = run(monkeypatch, ["film", "/use two"], *asked)
        assert out == answer(tiny(3), "film", 5) + "\n"
        assert code == 1
        assert "no model 'two'" in err
        code, out, err = run(monkeypatch, ["film"], url)
        assert (code, out) == (1, "")
        assert "no API key is given" in err
        assert "--key-env VARIABLE" in err
        client = Client(url, "k")
        with pytest.raises(InputError, match="greater than or equal"):
            list(client.stream("one", [{"role": "user", "content": "a"}], max_tokens=0))
        client.close()
    gone = Client("http://127.0.0.1:1")
    with pytest.raises(NetworkError, match="cannot be reached"):
        gone.models()
    gone.close()
