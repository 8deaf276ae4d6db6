"""Spaces: from objects, dataclasses and functions, and points as the ordinary objects they are."""

from dataclasses import dataclass, field

import numpy as np
import pyglove as pg
import pytest
import torch

from pluribus.core.chain import Chain, parse
from pluribus.core.errors import InputError
from pluribus.merge.linear import Linear
from pluribus.merge.ties import Ties
from pluribus.search import floatv, manyof, oneof, permutate, space, symbolic
from pluribus.search.torch_glue import lift, lower


@dataclass
class Block:
    width: int = 8
    names: list = field(default_factory=list)
    inner: object = None


# -- from objects ----------------------------------------------------------------------------------


def test_a_merge_method_becomes_a_space_by_replacing_values():
    made = space(Ties(weight=(1.0, 2.0)), {"density": floatv(0.1, 1.0), "scale": oneof([1, 2])})
    assert list(made.decisions) == ["density", "scale"]
    assert made.decode(pg.DNA([0.25, 1])) == Ties(density=0.25, scale=2.0, weight=(1.0, 2.0))


def test_the_twin_of_a_method_holds_placeholders_itself():
    twin = symbolic(Ties)(density=oneof([0.2, 0.4]), weight=[1.0, floatv(0.0, 1.0)])
    made = space(twin)
    assert made.decode(pg.DNA([0, 0.5])) == Ties(density=0.2, weight=(1.0, 0.5))
    with pytest.raises(InputError, match=r"Ties has no field 'densty'; it has: .* 'density'"):
        symbolic(Ties)(densty=1)
    with pytest.raises(InputError, match="is not a dataclass"):
        symbolic(int)


def test_a_class_stands_for_its_defaults():
    assert space(Ties, {"density": oneof([0.3])}).decode(pg.DNA(0)) == Ties(density=0.3)


def test_a_chain_is_searched_inside():
    made = space(
        parse("trim(density=0.2) >> elect() >> mean()"), {"parts[0].density": floatv(0.1, 0.9)}
    )
    found = made.decode(pg.DNA(0.7))
    assert isinstance(found, Chain)
    assert str(found) == "trim(density=0.7) >> elect >> mean"


def test_candidates_may_be_methods_with_placeholders_of_their_own():
    made = space({"method": oneof([Linear(), symbolic(Ties)(density=floatv(0.1, 1.0))]), "n": 3})
    assert made.decode(pg.DNA(0)) == {"method": Linear(), "n": 3}
    assert made.decode(pg.DNA((1, 0.5))) == {"method": Ties(density=0.5), "n": 3}
    assert type(made.decode(pg.DNA(0))) is dict


def test_a_plain_dataclass_holds_placeholders_directly():
    made = space(Block(width=oneof([4, 16]), names=[oneof(["a", "b"]), "c"], inner=Block()))
    found = made.decode(pg.DNA([1, 0]))
    assert found == Block(16, ["a", "c"], Block())
    assert isinstance(found.names, list)


def test_lists_and_mappings_stay_what_they_are():
    made = space({"a": manyof(2, [1, 2, 3]), "b": [permutate(["x", "y"])], "c": None})
    assert made.decode(pg.DNA([[2, 0], [1, 0]])) == {"a": [3, 1], "b": [["y", "x"]], "c": None}


def test_pyglove_objects_and_specs_are_spaces():
    @pg.members([("x", pg.typing.Any())])
    class Child(pg.Object):
        pass

    assert space(Child(x=oneof([1, 2]))).decode(pg.DNA(1)).x == 2
    spec = pg.dna_spec(pg.Dict(x=oneof([1, 2])))
    assert space(spec).decode(pg.DNA(1)) == pg.DNA(1)


# -- from functions --------------------------------------------------------------------------------


def test_a_function_becomes_a_space_by_being_run():
    def program():
        return oneof([lambda: floatv(0.0, 1.0), lambda: 3.0]) + oneof([10, 20])

    made = space(program)
    assert len(made.decisions) == 3
    assert made.decode(pg.DNA([(0, 0.5), 1])) == 20.5
    assert made.decode(pg.DNA([1, 0])) == 13.0


