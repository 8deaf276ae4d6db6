"""What a zoo takes beyond vectors and perceptrons, on tasks that cost nothing."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pluribus.core.errors import InputError, MismatchError
from pluribus.tasks import heads, raising, specialise, zoo
from pluribus.tasks.raising import raise_specialists
from pluribus.tasks.specialise import Plan
from pluribus.tasks.views import Split, TaskData, generator

PLAN = Plan(steps=6, batch=8, base_pool=40, lr=1e-2, warmup=0, threads=1)


class Normed(nn.Module):
    """Images to features through a batch norm, with a table nobody trains."""

    def __init__(self, width, momentum=0.5):
        super().__init__()
        self.width = width
        self.table = nn.Embedding(1, 3)
        self.norm = nn.BatchNorm2d(3, momentum=momentum)
        self.project = nn.Linear(3 * 4, width)

    def forward(self, x):
        return self.project(self.norm(x + self.table.weight[0, :, None, None]).flatten(1))


def data(name, seed=0, shift=0.0, count=40):
    rng = generator(seed, name, "toy")
    splits = []
    for _ in range(3):
        y = torch.arange(count) % 3
        x = torch.randn(count, 3, 2, 2, generator=rng) + shift
        x[:, :, 0, 0] += 2 * y[:, None]
        splits.append(Split(x, y))
    return TaskData(name, *splits, ("a", "b", "c"))


TASKS = {"one": data("one"), "two": data("two", shift=3.0)}


def weights(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {name: tensor.clone() for name, tensor in Normed(5).state_dict().items()}


def raised(plan=PLAN, tasks=TASKS, seed=0, base=None, cache=False, on_step=None, **more):
    return raise_specialists(
        "toy",
        tasks,
        plan,
        seed,
        partial(Normed, 5),
        cache=cache,
        on_step=on_step,
        base=weights() if base is None else base,
        **more,
    )


@pytest.fixture(scope="module")
def made():
    return raised()


# -- buffers and frozen tensors --------------------------------------------------------------------


def test_statistics_follow_a_task_or_stay(made):
    """A fresh norm's mean after one full-batch step: (1 - momentum) * 0 + momentum * mean."""
    one = raised(Plan(steps=1, batch=40, lr=1e-9, warmup=0, weight_decay=0.0, threads=1))
    x = TASKS["two"].train.x + one.base["table.weight"][0, :, None, None]
    expected = 0.5 * x.mean((0, 2, 3))
    torch.testing.assert_close(one.experts["two"]["norm.running_mean"], expected)
    assert one.experts["two"]["norm.num_batches_tracked"] == 1
    assert made.experts["one"]["norm.num_batches_tracked"] == 6
    still = raised(Plan(steps=4, batch=8, statistics="frozen", threads=1))
    for expert in still.experts.values():
        for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
            assert torch.equal(expert[name], still.base[name])
        assert not torch.equal(expert["norm.weight"], still.base["norm.weight"])


def test_the_base_is_left_as_it_was_given():
    base = weights()
    made = raised(base=base)
    assert {name: tensor.tolist() for name, tensor in made.base.items()} == {
        name: tensor.tolist() for name, tensor in weights().items()
    }
    assert not any(tensor.requires_grad for tensor in made.base.values())


def test_integers_stay_integers_and_are_not_averaged_into_fractions(made):
    state = made.base | {"norm.num_batches_tracked": torch.tensor(3.0)}
    assert made.module(state).norm.num_batches_tracked.dtype == torch.int64
    assert made.base["norm.num_batches_tracked"].dtype == torch.int64
    assert made.scores(state) == made.scores(made.base)


def test_scores_use_the_statistics_of_the_state(made):
    state = made.experts["two"] | {"norm.running_mean": made.base["norm.running_mean"] + 50}
    x = TASKS["two"].test.x
    module = made.module(made.experts["two"])
    assert not module.training
    with torch.no_grad():
        torch.testing.assert_close(made.features(made.experts["two"], x), module(x))
    assert not torch.allclose(made.features(state, x), made.features(made.experts["two"], x))


