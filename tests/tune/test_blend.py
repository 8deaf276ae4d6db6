"""The differentiable composition: values and gradients against an explicit graph."""

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from pluribus import Pool
from pluribus.core.coefficients import Coefficients, groups
from pluribus.core.errors import InputError, MismatchError
from pluribus.tune import Blend, ModuleForward

from .conftest import TASKS, Bed


def explicit(bed: Bed, scales: dict[str, torch.Tensor], masks=None) -> dict[str, torch.Tensor]:
    """The merge written out, with its graph: scales by tensor, (t, n) or (t, 1)."""
    out = dict(bed.base)
    for name in bed.floats:
        tau = torch.stack([bed.experts[t][name] - bed.base[name] for t in TASKS]).flatten(1)
        update = (scales[name] * tau).sum(0).reshape(bed.base[name].shape)
        out[name] = bed.base[name] + (update if masks is None else masks[name] * update)
    return out


def loss_of(bed: Bed, parameters) -> torch.Tensor:
    total = torch.zeros(())
    for task in TASKS:
        head = bed.heads[task]
        features = functional_call(bed.net, parameters, (bed.inputs[task][0],))
        total = total + linear(features, head["weight"], head["bias"]).log_softmax(1)[:, 0].mean()
    return total


def backward(bed: Bed, blend: Blend, masks=None, **keywords):
    leaves = blend.leaves(masks)
    parameters = blend.parameters(leaves)
    for task in TASKS:
        outputs = bed.forward(parameters, bed.inputs[task][0], task)
        outputs.log_softmax(1)[:, 0].mean().backward()
    return leaves, blend.pull(leaves, masks, **keywords)


