import numpy as np
import pytest
import torch
from torch import nn

from pluribus.calibrate import FisherFold, GramFold, examples, expected, fisher, gram
from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.core.pool import Pool
from pluribus.core.weights import Weights
from pluribus.engine.driver import merge
from pluribus.merge.fisher import Fisher
from pluribus.merge.regmean import RegMean


def squared_error(model, batch):
    x, y = batch
    return 0.5 * (model(x) - y).square().sum()


@pytest.fixture
def linear():
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0]]))
        layer.bias.fill_(0.5)
    return layer


BATCH = (torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0], [1.0]]))


def test_fisher_worked_by_hand(linear):
    # Outputs -0.5 and 3.5, errors -0.5 and 2.5. Gradients of the weight are error * x:
    # (-0.5, -1) and (7.5, 0); of the bias -0.5 and 2.5.
    found = fisher(linear, [BATCH], squared_error)
    torch.testing.assert_close(found["weight"], torch.tensor([[(0.25 + 56.25) / 2, 1.0 / 2]]))
    torch.testing.assert_close(found["bias"], torch.tensor([(0.25 + 6.25) / 2]))


def test_batches_do_not_matter(linear):
    one = fisher(linear, [BATCH], squared_error)
    two = fisher(linear, [tuple(t[i : i + 1] for t in BATCH) for i in range(2)], squared_error)
    for name in one:
        assert one[name].equal(two[name])


def test_a_batch_as_one_example(linear):
    found = fisher(linear, [BATCH], squared_error, split=False)
    torch.testing.assert_close(found["bias"], torch.tensor([(-0.5 + 2.5) ** 2]))


def test_expected_fisher_of_a_softmax_worked_by_hand():
    # For logits W x the Fisher of row j is p_j (1 - p_j) x^2.
    model = nn.Linear(2, 3, bias=False)
    x = torch.tensor([[1.0, -2.0]])
    p = torch.softmax(model(x), -1)[0].detach()
    found = fisher(model, [x], expected)["weight"]
    torch.testing.assert_close(found, (p * (1 - p))[:, None] * x**2)


def test_expected_leaves_labels_out(linear):
    model = nn.Linear(2, 3)
    x, y = torch.randn(4, 2), torch.zeros(4, dtype=torch.long)
    one, two = fisher(model, [x], expected), fisher(model, [(x, y)], expected)
    assert one["weight"].equal(two["weight"])


def test_frozen_and_unused_parameters(linear):
    linear.weight.requires_grad_(False)
    model = nn.ModuleDict({"used": linear, "unused": nn.Linear(2, 1)})
    found = fisher(model, [BATCH], lambda m, b: squared_error(m["used"], b))
    assert found["used.weight"].sum() > 0  # a frozen parameter is merged like any other
    assert found["unused.weight"].sum() == 0
    assert not linear.weight.requires_grad


def test_gram_worked_by_hand(linear):
    found = gram(linear, [BATCH[0]])
    assert list(found) == ["weight"]
    torch.testing.assert_close(
        found["weight"], torch.tensor([[(1.0 + 9.0) / 2, 2.0 / 2], [1.0, 2.0]])
    )


def test_gram_counts_every_position_of_a_sequence():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 7, 3)
    found = gram(model, [x[:2], x[2:]])
    rows = x.reshape(-1, 3).double()
    torch.testing.assert_close(found["0.weight"], (rows.T @ rows / 35).float())
    hidden = torch.tanh(model[0](x)).detach().reshape(-1, 4).double()
    torch.testing.assert_close(found["2.weight"], (hidden.T @ hidden / 35).float())


@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2}, {"padding": 1}, {"dilation": 2, "padding": (2, 1)}, {"padding": "same"},
     {"padding": 1, "padding_mode": "reflect"}],
)  # fmt: skip
def test_gram_of_a_convolution_is_that_of_its_patches(options):
    layer = nn.Conv2d(2, 3, (3, 2), bias=False, **options)
    x = torch.randn(4, 2, 6, 7)
    g = gram(layer, [x])["weight"]
    assert g.shape == (12, 12)
    # The mean squared output of any kernel k is k G k^T.
    out = layer(x).double().square().mean((0, 2, 3))
    kernels = layer.weight.reshape(3, 12).double()
    torch.testing.assert_close(((kernels @ g.double()) * kernels).sum(1), out, rtol=1e-5, atol=1e-6)


def test_workers_join(linear):
    fold = GramFold(linear)
    parts = [fold.update(fold.init(), BATCH[0][i : i + 1]) for i in range(2)]
    joined = fold.finish(fold.join(*parts))
    torch.testing.assert_close(joined["weight"], gram(linear, [BATCH[0]])["weight"])
    fold = FisherFold(linear, squared_error)
    parts = [fold.update(fold.init(), tuple(t[i : i + 1] for t in BATCH)) for i in range(2)]
    joined = fold.finish(fold.join(*parts))
    torch.testing.assert_close(joined["weight"], fisher(linear, [BATCH], squared_error)["weight"])
    empty = fold.finish(fold.join(fold.init(), fold.update(fold.init(), BATCH)))
    assert empty["weight"].equal(fisher(linear, [BATCH], squared_error)["weight"])


