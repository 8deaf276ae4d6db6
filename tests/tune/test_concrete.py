"""Concrete: both stages against explicit loops, the replay, the three masks, what goes wrong."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import RelaxedBernoulli
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear

from pluribus import Pool, Weights, recipe
from pluribus.cli import main
from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.engine.driver import copy
from pluribus.tune import Blend, ModuleForward, _concrete
from pluribus.tune._mask import EPS, ConcreteMask
from pluribus.tune.concrete import FINALS, Concrete, own, variant

from .conftest import TASKS


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Nets this small only wait for each other on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Explicit:
    """The merge with everything in the graph: slow, and obvious."""

    def __init__(self, bed) -> None:
        self.bed = bed
        self.tau = {n: [bed.experts[t][n] - bed.base[n] for t in TASKS] for n in bed.floats}
        self.sizes = {name: bed.base[name].numel() for name in bed.floats}
        self.reads = 0
        self.generator = torch.Generator().manual_seed(0)

    def uniforms(self):
        found = torch.rand(sum(self.sizes.values()), generator=self.generator)
        return dict(zip(self.sizes, found.split(list(self.sizes.values())), strict=True))

    def mask(self, logits, uniforms, temperature=0.5):
        out = {}
        for name, x in logits.items():
            u = uniforms[name].reshape(x.shape).clamp(EPS, 1 - EPS)
            soft = torch.sigmoid((x + torch.log(u) - torch.log(1 - u)) / temperature)
            out[name] = soft / soft.mean()
        return out

    def merged(self, scale, masks):
        """`scale` has one row for the model, or one for each tensor."""
        out = dict(self.bed.base)
        for j, name in enumerate(self.bed.floats):
            row = scale[j % len(scale)]
            update = sum(c * tau for c, tau in zip(row, self.tau[name], strict=True))
            out[name] = self.bed.base[name] + masks[name] * update
        return out

    def entropy(self, parameters):
        """Sum over tasks on the next batch of each."""
        total = torch.zeros(())
        for task in TASKS:
            x = self.bed.inputs[task][self.reads % 4]
            head = self.bed.heads[task]
            p = linear(functional_call(self.bed.net, parameters, (x,)), head["weight"]).softmax(1)
            total = total - (p * p.log()).sum(1).mean()
        self.reads += 1
        return total

    def zeros(self):
        return {n: torch.zeros_like(self.bed.base[n]).requires_grad_() for n in self.bed.floats}


def flat(logits):
    return torch.cat([x.detach().reshape(-1) for x in logits.values()])


def test_gradients_equal_an_explicit_graph_s(bed):
    slow = Explicit(bed)
    rng = torch.Generator().manual_seed(4)
    logits = {n: torch.randn(x.shape, generator=rng) for n, x in slow.zeros().items()}
    blend = Blend(bed.pool, by="tensor", init=0.3)
    with torch.no_grad():
        blend.coefficients.uniform_(0.1, 0.6, generator=rng)
    mask = ConcreteMask({n: x.shape for n, x in logits.items()}, init=logits)
    with torch.no_grad():
        draw = mask.draw(torch.Generator().manual_seed(0))
    leaves = blend.leaves(draw.masks)
    loss = bed.forward(blend.parameters(leaves), bed.inputs["a"][0], "a").logsumexp(1).sum()
    loss.backward()
    mask.pull(draw, blend.pull(leaves, draw.masks, mask_gradients=True))

    x = {name: value.clone().requires_grad_() for name, value in logits.items()}
    scale = blend.coefficients.detach()[:, :, 0].clone().requires_grad_()
    merged = slow.merged(scale, slow.mask(x, slow.uniforms()))
    head = bed.heads["a"]["weight"]
    outputs = linear(functional_call(bed.net, merged, (bed.inputs["a"][0],)), head)
    wanted = torch.autograd.grad(outputs.logsumexp(1).sum(), [*x.values(), scale])
    torch.testing.assert_close(
        mask.flat.grad, flat(dict(enumerate(wanted[:-1]))), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(blend.coefficients.grad[:, :, 0], wanted[-1], rtol=1e-4, atol=1e-5)


def test_task_arithmetic_equals_an_explicit_loop(bed):
    tuned = Concrete(steps=12, lr=0.05).fit(bed.pool, bed.forward, bed.inputs)
    slow = Explicit(bed)
    x = slow.zeros()
    optimiser = torch.optim.Adam(x.values(), lr=0.05)
    scale = torch.full((1, 3), 0.3)
    for step in range(12):
        loss = slow.entropy(slow.merged(scale, slow.mask(x, slow.uniforms())))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        assert tuned.history[step]["loss"] == pytest.approx(float(loss.detach()), abs=1e-4)
    torch.testing.assert_close(tuned.mask.flat.detach(), flat(x), atol=1e-5, rtol=0)
    assert all((tuned.coefficients.of(n) == np.float32(0.3)).all() for n in bed.floats)


@pytest.mark.parametrize("redraw", [False, True])
@pytest.mark.parametrize(("inner", "inner_lr"), [("tensor", 1.0), ("model", 0.1)])
def test_five_bilevel_steps_equal_an_explicit_derivation(bed, monkeypatch, inner, inner_lr, redraw):
    """Reset, merge, gradient, inner Adam with living moments, then the outer step at c'."""
    reached = []
    gradient = _concrete.MaskStage.gradient

    def recording(self, leaves, batches):
        gradient(self, leaves, batches)
        reached.append(self.reached[:, :, 0].clone())

    monkeypatch.setattr(_concrete.MaskStage, "gradient", recording)
    method = Concrete(
        inner=inner, steps=5, lr=0.05, inner_lr=inner_lr, redraw=redraw, adapt_steps=1
    )
    tuned = method.fit(bed.pool, bed.forward, bed.inputs)

    slow = Explicit(bed)
    x = slow.zeros()
    outer = torch.optim.Adam(x.values(), lr=0.05)
    rows = 1 if inner == "model" else len(bed.floats)
    scale = torch.empty(rows, 3, requires_grad=True)
    adam = torch.optim.Adam([scale], lr=inner_lr)
    for step in range(5):
        with torch.no_grad():
            scale.fill_(0.3)
        uniforms = slow.uniforms()
        masks = {name: m.detach() for name, m in slow.mask(x, uniforms).items()}
        adam.zero_grad()
        slow.entropy(slow.merged(scale.clamp(0, 1), masks)).backward()
        adam.step()
        torch.testing.assert_close(reached[step], scale.detach(), atol=1e-5, rtol=0)
        if redraw:
            uniforms = slow.uniforms()
        constant = scale.detach().clamp(0, 1)
        outer.zero_grad()
        slow.entropy(slow.merged(constant, slow.mask(x, uniforms))).backward()
        outer.step()
    torch.testing.assert_close(tuned.mask.flat.detach(), flat(x), atol=1e-5, rtol=0)
    assert len(reached) == 5
    if inner_lr == 1.0:
        assert float((reached[0] - 0.3).abs().min()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("final_mask", FINALS)
def test_the_second_stage_is_adamerging_on_the_fixed_mask(bed, final_mask):
    settings = {"inner": "tensor", "lr": 0.05, "adapt_lr": 0.03, "final_mask": final_mask}
    first = Concrete(steps=4, adapt_steps=1, **settings).fit(bed.pool, bed.forward, bed.inputs)
    tuned = Concrete(steps=0, adapt_steps=10, **settings).fit(
        bed.pool, bed.forward, bed.inputs, logits=first.mask.logits
    )
    assert torch.equal(tuned.mask.flat, first.mask.flat)
    masks = first.mask.final(final_mask, 0)
    slow = Explicit(bed)
    scale = torch.full((len(bed.floats), 3), 0.3, requires_grad=True)
    adam = torch.optim.Adam([scale], lr=0.03)
    for _ in range(10):
        adam.zero_grad()
        slow.entropy(slow.merged(scale.clamp(0, 1), masks)).backward()
        adam.step()
    for j, name in enumerate(bed.floats):
        got = tuned.coefficients.of(name)
        np.testing.assert_allclose(got, scale.detach().clamp(0, 1)[j], atol=1e-5)
    wanted = slow.merged(scale.detach().clamp(0, 1), masks)
    for name in bed.floats:
        torch.testing.assert_close(tuned.weights[name], wanted[name], atol=1e-5, rtol=1e-5)


def test_the_merge_equals_fusionbench_s_formula(bed, monkeypatch):
    """Their mask model samples torch's relaxed Bernoulli and divides by the mean; their task-wise
    merge masks each task vector, weights it and adds it to the base. Re-derived, not copied."""
    tuned = Concrete(steps=3, lr=0.2, final_mask="continuous").fit(
        bed.pool, bed.forward, bed.inputs
    )
    fed = torch.rand(tuned.mask.flat.shape, generator=torch.Generator().manual_seed(9))
    taken = iter(fed.split([x.numel() for x in tuned.mask.logits.values()]))
    wanted = {}
    with monkeypatch.context() as patched:
        for name, logits in tuned.mask.logits.items():
            u = next(taken).reshape(logits.shape)
            patched.setattr(torch, "rand", lambda *_, u=u, **__: u)
            sample = RelaxedBernoulli(torch.tensor(0.5), logits=logits).rsample()
            sample = sample / sample.mean()
            wanted[name] = bed.base[name].clone()
            for task in TASKS:
                wanted[name] += 0.3 * (sample * (bed.experts[task][name] - bed.base[name]))
        patched.setattr(torch, "rand", lambda *_, **__: fed)
        masked = variant(tuned, "continuous")
    for name, value in wanted.items():
        torch.testing.assert_close(masked.weights[name], value, atol=1e-6, rtol=1e-6)


def folders(bed, tmp_path):
    places = {"base": tmp_path / "base", **{t: tmp_path / t for t in TASKS}}
    copy(Weights.of(bed.base), places["base"])
    for task in TASKS:
        copy(Weights.of(bed.experts[task]), places[task])
    return {label: str(place) for label, place in places.items()}


def same_bits(one, two):
    assert list(one) == list(two)
    for name in one:
        assert one.source(name).load().tobytes() == two.source(name).load().tobytes(), name


@pytest.mark.parametrize("final_mask", FINALS)
@pytest.mark.parametrize("inner", ["none", "tensor"])
def test_the_exported_recipe_replays_the_same_bits(bed, tmp_path, inner, final_mask):
    places = folders(bed, tmp_path)
    pool = Pool(places["base"], {task: places[task] for task in TASKS})
    method = Concrete(inner=inner, steps=3, lr=0.2, adapt_steps=3, final_mask=final_mask)
    tuned = method.fit(pool, bed.forward, bed.inputs)
    saved = tuned.save(tmp_path / "tuned")
    told = tmp_path / "tuned" / "recipe.yml"
    recipe.run(recipe.load(told), tmp_path / "again")
    again = Weights.open(tmp_path / "again")
    same_bits(again, saved)
    same_bits(again, tuned.weights)
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(told), str(tmp_path / "cli"), "--quiet"])
    assert not stop.value.code
    same_bits(Weights.open(tmp_path / "cli"), saved)
    masks = tuned.mask.final(final_mask, 0)
    name = "blocks.0.0.weight"
    scale = torch.from_numpy(tuned.coefficients.of(name).copy())
    tau = torch.stack([bed.experts[t][name] - bed.base[name] for t in TASKS])
    wanted = bed.base[name] + masks[name] * torch.tensordot(scale, tau, 1)
    torch.testing.assert_close(again[name], wanted, atol=1e-6, rtol=1e-6)


