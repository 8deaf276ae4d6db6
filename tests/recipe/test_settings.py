"""Settings: gradients, filters and method parameters, worked by hand."""

from dataclasses import MISSING

import pytest

from pluribus.core.errors import RecipeError
from pluribus.merge.linear import Linear
from pluribus.merge.slerp import Slerp
from pluribus.merge.ties import Ties
from pluribus.recipe.settings import Condition, evaluate, parameters_of, parse, plain


@pytest.mark.parametrize(
    ("values", "t", "expected"),
    [
        ([0, 1], 0, 0),
        ([0, 1], 1, 1),
        ([0, 1], 0.25, 0.25),
        ([0, 0.5, 0.3, 0.7, 1], 1 / 3, 0.5 * 2 / 3 + 0.3 / 3),  # 4/3 of a step
        ([0, 0.5, 0.3, 0.7, 1], 2 / 3, 0.3 / 3 + 0.7 * 2 / 3),
        ([1, 0.7, 0.1], 0.5, 0.7),
        ([5], 0.3, 5),
        ([True, False], 0.4, True),
        ([True, False], 1, False),
        (["a", "b", "c"], 0.5, "b"),
        (["a", "b", "c"], 0.49, "a"),
    ],
)
def test_gradient(values, t, expected):
    assert evaluate(parse(values), "x", t) == pytest.approx(expected)


def test_first_filter_in_the_name_wins():
    setting = parse(
        [{"filter": "mlp", "value": [0, 1]}, {"filter": "up", "value": 7}, {"value": 3}]
    )
    assert evaluate(setting, "layers.0.mlp.up_proj", 0.5) == 0.5
    assert evaluate(setting, "layers.0.up", 0.5) == 7
    assert evaluate(setting, "lm_head", 0.5) == 3
    assert evaluate(parse([{"filter": "*", "value": 2}]), "anything", 0) == 2


def test_no_filter_in_the_name_is_unset():
    assert evaluate(parse({"filter": "mlp", "value": 1}), "norm", 0) is None


def test_a_filter_is_a_substring_not_a_pattern():
    assert evaluate(parse([{"filter": "m.p", "value": 1}]), "mlp", 0) is None


def test_written_numbers_become_numbers_before_interpolation():
    scale = parameters_of(Slerp)["t"]
    assert evaluate(parse(["1e-1", 0.3]), "x", 0.5, scale.read) == pytest.approx(0.2)
    with pytest.raises(RecipeError, match="t: 'half' is not a number"):
        evaluate(parse("half"), "x", 0, scale.read)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "empty list"),
        (None, "expected a number"),
        ([{"filter": "a", "value": 1}, 2], "stands among filters"),
        ([{"filtre": "a", "value": 1}], "Did you mean 'filter'"),
        ([{"filter": "a"}], "without a value"),
        ([{"filter": 3, "value": 1}], "filter 3 is not text"),
        ([{"filter": "a", "value": {"filter": "b", "value": 1}}], "not filters"),
        ([{"filter": "a", "value": [{"value": 1}]}], "not filters"),
        ([[1, 2]], "expected a number"),
        (float("nan"), "not a finite"),
    ],
)
def test_what_is_no_setting(value, message):
    with pytest.raises(ValueError, match=message):
        parse(value)


def test_plain_gives_back_what_was_written():
    for value in (0.5, True, [0, 1], [{"filter": "a", "value": [0, 1]}, {"value": 2}]):
        assert plain(parse(value)) == value
    assert plain(parse({"filter": "a", "value": 2})) == [{"filter": "a", "value": 2}]
    assert parse([{"value": 2}]) == (Condition(None, 2),)


def test_parameters_of_methods():
    ties = parameters_of(Ties)
    assert ties["density"].per_expert
    assert ties["density"].numeric
    assert ties["scale"].names == ("lambda", "scale")
    assert not ties["scale"].per_expert
    assert not ties["tie"].numeric
    assert not ties["normalize"].numeric
    assert parameters_of(Linear)["weight"].default == 1.0
    assert parameters_of(Slerp)["t"].default is MISSING
