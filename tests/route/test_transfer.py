"""ScaLearn, AdapterFusion and a single adapter: values, counts, training."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from pluribus.route import Routed, transfer
from pluribus.route.adapters import AdapterSet, added
from pluribus.route.parts import Bottleneck
from pluribus.route.store import digest
from pluribus.route.transfer import (
    METHODS,
    AdapterFusion,
    Examples,
    ScaLearn,
    SingleAdapter,
    Target,
    fit,
)
from pluribus.route.transfer._fit import trimmed
from pluribus.route.transfer._methods import start
from pluribus.route.transfer._mix import Fused, Scaled, stacked

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from transfers import LAYERS, data, net, rng, source, sources


def slow_scalearn(ups: torch.Tensor, omega: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The paper's formula, entry by entry: ups (b, s, n, d), omega (n, d) or (n, 1)."""
    out = residual.clone()
    for s in range(ups.shape[2]):
        for i in range(ups.shape[3]):
            out[..., i] = out[..., i] + omega[s, min(i, omega.shape[1] - 1)] * ups[:, :, s, i]
    return out


VARIANTS = [name for name in METHODS if name.startswith("scalearn")]


@pytest.mark.parametrize("normalise", ["none", "mean", "softmax"])
@pytest.mark.parametrize("name", VARIANTS)
def test_scalearn_is_the_papers_sum(name, normalise):
    """Against the formula on finished outputs of each source, in float64."""
    settings = {"scope": METHODS[name].scope, "shape": METHODS[name].shape}
    stack = stacked(sources())
    mixer = ScaLearn(**settings, normalise=normalise, init_std=0.5).mixer(stack, rng()).double()
    mixer.eval()
    x = torch.randn(2, 4, 8, dtype=torch.float64, generator=rng(1))
    for layer, path in enumerate(LAYERS):
        ups = torch.stack(
            [added(x, _double(one.layers[path])) for one in sources().values()], dim=2
        )
        omega = mixer.omega if METHODS[name].scope == "shared" else mixer.omega[layer]
        if normalise == "mean":
            omega = omega / sum(omega[s] for s in range(3))
        elif normalise == "softmax":
            omega = omega.exp() / sum(omega[s].exp() for s in range(3))
        expected = slow_scalearn(ups, omega.detach(), x)
        torch.testing.assert_close(x + mixer(layer, x).detach(), expected, atol=1e-12, rtol=1e-12)


def _double(one: Bottleneck) -> Bottleneck:
    fields = (one.down, one.down_bias, one.up, one.up_bias)
    return Bottleneck(*(tensor.double() for tensor in fields), activation=one.activation)


def test_omega_starts_around_two_over_n():
    stack = stacked({str(i): source(i) for i in range(8)})
    omega = ScaLearn().mixer(stack, rng()).omega.detach()
    assert omega.shape == (2, 8, 8)
    assert abs(float(omega.mean()) - 2 / 8) < 5e-4
    assert 5e-4 < float(omega.std()) < 2e-3
    again = ScaLearn().mixer(stack, rng()).omega
    assert torch.equal(omega, again)


def test_dropout_is_of_omega_and_in_training_alone():
    mixer = ScaLearn(init_std=0.0).mixer(stacked(sources()), rng()).train()
    seen = torch.stack([mixer.scales(0).detach() for _ in range(400)])
    kept = 2 / 3 / 0.7  # 2 / n over what is kept
    assert seen.unique().tolist() == pytest.approx([0.0, kept])
    assert abs(float((seen == 0).float().mean()) - 0.3) < 0.02
    assert torch.equal(mixer.eval().scales(0), mixer.omega[0])
    for name, share in (("scalearn", 0.3), ("scalearn++", 0.3), ("scalearn_uniform", 0.0)):
        made = METHODS[name].mixer(stacked(sources()), rng())  # type: ignore[union-attr]
        assert made.dropout == share
    paper = ScaLearn(shape="scalar", dropout=0.3).mixer(stacked(sources()), rng())
    assert paper.dropout == 0.3