def test_variants_share_logits_and_coefficients_and_differ_in_the_mask(bed):
    tuned = Concrete(inner="model", steps=3, lr=0.3, adapt_steps=2, seed=5).fit(
        bed.pool, bed.forward, bed.inputs
    )
    found = {final: variant(tuned, final) for final in FINALS}
    assert found["expected"].coefficients.digest == tuned.coefficients.digest
    assert len({other.coefficients.digest for other in found.values()}) == 3
    again = variant(tuned, "continuous", 6).coefficients
    assert again.digest != found["continuous"].coefficients.digest
    np.testing.assert_array_equal(
        again.mask("norm.bias"), tuned.mask.final("continuous", 6)["norm.bias"].numpy()
    )
    for final, other in found.items():
        assert other.coefficients.note["final_mask"] == final
        for name, values in tuned.mask.final(final, 5).items():
            got = other.coefficients.mask(name)
            np.testing.assert_array_equal(got, values.reshape(-1).numpy())
        np.testing.assert_array_equal(
            other.coefficients.of("stem.weight"), tuned.coefficients.of("stem.weight")
        )


@pytest.mark.parametrize("inner", ["none", "model"])
def test_the_loss_with_each_final_mask_is_reported(bed, inner):
    method = Concrete(inner=inner, steps=2, lr=0.3, adapt_steps=3, adapt_lr=0.1)
    tuned = method.fit(bed.pool, bed.forward, bed.inputs)
    (told,) = (text for text in tuned.log.notes if text.startswith("loss of the mask's last"))
    found = dict(part.split(" ") for part in told.split(": ")[1].split(", "))
    assert list(found) == list(FINALS)
    for final, loss in found.items():
        slow = Explicit(bed)
        slow.reads = 1 if inner == "none" else 3  # the batch that the last step learned from
        scale = torch.from_numpy(tuned.coefficients.of("stem.weight").copy())[None]
        wanted = slow.entropy(slow.merged(scale, tuned.mask.final(final, 0)))
        assert float(loss) == pytest.approx(float(wanted), abs=2e-4)
    assert f"drops {100 * tuned.mask.sparsity():.1f}% of the weights" in tuned.log.notes[-1]