def drawn(blend: Blend, seed: int = 5) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        blend.coefficients.copy_(torch.rand(blend.coefficients.shape, generator=rng) * 1.6 - 0.3)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("by", ["tensor", "layer", "model", lambda name: name.split(".")[-1]])
def test_gradient_equals_autograd_through_an_explicit_merge(bed, by, resident):
    blend = Blend(bed.pool, by=by, clamp=(0.0, 1.0), resident=resident)
    drawn(blend)
    leaves, _ = backward(bed, blend)
    raw = blend.coefficients.detach().clone().requires_grad_()
    scales = {name: raw[row].clamp(0, 1) for name, row in blend.tensors.items()}
    parameters = explicit(bed, scales)
    (wanted,) = torch.autograd.grad(loss_of(bed, parameters), raw)
    for name in bed.floats:
        torch.testing.assert_close(leaves[name], parameters[name].detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(blend.coefficients.grad, wanted, rtol=1e-4, atol=1e-6)
    assert bool((wanted == 0).any()), "no coefficient lies outside the clamp: nothing is tested"


def test_gradients_of_masks_and_groups(bed):
    blend = Blend(bed.pool, partitions=3, seed=9)
    drawn(blend)
    rng = torch.Generator().manual_seed(2)
    masks = {n: torch.rand(bed.base[n].shape, generator=rng) for n in bed.floats}
    leaves, found = backward(bed, blend, masks, mask_gradients=True)
    raw = blend.coefficients.detach().clone().requires_grad_()
    own = {name: mask.clone().requires_grad_() for name, mask in masks.items()}
    index = {n: torch.from_numpy(groups(n, bed.base[n].numel(), 3, 9)) for n in bed.floats}
    parameters = explicit(bed, {n: raw[r][:, index[n]] for n, r in blend.tensors.items()}, own)
    wanted = torch.autograd.grad(loss_of(bed, parameters), [raw, *own.values()])
    torch.testing.assert_close(blend.coefficients.grad, wanted[0], rtol=1e-4, atol=1e-6)
    for name, slope in zip(own, wanted[1:], strict=True):
        torch.testing.assert_close(found[name], slope, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(leaves[name], parameters[name].detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("partitions", [1, 3])
def test_called_it_is_connected_to_autograd(bed, partitions):
    blend = Blend(bed.pool, clamp=(0.0, 1.0), partitions=partitions)
    drawn(blend)
    backward(bed, blend)
    wanted = blend.coefficients.grad.clone()
    blend.coefficients.grad = None
    loss_of(bed, blend()).backward()
    torch.testing.assert_close(blend.coefficients.grad, wanted, rtol=1e-4, atol=1e-6)


def test_groups_share_out_every_coordinate_evenly_and_from_the_seed_alone():
    index = groups("w", 30_000, 3, 9)
    assert set(np.unique(index)) == {0, 1, 2}
    assert np.bincount(index).min() > 9_500
    assert (index == groups("w", 30_000, 3, 9)).all()
    assert (index[:100] == groups("w", 100, 3, 9)).all(), "blocks must not change the draw"
    assert (index != groups("v", 30_000, 3, 9)).mean() > 0.5


def test_kept_experts_alone_take_part(bed):
    blend = Blend(bed.pool, init=0.5)
    name = bed.floats[0]
    blend.keep({name: [2]})
    tau = bed.experts["c"][name] - bed.base[name]
    torch.testing.assert_close(blend.leaves()[name].detach(), bed.base[name] + 0.5 * tau)
    backward(bed, blend)
    slope = blend.coefficients.grad[blend.tensors[name], :, 0]
    assert slope[0] == slope[1] == 0
    assert slope[2] != 0
    assert blend.export().of(name).tolist() == [0.0, 0.0, 0.5]


def test_excluded_and_whole_numbers_stay_the_base(bed):
    blend = Blend(bed.pool, exclude=("stem.weight",))
    parameters = blend.parameters(blend.leaves())
    assert torch.equal(parameters["stem.weight"], bed.base["stem.weight"])
    assert torch.equal(parameters["steps"], bed.base["steps"])
    assert blend.export().of("stem.weight").tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(InputError, match=r"Did you mean 'stem\.weight'"):
        Blend(bed.pool, exclude=("stem.weights",))


def test_ties_before_the_coefficients_equals_the_authors_split(bed):
    """`ties_merging_split` re-derived: trimmed by the whole vector, names sorted, ties included."""
    blend = Blend(
        bed.pool, of="trim(density=0.2, scope='model', count='official') >> elect(tie='global')"
    )
    names = sorted(bed.floats)
    tau = torch.stack(
        [torch.cat([(bed.experts[t][n] - bed.base[n]).flatten() for n in names]) for t in TASKS]
    )
    keep = int(0.2 * tau.shape[1])
    for row in tau:
        cut = row.abs().sort().values[tau.shape[1] - keep - 1]
        row[row.abs() < cut] = 0
    sign = tau.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    wanted = torch.where(sign > 0, tau > 0, tau < 0) * tau
    got = torch.cat([blend.task_vectors(name) for name in names], 1)
    assert torch.equal(got, wanted)


def test_gradient_checkpointing_gives_the_same_gradient(bed):
    class Checkpointed(type(bed.net)):
        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=False)
            return self.out(self.norm(x))

    grads = []
    for net in (bed.net, Checkpointed()):
        blend = Blend(bed.pool)
        leaves = blend.leaves()
        parameters = blend.parameters(leaves)
        forward = ModuleForward(net, bed.heads)
        with forward.holding(parameters):
            forward(parameters, bed.inputs["a"][0], "a").logsumexp(1).mean().backward()
        blend.pull(leaves)
        grads.append(blend.coefficients.grad)
    torch.testing.assert_close(*grads)


def test_a_module_is_left_as_it_was_even_after_an_error(bed):
    before = {name: tensor.clone() for name, tensor in bed.net.state_dict().items()}
    bed.net.train()
    with bed.forward.holding(bed.experts["a"]):
        assert torch.equal(bed.net.stem.weight, bed.experts["a"]["stem.weight"])
    broken = ModuleForward(bed.net, call=lambda module, x, task: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        broken(bed.experts["a"], None, "a")
    assert bed.net.training
    for name, tensor in bed.net.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert isinstance(bed.net.stem.weight, torch.nn.Parameter)


def test_tied_tensors_are_blended_once(bed):
    net = torch.nn.ModuleDict({"one": torch.nn.Linear(6, 6), "two": torch.nn.Linear(6, 6)})
    net["two"].weight = net["one"].weight

    def states():
        weight = torch.randn(6, 6)
        return {
            "one.weight": weight,
            "one.bias": torch.randn(6),
            "two.weight": weight,
            "two.bias": torch.randn(6),
        }

    blend = Blend(Pool(states(), [states(), states()]))
    leaves = blend.leaves()
    assert set(leaves) == {"one.weight", "one.bias", "two.bias"}
    forward = ModuleForward(net, call=lambda module, x, _: module["two"](module["one"](x)))
    parameters = blend.parameters(leaves)
    got = forward(parameters, torch.eye(6), "any")
    weight = leaves["one.weight"]
    wanted = linear(linear(torch.eye(6), weight, leaves["one.bias"]), weight, leaves["two.bias"])
    torch.testing.assert_close(got, wanted)


# -- coefficients on disk --------------------------------------------------------------------------


def test_coefficients_come_back_from_their_file(tmp_path, bed):
    blend = Blend(bed.pool, partitions=2, seed=4)
    drawn(blend)
    masks = {n: torch.rand(bed.base[n].shape) for n in bed.floats[:2]}
    kept = blend.export(masks, {"method": "a test"})
    kept.save(tmp_path / "c.safetensors")
    found = Coefficients.load(tmp_path / "c.safetensors", kept.digest)
    assert found.experts == TASKS
    assert found.digest == kept.digest
    assert dict(found.note) == {"method": "a test"}
    for name in bed.floats:
        np.testing.assert_array_equal(found.of(name), kept.of(name))
    np.testing.assert_array_equal(found.mask(bed.floats[0]), masks[bed.floats[0]].numpy().ravel())
    again = Blend(bed.pool, partitions=2, seed=4)
    again.load(found)
    assert torch.equal(again.coefficients, blend.coefficients)


def test_changed_coefficients_are_refused(tmp_path, bed):
    blend = Blend(bed.pool)
    path = tmp_path / "c.safetensors"
    blend.export().save(path)
    wanted = blend.export().digest
    drawn(blend)
    blend.export().save(path)
    with pytest.raises(MismatchError, match="changed or replaced"):
        Coefficients.load(path, wanted)


def test_coefficients_for_other_experts_or_shapes_are_refused(bed):
    found = Blend(bed.pool).export()
    with pytest.raises(InputError, match="for experts a, b, c"):
        Blend(Pool(bed.base, {"a": bed.experts["a"]})).load(found)
    with pytest.raises(MismatchError, match="need \\[2\\]"):
        Coefficients({"w": np.zeros(3, np.float32)}, ("a", "b"))
    with pytest.raises(MismatchError, match=r"Did you mean 'stem\.weight'"):
        found.of("stem.weights")


def test_bad_input(bed):
    with pytest.raises(InputError, match="give a base model"):
        Blend(Pool(None, bed.experts))
    with pytest.raises(InputError, match="nothing to blend"):
        Blend(bed.pool, exclude=lambda name: True)
    with pytest.raises(InputError, match="by = 'row'"):
        Blend(bed.pool, by="row")
    with pytest.raises(InputError, match="keep the experts apart"):
        Blend(bed.pool, of="trim(density=0.2) >> mean")
    with pytest.raises(InputError, match="by='tensor'"):
        Blend(bed.pool, by="model").keep({})
    with pytest.raises(MismatchError, match="no tensor 'other'"):
        bed.forward({**bed.base, "other": torch.zeros(1)}, bed.inputs["a"][0], "a")
    with pytest.raises(MismatchError, match=r"the models lack stem\.weight"):
        bed.forward({n: t for n, t in bed.base.items() if n != "stem.weight"}, None, "a")
    with pytest.raises(InputError, match="no head for task 'd'"):
        bed.forward(bed.base, bed.inputs["a"][0], "d")
