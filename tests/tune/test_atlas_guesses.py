"""Learning from guesses: the trusted inputs, the views, the loop, and what goes wrong."""

import math

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import linear

from pluribus import Pool
from pluribus.core.errors import InputError
from pluribus.loss.ufm import Ufm
from pluribus.tune import AdaMerging, ModuleForward
from pluribus.tune._examples import Examples
from pluribus.tune._trusted import TwoViews, as_it_is, strong_view, trust, two_views
from pluribus.tune.atlas import Atlas

from .conftest import TASKS


def weak(inputs, rng):
    return inputs


def strong(inputs, rng):
    return inputs + 0.1 * torch.randn(inputs.shape, generator=rng)


VIEWS = (weak, strong)


def test_trusted_by_hand():
    """23 inputs of 2 classes: at most floor(23 / 20) = 1 of each, the most probable named so."""
    p = torch.full((23, 2), 0.5)
    p[:, 0] = torch.linspace(0.05, 0.6, 23)
    p[:, 1] = 1 - p[:, 0]
    found = trust(p, p, sure=0.9)
    assert found.rows.tolist() == [22, 0]
    assert found.labels.tolist() == [0, 1]
    assert found.empty == []
    assert found.sure.tolist() == [1, 1] + 21 * [-1]


def test_only_the_chosen_inputs_are_trusted():
    """In the authors' code all are. 400 inputs, 4 classes: 10 of each, and never more than 100."""
    rng = torch.Generator().manual_seed(0)
    p = torch.randn(400, 4, generator=rng).softmax(1)
    found = trust(p, p, 0.9)
    assert len(found.rows) == 40
    for c in range(4):
        own = found.rows[found.labels == c]
        named = (p.argmax(1) == c).nonzero().flatten()
        assert sorted(own.tolist()) == sorted(named[p[named, c].topk(10).indices].tolist())
    many = torch.randn(6000, 2, generator=rng).softmax(1)
    assert len(trust(many, many, 0.9).rows) == 200


def test_a_class_without_predictions_has_no_trusted_input():
    p = torch.tensor([[0.9, 0.06, 0.04]]).repeat(50, 1)
    p[0] = torch.tensor([0.2, 0.7, 0.1])
    found = trust(p, p, 0.95)
    assert found.empty == [2]
    assert (found.labels == 1).sum() == 1


def test_batches_are_three_quarters_of_others_and_a_quarter_trusted():
    rng = torch.Generator().manual_seed(0)
    p = torch.randn(200, 4, generator=rng).softmax(1)
    found = trust(p, p, 0.9)  # 5 of each
    x = torch.arange(200.0)[:, None]
    stream = TwoViews(x, found, weak=weak, strong=strong, batch_size=16)
    batches = list(stream)
    assert len(batches) == len(stream) == 15  # 180 others, 12 a batch
    for batch in batches:
        known = batch["trusted"] >= 0
        assert (known.sum(), (~known).sum()) == (4, 12)
        assert batch["index"][known].tolist() == batch["weak"][known, 0].int().tolist()
        for index, label in zip(batch["index"][known], batch["trusted"][known], strict=True):
            assert int(found.labels[found.rows == index]) == int(label)
        assert not torch.equal(batch["weak"], batch["strong"])
    dealt = torch.cat([batch["index"][batch["trusted"] < 0] for batch in batches])
    assert sorted(dealt.tolist()) == sorted(set(range(200)) - set(found.rows.tolist()))
    assert [b["index"].tolist() for b in stream] != [b["index"].tolist() for b in batches]