def test_an_expert_s_own_masked_model(bed):
    tuned = Concrete(steps=3, lr=0.3).fit(bed.pool, bed.forward, bed.inputs)
    alone = own(tuned, "b", 0.5).weights
    for name, mask in tuned.mask.expected().items():
        wanted = bed.base[name] + 0.5 * mask * (bed.experts["b"][name] - bed.base[name])
        torch.testing.assert_close(alone[name], wanted, atol=1e-6, rtol=1e-6)
    with pytest.raises(InputError, match="no expert is called 'bb'"):
        own(tuned, "bb")


def test_tensors_of_one_entry_are_merged_without_a_mask_and_named():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.gain * self.layer(x)

    net = Scaled()
    base = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    expert = {name: tensor + 0.5 for name, tensor in base.items()}
    streams = {"a": [torch.rand(8, 6, generator=torch.Generator().manual_seed(0))]}
    tuned = Concrete(steps=2).fit(Pool(base, {"a": expert}), ModuleForward(net), streams)
    assert any("1 tensors have no mask (gain)" in text for text in tuned.log.notes)
    assert tuned.coefficients.mask("gain") is None
    assert float(tuned.weights["gain"]) == pytest.approx(1.15)
    small = Concrete(steps=2, min_numel=5).fit(
        Pool(base, {"a": expert}), ModuleForward(net), streams
    )
    assert small.mask.left_out == ("gain", "layer.bias")