def test_the_penalty():
    """By layer the mean over d, shared the sum: as the authors' code has it."""
    stack = stacked(sources())
    by_layer = ScaLearn(init_scale=0.0, init_std=0.0).mixer(stack, rng())
    assert by_layer.penalty().item() == 2 * 3  # L * n, each 1
    shared = ScaLearn(scope="shared", init_scale=0.0, init_std=0.0).mixer(stack, rng())
    assert shared.penalty().item() == 3 * 8  # n * d
    far = fit(net(), sources(), data(), 3, ScaLearn(dropout=0.0), steps=40, lr=0.05)
    near = fit(
        net(), sources(), data(), 3, ScaLearn(dropout=0.0, regulariser=10.0), steps=40, lr=0.05
    )
    gap = [sum(float((1 - t).square().sum()) for t in r.omega.values()) for r in (far, near)]
    assert gap[1] < 0.3 * gap[0]


def test_the_numbers_of_the_papers_table():
    """L = 12, d = 768, n = 8; AdapterFusion's matrices are 3 d^2 a layer, its biases 2 d."""
    layers = [f"layer.{i}" for i in range(12)]
    one = AdapterSet(
        {
            path: Bottleneck(*(torch.zeros(s) for s in ((1, 768), (1,), (768, 1), (768,))))
            for path in layers
        }
    )
    stack = stacked({str(i): one for i in range(8)})

    def count(method) -> int:
        return sum(p.numel() for p in method.mixer(stack, rng()).parameters())

    assert [count(METHODS[name]) for name in VARIANTS] == [73_728, 96, 6_144, 8]
    fusion = AdapterFusion().mixer(stack, rng())
    matrices = sum(p.numel() for p in fusion.parameters() if p.ndim == 2)
    assert matrices == 12 * 3 * 768**2 == 21_233_664
    assert sum(p.numel() for p in fusion.parameters()) - matrices == 12 * 2 * 768
    assert count(METHODS["scalearn"]) / matrices == pytest.approx(8 / (3 * 768))


def test_adapter_fusion_against_the_formula():
    """Token by token, source by source; the temperature 50, 49.95, ... in training."""
    stack = stacked(sources())
    mixer = AdapterFusion().mixer(stack, rng()).double()
    mixer.layers = [[_double(one) for one in layer] for layer in stack.layers]
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng(3), dtype=torch.float64))
    x = torch.randn(2, 4, 8, dtype=torch.float64, generator=rng(1))
    mixer.train()
    for turn in range(3):
        out = mixer(1, x).detach()
        temperature = 50.0 - 0.05 * turn
        for b in range(2):
            for s in range(4):
                torch.testing.assert_close(out[b, s], slow_fusion(mixer, x[b, s], temperature))
    assert mixer.temperature.tolist() == pytest.approx([50.0, 49.85])
    mixer.eval()(1, x)
    assert mixer.temperature.tolist() == pytest.approx([50.0, 49.85])
    mixer.train()
    mixer.temperature.fill_(1.02)
    for _ in range(2):
        mixer(0, x)
    assert float(mixer.temperature[0]) == 1.0


@torch.no_grad()
def slow_fusion(mixer: Fused, x: torch.Tensor, temperature: float) -> torch.Tensor:
    """One token at layer 1."""
    query = mixer.query[1] @ x + mixer.query_bias[1]
    scores, values = [], []
    for one in mixer.layers[1]:
        u = one.up @ torch.relu(one.down @ x + one.down_bias) + one.up_bias
        scores.append(float(query @ (mixer.key[1] @ u + mixer.key_bias[1])) / temperature)
        values.append(mixer.value[1] @ u)
    whole = sum(math.exp(score - max(scores)) for score in scores)
    return sum(
        math.exp(score - max(scores)) / whole * value
        for score, value in zip(scores, values, strict=True)
    )  # type: ignore[return-value]


@torch.no_grad()
def test_fusion_starts_with_values_as_they_are():
    mixer = AdapterFusion().mixer(stacked(sources()), rng())
    expected = torch.eye(8) + 1e-6 * (1 - torch.eye(8))
    torch.testing.assert_close(mixer.value[0], expected)
    assert float(mixer.query_bias[0].abs().sum() + mixer.key_bias[0].abs().sum()) == 0
    assert 0.01 < float(mixer.key[0].std()) < 0.03


