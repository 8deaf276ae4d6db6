"""YAML documents: duplicates, aliases, lines."""

import pytest

from pluribus.core.errors import RecipeError
from pluribus.recipe.text import documents, dump


def test_documents_without_empty_ones():
    found = documents("# c\n---\na: 1\n---\n---\nb: [1, 2]\n")
    assert [document.value for document in found] == [{"a": 1}, {"b": [1, 2]}]


def test_lines_of_keys_and_items():
    document = documents("a: 1\nmodels:\n  - model: x\n    parameters:\n      weight: 2\n")[0]
    assert document.line(["models", 0, "parameters", "weight"]) == 5
    assert document.line(["models", 0, "unknown"]) == 3
    assert document.line([]) == 1


def test_key_given_twice_names_both_lines():
    with pytest.raises(RecipeError, match=r"r.yml:3: 'dtype' is given twice.*line 1"):
        documents("dtype: float16\nmerge_method: ties\ndtype: float32\n", "r.yml")


@pytest.mark.parametrize("text", ["a: [1, 2", "a: b: c", "a:\n\t- b", "!!python/name:os.system {}"])
def test_not_yaml(text):
    with pytest.raises(RecipeError, match=r"r\.yml:[12]"):
        documents(text, "r.yml")


def test_alias_bomb():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(RecipeError, match="aliases stand for more than"):
        documents("\n".join(lines))


def test_alias_within_itself():
    with pytest.raises(RecipeError, match="contains itself"):
        documents("a: &a [1, *a]")


def test_honest_alias_and_merge_key():
    text = "x: &x {weight: 1}\ny: *x\nz:\n  <<: *x\n  density: 2\n"
    assert documents(text)[0].value["z"] == {"weight": 1, "density": 2}


def test_too_long_and_too_deep():
    with pytest.raises(RecipeError, match="characters"):
        documents("a" * 5_000_000)
    with pytest.raises(RecipeError, match=r"not a usable|not valid"):
        documents("[" * 5000 + "]" * 5000)


def test_dump_writes_plain_lists_on_one_line():
    assert dump({"t": [0, 0.5, 1], "m": [{"a": 1}]}) == "t: [0, 0.5, 1]\nm:\n- a: 1\n"


def test_characters_that_no_yaml_holds():
    with pytest.raises(RecipeError, match=r"recipe\.yml: not valid YAML"):
        documents("merge_method: ties\x00", "recipe.yml")
