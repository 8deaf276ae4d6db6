"""Routers: fitted to known clusters, calibrated, compared with slow and obvious forms."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from pluribus.core.errors import InputError, MismatchError, NonFiniteError, RecipeError
from pluribus.route import recipe
from pluribus.route.router import Gate, auroc, fit, report, strangeness


def clusters(count: int = 60, spread: float = 1.0, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    centres = 3 * torch.eye(3, 6)
    return {
        name: centres[i] + spread * torch.randn(count, 6, generator=rng)
        for i, name in enumerate(("maths", "code", "chat"))
    }


@pytest.mark.parametrize("kind", ["mlp", "linear", "centroids"])
def test_clusters_are_told_apart(kind):
    gate, told = fit(clusters(), clusters(seed=1), kind=kind, epochs=40, lr=5e-3, batch_size=32)
    assert told.accuracy > 0.9
    weights = gate(torch.cat([*clusters(seed=2).values()]))
    assert torch.allclose(weights.sum(1), torch.ones(180))
    assert gate.names == ("maths", "code", "chat")
    assert sum(told.confusion["code"].values()) == 60
    assert told.accuracy == pytest.approx(
        sum(told.confusion[name][name] for name in gate.names) / 180
    )


def test_the_mlp_is_the_papers():
    gate = Gate(["a", "b"], 5)
    kinds = [type(part) for part in gate.score.children()]
    block = [nn.Linear, nn.BatchNorm1d, nn.LeakyReLU, nn.Dropout]
    assert kinds == [*block, *block, nn.Linear]
    shapes = [tuple(p.weight.shape) for p in gate.score.modules() if isinstance(p, nn.Linear)]
    assert shapes == [(10, 5), (10, 10), (2, 10)]


def test_the_mlp_is_as_wide_as_asked():
    gate, told = fit(clusters(), epochs=20, lr=1e-2, batch_size=32, dropout=0.0, hidden=3)
    shapes = [tuple(p.weight.shape) for p in gate.score.modules() if isinstance(p, nn.Linear)]
    assert shapes == [(3, 6), (3, 3), (3, 3)]
    assert told.accuracy > 0.9
    again = Gate(**gate.settings())
    again.load_state_dict(gate.state_dict())
    x = torch.randn(4, 6)
    assert torch.equal(again.eval()(x), gate(x))


def test_centroids_are_cosines():
    found = clusters()
    gate, _ = fit(found, found, kind="centroids", calibrate=False)
    x = torch.randn(4, 6)
    all_ = torch.cat([*found.values()])
    mean, spread = all_.mean(0), all_.std(0)
    rows = []
    for one in (x - mean) / spread:
        row = []
        for values in found.values():
            normal = (values - mean) / spread
            centre = (normal / normal.norm(dim=1, keepdim=True)).mean(0)
            row.append(float(one @ centre / one.norm() / centre.norm()))
        rows.append(row)
    torch.testing.assert_close(gate(x), torch.tensor(rows).softmax(1))


def test_the_temperature_is_the_likeliest():
    found = clusters(spread=2.0)
    gate, told = fit(found, clusters(seed=3, spread=2.0), kind="linear", epochs=60, lr=5e-2)
    seen = clusters(seed=3, spread=2.0)
    logits = gate.logits(torch.cat([*seen.values()])).double()
    true = torch.arange(3).repeat_interleave(60)

    def loss(temperature: float) -> float:
        return float(nn.functional.cross_entropy(logits / temperature, true))

    best = min(np.exp(np.linspace(-3, 3, 2001)), key=loss)
    assert told.temperature == pytest.approx(best, rel=0.01)
    assert told.loss == pytest.approx(loss(told.temperature), abs=1e-5)


def test_report_by_hand():
    gate = Gate(["a", "b"], 2, "linear").eval()
    with torch.no_grad():
        gate.score.weight.copy_(torch.eye(2))  # type: ignore[operator, union-attr]
        gate.score.bias.zero_()  # type: ignore[operator, union-attr]
    x = {"a": torch.tensor([[2.0, 0.0], [0.0, 1.0]]), "b": torch.tensor([[0.0, 3.0]])}
    told = report(gate, x)
    sure = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))]
    assert told.accuracy == pytest.approx(2 / 3)
    assert told.confusion == {"a": {"a": 1, "b": 1}, "b": {"a": 0, "b": 1}}
    loss = -(math.log(sure[0]) + math.log(1 - sure[1]) + math.log(sure[2])) / 3
    assert told.loss == pytest.approx(loss)
    entropy = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in sure]
    assert told.entropy == pytest.approx(sum(entropy) / 3)
    # bins (0.7, 0.8], (0.8, 0.9], (0.9, 1]: one input each
    error = ((1 - sure[0]) + sure[1] + (1 - sure[2])) / 3
    assert told.calibration == pytest.approx(error)


def test_strange_inputs_score_higher():
    gate, _ = fit(clusters(), kind="linear", epochs=60, lr=5e-2)
    known = strangeness(gate, torch.cat([*clusters(seed=4).values()]))
    strange = strangeness(gate, torch.zeros(50, 6))
    assert auroc(known, strange) > 0.7


def test_auroc_is_the_share_of_pairs_in_order():
    rng = torch.Generator().manual_seed(0)
    known = torch.randint(0, 9, (40,), generator=rng).float()
    strange = torch.randint(3, 12, (25,), generator=rng).float()
    pairs = [(s > k) + 0.5 * (s == k) for s in strange.tolist() for k in known.tolist()]
    expected = sum(pairs) / len(pairs)
    assert auroc(known, strange) == pytest.approx(expected)


def test_a_seed_gives_the_same_router():
    before = torch.get_rng_state()
    one, two = (fit(clusters(), epochs=3, seed=7)[0] for _ in range(2))
    other, _ = fit(clusters(), epochs=3, seed=8)
    x = torch.randn(5, 6)
    assert torch.equal(one(x), two(x))
    assert not torch.equal(one(x), other(x))
    assert before is not None


def test_bad_input():
    with pytest.raises(InputError, match="chooses among tasks; 1 was given"):
        fit({"a": torch.randn(4, 3)})
    with pytest.raises(InputError, match="task b has 1 input"):
        fit({"a": torch.randn(4, 3), "b": torch.randn(1, 3)})
    with pytest.raises(MismatchError, match="different widths"):
        fit({"a": torch.randn(4, 3), "b": torch.randn(4, 2)})
    with pytest.raises(InputError, match="learns from two inputs at least, so give 2"):
        fit({"a": torch.randn(4, 3), "b": torch.randn(4, 3)}, batch_size=1)
    broken = torch.randn(4, 3)
    broken[2, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="features of task b are not finite"):
        fit({"a": torch.randn(4, 3), "b": broken})
    gate, _ = fit({"a": torch.randn(4, 3), "b": torch.randn(4, 3)}, epochs=1)
    with pytest.raises(MismatchError, match=r"takes features \(b, 3\), not \[2, 4\]"):
        gate(torch.randn(2, 4))
    with pytest.raises(NonFiniteError, match="scores of row 2 are not finite"):
        gate(broken)
    with pytest.raises(InputError, match="router 'tree': expected mlp, linear or centroids"):
        Gate(["a", "b"], 3, "tree")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="hidden is 0 for router 'mlp'; it is the width of an mlp"):
        Gate(["a", "b"], 3, hidden=0)
    with pytest.raises(InputError, match="hidden is 4 for router 'linear'"):
        Gate(["a", "b"], 3, "linear", hidden=4)
    with pytest.raises(InputError, match="no part 'c'; parts: a, b"):
        report(gate, {"c": torch.randn(2, 3)})


def test_a_recipe_says_the_width():
    told = {"parts": "low_rank", "zoo": "demo8", "router": {"hidden": 32}}
    assert recipe.of(told).router.hidden == 32
    with pytest.raises(RecipeError, match=r"^recipe: router: hidden is the width of an mlp"):
        recipe.of(told | {"router": {"hidden": 32, "kind": "linear"}})
    with pytest.raises(RecipeError, match="greater than 0"):
        recipe.of(told | {"router": {"hidden": 0}})


def test_rows_that_are_not_finite_get_equal_weights_if_asked():
    gate, _ = fit({"a": torch.randn(4, 3), "b": torch.randn(4, 3)}, epochs=1, uniform_on_nan=True)
    x = torch.randn(3, 3)
    x[1] = float("nan")
    found = gate(x)
    assert found[1].tolist() == [0.5, 0.5]
    assert torch.equal(found[[0, 2]], gate(x[[0, 2]]))
