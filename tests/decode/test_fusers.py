"""Every fuser against a slow obvious version, its properties, and what it refuses."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from pluribus.core.errors import InputError, MismatchError, NonFiniteError, RecipeError
from pluribus.decode import (
    EFT,
    FUSERS,
    Contrastive,
    DynamicFusion,
    Mixture,
    Product,
    StaticFusion,
)
from pluribus.decode.fusers import build, settings_of

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
import brute  # type: ignore[import-not-found]

GRID = np.round(np.arange(21) * 0.1, 12)
TYPES = pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])


def logits(roles, rows=4, v=50, seed=0, dtype=torch.float64, scale=2.0):
    rng = torch.Generator().manual_seed(seed)
    return {
        role: (scale * torch.randn(rows, v, generator=rng, dtype=torch.float64)).to(dtype)
        for role in roles
    }


def tuned(experts=2, near=0.5, **settings):
    """A large and a small base, and experts that are the small one moved."""
    given = logits(["large", "base"], **settings)
    moves = logits([f"e{t}" for t in range(experts)], **{**settings, "seed": 7, "scale": near})
    return {**given, **{role: given["base"] + move for role, move in moves.items()}}


def numpy(given):
    return {role: x.double().numpy() for role, x in given.items()}


# -- logits fusion ---------------------------------------------------------------------------------


@TYPES
@pytest.mark.parametrize("experts", [1, 2, 4])
def test_dynamic_weights_are_those_of_the_whole_grid(experts, dtype, close):
    given = tuned(experts, near=0.8, rows=8, v=1000, dtype=dtype)
    made = DynamicFusion()(given)
    known = numpy(given)
    seen = set()
    for row in range(8):
        a, fused = brute.grid_search(
            known["large"][row],
            known["base"][row],
            [known[f"e{t}"][row] for t in range(experts)],
            GRID,
        )
        found = [float(made.weights[f"e{t}"][row]) for t in range(experts)]
        np.testing.assert_allclose(found, a, atol=1e-6)  # the exact index: steps are 0.1
        np.testing.assert_allclose(made.log_probs[row], fused, atol=close)
        seen.add(tuple(a))
    assert len(seen) > 1  # rows differ


@pytest.mark.parametrize(
    ("settings", "brutally"),
    [
        ({"mode": "joint", "grid": (0.0, 2.0, 0.25)}, {"mode": "joint"}),
        ({"targets": "selected"}, {"selected": True}),
        ({"grid": (0.0, 3.0, 0.2)}, {}),
    ],
)
def test_other_searches(settings, brutally):
    given = tuned(2, near=1.0, rows=5, v=200)
    fuser = DynamicFusion(**settings)
    made = fuser(given)
    known = numpy(given)
    for row in range(5):
        a, fused = brute.grid_search(
            *(known[r][row] for r in ("large", "base")),
            [known["e0"][row], known["e1"][row]],
            fuser.values,
            **brutally,
        )
        found = [float(made.weights[r][row]) for r in ("e0", "e1")]
        np.testing.assert_allclose(found, a, atol=1e-9)
        np.testing.assert_allclose(made.log_probs[row], fused, atol=1e-10)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("targets", ["all", "selected"])
def test_a_bracket_is_at_least_as_good_and_within_a_step(experts, targets):
    given = tuned(experts, near=0.8, rows=16, v=200)
    fine = DynamicFusion(mode="bracket", targets=targets)(given)
    coarse = DynamicFusion(targets=targets)(given)
    assert (fine.info["loss"] <= coarse.info["loss"] + 1e-6).all()
    if experts == 1:
        assert (fine.weights["e0"] - coarse.weights["e0"]).abs().max() <= 0.1


def test_a_large_model_that_is_the_base_becomes_the_expert():
    given = tuned(1)
    given["large"] = given["base"].clone()
    for mode in ("one_hot", "joint", "bracket"):
        made = DynamicFusion(mode=mode)(given)
        torch.testing.assert_close(
            made.weights["e0"], torch.ones(4).double(), atol=2e-3 * (mode == "bracket"), rtol=0
        )
        torch.testing.assert_close(
            made.log_probs,
            given["e0"].log_softmax(-1),
            atol=5e-3 * (mode == "bracket") + 1e-12,
            rtol=0,
        )
        assert (made.info["loss"] < 1e-4).all()


def test_experts_that_learned_nothing_leave_the_large_model():
    given = tuned(2)
    given["e0"], given["e1"] = given["base"].clone(), given["base"] + 3.0
    for mode in ("one_hot", "joint", "bracket"):
        made = DynamicFusion(mode=mode)(given)
        torch.testing.assert_close(made.log_probs, given["large"].log_softmax(-1))
        if mode != "bracket":
            assert not made.weights["e0"].any()


def test_bounds_hold_for_their_expert():
    given = tuned(2, near=1.5, rows=16)
    made = DynamicFusion(bounds={"e0": (0.3, 0.5), "e1": (0.0, 0.2)})(given)
    e0, e1 = made.weights["e0"], made.weights["e1"]
    assert (((e0 >= 0.3 - 1e-9) & (e0 <= 0.5 + 1e-9)) | (e0 == 0)).all()
    assert (e1 <= 0.2 + 1e-9).all()
    free = DynamicFusion()(given)
    assert max(free.weights["e0"].max(), free.weights["e1"].max()) > 0.5
    bracket = DynamicFusion(mode="bracket", bounds={"e0": (0.3, 0.5), "e1": (0.0, 0.2)})(given)
    assert (bracket.weights["e0"] <= 0.5).all()
    assert (bracket.weights["e1"] <= 0.2).all()


def test_ties_go_to_the_first_expert_and_the_smallest_weight():
    given = tuned(1, near=1.0, rows=6)
    given["e1"] = given["e0"].clone()
    made = DynamicFusion()(given)
    assert (made.weights["e1"] == 0).all()
    assert (made.weights["e0"] > 0).any()


def test_it_says_what_was_done():
    made = DynamicFusion(targets="selected")(tuned(2))
    assert made.info["search"].startswith("one_hot: one expert at a time")
    assert made.info["grid"] == (0.0, 2.0, 0.1)
    assert made.info["targets"] == "selected"
    p, q = (tuned(2)[r].log_softmax(-1) for r in ("e1", "base"))
    torch.testing.assert_close(made.info["kl e1"], (p.exp() * (p - q)).sum(-1))


# -- static and EFT --------------------------------------------------------------------------------


@TYPES
def test_static_and_eft_by_hand(dtype, close):
    given = tuned(2, dtype=dtype)
    made = StaticFusion(alpha={"e0": 0.5, "e1": -0.25})(given)
    emulated = EFT(weights={"e1": -0.25, "e0": 0.5})(
        {"ref": given["large"], **{r: given[r] for r in ("e1", "base", "e0")}}
    )
    known = numpy(given)
    for row in range(4):
        expected = brute.shifted(
            known["large"][row],
            known["base"][row],
            [known["e0"][row], known["e1"][row]],
            [0.5, -0.25],
        )
        np.testing.assert_allclose(made.log_probs[row], expected, atol=close)
        np.testing.assert_allclose(emulated.log_probs[row], expected, atol=close)
    assert torch.equal(made.weights["e1"], torch.full((4,), -0.25, dtype=dtype))


def test_dynamic_at_one_is_static_is_eft():
    given = tuned(1)
    one = DynamicFusion(grid=(1.0, 1.0, 0.1))(given)
    assert one.weights["e0"].tolist() == [1.0] * 4
    fixed = StaticFusion(alpha=1.0)(given)
    emulated = EFT()({"ref": given["large"], "base": given["base"], "tuned": given["e0"]})
    torch.testing.assert_close(one.log_probs, fixed.log_probs)
    assert torch.equal(fixed.log_probs, emulated.log_probs)


def test_eft_at_its_own_scale_is_the_tuned_model():
    given = tuned(1)
    made = EFT(ref="base")({"base": given["base"], "tuned": given["e0"]})
    torch.testing.assert_close(made.log_probs, given["e0"].log_softmax(-1))
    same = EFT()({"ref": given["large"], "base": given["base"], "tuned": given["base"]})
    torch.testing.assert_close(same.log_probs, given["large"].log_softmax(-1))


@pytest.mark.parametrize("on", ["base", "tuned"])
def test_the_filter_keeps_shifts_of_likely_tokens_alone(on):
    given = tuned(2, near=2.0)
    roles = {"ref": given["large"], "base": given["base"], "e0": given["e0"], "e1": given["e1"]}
    made = EFT(top_p_filter=0.8, filter_on=on, weights={"e0": 1.0, "e1": 0.5})(roles)
    known = numpy(roles)
    for row in range(4):
        total = log_softmax(known["ref"][row])
        for role, weight in (("e0", 1.0), ("e1", 0.5)):
            kept = brute.nucleus(known["ref" if on == "base" else role][row], 0.8)
            shift = log_softmax(known[role][row]) - log_softmax(known["base"][row])
            total = total + np.where(kept, weight * shift, 0)
            assert made.info[f"trusted {role}"][row] == kept.sum()
        np.testing.assert_allclose(made.log_probs[row], log_softmax(total), atol=1e-10)
    assert not torch.allclose(made.log_probs, EFT(weights={"e0": 1.0, "e1": 0.5})(roles).log_probs)


# -- pools -----------------------------------------------------------------------------------------


def test_pools_and_contrast_by_hand():
    given = logits(["a", "b"], v=20)
    p, q = (given[r].log_softmax(-1).numpy() for r in "ab")
    pooled = Product(weights={"b": 0.75, "a": 0.25})(given).log_probs
    np.testing.assert_allclose(pooled, log_softmax(0.25 * p + 0.75 * q, axis=-1), atol=1e-12)
    np.testing.assert_allclose(
        Product(weights=1.0)(given).log_probs, log_softmax(p + q, axis=-1), atol=1e-12
    )
    mixed = Mixture(weights={"a": 1.0, "b": 3.0})(given)
    np.testing.assert_allclose(
        mixed.log_probs.exp(), 0.25 * np.exp(p) + 0.75 * np.exp(q), atol=1e-12
    )
    assert mixed.weights["b"].tolist() == [0.75] * 4
    contrast = Contrastive(alpha=0.2, temperature=0.5)(
        {"amateur": given["b"], "expert": given["a"]}
    )
    amateur = log_softmax(given["b"].numpy() / 0.5, axis=-1)
    for row in range(4):
        plausible = np.exp(p[row]) >= 0.2 * np.exp(p[row]).max()
        score = np.where(plausible, p[row] - amateur[row], -np.inf)
        np.testing.assert_allclose(contrast.log_probs[row], log_softmax(score), atol=1e-12)
        assert contrast.info["plausible"][row] == plausible.sum() < 20


def test_one_member_is_itself():
    given = logits(["only"])
    for fuser in (Product(), Mixture()):
        torch.testing.assert_close(fuser(given).log_probs, given["only"].log_softmax(-1))


# -- all of them -----------------------------------------------------------------------------------

CASES = {
    "static": (StaticFusion(alpha={"e0": 0.7, "e1": 0.2}), ["large", "base", "e0", "e1"]),
    "eft": (EFT(weights=0.5, top_p_filter=0.9), ["ref", "base", "e0", "e1"]),
    "logits_fusion": (DynamicFusion(), ["large", "base", "e0", "e1"]),
    "contrastive": (Contrastive(), ["expert", "amateur"]),
    "product": (Product(), ["a", "b", "c"]),
    "mixture": (Mixture(), ["a", "b", "c"]),
}


def test_no_fuser_is_left_out():
    assert set(CASES) == set(FUSERS)


@pytest.mark.parametrize("name", CASES)
class TestAll:
    def test_a_distribution_a_row_for_each(self, name):
        fuser, roles = CASES[name]
        given = logits(roles, v=40)
        before = {role: x.clone() for role, x in given.items()}
        made = fuser(given)
        torch.testing.assert_close(made.log_probs.exp().sum(-1), torch.ones(4).double())
        assert all(torch.equal(x, before[role]) for role, x in given.items())
        for row in range(4):  # rows do not see one another
            alone = fuser({role: x[row : row + 1] for role, x in given.items()})
            torch.testing.assert_close(alone.log_probs[0], made.log_probs[row])

    def test_constants_and_order_change_nothing(self, name):
        fuser, roles = CASES[name]
        given = logits(roles, v=40)
        made = fuser(given)
        moved = fuser({role: x + 3.5 * i for i, (role, x) in enumerate(given.items())})
        torch.testing.assert_close(moved.log_probs, made.log_probs)
        turned = fuser(dict(reversed(given.items())))
        torch.testing.assert_close(turned.log_probs, made.log_probs)
        for role, weight in made.weights.items():
            torch.testing.assert_close(turned.weights[role], weight)

    def test_what_one_rules_out_is_out(self, name):
        fuser, roles = CASES[name]
        given = logits(roles, v=40)
        for i, role in enumerate(roles):
            given[role][:, i] = -torch.inf
        made = fuser(given).log_probs
        assert not made.isnan().any()
        if name == "mixture":
            return
        out = len(roles)
        assert (made[:, :out] == -torch.inf).all()
        rest = fuser({role: x[:, out:] for role, x in given.items()}).log_probs
        torch.testing.assert_close(made[:, out:], rest)

    def test_half_precision_is_widened(self, name):
        fuser, roles = CASES[name]
        given = {role: x.bfloat16() for role, x in logits(roles, v=40).items()}
        made = fuser(given).log_probs
        assert made.dtype == torch.float32
        torch.testing.assert_close(made, fuser({r: x.float() for r, x in given.items()}).log_probs)

    def test_it_can_be_written_down(self, name):
        fuser, _ = CASES[name]
        told = settings_of(fuser)
        assert told["kind"] == name
        assert build(told) == fuser

    def test_bad_logits(self, name):
        fuser, roles = CASES[name]
        for value, word in ((torch.nan, "NaN"), (torch.inf, r"\+inf")):
            given = logits(roles)
            given[roles[1]][2, 3] = value
            with pytest.raises(NonFiniteError, match=f"{roles[1]!r} gave {word}"):
                fuser(given)
        given = logits(roles)
        given[roles[1]] = given[roles[1]][:, :-1]
        with pytest.raises(MismatchError, match=r"\[4, 49\].*\[4, 50\]"):
            fuser(given)
        given = logits(roles)
        given[roles[0]][1] = -torch.inf
        with pytest.raises(InputError, match=r"every token|rules out every"):
            fuser(given)


def test_ids_without_a_say_keep_the_large_models_odds():
    given = tuned(1, near=2.0)
    free, held = StaticFusion()(given), StaticFusion(exclude=(3, 5))(given)
    large = given["large"].log_softmax(-1)
    gap = held.log_probs[:, 3] - held.log_probs[:, 5]
    torch.testing.assert_close(gap, large[:, 3] - large[:, 5])
    assert not torch.allclose(free.log_probs[:, 3] - free.log_probs[:, 5], gap)
    moved = {**given, "e0": given["e0"] + 9.0}  # a constant is no shift
    torch.testing.assert_close(StaticFusion(exclude=(3, 5))(moved).log_probs, held.log_probs)
    for fuser in (DynamicFusion(exclude=(99,)), StaticFusion(exclude=(-1,))):
        with pytest.raises(InputError, match="not in the vocabulary of 50"):
            fuser(given)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DynamicFusion(grid=(0.0, 2.0, -0.1)), "a step above 0"),
        (lambda: DynamicFusion(grid=(2.0, 0.0, 0.1)), "lowest, highest"),
        (lambda: DynamicFusion(grid=(0.0, float("nan"), 0.1)), "lowest, highest"),
        (lambda: DynamicFusion(grid=()), "grid"),
        (lambda: DynamicFusion(mode="best"), "mode = 'best'"),
        (lambda: DynamicFusion(mode="joint", targets="selected"), "selects no expert"),
        (lambda: DynamicFusion(mode="bracket", grid=(-1.0, 1.0, 0.1)), "c >= 0"),
        (lambda: DynamicFusion(bounds={"x": (0.51, 0.55)}), "holds no value of the grid"),
        (lambda: EFT(weights=float("nan")), "weights is nan"),
        (lambda: EFT(weights={"a": float("inf")}), "weights of a is inf"),
        (lambda: EFT(top_p_filter=1.5), "top_p_filter"),
        (lambda: EFT(filter_on="both"), "filter_on"),
        (lambda: StaticFusion(beta=1.0), "no parameter 'beta'"),
        (lambda: Contrastive(alpha=0.0), "alpha"),
        (lambda: Mixture(weights={"a": -1.0, "b": 2.0}), "at least 0"),
        (lambda: Mixture(weights={"a": 0.0}), "above 0"),
    ],
)
def test_settings_that_are_refused(make, said):
    with pytest.raises(InputError, match=said):
        make()


@pytest.mark.parametrize(
    ("fuser", "roles", "said"),
    [
        (DynamicFusion(), ["large", "base"], "needs an expert"),
        (DynamicFusion(), ["big", "base", "e"], "needs a model in the role 'large'"),
        (
            DynamicFusion(bounds={"f": (0.0, 1.0)}),
            ["large", "base", "e"],
            "bounds are given for 'f'",
        ),
        (DynamicFusion(mode="joint"), ["large", "base", *"abcd"], "more than 20000 candidates"),
        (EFT(), ["base", "tuned"], "say ref='base'"),
        (EFT(), ["ref", "base"], "needs a tuned model"),
        (EFT(weights={"a": 1.0}), ["ref", "base", "a", "b"], "one for b too"),
        (EFT(weights={"a": 1.0, "c": 1.0}), ["ref", "base", "a"], "names 'c'"),
        (StaticFusion(), ["large", "bass", "e"], "Did you mean 'bass'"),
        (Contrastive(), ["expert", "amateur", "third"], "takes two models"),
        (Product(), [], "needs a model"),
    ],
)
def test_roles_that_are_refused(fuser, roles, said):
    with pytest.raises(InputError, match=said):
        fuser.check_roles(roles)


def test_fusers_by_name():
    assert build({"kind": "eft", "ref": "base"}) == EFT(ref="base")
    with pytest.raises(RecipeError, match="Did you mean 'static'"):
        build({"kind": "statik"})
    with pytest.raises(RecipeError, match="needs a kind"):
        build({"alpha": 1.0})
    with pytest.raises(InputError, match="cannot be written down"):
        settings_of(lambda logits: logits)
