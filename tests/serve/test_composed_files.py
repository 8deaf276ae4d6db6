"""Servers' files with workers and strategies: what is opened, and what is refused."""

import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from composed_help import ROOM, WORDS, chat, samples
from server_help import tiny
from serving import background, openai

from pluribus.core.errors import InputError, MissingError, RecipeError
from pluribus.serve import config, open_all

FILE = """models:
  together: {hogwild: small, workers: [Ann, Ben], layout: interleaved, max_steps: 5}
  voted: {scale: small, strategy: self_consistency(n=3), extract: number}
  implied: {scale: tuned, strategy: {kind: best_of_n, n: 2}, verifier: implicit_reward}
  small: small
  tuned: {models: {ref: small, tuned: small, base: small}, fuser: {kind: eft}}
  far: {endpoint: "http://127.0.0.1:1/v1", model: m}
specialists: false
"""


@pytest.fixture
def place(tmp_path):
    tiny(3, positions=ROOM).save_pretrained(tmp_path / "small")
    WORDS.save_pretrained(tmp_path / "small")
    (tmp_path / "server.yml").write_text(FILE)
    return tmp_path / "server.yml"


def test_a_file_with_all_kinds(place):
    members = open_all(config.read(place))
    assert list(members) == ["together", "voted", "implied", "small", "tuned", "far"]
    assert members["together"].workers.names == ("Ann", "Ben")
    assert members["voted"].over is members["small"]
    with (
        background(members) as url,
        openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=60) as client,
    ):
        assert [one.id for one in client.models.list()] == list(members)
        got = chat(client, "implied", max_tokens=5)
        drawn = samples(client, 2, "tuned", max_tokens=5)
        # The tuned model is its own base here: all rewards are 0, and the first wins.
        assert got.choices[0].message.content == drawn.choices[0].message.content
        assert chat(client, "voted", max_tokens=4).usage.completion_tokens > 1
        told = chat(client, "together", max_completion_tokens=4).choices[0].message
        assert set(told.workers) == {"Ann", "Ben"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("workers: [", "workrs: ["), "server.yml:2: models.together: unknown key 'workrs'"),
        (("[Ann, Ben]", "0"), "server.yml:2: models.together: 0 workers"),
        (("[Ann, Ben]", "[Ann, Ann]"), "server.yml:2: models.together: workers 'Ann', 'Ann'"),
        (
            ("layout: interleaved", "layout: wide"),
            "server.yml:2: models.together.layout: .*comb",
        ),
        (("scale: small", "scale: smal"), "server.yml:3: models.voted: .*Did you mean 'small'"),
        (("scale: small", "scale: together"), "server.yml:3: models.voted: scale names 'together'"),
        (("scale: small", "scale: voted"), "server.yml:3: models.voted: scale names 'voted'"),
        (("self_consistency(n=3)", "self_consistncy"), "server.yml:3: .*self_consistency"),
        (("self_consistency(n=3)", '"sample, weighted"'), "names 2 strategies; give one"),
        (("self_consistency(n=3)", "best_of_n"), "best_of_n needs a verifier"),
        (("extract: number", "extract: nmber"), "server.yml:3: .*Did you mean 'number'"),
        (("verifier: implicit_reward", "verifier: exact"), "requests bring none"),
        (("verifier: implicit_reward", "verifier: head"), "head: FILE belong together"),
        (("extract: number", "temperature: 0"), "server.yml:3: models.voted.temperature"),
    ],
)
def test_files_that_are_refused(tmp_path, change, said):
    path = tmp_path / "server.yml"
    assert change[0] in FILE
    path.write_text(FILE.replace(*change, 1))
    with pytest.raises(RecipeError, match=said):
        config.read(path)


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        (
            "x: {scale: small, strategy: best_of_n, verifier: head, head: none}",
            MissingError,
            "no such",
        ),
        (
            "x: {scale: small, strategy: best_of_n, verifier: implicit_reward}",
            InputError,
            "fuser eft",
        ),
        (
            "x: {scale: far, strategy: best_of_n, verifier: implicit_reward}",
            InputError,
            "an endpoint shows none",
        ),
        (
            "x: {scale: far, strategy: beam_search, verifier: judge}",
            InputError,
            "say how the endpoint of 'far' does",
        ),
        ("x: {scale: 'small:a', strategy: sample}", RecipeError, "scale names 'small:a'"),
    ],
)
def test_members_that_do_not_fit(place, line, error, said):
    before = set(threading.enumerate())
    place.write_text(f"models:\n  small: small\n  {line}\n" + FILE.splitlines()[-2] + "\n")
    with pytest.raises(error, match=rf"models\.x: .*{said}"):
        open_all(config.read(place))
    assert set(threading.enumerate()) <= before