def test_frozen_tensors_are_the_bases_own():
    made = raised(Plan(steps=3, batch=8, frozen=("table.", "norm.weight"), threads=1))
    for expert in made.experts.values():
        changed = {n for n in expert if not torch.equal(expert[n], made.base[n])}
        assert expert["table.weight"] is made.base["table.weight"]
        assert changed == {
            *("norm.bias", "norm.running_mean", "norm.running_var"),
            *("norm.num_batches_tracked", "project.weight", "project.bias"),
        }


def test_frozen_tensors_and_a_given_base_are_not_stored(own_folders):
    plan = Plan(steps=3, batch=8, frozen=("table.",), threads=1)
    made = raised(plan, cache=True)
    (path,) = (own_folders[1] / "zoos").iterdir()
    kept = raising.store.load(path)
    assert "expert/one/project.weight" in kept
    assert not [name for name in kept if name.startswith("base/") or "table" in name]
    seen = []
    again = raised(plan, cache=True, on_step=lambda *step: seen.append(step))
    assert not seen
    for task in TASKS:
        assert all(torch.equal(made.experts[task][n], again.experts[task][n]) for n in made.base)
    other = weights() | {"table.weight": torch.ones(1, 3)}
    raised(plan, cache=True, base=other, on_step=lambda *step: seen.append(step))
    assert seen, "another base is another zoo"


def test_steps_and_heads_are_reported():
    seen = []
    raised(on_step=lambda *step: seen.append(step))
    assert seen[:3] == [("heads", 1, 2), ("heads", 2, 2), ("one", 1, 6)]
    assert seen[-1] == ("two", 6, 6)


def test_a_number_of_steps_goes_over_the_data_as_often_as_it_takes():
    rows = list(specialise._rows(5, 2, 7, generator(0, "t", "rows")))
    assert [len(r) for r in rows] == [2, 2, 1, 2, 2, 1, 2]
    assert sorted(torch.cat(rows[:3]).tolist()) == list(range(5))
    assert sorted(torch.cat(rows[3:6]).tolist()) == list(range(5))


def test_key_ignores_what_decides_nothing(monkeypatch):
    before = raising._code(specialise)
    source = raising.inspect.getsource(specialise)
    monkeypatch.setattr(
        raising.inspect, "getsource", lambda module: source.replace('"""Train', '"""# Train x')
    )
    assert raising._code(specialise) == before
    monkeypatch.setattr(
        raising.inspect, "getsource", lambda module: source.replace("0.5 * (1 +", "0.4 * (1 +")
    )
    assert raising._code(specialise) != before


# -- features, forward, module ---------------------------------------------------------------------


def test_features_come_in_chunks(made, monkeypatch):
    x = TASKS["one"].test.x
    whole = made.features(made.base, x)
    sizes = []
    call = specialise.functional_call
    monkeypatch.setattr(specialise, "CHUNK", 7)
    monkeypatch.setattr(
        specialise,
        "functional_call",
        lambda module, state, args, **k: sizes.append(len(args[0])) or call(module, state, args),
    )
    torch.testing.assert_close(made.features(made.base, x), whole)
    assert sizes == [7, 7, 7, 7, 7, 5]


def test_padded_inputs_go_through_beside_others_of_like_length(made, monkeypatch):
    """Features come back in the inputs' order, and no chunk holds a longer input than the next."""
    x = torch.randn(50, 3, 2, 2, generator=generator(0, "padded", "toy"))
    long = torch.arange(50) * 7 % 50  # each length once

    def lengths(given):
        return long[(given[:, None] == x).flatten(2).all(2).int().argmax(1)]

    padded = replace(made, lengths=lengths)
    assert long[padded.order(x)].tolist() == list(range(50))
    assert torch.equal(made.order(x), torch.arange(50))
    monkeypatch.setattr(zoo, "PADDED_CHUNK", 8)
    seen = []
    call = specialise.functional_call
    monkeypatch.setattr(
        specialise,
        "functional_call",
        lambda module, state, args, **k: seen.append(args[0]) or call(module, state, args),
    )
    found = padded.features(made.base, x)
    assert [len(part) for part in seen] == [8] * 6 + [2]
    assert torch.equal(torch.cat(seen), x[long.argsort()])
    torch.testing.assert_close(found, made.features(made.base, x))