def test_the_mask_lowers_the_objective(bed):
    tuned = Concrete(steps=60, lr=0.1).fit(bed.pool, bed.forward, bed.inputs)
    first, last = (
        np.mean([s["loss"] for s in tuned.history[part]]) for part in (slice(8), slice(-8, None))
    )
    assert last < first - 0.05


# -- stopping --------------------------------------------------------------------------------------


HELD = {"lr": 0.3, "stop": "held_out", "held_out": 1}


def test_a_held_out_part_chooses_the_step(bed):
    """Labels drawn at random can be learned by heart, which does not help the part held out."""
    labelled = bed.labelled()
    method = Concrete(steps=120, patience=20, **HELD)
    tuned = method.fit(bed.pool, bed.forward, labelled, objective="cross_entropy")
    judged = {s["number"]: s["judged"] for s in tuned.history if s["judged"] is not None}
    assert len(judged) == 12
    best = max(judged, key=judged.get)
    assert 0 < tuned.log.best == best - 1 < 110
    start = ConcreteMask({name: bed.base[name].shape for name in bed.floats})
    assert judged[1] == pytest.approx(-held_out_loss(bed, labelled, start), abs=1e-4)
    assert judged[best] == pytest.approx(-held_out_loss(bed, labelled, tuned.mask), abs=1e-4)
    assert any(f"step {best - 1} was kept" in text for text in tuned.log.notes)


def held_out_loss(bed, labelled, mask):
    """Of the first batches, which were held out, at the expected mask."""
    merged = Explicit(bed).merged(torch.full((1, 3), 0.3), mask.expected())
    total = 0.0
    for task in TASKS:
        x, y = labelled[task][0]
        outputs = linear(functional_call(bed.net, merged, (x,)), bed.heads[task]["weight"])
        total += float(cross_entropy(outputs, y))
    return total


