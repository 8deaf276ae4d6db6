"""The OpenAPI document against the server: schemathesis sends what it allows, and what it doesn't.

The full run: `pluribus serve MODEL --port 8000`, and beside it `schemathesis run
http://127.0.0.1:8000/openapi.json --max-examples 500`.
"""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from server_help import tiny, tokenizer
from serving import background

from pluribus.serve import Limits, Served

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")

pytestmark = pytest.mark.slow
LIMITS = Limits(max_new_tokens=8, max_choices=4, max_prompt_tokens=50_000)
EXAMPLES = int(os.environ.get("PLURIBUS_EXAMPLES", "6"))


@pytest.fixture(scope="module")
def document():
    members = {"plain": Served("plain", tiny(3, positions=100_000), tokenizer())}
    with background(members, LIMITS, keys=("k",)) as url:
        yield schemathesis.openapi.from_url(f"{url[:-3]}/openapi.json")


OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/metrics"),
]


def test_these_are_all(document):
    found = [one.ok() for one in document.get_all_operations()]
    assert {(one.method.upper(), one.path) for one in found} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        (method, path, mode)
        for method, path in OPERATIONS
        for mode in ("positive", "negative")
        if (method, mode) != ("GET", "negative")  # there is nothing to get wrong
    ],
)
def test_requests_and_answers_are_as_described(document, method, path, mode):
    cases = document[path][method].as_strategy(schemathesis.GenerationMode(mode))

    @hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @hypothesis.given(case=cases)
    def ask(case):
        if mode == "negative" or possible(case.body):
            case.call_and_validate(headers={"Authorization": "Bearer k"}, timeout=60)

    ask()


def possible(body):
    """Whether a body keeps to the rules that the document tells in words."""
    if not isinstance(body, dict):
        return True
    given, n = body.get("prompt"), body.get("n") or 1
    several = isinstance(given, list) and not isinstance(given[0], int | float)
    return (
        (body.get("top_logprobs") is None or body.get("logprobs") is True)
        and body.get("best_of") in (None, n)
        and n * (len(given) if several else 1) <= LIMITS.max_choices
    )
