import pytest
import yaml
from pydantic import ValidationError

from pluribus.core.errors import RecipeError
from pluribus.core.refs import ModelRef
from pluribus.tokenizer import (
    Kind,
    TokenizerConfig,
    TokenizerError,
    VocabIn,
    align_models,
    tokenizer_config,
)

A = VocabIn("org/a", {"x": 0, "y": 1}, 4)
B = VocabIn("org/b", {"y": 0, "z": 1}, 2)


def read(text):
    return tokenizer_config(yaml.safe_load(text))


def test_full_block():
    config = read("""
        source: org/b
        tokens:
          x: {source: org/a}
          y: {source: {kind: model_token, model: org/a, token: x}, force: true}
          "<t>": {source: {kind: model_token, model: org/a, token_id: 3}}
          "<zero>": {source: {kind: zero}}
          "<plain>": {}
        pad_to_multiple_of: 8
    """)
    assert config.source == ModelRef.model_validate("org/b")
    out = align_models(config, [A, B], base=0)
    assert list(out.tokens) == ["y", "z", "x", "<t>", "<zero>", "<plain>"]
    assert out.added == ("x", "<t>", "<zero>", "<plain>")
    assert out.rows == 8
    kinds = [Kind.OVERRIDE, Kind.OWNER, Kind.OWN, Kind.OVERRIDE, Kind.ZERO, Kind.ZERO]
    assert out.maps[0].kind.tolist() == [*kinds, Kind.PAD, Kind.PAD]
    assert out.maps[1].index[[0, 2, 3]].tolist() == [0, 0, 3]
    assert [text for text in out.warnings if "<plain>" in text]
    assert not [text for text in out.warnings if "<zero>" in text]


@pytest.mark.parametrize("source", ["union", "base", "org/b"])
def test_legacy_spelling_is_the_same_object(source):
    assert tokenizer_config(tokenizer_source=source) == tokenizer_config({"source": source})


def test_defaults_and_absence():
    assert tokenizer_config() is None
    assert tokenizer_config({}).source == "union"
    assert tokenizer_config({"source": "base"}).source == "base"


def test_both_spellings_are_refused():
    with pytest.raises(RecipeError, match="both tokenizer_source and tokenizer"):
        tokenizer_config({}, "union")


@pytest.mark.parametrize(
    "text",
    [
        "{sorce: union}",
        "{tokens: {x: {sauce: org/a}}}",
        "{tokens: {x: {force: true}}}",
        "{tokens: {x: {force: 'yes', source: org/a}}}",
        "{tokens: {x: {source: {kind: model_token, model: org/a}}}}",
        "{tokens: {x: {source: {kind: model_token, model: org/a, token: x, token_id: 0}}}}",
        "{tokens: {x: {source: {kind: model_token, model: org/a, token_id: -1}}}}",
        "{tokens: {x: {source: {kind: nil}}}}",
        "{pad_to_multiple_of: 8.5}",
        "{pad_to_multiple_of: -8}",
    ],
)
def test_wrong_blocks_are_refused(text):
    with pytest.raises(ValidationError):
        read(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{source: org/c}", r"'org/c' is not one of the models.*Did you mean 'org/"),
        (
            "{tokens: {x: {source: org/c}}}",
            "token 'x': its source 'org/c' is not one of the models",
        ),
        ("{tokens: {x: {source: org/b}}}", "'org/b' has no row for 'x'"),
        (
            "{tokens: {x: {source: {kind: model_token, model: org/b, token_id: 2}}}}",
            "id 2 is beyond the 2 rows",
        ),
    ],
)
def test_requests_that_cannot_be_met(text, message):
    with pytest.raises(TokenizerError, match=message):
        align_models(read(text), [A, B], base=0)


def test_source_from_outside_the_merge():
    donor = VocabIn("org/c", {"q": 0, "x": 1}, 2)
    out = align_models(TokenizerConfig(source="org/c"), [A, B], base=0, donor=donor)
    assert out.tokens == {"q": 0, "x": 1}


def test_round_trip_through_plain_values():
    config = read("{tokens: {x: {source: org/a, force: true}}, pad_to_multiple_of: 2}")
    assert TokenizerConfig.model_validate(config.model_dump()) == config