@pytest.mark.parametrize("threshold", [0.9, "adaptive"])
def test_ten_steps_equal_an_explicit_loop(bed, threshold):
    loss = Ufm(threshold=threshold, top=0.9)
    sets = {task: torch.cat(bed.inputs[task]) for task in TASKS}
    method = Atlas(lr=0.02, epochs=5, batch_size=96, steps_per_epoch=2)
    tuned = method.fit(bed.pool, bed.forward, sets, objective=loss, views=VIEWS)
    streams = {
        task: iter_again(
            two_views(
                bed.forward,
                bed.base,
                Examples(x, batch_size=32),
                task,
                loss,
                views=VIEWS,
            )
        )
        for task, x in sets.items()
    }
    raw = torch.zeros(len(bed.floats), 3, requires_grad=True)
    optimiser = torch.optim.AdamW([raw], lr=0.02, weight_decay=0.1)
    known: dict[str, list[int]] = {}
    for step in range(10):
        parameters = dict(bed.base)
        for j, name in enumerate(bed.floats):
            for t, task in enumerate(TASKS):
                tau = bed.experts[task][name] - bed.base[name]
                parameters[name] = parameters[name] + raw[j, t] * tau
        total = torch.zeros(())
        for task in TASKS:
            batch = next(streams[task])
            known.setdefault(task, batch["sure"].tolist())
            head = bed.heads[task]
            first, second = (
                linear(functional_call(bed.net, parameters, (batch[v],)), **head).softmax(1)
                for v in ("weak", "strong")
            )
            bars = [0.9] * 4
            if threshold == "adaptive":
                counts = [known[task].count(c) for c in range(4)]
                most = max(*counts, known[task].count(-1), 1)
                bars = [0.9 * (n / most) / (2 - n / most) for n in counts]
            summed, weight = torch.zeros(()), 0
            for b in range(len(batch["index"])):
                q = first[b].detach() ** 2
                q = q / q.sum()
                if batch["trusted"][b] >= 0:
                    q = torch.eye(4)[batch["trusted"][b]]
                named = int(q.argmax())
                if q.max() > bars[named]:
                    summed = summed - (q * second[b].log()).sum()
                    weight += 1
                if q.max() > 0.9:
                    known[task][int(batch["index"][b])] = named
            total = total + summed / max(weight, 1)
        assert tuned.history[step]["loss"] == pytest.approx(float(total.detach()), abs=1e-4)
        optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_([raw], 1.0)
        optimiser.step()
    for j, name in enumerate(bed.floats):
        got = torch.from_numpy(tuned.coefficients.of(name))
        torch.testing.assert_close(got, raw[j].detach(), rtol=0, atol=1e-5)


def iter_again(stream):
    while True:
        yield from stream