def test_forward_is_logits_with_a_gradient(made):
    x, y = TASKS["two"].val
    params = {
        name: t.clone().requires_grad_(t.is_floating_point()) for name, t in made.base.items()
    }
    logits = made.forward(params, x, "two")
    torch.testing.assert_close(logits.detach(), made.logits(made.base, "two", x))
    cross_entropy(logits, y).backward()
    module, head = made.module(), made.heads["two"]
    cross_entropy(module(x) @ head["weight"].T + head["bias"], y).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(params[name].grad, parameter.grad)
    assert params["norm.running_mean"].grad is None
    torch.testing.assert_close(params["project.weight"].detach(), made.base["project.weight"])
    assert params["norm.num_batches_tracked"] == made.base["norm.num_batches_tracked"]


def test_forward_takes_the_rest_from_the_base(made):
    x = TASKS["one"].val.x
    own = {"project.bias": made.base["project.bias"] + 1}
    torch.testing.assert_close(made.forward(own, x, "one"), made.logits(made.base | own, "one", x))
    with pytest.raises(MismatchError, match=r"zoo toy has no projct\.bias"):
        made.forward({"projct.bias": own["project.bias"]}, x, "one")
    with pytest.raises(InputError, match="no task 'three'; there are: one, two"):
        made.forward(own, x, "three")


def test_forward_keeps_a_wider_type(made):
    params = {n: t.double() if t.is_floating_point() else t for n, t in made.base.items()}
    assert made.forward(params, TASKS["one"].val.x.double(), "one").dtype == torch.float64


def test_module_is_a_copy_with_the_bases_weights(made):
    module = made.module()
    assert list(module.state_dict()) == list(made.base)
    before = made.base["project.bias"].clone()
    with torch.no_grad():
        module.project.bias += 1
    assert torch.equal(made.base["project.bias"], before)
    assert all(p.requires_grad for p in module.parameters())
    state = torch.get_rng_state()
    made.module()
    assert torch.equal(state, torch.get_rng_state())


def test_a_zoo_moves_whole(made):
    moved = made.to("meta")
    assert all(t.is_meta for t in moved.base.values())
    assert moved.experts["two"]["norm.bias"].is_meta
    assert moved.heads["one"]["weight"].is_meta
    assert moved.tasks["one"].val.x.is_meta
    assert not made.base["norm.bias"].is_meta
    here = made.to("cpu")
    assert here.scores(here.base) == made.scores(made.base)


# -- streams and shots -----------------------------------------------------------------------------


def numbered(count):
    return Split(torch.arange(count)[:, None], torch.arange(count) % 3)


def test_a_stream_is_endless_whole_and_its_seeds(made):
    stream = numbered(10).batches(4, generator(0, "t", "s"))
    drawn = [next(stream) for _ in range(6)]
    assert all(len(batch.y) == 4 for batch in drawn)
    assert all(torch.equal(batch.x[:, 0] % 3, batch.y) for batch in drawn)
    for epoch in (drawn[:2], drawn[2:4], drawn[4:]):
        assert len(set(torch.cat([batch.x for batch in epoch])[:, 0].tolist())) == 8
    assert not torch.equal(drawn[0].x, drawn[2].x)

    def first(*arguments):
        return next(made.unlabelled("one", *arguments))

    assert torch.equal(first("val", 8, 1), first("val", 8, 1))
    assert not torch.equal(first("val", 8, 1), first("val", 8, 2))
    assert not torch.equal(first("val", 8, 1), first("test", 8, 1))


def test_unlabelled_is_labelled_without_labels(made):
    pairs = zip(made.labelled("two", "val", 5, 3), made.unlabelled("two", "val", 5, 3), strict=True)
    for (x, y), alone in itertools.islice(pairs, 20):
        assert isinstance(alone, torch.Tensor)
        assert torch.equal(x, alone)
        assert y.shape == (5,)