def test_patience_ends_a_stage_early(bed):
    method = Concrete(steps=100, patience=2, **HELD)
    tuned = method.fit(bed.pool, bed.forward, bed.labelled(), objective="cross_entropy")
    assert len(tuned.history) < 100
    assert f"no better than at step {tuned.log.best} for 2 probes" in tuned.log.stopped


def test_what_is_held_out_is_not_learned_from(bed):
    seen = []

    class Told(list):
        def __iter__(self):
            return (seen.append(float(x[0, 0])) or x for x in super().__iter__())

    streams = {**bed.inputs, "a": Told(bed.inputs["a"])}
    fit = Concrete(steps=7, stop="held_out", held_out=1).fit
    tuned = fit(bed.pool, bed.forward, streams)
    others = {task: batches[1:] for task, batches in bed.inputs.items()}
    wanted = Concrete(steps=7).fit(bed.pool, bed.forward, others)
    got = [step["loss"] for step in tuned.history]
    assert got == pytest.approx([step["loss"] for step in wanted.history], abs=1e-5)
    assert len(seen) > 4  # read again from the start, and the first skipped again
    once = fit(bed.pool, bed.forward, {t: iter(b * 3) for t, b in bed.inputs.items()})
    assert [s["loss"] for s in once.history][:3] == pytest.approx(got[:3], abs=1e-5)
    with pytest.raises(InputError, match=r"'c' has 4 batches, of which 4"):
        Concrete(steps=7, stop="held_out", held_out=4).fit(
            bed.pool,
            bed.forward,
            {**{t: b * 2 for t, b in bed.inputs.items()}, "c": bed.inputs["c"]},
        )


def test_agreement_can_choose_the_step_of_both_stages(bed):
    method = Concrete(
        inner="model", steps=20, lr=1.0, adapt_steps=20, adapt_lr=0.1, stop="agreement"
    )
    tuned = method.fit(bed.pool, bed.forward, bed.inputs)
    assert tuned.log.best is not None
    assert any("learned the mask" in text for text in tuned.log.notes)
    assert [s["number"] for s in tuned.history] == list(range(1, len(tuned.history) + 1))


def test_how_much_is_to_do_is_told_before_it_is_done(bed):
    told = []
    method = Concrete(inner="model", steps=4, adapt_steps=3, batches_per_step=2)
    assert method.passes(3) == (2 * 4 + 3) * 3 * 2
    tuned = method.fit(bed.pool, bed.forward, bed.inputs, on_step=lambda *step: told.append(step))
    assert told[0] == ("mask: 66 passes in all", 0, 4)
    assert told[2][0].startswith("mask: about")
    assert told[-1][0].startswith("coefficients: about")
    assert told[-1][1:] == (3, 3)
    assert "up to 66 passes forward and backward" in tuned.log.notes
    assert "steps 1 to 4 learned the mask" in tuned.log.notes
    assert "steps 5 to 7 learned the coefficients" in tuned.log.notes


# -- bad input -------------------------------------------------------------------------------------


