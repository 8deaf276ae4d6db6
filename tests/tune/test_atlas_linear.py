"""The linearised variant against finite differences and an explicit graph."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from pluribus import Pool
from pluribus.tune import Blend, ModuleForward
from pluribus.tune._linear import Linearised, linear_scores
from pluribus.tune.atlas import Atlas

from .conftest import TASKS


def filled(bed, size, seed=0):
    """Coefficients drawn at random, and the updates that they give."""
    blend = Blend(bed.pool, init=0.0)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        blend.coefficients.copy_(size * torch.randn(blend.coefficients.shape, generator=rng))
    return blend, blend.leaves(only="update")


def test_it_is_the_derivative_along_the_update(bed):
    blend, updates = filled(bed, 1.0)
    x = bed.inputs["a"][0].double()
    heads = {t: {n: w.double() for n, w in head.items()} for t, head in bed.heads.items()}
    net = bed.net.double()
    forward = ModuleForward(net, heads)
    base = {n: t.double() if n in bed.floats else t for n, t in bed.base.items()}
    linear = Linearised(forward, blend)
    linear._base = {name: base[name] for name in blend.tensors}
    moving = {name: update.detach().double() for name, update in updates.items()}
    got = linear({**base, **moving}, x, "a")
    start = forward(base, x, "a")
    step = 1e-3
    moved = {n: t + step * moving[n] if n in moving else t for n, t in base.items()}
    back = {n: t - step * moving[n] if n in moving else t for n, t in base.items()}
    slope = (forward(moved, x, "a") - forward(back, x, "a")) / (2 * step)
    torch.testing.assert_close(got - start, slope, rtol=1e-2, atol=1e-5)


def test_at_no_update_it_is_the_base_and_it_adds_up(bed):
    blend, one = filled(bed, 0.5, 0)
    _, other = filled(bed, 0.5, 1)
    linear, x = Linearised(bed.forward, blend), bed.inputs["b"][0]

    def out(updates):
        return linear(blend.parameters(updates), x, "b").detach()

    base = bed.forward(bed.base, x, "b")
    nothing = {name: torch.zeros_like(update) for name, update in one.items()}
    both = {name: (one[name] + other[name]).detach() for name in one}
    torch.testing.assert_close(out(nothing), base)
    torch.testing.assert_close(
        out(both) - base, out(one) + out(other) - 2 * base, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("partitions", [1, 3])
def test_ten_steps_equal_an_explicit_graph(bed, partitions):
    given = bed.labelled()
    scope = "block" if partitions == 1 else "partition"
    method = Atlas(
        scope=scope,
        partitions=partitions,
        linear=True,
        lr=0.02,
        epochs=1,
        steps_per_epoch=10,
        keep="last",
    )
    tuned = method.fit(bed.pool, bed.forward, given)
    blend = Blend(bed.pool, init=0.0, partitions=partitions)
    optimiser = torch.optim.AdamW([blend.coefficients], lr=0.02, weight_decay=0.1)
    for step in range(10):
        merged = blend()  # connected to the coefficients
        updates = {name: merged[name] - bed.base[name] for name in bed.floats}
        moving = {name: bed.base[name] for name in bed.floats}
        loss = torch.zeros(())
        for task in TASKS:
            x, y = given[task][step % 4]

            def run(tensors, x=x, task=task):
                return bed.forward({**bed.base, **tensors}, x, task)

            value, slope = torch.func.jvp(run, (moving,), (updates,))
            loss = loss + cross_entropy(value + slope, y)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([blend.coefficients], 1.0)
        optimiser.step()
        assert tuned.history[step]["loss"] == pytest.approx(float(loss.detach()), abs=1e-4)
    for name, j in blend.tensors.items():
        got = torch.from_numpy(tuned.coefficients.of(name)).reshape(3, partitions)
        torch.testing.assert_close(got, blend.coefficients[j].detach(), rtol=0, atol=1e-5)


def test_scores_of_the_result_are_those_of_the_linear_model(bed):
    method = Atlas(linear=True, lr=0.05, epochs=1, steps_per_epoch=5, keep="last")
    tuned = method.fit(bed.pool, bed.forward, bed.labelled())
    scores = linear_scores(bed.pool, tuned.coefficients, bed.forward)
    x = bed.inputs["c"][0]
    blend = Blend(bed.pool)
    blend.load(tuned.coefficients)
    linear = Linearised(bed.forward, blend)
    wanted = linear(blend.parameters(blend.leaves(only="update")), x, "c").detach()
    torch.testing.assert_close(scores(x, "c"), wanted)
    plain = bed.forward(dict(tuned.weights), x, "c")
    assert float((scores(x, "c") - plain).abs().max()) > 1e-4
    assert "linear" in tuned.coefficients.note


def test_divergence_from_the_experts_is_from_the_experts_themselves(bed):
    """Their outputs must not go through the first-order view."""
    method = Atlas(linear=True, lr=0.02, epochs=1, steps_per_epoch=1, keep="last")
    tuned = method.fit(bed.pool, bed.forward, bed.inputs, objective="kl")
    wanted = 0.0
    for task in TASKS:
        x = bed.inputs[task][0]
        q = bed.forward(bed.experts[task], x, task).log_softmax(1)
        p = bed.forward(bed.base, x, task).log_softmax(1)
        wanted += float((q.exp() * (q - p)).sum(1).mean())
    assert tuned.history[0]["loss"] == pytest.approx(wanted, rel=1e-4)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        q = self.q(x)[:, None]
        return self.out(scaled_dot_product_attention(q, q, q).squeeze(1).mean(1))


def test_fused_attention_has_a_derivative_here():
    net = Attention()
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pool = Pool(base, {"a": {name: tensor + 0.1 for name, tensor in base.items()}})
    x, y = torch.rand(8, 5, 4), torch.randint(3, (8,))
    tuned = Atlas(linear=True, lr=0.05, epochs=3).fit(pool, ModuleForward(net), {"a": (x, y)})
    assert tuned.history[-1]["loss"] < tuned.history[0]["loss"]