@pytest.mark.parametrize("size", [0, 41])
def test_a_batch_that_cannot_be_filled_is_refused_at_once(made, size):
    with pytest.raises(InputError, match=f"a batch of {size} from 40 examples"):
        made.unlabelled("one", "val", size)


def test_shots_are_so_many_a_class():
    shots = numbered(30).shots(4, generator(0, "t", "s"))
    assert shots.y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(shots.x[:, 0] % 3, shots.y)
    assert len(set(shots.x[:, 0].tolist())) == 12
    assert not torch.equal(shots.x, numbered(30).shots(4, generator(1, "t", "s")).x)
    with pytest.raises(InputError, match="4 shots of class 1: give a number from 1 to 3"):
        numbered(10).shots(4, generator(0, "t", "s"))


# -- heads -----------------------------------------------------------------------------------------


def test_class_means_by_hand():
    features = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    head = heads.class_means(features, torch.tensor([0, 0, 2]), 4, scale=2.0)
    assert head["weight"].tolist() == [[2, 0], [0, 0], [0, 2], [0, 0]]
    assert head["bias"].tolist() == [0, 0, 0, 0]
    with pytest.raises(InputError, match="no examples"):
        heads.class_means(features[:0], torch.tensor([], dtype=torch.long), 2)
    with pytest.raises(InputError, match="the mean feature of class 1 is zero"):
        heads.class_means(torch.tensor([[1.0], [1.0], [-1.0]]), torch.tensor([0, 1, 1]), 2)


def test_probe_is_where_the_gradient_vanishes():
    rng = generator(0, "t", "probe")
    features = torch.randn(60, 4, generator=rng, dtype=torch.float64)
    labels = torch.randint(3, (60,), generator=rng)
    head = heads.probe(features, labels, 3, decay=0.05)
    share = (features @ head["weight"].T + head["bias"]).softmax(1)
    excess = (share - torch.nn.functional.one_hot(labels, 3)) / 60
    by_weight = excess.T @ features + 0.05 * head["weight"]
    torch.testing.assert_close(by_weight, torch.zeros(3, 4, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        excess.sum(0), torch.zeros(3, dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_probes_make_the_heads_of_a_given_base(made):
    x, y = TASKS["one"].train.first(40)
    expected = heads.probe(made.features(made.base, x).clone(), y, 3)
    torch.testing.assert_close(made.heads["one"], expected)


# -- a task left out -------------------------------------------------------------------------------


def test_a_task_is_left_out_until_it_has_a_head():
    made = raised(without="two")
    assert list(made.tasks) == list(made.experts) == ["one"]
    assert made.left_out["two"] is TASKS["two"]
    with pytest.raises(InputError, match="built without task 'two'; give it a head"):
        made.score(made.base, "two")
    with pytest.raises(InputError, match="left out no task 'one', but two"):
        made.with_head("one", torch.zeros(3, 5))
    with pytest.raises(MismatchError, match=r"\[2, 5\], expected \[3, 5\]"):
        made.with_head("two", torch.zeros(2, 5))
    shots = made.left_out["two"].train.shots(3, generator(0, "two", "shots"))
    head = heads.class_means(made.features(made.base, shots.x), shots.y, 3)
    whole = made.with_head("two", **head)
    assert list(whole.tasks) == ["one", "two"]
    assert not whole.left_out
    x, y = TASKS["two"].test
    guess = (whole.features(whole.base, x) @ head["weight"].T).argmax(1)
    assert whole.score(whole.base, "two") == pytest.approx((guess == y).double().mean().item())
    assert list(whole.normalised(whole.base)) == ["one"]
    assert whole.described()["tasks"]["two"]["specialist"] is None
    assert "two" not in made.tasks


def test_what_is_left_out_decides_nothing():
    other = TASKS | {"two": data("two", seed=9)}
    a, b = raised(without="two"), raised(without="two", tasks=other)
    assert all(torch.equal(a.experts["one"][n], b.experts["one"][n]) for n in a.base)