def test_a_function_with_arguments_is_refused():
    with pytest.raises(InputError, match="takes no arguments, but this needs x"):
        space(lambda x: x)


# -- points ----------------------------------------------------------------------------------------


def test_points_and_values_go_both_ways():
    made = space({"a": oneof([1, {"b": floatv(0.0, 1.0)}]), "m": Ties(), "c": manyof(2, [1, 2, 3])})
    rng = pg.geno.Random(seed=1)
    rng.setup(made.spec)
    for _ in range(20):
        dna = rng.propose()
        assert made.encode(made.decode(dna)) == dna
    with pytest.raises(InputError, match="is not in the space"):
        made.encode({"a": 7, "m": Ties(), "c": [1, 2]})


def test_a_point_of_another_space_is_refused():
    with pytest.raises(InputError, match="is not a point of this space"):
        space({"a": oneof([1, 2])}).decode(pg.DNA(0.5))


def test_choices_have_labels():
    made = space(
        {
            "m": oneof([{"merge": "ties", "density": floatv(0.0, 1.0)}, {"merge": "sum", "k": 2}]),
            "e": manyof(2, [{"model": "a"}, {"model": "b"}, {"model": "c"}], sorted=True),
        }
    )
    assert made.point(pg.DNA([(0, 0.25), [0, 2]])) == {
        "m": "ties",
        "m[=0/2].density": 0.25,
        "e": ["a", "c"],
    }
    assert made.point(pg.DNA([1, [0, 1]])) == {"m": "sum, k 2", "e": ["a", "b"]}


def test_size_and_constancy():
    assert space({"a": oneof([1, 2]), "b": manyof(2, [1, 2, 3], sorted=True)}).size == 6
    assert space({"a": floatv(0.0, 1.0)}).size == -1
    assert space({"a": 1}).constant
    assert not space({"a": oneof([1])}).constant


def test_the_digest_names_placeholders_and_constants():
    def make(high=1.0, constant=1, name="a"):
        return space({name: floatv(0.0, high), "c": constant, "f": np.mean}).digest

    assert make() == make()
    assert len({make(), make(high=2.0), make(constant=2), make(name="b")}) == 4


def test_the_twin_of_a_twin_is_itself_and_lowering_leaves_placeholders():
    twin = symbolic(Ties)(density=oneof([0.2, 0.4]))
    assert lift(twin) is twin
    assert lower(twin) is twin
    assert lower(lift([{"m": Ties()}])) == [{"m": Ties()}]


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "heavy", [torch.zeros(2), np.zeros(2), torch.nn.Linear(1, 1)], ids=lambda x: type(x).__name__
)
def test_no_tensors_in_the_tree(heavy):
    with pytest.raises(InputError, match=r"^a\.b\[1\] holds a .*put a path, a key or a function"):
        space({"a": {"b": [1, heavy]}})


def test_nor_among_the_candidates():
    with pytest.raises(InputError, match=r"^a\[=1\] holds a Linear: .*a function that makes it"):
        space({"a": oneof([1, torch.nn.Linear(1, 1)])})


def test_a_value_that_its_field_refuses_is_found_before_the_search():
    with pytest.raises(InputError, match=r"^density: Ties: density = 1\.5.*take it out"):
        space(Ties(), {"density": oneof([0.5, 1.5])})
    with pytest.raises(InputError, match=r"^m\.density: Ties: density = 0\.0"):
        space({"m": Ties()}, {"m.density": floatv(0.0, 1.0)})


def test_a_path_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(InputError, match=r"nothing stands at 'densty'.*Did you mean 'density'"):
        space(Ties(), {"densty": oneof([1])})


def test_other_mistakes():
    with pytest.raises(InputError, match="not a class"):
        space(int)
    with pytest.raises(InputError, match="keys are text, not 1"):
        space({1: oneof([1, 2])})
    with pytest.raises(InputError, match="changes go to the object"):
        space(space({"a": 1}), {"a": 2})
    with pytest.raises(InputError, match="changes don't apply"):
        space(lambda: oneof([1, 2]), {"a": 2})