@pytest.mark.parametrize("name", [*VARIANTS, "single_adapter"])
def test_the_export_is_exact_and_a_part(name):
    model, task = net(), data()
    result = fit(model, sources(), task, 3, METHODS[name], steps=20, lr=0.02)
    part = result.export().part()
    ranks = {"single_adapter": 3}.get(name, 3 + 2 + 3)
    assert [len(one.down) for one in part.values()] == [ranks, ranks]
    expected = result.logits(model, task.test.x)
    with result.export().attach(model.eval()):
        features = model(task.test.x).mean(1)
    torch.testing.assert_close(linear(features, **result.head), expected, atol=1e-5, rtol=0)
    routed = Routed(model, {"target": part, "a": sources()["a"].part()}, heads={"t": result.head})
    features = routed(task.test.x, weights="target").mean(1)
    torch.testing.assert_close(linear(features, **result.head), expected, atol=1e-5, rtol=0)
    routed.detach()


def test_the_sum_before_folding_is_the_same():
    """Each source by itself, its output scaled and added: the unfolded form."""
    model, x = net().eval(), data().test.x
    result = fit(model, sources(), data(), 3, ScaLearn(), steps=20, lr=0.02)

    class Unfolded:
        def __init__(self, path: str, layer: int) -> None:
            self.path, self.layer = path, layer

        def __call__(self, y: torch.Tensor) -> torch.Tensor:
            return sum(
                result.omega[name][self.layer] * added(y, one.layers[self.path])
                for name, one in sources().items()
            )  # type: ignore[return-value]

    from pluribus.route.adapters import attach

    with attach(model, {path: Unfolded(path, i) for i, path in enumerate(LAYERS)}):
        features = model(x).mean(1)
    expected = linear(features, **result.head)
    torch.testing.assert_close(result.logits(model, x), expected, atol=1e-5, rtol=0)


def test_one_source_at_scale_one_is_that_adapter():
    one = source(1)
    mixer = ScaLearn(init_scale=1.0, init_std=0.0).mixer(stacked({"a": one}), rng()).eval()
    x = torch.randn(3, 4, 8, generator=rng(1))
    for layer, path in enumerate(LAYERS):
        torch.testing.assert_close(mixer(layer, x), added(x, one.layers[path]))


def test_what_is_frozen_stays_and_what_is_learned_moves():
    model, given = net().train(), sources()
    model.up.weight.requires_grad_(False)
    before = digest(model), [one.digest for one in given.values()]
    seen = []
    result = fit(
        model, given, data(), 3, steps=30, lr=0.05, on_step=lambda *step: seen.append(step)
    )
    assert (digest(model), [one.digest for one in given.values()]) == before
    assert model.training
    assert model.drop.training
    assert not model.up.weight.requires_grad
    assert model.down.weight.requires_grad
    assert seen[-1] == ("scalearn", 30, 30)
    assert max(float((o - 2 / 3).abs().max()) for o in result.omega.values()) > 0.1
    assert not model._forward_hooks
    assert not model.up._forward_hooks


def test_the_best_validation_is_kept_and_a_seed_repeats():
    task = data()
    result, again, other = (
        fit(net(), sources(), task, 3, steps=60, lr=0.05, seed=seed) for seed in (1, 1, 2)
    )
    best = max(result.history, key=lambda point: (point.val.accuracy, -point.val.loss))
    assert best.step == result.step
    assert best.val == result.val
    found = result.logits(net(), task.val.x)
    assert result.val.accuracy == float((found.argmax(1) == task.val.y).double().mean())
    assert result.val.loss == pytest.approx(float(cross_entropy(found, task.val.y)), abs=1e-5)
    found = result.logits(net(), task.test.x)
    assert result.test.accuracy == pytest.approx(
        float((found.argmax(1) == task.test.y).double().mean())
    )
    assert torch.equal(found, again.logits(net(), task.test.x))
    assert not torch.equal(found, other.logits(net(), task.test.x))


def test_without_validation_the_last_step_is_kept():
    task = Target(data().train)
    result = fit(net(), sources(), task, 3, steps=7)
    assert (result.step, result.val, result.test) == (7, None, None)


