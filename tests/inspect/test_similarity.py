import numpy as np
import pytest
import torch
from torch import nn

from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.core.pool import Pool
from pluribus.inspect import inspect
from pluribus.inspect.similarity import hsic, similarity


class Net(nn.Module):
    def __init__(self, seed=0, width=6):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Linear(5, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def batches(count=2, rows=8):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 5, generator=rng) for _ in range(count)]


def unbiased(k, l):  # noqa: E741
    """Song et al.'s estimator as the sum over different i, j, q, r that it is an average of."""
    n, total, count = len(k), 0.0, 0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
                        count += 1
    return total / count


def test_the_estimator_is_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((6, 3)), rng.standard_normal((6, 4))
    k, l = x @ x.T, y @ y.T  # noqa: E741
    found = hsic(torch.from_numpy(k), torch.from_numpy(l))
    assert found == pytest.approx(unbiased(k, l), rel=1e-10)


def test_equals_the_formula_in_numpy():
    models = {"a": Net(0), "b": Net(1)}
    found = similarity(models, batches())
    assert found.blocks == ("layers.0", "layers.1")
    assert found.inputs == 16
    for b in range(2):
        sums = np.zeros(3)
        for x in batches():
            with torch.no_grad():
                rows = []
                for model in models.values():
                    h = model.stem(x)
                    for i, layer in enumerate(model.layers):
                        out = layer(h)
                        if i == b:
                            rows.append(out.double().numpy())
                        h = h + torch.tanh(out)
            k, l = (row @ row.T for row in rows)  # noqa: E741
            sums += [unbiased(k, l), unbiased(k, k), unbiased(l, l)]
        assert found.cka[b, 0, 1] == pytest.approx(sums[0] / np.sqrt(sums[1] * sums[2]), rel=1e-5)
        np.testing.assert_allclose(np.diag(found.cka[b]), 1)


def test_rotation_scale_and_shift_change_nothing():
    one = Net()
    turned = Net()
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    with torch.no_grad():
        last = turned.layers[1]
        last.weight.copy_(3 * rotation @ last.weight)
        last.bias.copy_(3 * rotation @ last.bias + 5)
    found = similarity({"one": one, "turned": turned}, batches())
    np.testing.assert_allclose(found.cka, 1, rtol=1e-5)


def test_unrelated_outputs_are_near_zero_although_inputs_are_few():
    class Noise(Net):
        def forward(self, x):
            noise = torch.randn(len(x), 6, generator=torch.Generator().manual_seed(self.seed))
            return self.layers[0](noise)

    one, other = Noise(), Noise()
    one.seed, other.seed = 1, 2
    found = similarity({"one": one, "other": other}, batches(6, 40), blocks=["layers.0"])
    assert abs(found.cka[0, 0, 1]) < 0.2


def test_tokens_are_averaged_without_padding():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])

        def forward(self, x, attention_mask):
            for layer in self.layers:
                x = layer(x)
            return x

    rng = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 4, generator=rng)
    mask = torch.tensor([[1, 1, 0]] * 6)
    padded = x.clone()
    padded[:, 2] = 100 * torch.randn(6, 4, generator=rng)
    models = {"a": Tokens(), "b": Tokens()}
    one = similarity(models, [{"x": x, "attention_mask": mask}], blocks=["layers.0"])
    other = similarity(models, [{"x": padded, "attention_mask": mask}], blocks=["layers.0"])
    np.testing.assert_allclose(one.cka, other.cka)


def test_models_are_loaded_one_at_a_time_and_left_as_they_were():
    model = Net().train()
    found = similarity({"a": model, "b": lambda: Net(0)}, batches())
    np.testing.assert_allclose(found.cka, 1)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_constant_output_has_no_similarity():
    dead = Net()
    with torch.no_grad():
        dead.layers[0].weight.zero_()
    found = similarity({"a": Net(), "dead": dead}, batches())
    assert np.isnan(found.cka[0, 0, 1])
    assert found.cka[1, 0, 1] <= 1


def test_the_report_shows_it():
    models = {"base": Net(0), "a": Net(1)}
    pool = Pool(models["base"], {"a": models["a"]})
    found = inspect(pool, models=models, inputs=batches())
    assert "linear CKA on 16 inputs" in found.table()
    assert "What blocks compute" in found.html()
    assert set(found.to_dict()["similarity"]["blocks"]) == {"layers.0", "layers.1"}


def test_refusals():
    models = {"a": Net(0), "b": Net(1)}
    for given, error, said in (
        (({"a": Net()}, batches()), InputError, "at least two"),
        ((models, []), InputError, "no batch"),
        ((models, batches(1, 3)), InputError, "at least 4"),
        ((models, [torch.randn(8, 4)]), MismatchError, r"does not take batch 0 \(shape \[8, 4\]\)"),
        (({"a": nn.Linear(5, 5), "b": nn.Linear(5, 5)}, batches()), InputError, "no numbered"),
    ):
        with pytest.raises(error, match=said):
            similarity(*given)
    with pytest.raises(MismatchError, match=r"has no module layers\.2.*Did you mean"):
        similarity(models, batches(), blocks=["layers.2"])
    bad = batches()
    bad[1][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="batch 1"):
        similarity(models, bad)
    with pytest.raises(InputError, match="models and inputs"):
        inspect(Pool(models["a"], {"b": models["b"]}), models=models)