def test_the_model_is_left_as_it_was(linear):
    model = nn.Sequential(linear, nn.BatchNorm1d(1), nn.Dropout(0.5))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gram(model, [BATCH[0]])
    fisher(model, [BATCH], squared_error)
    assert [m.training for m in model] == [True, False, True]
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not linear._forward_pre_hooks


def test_round_trip_through_a_file(linear, tmp_path):
    found = gram(linear, [BATCH[0]])
    found.save(tmp_path / "gram.safetensors")
    opened = Weights.open(tmp_path / "gram.safetensors")
    assert opened["weight"].equal(found["weight"])
    assert opened.metadata["pluribus.calibration"] == "gram"
    assert opened.metadata["pluribus.count"] == "2"


def test_shared_layers_count_all_their_calls():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, layer)
    x = torch.randn(3, 2)
    both = torch.cat([x, layer(x)]).detach().double()
    torch.testing.assert_close(gram(model, [x])["0.weight"], (both.T @ both / 6).float())


def test_only_some_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert list(gram(model, [torch.ones(1, 2)], names=["1.weight"])) == ["1.weight"]
    with pytest.raises(InputError, match=r"'1\.bias' is not the weight"):
        gram(model, [], names=["1.bias"])


def test_keywords_and_other_forwards(linear):
    expected_gram = gram(linear, [BATCH[0]])["weight"]
    assert gram(linear, [{"input": BATCH[0]}])["weight"].equal(expected_gram)
    assert gram(linear, [(BATCH[0],)])["weight"].equal(expected_gram)
    found = gram(linear, [BATCH], forward=lambda model, batch: model(batch[0]))
    assert found["weight"].equal(expected_gram)


def test_merges_take_them(tmp_path):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2)]
    data = [torch.randn(40, 4) * torch.tensor(s) for s in ([1.0, 1, 0, 0], [0.0, 0, 1, 1])]
    grams = [gram(m, [x]) for m, x in zip(models, data, strict=True)]
    merged = merge(Pool(None, models, extras={"gram": grams}), RegMean(alpha=1.0))
    out = nn.Sequential(nn.Linear(4, 5))
    out[0].load_state_dict({"weight": merged["0.weight"], "bias": models[0][0].bias.detach()})
    # Each task uses its own two inputs: RegMean keeps each expert's columns for them.
    for model, columns in zip(models, (slice(0, 2), slice(2, 4)), strict=True):
        np.testing.assert_allclose(
            merged["0.weight"][:, columns], model[0].weight.detach()[:, columns], atol=1e-5
        )
    fishers = [fisher(m, [x], expected) for m, x in zip(models, data, strict=True)]
    merged = merge(Pool(None, models, extras={"fisher": fishers}), Fisher(floor=0.0))
    np.testing.assert_allclose(
        merged["0.weight"][:, :2], models[0][0].weight.detach()[:, :2], atol=1e-6
    )


def test_examples_keep_what_is_no_tensor():
    batch = {"x": torch.arange(4).reshape(2, 2), "flag": True, "more": [torch.ones(2)]}
    first, second = examples(batch)
    assert first["x"].equal(torch.tensor([[0, 1]]))
    assert second["more"][0].shape == (1,)
    assert first["flag"] is True


def test_bad_inputs(linear):
    with pytest.raises(InputError, match="no batches were given"):
        fisher(linear, [], squared_error)
    with pytest.raises(InputError, match=r"first axes \[2, 3\]"):
        fisher(linear, [(torch.ones(2, 2), torch.ones(3, 1))], squared_error)
    with pytest.raises(InputError, match="does not depend"):
        fisher(linear, [BATCH], lambda model, batch: batch[1].sum())
    with pytest.raises(NonFiniteError, match="fisher of 'weight' is not finite"):
        fisher(linear, [BATCH], lambda model, batch: squared_error(model, batch) * float("nan"))
    with pytest.raises(InputError, match="has no linear layer"):
        gram(nn.ReLU(), [BATCH[0]])
    fold, other = GramFold(linear), GramFold(nn.Linear(3, 1))
    with pytest.raises(MismatchError, match="different models"):
        fold.join(fold.update(fold.init(), BATCH[0]), other.update(other.init(), torch.ones(1, 3)))


@pytest.mark.filterwarnings("ignore")
def test_transformers_models():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    batch = {"input_ids": torch.randint(0, 16, (2, 5))}
    found = gram(model, [batch])
    assert found["transformer.h.0.mlp.c_proj.weight"].shape == (32, 32)
    fishers = fisher(model, [batch], lambda m, b: m(**b, labels=b["input_ids"]).loss)
    assert set(fishers) == {name for name, _ in model.named_parameters()}