def test_strong_views_of_images():
    images = torch.rand(40, 2, 16, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    rng = torch.Generator().manual_seed(1)
    before = images.clone()
    seen = strong_view(images, rng)
    assert torch.equal(images, before)
    assert seen.shape == images.shape
    zeros = (seen == 0).float().mean((1, 2, 3))
    assert bool((zeros >= 16 / 256).all())  # the blank square, a quarter of each side
    assert float(zeros.max()) < 0.4
    assert not torch.equal(seen, strong_view(images, rng))
    again = strong_view(images, torch.Generator().manual_seed(1))
    assert torch.equal(seen, again)
    # what is left is the image itself, shifted by at most 2 and times one gain
    for one, own in zip(seen, images, strict=True):
        fits = []
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                moved = torch.zeros_like(own)
                ys, xs = slice(max(dy, 0), 16 + min(dy, 0)), slice(max(dx, 0), 16 + min(dx, 0))
                yo, xo = slice(max(-dy, 0), 16 - max(dy, 0)), slice(max(-dx, 0), 16 - max(dx, 0))
                moved[:, ys, xs] = own[:, yo, xo]
                both = (one != 0) & (moved != 0)
                gains = one[both] / moved[both]
                fits.append(float(gains.max() - gains.min()))
        assert min(fits) < 1e-4
    assert as_it_is(images, rng) is images


def test_images_need_no_views_and_other_inputs_do(bed):
    sets = {task: torch.cat(bed.inputs[task]) for task in TASKS}
    with pytest.raises(InputError, match=r"views=\(weak, strong\)"):
        Atlas().fit(bed.pool, bed.forward, sets, objective="ufm")
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pool = Pool(base, {"a": {name: tensor + 0.1 for name, tensor in base.items()}})
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    method = Atlas(lr=0.02, epochs=2, batch_size=16)
    tuned = method.fit(pool, ModuleForward(net), {"new": images}, objective=Ufm(threshold=0.3))
    assert tuned.history
    assert "transductive" in tuned.coefficients.note


def test_labels_are_refused(bed):
    x = torch.cat(bed.inputs["a"])
    y = torch.zeros(len(x), dtype=torch.long)
    pool = Pool(bed.base, {t: bed.experts[t] for t in "bc"})
    fit = Atlas(epochs=1).fit
    for given in ((x, y), Examples(x, y), [(x, y)], {"x": x, "labels": y}):
        with pytest.raises(InputError, match="must not see"):
            fit(pool, bed.forward, {"a": given}, objective="ufm", views=VIEWS)


def test_batches_are_read_whole_and_iterators_refused(bed):
    pool = Pool(bed.base, {t: bed.experts[t] for t in "bc"})
    method = Atlas(epochs=1, lr=0.01)
    told = {"objective": Ufm(threshold=0.5), "views": VIEWS}
    tuned = method.fit(pool, bed.forward, {"a": bed.inputs["a"]}, **told)
    assert len(tuned.history) == math.ceil((64 - 4) / 12)  # batches of 16; one trusted of a class
    with pytest.raises(InputError, match="read more than once"):
        method.fit(pool, bed.forward, {"a": iter(bed.inputs["a"])}, **told)
    with pytest.raises(InputError, match="is empty"):
        method.fit(pool, bed.forward, {"a": []}, **told)


def test_an_epoch_without_a_sure_guess_is_an_error(bed):
    sets = {task: torch.cat(bed.inputs[task]) for task in TASKS}
    with pytest.raises(InputError, match="no guess that was sure enough"):
        Atlas(epochs=1).fit(bed.pool, bed.forward, sets, objective=Ufm(threshold=1.0), views=VIEWS)


def test_batches_without_a_sure_guess_are_skipped_and_counted(bed):
    """One input a step and none trusted among them: only loud inputs give sure guesses."""
    x = torch.cat(bed.inputs["a"])[:24]
    heads = {"a": {"weight": 10 * bed.heads["a"]["weight"], "bias": bed.heads["a"]["bias"]}}
    forward = ModuleForward(bed.net, heads)
    pool = Pool(bed.base, {t: bed.experts[t] for t in "bc"})
    loss = Ufm(threshold=0.99)
    method = Atlas(lr=1e-4, epochs=1, batch_size=1)
    tuned = method.fit(pool, forward, {"a": x}, objective=loss, views=VIEWS)
    q = loss.guess(forward(bed.base, x, "a"))
    own = trust(q, forward(bed.base, x, "a").softmax(1), 0.99)
    others = [i for i in range(24) if i not in own.rows.tolist()]
    wanted = sum(float(q[i].max()) <= 0.99 for i in others)
    assert 0 < wanted < len(others)
    assert tuned.log.skipped == wanted
    assert len(tuned.history) == len(others) - wanted
    assert any(f"{wanted} of {len(others)} steps were left out" in t for t in tuned.warnings)


def test_a_class_that_is_never_named_is_warned_of(bed):
    heads = {"a": {"weight": bed.heads["a"]["weight"], "bias": torch.tensor([0, 0, 0, -1e3])}}
    pool = Pool(bed.base, {t: bed.experts[t] for t in "bc"})
    tuned = Atlas(epochs=1, lr=0.01).fit(
        pool,
        ModuleForward(bed.net, heads),
        {"a": torch.cat(bed.inputs["a"])},
        objective=Ufm(threshold=0.5),
        views=VIEWS,
    )
    assert any("names no input as class 3" in text for text in tuned.warnings)


def test_too_few_inputs(bed):
    pool = Pool(bed.base, {t: bed.experts[t] for t in "bc"})
    with pytest.raises(InputError, match="nothing to learn from; give more"):
        Atlas(epochs=1).fit(
            pool, bed.forward, {"a": bed.inputs["a"][0][:1]}, objective="ufm", views=VIEWS
        )


def test_the_linear_model_can_guess(bed):
    sets = {task: torch.cat(bed.inputs[task]) for task in TASKS}
    method = Atlas(lr=0.02, epochs=2, batch_size=96, linear=True)
    tuned = method.fit(bed.pool, bed.forward, sets, objective=Ufm(threshold=0.8), views=VIEWS)
    assert any(tuned.coefficients.of(name).any() for name in bed.floats)


def test_adamerging_takes_the_same_batches(bed):
    loss = Ufm(threshold=0.8)
    streams = {
        task: two_views(
            bed.forward,
            bed.base,
            Examples(torch.cat(bed.inputs[task]), batch_size=32),
            task,
            loss,
            views=VIEWS,
        )
        for task in TASKS
    }
    tuned = AdaMerging(steps=4, lr=0.02).fit(bed.pool, bed.forward, streams, objective=loss)
    assert len(tuned.history) == 4
    assert tuned.history[0]["loss"] > 0
    with pytest.raises(InputError, match="'weak' and 'strong' views"):
        AdaMerging(steps=1).fit(bed.pool, bed.forward, bed.inputs, objective=loss)


def test_validation_chooses_the_epoch(bed):
    pool = Pool(bed.base, {t: bed.experts[t] for t in "bc"})
    x = torch.cat(bed.inputs["a"])
    base = bed.forward(bed.base, x, "a").argmax(1)
    method = Atlas(lr=3.0, clip=100.0, epochs=3)
    tuned = method.fit(
        pool,
        bed.forward,
        {"a": x},
        objective=Ufm(threshold=0.5),
        views=VIEWS,
        validation={"a": (x, base)},
    )
    assert tuned.log.best == 0