def test_settings_are_checked():
    for wrong in ({"temperature": 0.0}, {"lr": -1.0}, {"steps": -1}, {"min_numel": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Concrete(**wrong)
    with pytest.raises(InputError, match="clamp"):
        Concrete(clamp=(1.0, 0.0))
    with pytest.raises(InputError, match="outside clamp"):
        Concrete(inner="tensor", scale=1.5)
    assert Concrete(scale=1.5).scale == 1.5  # fixed, so the clamp does not matter
    with pytest.raises(InputError, match="inner"):
        Concrete(inner="layers")
    official = Concrete.official(inner="tensor")
    assert (official.inner_lr, official.redraw, official.final_mask) == (1.0, True, "continuous")


def test_a_fixed_scale_above_the_clamp_is_used(bed):
    tuned = Concrete(steps=1, scale=1.5).fit(bed.pool, bed.forward, bed.inputs)
    assert (tuned.coefficients.of("stem.weight") == np.float32(1.5)).all()


def test_logits_of_another_model(bed):
    fit = Concrete(steps=1).fit
    good = Concrete(steps=1).fit(bed.pool, bed.forward, bed.inputs).mask.logits
    wrong = good | {"stem.weight": torch.zeros(2, 2)}
    with pytest.raises(MismatchError, match=r"'stem\.weight' have shape \[2, 2\]"):
        fit(bed.pool, bed.forward, bed.inputs, logits=wrong)
    broken = good | {"stem.weight": torch.full((8, 6), float("inf"))}
    with pytest.raises(NonFiniteError, match=r"stem\.weight"):
        fit(bed.pool, bed.forward, bed.inputs, logits=broken)
    with pytest.raises(MismatchError, match="lack"):
        fit(bed.pool, bed.forward, bed.inputs, logits={})


def test_labels_heads_and_streams_as_in_adamerging(bed):
    fit = Concrete(steps=1).fit
    with pytest.raises(InputError, match="must not see any"):
        fit(bed.pool, bed.forward, bed.labelled())
    with pytest.raises(InputError, match="'c' has a head but no stream"):
        fit(bed.pool, bed.forward, {t: bed.inputs[t] for t in "ab"})
    forward = ModuleForward(bed.net, call=lambda net, x, _: net(x).sum())
    with pytest.raises(InputError, match="class scores"):
        fit(bed.pool, forward, bed.inputs)
    with pytest.raises(InputError, match="must not see any"):
        Concrete(steps=1, stop="held_out").fit(bed.pool, bed.forward, bed.labelled())
    pool = Pool(bed.base, {**bed.experts, "c": {n: t.clone() for n, t in bed.base.items()}})
    tuned = fit(pool, bed.forward, bed.inputs)
    assert any("c equals the base" in text for text in tuned.warnings)
    supervised = fit(bed.pool, bed.forward, bed.labelled(), objective="cross_entropy")
    assert len(supervised.history) == 1


@pytest.mark.parametrize("where", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_mask_where_it_was(bed, where):
    """In the outer batch of the first step and in the inner batch of the second."""
    broken = torch.full((16, 6), float("nan"))
    batches = [*bed.inputs["b"][:where], broken, *bed.inputs["b"]]
    method = Concrete(inner="tensor", steps=5, lr=0.1, adapt_steps=1)
    if where == 1:
        with pytest.raises(NonFiniteError, match="step 1: the loss of task b"):
            method.fit(bed.pool, bed.forward, {**bed.inputs, "b": batches})
        return
    tuned = method.fit(bed.pool, bed.forward, {**bed.inputs, "b": batches})
    assert "step 2: the loss of task b is not finite" in tuned.log.stopped
    assert len(tuned.history) == 2  # one of the mask, one of the coefficients
    assert bool(tuned.mask.flat.isfinite().all())
    assert all(np.isfinite(tuned.coefficients.of(n)).all() for n in bed.floats)


def test_a_stream_that_ends_keeps_the_mask(bed):
    method = Concrete(inner="model", steps=2, lr=0.1, adapt_steps=5)
    streams = {**bed.inputs, "b": iter(bed.inputs["b"])}  # used up by the first stage
    tuned = method.fit(bed.pool, bed.forward, streams)
    assert len(tuned.history) == 2
    assert "task b ended after 0 of 5 steps" in tuned.log.stopped
    assert float(tuned.mask.flat.detach().abs().max()) > 0
    assert (tuned.coefficients.of("stem.weight") == np.float32(0.3)).all()
    short = {**bed.inputs, "b": itertools.islice(bed.inputs["b"], 3)}
    tuned = method.fit(bed.pool, bed.forward, short)
    assert len(tuned.history) == 1
    assert any("task b ended after 1 of 2 steps" in text for text in tuned.warnings)


def test_the_seed_decides_the_bits(bed):
    def run(seed):
        method = Concrete(inner="tensor", steps=3, adapt_steps=2, seed=seed)
        return method.fit(bed.pool, bed.forward, bed.inputs).coefficients.digest

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_task_vectors_read_from_files_give_the_same_mask(bed):
    one, two = (
        Concrete(steps=3, resident=resident).fit(bed.pool, bed.forward, bed.inputs)
        for resident in (True, False)
    )
    torch.testing.assert_close(one.mask.flat, two.mask.flat, atol=1e-6, rtol=0)
