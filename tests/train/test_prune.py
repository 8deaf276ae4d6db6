"""Global L1 pruning against torch's own, and masks that hold while what is left is tuned."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torchs

from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.train import prune
from pluribus.train.prune import Pruning, Tuning


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
        )


def data(count: int = 65) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    return x, (x.mean((1, 2, 3)) > 0).long()


@pytest.mark.parametrize("amount", [0.0, 0.013, 0.5, 0.98, 1.0])
def test_masks_are_torchs(amount):
    ours, theirs = net(), net()
    layers = [(theirs[0], "weight"), (theirs[4], "weight")]
    torchs.global_unstructured(layers, pruning_method=torchs.L1Unstructured, amount=amount)
    found = prune.masks(ours, amount)
    assert list(found) == ["0.weight", "4.weight"]
    assert torch.equal(found["0.weight"], theirs[0].weight_mask.bool())
    assert torch.equal(found["4.weight"], theirs[4].weight_mask.bool())
    prune.apply(ours, found)
    assert torch.equal(ours[0].weight, theirs[0].weight)
    assert torch.equal(ours[0].bias, theirs[0].bias)


def test_masks_worked_by_hand():
    two = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        two[0].weight.copy_(torch.tensor([[0.5, -0.1], [3.0, 0.2]]))
        two[1].weight.copy_(torch.tensor([[-0.3, 0.05]]))
    found = prune.masks(two, 0.5)  # 0.05, -0.1 and 0.2 of six go
    assert found["0.weight"].tolist() == [[True, False], [True, False]]
    assert found["1.weight"].tolist() == [[True, False]]


def test_a_single_layer_is_named_as_its_state_dict_has_it():
    assert list(prune.weights(nn.Linear(2, 2))) == ["weight"]


def test_masks_hold_while_the_rest_is_tuned():
    x, y = data()
    module, before = net(), net()
    how = Pruning(amount=0.8, tuning=Tuning(epochs=12, momentum=0.9, batch_size=16))
    found = prune.prune(module, x, y, how, torch.Generator().manual_seed(0))
    kept = sum(int(mask.sum()) for mask in found.values())
    assert kept == (27 + 96) - round(0.8 * (27 + 96))
    for name, weight in prune.weights(module).items():
        assert not weight[~found[name]].any()
        assert (weight != before.get_parameter(name))[found[name]].all()
    assert not module.training
    assert prune.nonzeros(module) <= kept + 3 + 2 + 6
    prune.apply(before.eval(), found)
    with torch.no_grad():
        untuned, tuned = (float(nn.functional.cross_entropy(one(x), y)) for one in (before, module))
    assert tuned < 0.75 * untuned


def test_tuning_is_plain_sgd():
    """Against a loop that says what it does: full batches, no shuffle that matters."""
    x, y = data(20)
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    slow = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    slow.load_state_dict(module.state_dict())
    mask = torch.rand(2, 36, generator=torch.Generator().manual_seed(3)) > 0.5
    prune.apply(module, {"1.weight": mask})
    how = Tuning(lr=0.1, weight_decay=0.01, epochs=3, batch_size=64)
    steps = prune.tune(module, x, y, how, torch.Generator().manual_seed(0), {"1.weight": mask})
    assert steps == 3
    weight, bias = slow[1].weight.detach() * mask, slow[1].bias.detach().clone()
    onehot = torch.eye(2)[y]
    for _ in range(3):
        chance = torch.softmax(x.flatten(1) @ weight.T + bias, 1)
        gap = (chance - onehot) / 20
        weight = (weight - 0.1 * (gap.T @ x.flatten(1) + 0.01 * weight)) * mask
        bias = bias - 0.1 * (gap.sum(0) + 0.01 * bias)
    torch.testing.assert_close(module[1].weight.detach(), weight)
    torch.testing.assert_close(module[1].bias.detach(), bias)


def test_a_last_batch_of_one_is_left_to_batch_norms_peace():
    x, y = data(33)
    how = Tuning(epochs=2, batch_size=16)
    assert prune.tune(net(), x, y, how, torch.Generator().manual_seed(0)) == 4


def test_the_generator_decides():
    x, y = data()
    how = Tuning(epochs=2, batch_size=8)
    found = []
    for seed in (0, 0, 1):
        module = net()
        prune.tune(module, x, y, how, torch.Generator().manual_seed(seed))
        found.append(module[4].weight.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Pruning(amount=1.0), "amount = 1.0: give the share"),
        (lambda: Pruning(amount=-0.1), "amount"),
        (lambda: Tuning(lr=0.0), "learning rate above 0"),
        (lambda: Tuning(lr=float("nan")), "learning rate above 0"),
        (lambda: Tuning(momentum=1.0), "below 1"),
        (lambda: Tuning(weight_decay=-1.0), "weight_decay"),
        (lambda: Tuning(batch_size=0), "batch_size = 0"),
        (lambda: prune.masks(nn.ReLU(), 0.5), "ReLU has no linear or convolution layer"),
        (lambda: prune.masks(net(), 1.5), "amount = 1.5"),
    ],
)
def test_settings_that_cannot_be(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_weights_that_are_no_numbers():
    module = net()
    with torch.no_grad():
        module[4].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"4\.weight holds NaN"):
        prune.masks(module, 0.5)


def test_masks_of_another_module():
    with pytest.raises(MismatchError, match=r"7\.weight is not in the module"):
        prune.apply(net(), {"7.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(MismatchError, match=r"4\.weight is \[2, 48\], but the mask is \[2, 2\]"):
        prune.apply(net(), {"4.weight": torch.ones(2, 2, dtype=torch.bool)})


def test_nothing_to_tune_on():
    x, y = data(2)
    with pytest.raises(InputError, match="no examples"):
        prune.tune(net(), x[:0], y[:0], Tuning(), torch.Generator())


def test_tuning_that_diverges_says_so():
    x, y = data()
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        prune.tune(net(), x * 1e30, y, Tuning(lr=1e30), torch.Generator().manual_seed(0))
