"""The knowledge base of IBCL: growth, reuse, models for preferences, and what it refuses."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.core.pool import Pool
from pluribus.engine.driver import merge
from pluribus.train.continual import (
    AccuracyTable,
    CheckpointFront,
    CredalBase,
    Preferring,
    SequentialPosterior,
    backward_transfer,
    drawn,
)

WIDTH = 6
NET = partial(nn.Linear, WIDTH, 1)


def task(seed: int, count: int = 120, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes on either side of a random plane."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=rng)
    return x, (x @ torch.randn(width, generator=rng) > 0).long()


TASKS = {name: task(seed) for seed, name in enumerate(("shoes", "shirts", "bags"))}


def learned(**settings) -> CredalBase:
    keywords = {"epochs": 2, "lr": 2e-2, "batch_size": 32, "kl_weight": "elbo", "d_thr": 0.0}
    base = CredalBase(settings.pop("net", NET), **{**keywords, **settings})
    for name, data in TASKS.items():
        base.learn(name, data)
    return base


@pytest.fixture(scope="module")
def base() -> CredalBase:
    return learned()


def close(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance)


def same(one, other):
    close(one, other, rtol=0, atol=0)


# -- growth and reuse ------------------------------------------------------------------------------


def test_every_posterior_is_stored_without_a_threshold(base):
    assert base.tasks == ("shoes", "shirts", "bags")
    assert base.reuse == {"shoes": (0, 1, 2), "shirts": (3, 4, 5), "bags": (6, 7, 8)}
    assert base.cost() == (9, 9 * 2 * 4, 9, 9 * 2 * (WIDTH + 1))


def test_a_wide_threshold_reuses_the_first_point():
    base = learned(d_thr=100.0)
    assert base.reuse == dict.fromkeys(TASKS, (0, 0, 0))  # points of the same task count too
    assert len(base.points) == 1
    assert [entry.stored for entry in base.learned] == [(True, False, False)] + [(False,) * 3] * 2
    assert base.cost().trained_models == 9
    same(base.mean({"shirts": 1.0}), base.mean({"bags": 1.0}))


@pytest.mark.parametrize("distance", ["official", "w2"])
def test_the_threshold_parts_what_is_stored_from_what_is_reused(distance):
    """Replays algorithm 1 from the distances that each task recorded."""
    loose = learned(d_thr=0.0, distance=distance)
    gaps = sorted(gap for entry in loose.learned for gap in entry.nearest if gap is not None)
    base = learned(d_thr=gaps[2] * 1.001, distance=distance)
    assert 0 < sum(not new for entry in base.learned for new in entry.stored) < 8
    for entry in base.learned:
        for number, new, gap in zip(entry.points, entry.stored, entry.nearest, strict=True):
            assert new == (gap is None or gap > base.d_thr)
            assert number < len(base.points)
    stored = [n for e in base.learned for n, new in zip(e.points, e.stored, strict=True) if new]
    assert stored == list(range(len(base.points)))


def test_a_substitute_is_the_next_prior(monkeypatch):
    """And a posterior that was stored is it otherwise."""
    from pluribus.train.continual import ibcl

    priors = []

    def watched(network, prior, *rest, **keywords):
        priors.append(prior)
        return fit(network, prior, *rest, **keywords)

    fit = ibcl.fit
    monkeypatch.setattr(ibcl, "fit", watched)
    base = learned(d_thr=100.0)
    assert all(prior is base.points[0] for prior in priors[3:])
    priors.clear()
    base = learned()
    assert [id(prior) for prior in priors[3:]] == [id(point) for point in base.points[:6]]
    stds = [float(prior.sigma["weight"].mean()) for prior in priors[:3]]
    assert stds == pytest.approx([0.2, 0.25, 0.3])


def test_stored_points_do_not_change_when_tasks_are_added():
    """So a preference over earlier tasks keeps its model: backward transfer is exactly 0."""
    for threshold in (0.0, 0.05):
        base = CredalBase(NET, d_thr=threshold, epochs=2, lr=2e-2)
        given = {}
        for name, data in TASKS.items():
            base.learn(name, data)
            given[name] = base.mean({name: 1.0})
            for earlier, state in given.items():
                same(base.mean({earlier: 1.0}), state)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(base):
    again, other = learned(), learned(seed=1)
    for one, two, three in zip(base.points, again.points, other.points, strict=True):
        same(one.mu, two.mu)
        same(one.sigma, two.sigma)
        assert not torch.equal(one.mu["weight"], three.mu["weight"])


def test_a_loader_is_data_too():
    one, other = CredalBase(NET, epochs=1), CredalBase(NET, epochs=1)
    one.learn("shoes", TASKS["shoes"])
    other.learn("shoes", DataLoader(TensorDataset(*TASKS["shoes"]), batch_size=50))
    same(one.points[0].mu, other.points[0].mu)


def test_learning_leaves_torchs_global_draws_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    CredalBase(NET, epochs=1).learn("shoes", TASKS["shoes"])
    assert torch.equal(torch.rand(3), expected)


# -- asking ----------------------------------------------------------------------------------------


def test_one_task_gives_the_mean_of_its_posteriors_exactly():
    base = CredalBase(NET, epochs=1)
    base.learn("shoes", TASKS["shoes"])
    found = base.mean({"shoes": 1.0})
    for name in found:
        stack = torch.stack([point.mu[name].double() for point in base.points])
        assert torch.equal(found[name], (stack / 3).sum(0).float())
        torch.testing.assert_close(found[name], stack.mean(0).float(), rtol=0, atol=6e-8)


def test_mu_bar_is_the_merge_of_the_means_as_checkpoints(base):
    wanted = {"shoes": 0.2, "shirts": 0.5, "bags": 0.3}
    pool = Pool(None, {str(n): point.mu for n, point in enumerate(base.points)})
    shares = tuple(wanted[name] / 3 for name in TASKS for _ in range(3))
    merged = merge(pool, f"linear(weight={shares!r}, normalize=False)")
    same(base.mean(wanted), {name: merged[name] for name in merged})


def test_shares_go_through_the_reuse_map():
    base = learned(d_thr=100.0)
    assert base.betas({"shoes": 0.25, "bags": 0.75}) == pytest.approx((1.0,))
    loose = learned()
    found = loose.betas({"shoes": 0.25, "bags": 0.75})
    assert found == pytest.approx((0.25 / 3,) * 3 + (0.0,) * 3 + (0.25,) * 3)


def test_models_lie_in_the_box(base):
    wanted = {"shoes": 0.5, "shirts": 0.5}
    low, high = base.posterior(wanted).region(0.2)
    states = base.model(wanted, n=5, mass=0.2)
    assert len(states) == 5
    for state in states:
        for name in low:
            assert (state[name] >= low[name] - 1e-6).all()
            assert (state[name] <= high[name] + 1e-6).all()
    assert not torch.equal(states[0]["weight"], states[1]["weight"])
    NET().load_state_dict(states[0])


def test_models_repeat_unless_a_generator_says_otherwise(base):
    wanted = {"shoes": 1.0}
    same(base.model(wanted)[0], base.model(wanted)[0])
    rng = torch.Generator().manual_seed(0)
    one, other = base.model(wanted, generator=rng), base.model(wanted, generator=rng)
    assert not torch.equal(one[0]["weight"], other[0]["weight"])


def test_a_mixture_keeps_to_its_points(base):
    """A tight mass puts each model on the mean of one point that the preference counts."""
    wanted = {"shoes": 0.5, "bags": 0.5}
    states = base.model(wanted, n=40, mass=1e-6, combine="mixture")
    near = [
        min(range(9), key=lambda n: float((state["weight"] - base.points[n].mu["weight"]).norm()))
        for state in states
    ]
    assert set(near) <= {0, 1, 2, 6, 7, 8}
    assert len(set(near)) >= 4
    for state, number in zip(states, near, strict=True):
        close(state, base.points[number].mu, atol=1e-4, rtol=0)


def test_a_sweep_moves_from_the_others_to_the_task(base):
    found = list(base.sweep("bags", 3))
    assert [preference["bags"] for preference, _ in found] == [0.0, 0.5, 1.0]
    assert found[0][0] == {"shoes": 0.5, "shirts": 0.5, "bags": 0.0}
    same(found[2][1], base.mean({"bags": 1.0}))


def test_softmax_heads():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(300, WIDTH, generator=rng)
    y = (x @ torch.randn(WIDTH, 4, generator=rng)).argmax(1)
    base = CredalBase(partial(nn.Linear, WIDTH, 4), epochs=20, lr=2e-2, kl_weight="elbo")
    base.learn("four", (x, y))
    assert base.network.outputs == 4
    assert base.front(1, {"four": (x, y)}).weighted() > 0.8
    with pytest.raises(InputError, match=r"labels span 0 \.\. 4, .* the labels 0 \.\. 3"):
        base.learn("five", (x[:5], torch.arange(5)))


def test_deep_networks_and_other_shapes():
    def net():
        return nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, 5), nn.ReLU(), nn.Linear(5, 1))

    base = CredalBase(net, epochs=1)
    for name, (x, y) in TASKS.items():
        base.learn(name, (x.reshape(-1, 2, WIDTH // 2), y[:, None].float()))
    assert base.network.features == (2, WIDTH // 2)
    net().load_state_dict(base.mean({"shoes": 1.0}))


# -- tables ----------------------------------------------------------------------------------------


def test_a_front_is_what_its_models_score(base):
    wanted = [{"shoes": 1.0}, {"shoes": 0.5, "bags": 0.5}]
    front = base.front(wanted, TASKS)
    assert front.tasks == base.tasks
    for row, preference in enumerate(wanted):
        weight, bias = base.mean(preference)["weight"][0], base.mean(preference)["bias"]
        for column, (x, y) in enumerate(TASKS.values()):
            right = ((x @ weight + bias > 0).long() == y).float().mean()
            assert float(front.accuracy[row, 0, column]) == pytest.approx(float(right), abs=1e-6)
    assert base.front(4, TASKS).accuracy.shape == (4, 1, 3)
    assert base.front(4, TASKS, models=5, mass=0.3).accuracy.shape == (4, 5, 3)
    assert "weighted" in front.text()


def test_metrics_worked_by_hand():
    table = AccuracyTable(
        ("a", "b"),
        torch.tensor([[0.5, 0.5], [1.0, 0.0]]),
        torch.tensor([[[0.6, 0.8], [0.8, 0.4]], [[1.0, 0.0], [0.9, 0.2]]]),
    )
    torch.testing.assert_close(table.per_task("max"), torch.tensor([(0.4 + 1.0) / 1.5, 0.8]))
    torch.testing.assert_close(table.per_task("min"), torch.tensor([(0.3 + 0.9) / 1.5, 0.4]))
    assert table.average() == pytest.approx(((0.35 + 0.95) / 1.5 + 0.6) / 2)
    assert table.peak() == pytest.approx((0.35 + 0.95) / 1.5)
    assert table.weighted() == pytest.approx((0.5 * 0.7 + 0.5 * 0.6 + 0.95) / 2)
    assert table.rows()[1]["accuracy"] == {
        "a": pytest.approx(0.95),
        "b": pytest.approx(0.1),
    }


def test_a_task_that_nobody_wants_is_left_out():
    table = AccuracyTable(("a", "b"), torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.7, 0.1]]]))
    assert math.isnan(float(table.per_task()[1]))
    assert table.average() == table.peak() == pytest.approx(0.7)


def test_backward_transfer_worked_by_hand():
    table = torch.tensor([[0.9, 0.0, 0.0], [0.7, 0.8, 0.0], [0.6, 0.9, 0.5]])
    assert backward_transfer(table) == pytest.approx(((0.6 - 0.9) + (0.9 - 0.8)) / 2)
    with pytest.raises(InputError, match="two or more"):
        backward_transfer(torch.ones(1, 1))


def test_random_preferences_lie_on_the_simplex():
    rng = torch.Generator().manual_seed(0)
    found = drawn(("a", "b", "c"), 50, rng)
    assert all(sum(preference.values()) == pytest.approx(1) for preference in found)
    assert min(min(preference.values()) for preference in found) >= 0
    assert len({tuple(preference.values()) for preference in found}) == 50


# -- report ----------------------------------------------------------------------------------------


def test_report(base):
    report = base.report()
    assert (report.stored_points, report.reused_points, report.most_points) == (9, 0, 9)
    assert report.log10_box_mass == pytest.approx(-2 * (WIDTH + 1))
    assert report.kl_over_elbo == dict.fromkeys(TASKS, 1.0)
    pairs = list(itertools.combinations(range(3), 2))
    inner = sum(base.points[a].distance(base.points[b], "official") for a, b in pairs) / 3
    assert report.within["shoes"] == pytest.approx(inner)
    apart = itertools.product(range(3), range(3, 9))
    outer = [base.points[a].distance(base.points[b], "official") for a, b in apart]
    apart = itertools.product(range(3, 6), range(6, 9))
    last = [base.points[a].distance(base.points[b], "official") for a, b in apart]
    # Each task's mean over the other two, then the mean of the tasks.
    assert report.between == pytest.approx((sum(outer) + sum(last)) / 27)
    text = str(report)
    assert "9 stored, 0 reused, at most 9 (3 a task)" in text
    assert "never change" in text
    assert report.to_dict()["distance"] == "official"


def test_report_counts_the_kl_as_often_as_it_is_counted():
    base = CredalBase(NET, epochs=1, batch_size=20, kl_weight=1.0)
    base.learn("shoes", task(0, 400))
    report = base.report()
    assert report.kl_over_elbo == {"shoes": 20.0}  # 20 batches an epoch, the KL once in each
    assert any("20 times the evidence bound" in note for note in report.warnings)
    assert "warning: the prior counts" in str(report)


def test_report_warns_of_points_further_apart_than_tasks():
    base = CredalBase(NET, (0.05, 8.0), epochs=1, lr=1e-4, d_thr=0.0)
    base.learn("shoes", TASKS["shoes"])
    base.learn("shirts", TASKS["shirts"])
    notes = [note for note in base.report().warnings if "further than from other tasks" in note]
    assert notes
    assert notes[0].startswith("shoes: its own points lie")
    assert not [n for n in learned(lr=0.1, epochs=8).report().warnings if "further" in n]


def test_report_tells_how_far_substitutes_are():
    report = learned(d_thr=100.0).report()
    assert report.reused_points == 8
    assert 0 < report.largest_substitution <= 100
    assert "a substitute is at most" in str(report)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"shoes": 1.5, "bags": -0.5}, "the share of bags is -0.5; shares are 0 or more"),
        ({"shoes": 0.5, "bags": 0.4}, "sum to 0.9, not to 1.*normalise=True"),
        ({"shoes": 1.0, "bag": 0.0}, "names 'bag'.*Did you mean 'bags'"),
        ({"shoes": 0.0, "bags": 0.0}, "all shares of the preference are zero"),
        ({}, "all shares of the preference are zero"),
        ({"shoes": math.nan}, "the share of shoes is nan"),
        ({"shoes": "much"}, "the share of shoes is 'much'"),
        ({"shoes": True}, "the share of shoes is True"),
    ],
)
def test_preferences_that_are_refused(base, wanted, said):
    for ask in (base.mean, base.model, base.betas):
        with pytest.raises(InputError, match=said):
            ask(wanted)


def test_a_sum_within_a_thousandth_is_rounding_and_any_other_can_be_normalised(base):
    assert sum(base.betas({"shoes": 0.3334, "bags": 0.6665})) == pytest.approx(1, abs=1e-12)
    with pytest.raises(InputError, match="sum to"):
        base.mean({"shoes": 0.33, "bags": 0.668})
    same(
        base.mean({"shoes": 3, "bags": 1}, normalise=True), base.mean({"shoes": 0.75, "bags": 0.25})
    )


def test_asking_before_learning_is_refused():
    base = CredalBase(NET)
    for ask in (lambda: base.mean({"shoes": 1.0}), base.report):
        with pytest.raises(InputError, match="no task has been learned"):
            ask()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prior_stds": ()}, "prior_stds is empty"),
        ({"prior_stds": (0.2, 0.0)}, "prior standard deviation 0.0"),
        ({"prior_stds": (-1.0,)}, "prior standard deviation -1.0"),
        ({"d_thr": -0.01}, "d_thr = -0.01"),
        ({"d_thr": math.nan}, "d_thr = nan"),
        ({"distance": "kl"}, "there are 'official' and 'w2'"),
        ({"kl_weight": "B/N"}, "kl_weight = 'B/N'"),
        ({"kl_weight": -1.0}, "kl_weight = -1.0"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"epochs": 0}, "epochs = 0"),
        ({"steps": 0}, "steps = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
    ],
)
def test_settings_that_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        CredalBase(NET, **settings)


def test_networks_that_are_refused():
    with pytest.raises(InputError, match="no parameters"):
        CredalBase(nn.ReLU)
    with pytest.raises(InputError, match=r"buffers \(running_mean, .*LayerNorm"):
        CredalBase(partial(nn.BatchNorm1d, 3))
    with pytest.raises(InputError, match=r"gives \[2, 3, 1\]"):
        CredalBase(partial(nn.Linear, 4, 1)).learn("t", (torch.ones(5, 3, 4), torch.ones(5)))
    with pytest.raises(MismatchError, match="does not take examples of shape"):
        CredalBase(NET).learn("t", (torch.ones(5, 3), torch.ones(5)))


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        (task(0, 9, 5), MismatchError, r"features are \[5\], but those of the first task are \[6"),
        ((TASKS["bags"][0], TASKS["bags"][1] * 2), InputError, r"span 0 \.\. 2, .* 0 and 1"),
        ((TASKS["bags"][0], TASKS["bags"][1] - 1), InputError, r"span -1 \.\. 0"),
        ((TASKS["bags"][0], TASKS["bags"][1] * 0.5), InputError, "must be whole numbers"),
        ((TASKS["bags"][0][:5], TASKS["bags"][1]), InputError, "one label for each"),
        ((TASKS["bags"][0] * math.nan, TASKS["bags"][1]), NonFiniteError, "NaN or infinity"),
        ((TASKS["bags"][0][:0], TASKS["bags"][1][:0]), InputError, "there are no examples"),
        ([], InputError, "there are no examples"),
        ([TASKS["bags"][0]], InputError, "pair of tensors"),
        (7, InputError, "data is int"),
        ((TASKS["bags"][0].long(), TASKS["bags"][1]), InputError, "floating-point rows"),
    ],
)
def test_data_that_is_refused_leaves_the_base_as_it_was(data, error, said):
    base = CredalBase(NET, epochs=1)
    base.learn("shoes", TASKS["shoes"])
    before, points = base.learned, base.points
    with pytest.raises(error, match=said):
        base.learn("bags", data)
    assert (base.learned, base.points) == (before, points)


def test_names_that_are_refused(base):
    with pytest.raises(InputError, match="'bags' is taken"):
        base.learn("bags", TASKS["bags"])
    with pytest.raises(InputError, match="is empty"):
        base.learn("", TASKS["bags"])


def test_a_loss_that_is_no_number_stops_and_says_so():
    base = CredalBase(NET, (0.2, 3.0), epochs=2, lr=1e-2)
    base.learn("shoes", TASKS["shoes"])
    before = base.points
    x, y = TASKS["bags"]
    with pytest.raises(
        NonFiniteError, match=r"bags: the loss became .* wide prior .* rate .*0\.01"
    ):
        base.learn("bags", (x * 3e37, y))
    assert base.points == before
    assert base.tasks == ("shoes",)


def test_questions_that_are_refused(base):
    with pytest.raises(InputError, match="n = 0"):
        base.model({"shoes": 1.0}, n=0)
    with pytest.raises(InputError, match="mass = 1"):
        base.model({"shoes": 1.0}, mass=1)
    with pytest.raises(InputError, match="there are 'gaussian' and 'mixture'"):
        base.model({"shoes": 1.0}, combine="product")
    with pytest.raises(InputError, match="no data for bags"):
        base.front(3, {"shoes": TASKS["shoes"], "shirts": TASKS["shirts"]})
    with pytest.raises(InputError, match="ask for at least 1"):
        base.front(0, TASKS)
    with pytest.raises(InputError, match="mass = 0"):
        base.report(0)


def test_all_that_answers_preferences_has_one_interface(base):
    pool = Pool({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}})
    sequential = SequentialPosterior(NET)
    for one in (base, CheckpointFront(pool), sequential):
        assert isinstance(one, Preferring)