def test_patience_stops():
    task = data()
    result = fit(net(), sources(), task, 3, ScaLearn(), epochs=200, patience=2, lr=0.05)
    assert result.history[-1].step < 200
    assert result.history[-1].step - result.step == 2 * 7  # validated 30 times in 200 steps


def test_a_task_is_learned_and_its_own_source_found():
    """The target is one of the sources' tasks: its scale ends above the others'."""
    model, big = net(), data(400)
    made = SingleAdapter(layers="up|down", bottleneck=4, lr=2e-2)
    own = fit(model, {}, big, 3, made, epochs=15)
    rest = {name: source(seed) for name, seed in (("a", 1), ("b", 2))}
    result = fit(
        model,
        {"own": own.export(), **rest},
        data(32),
        3,
        ScaLearn(scope="shared", shape="scalar"),
        steps=200,
        lr=0.02,
    )
    told = {name: shares["up"] for name, shares in result.contributions().items()}
    assert max(told, key=lambda name: abs(told[name])) == "own"
    assert told["own"] > 0.5
    assert result.contributions()["own"]["up"] == result.contributions()["own"]["down"]


def test_contributions_are_means_of_what_a_layer_uses():
    result = fit(net(), sources(), data(), 3, ScaLearn(), steps=10)
    told = result.contributions()
    assert list(told) == ["a", "b", "c"]
    for name in told:
        for layer, path in enumerate(LAYERS):
            assert told[name][path] == pytest.approx(float(result.omega[name][layer].mean()))
    soft = fit(net(), sources(), data(), 3, ScaLearn(normalise="softmax"), steps=10)
    assert sum(one["up"] for one in soft.contributions().values()) == pytest.approx(1)
    fused = fit(net(), sources(), data(), 3, AdapterFusion(), steps=10)
    for path in LAYERS:
        shares = [one[path] for one in fused.contributions().values()]
        assert sum(shares) == pytest.approx(1)
        assert min(shares) > 0
    assert fit(net(), sources(), data(), 3, SingleAdapter(), steps=5).contributions() == {}


def test_inputs_by_keyword_are_cut_to_their_longest():
    x = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [5, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]),
        "weights": torch.ones(2, 9),
    }
    found = trimmed(x)
    assert found["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert found["attention_mask"].shape == (2, 3)
    assert found["weights"].shape == (2, 9)
    assert trimmed({"x": torch.ones(2, 3)})["x"].shape == (2, 3)


def test_a_transformers_encoder_in_both_placements():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(1, 40, (40, 8), generator=rng())
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    task = Target(Examples(x, (ids[:, 0] > 20).long()))
    for layers, placement in (
        (r".*layer\.\d+\.output\.dense", "behind"),
        (r".*layer\.\d+\.output\.LayerNorm", "post_norm"),
    ):
        made = SingleAdapter(layers=layers, bottleneck=4, placement=placement)  # type: ignore[arg-type]
        one = fit(model, {}, task, 2, made, features="hidden", steps=10, lr=1e-2)
        result = fit(model, {"one": one.export()}, task, 2, features="hidden", steps=5)
        expected = result.logits(model, x)
        with result.export().attach(model):
            hidden = model(**x).last_hidden_state.mean(1)
        torch.testing.assert_close(linear(hidden, **result.head), expected, atol=1e-5, rtol=0)


def test_a_base_in_half_precision():
    model, task = net().bfloat16(), data()
    half = Target(*(Examples(some.x.bfloat16(), some.y) for some in task))  # type: ignore[union-attr]
    for method in (ScaLearn(), AdapterFusion(), SingleAdapter()):
        result = fit(model, sources(), half, 3, method, steps=5)
        assert result.head["weight"].dtype == torch.float32
        assert result.logits(model, half.train.x).dtype == torch.float32  # type: ignore[arg-type]


def test_starts_are_of_their_kind():
    began = start(ScaLearn(), sources(), net(), rng())
    assert isinstance(began.mixer, Scaled)
    assert (began.paths, began.placement) == (LAYERS, "behind")
    alone = start(SingleAdapter(), sources(), net(), rng())
    assert len(alone.mixer.adapters[0].down) == 3  # type: ignore[union-attr]
    assert transfer.METHODS["scalearn"] == ScaLearn()
