"""The stream learner: what it finds, and that nothing is lost or half done."""

import io
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pluribus.core.errors import FormatError, InputError, MismatchError
from pluribus.train import prune
from pluribus.train.continual.drift import LossShiftDetector, Switch
from pluribus.train.continual.tame import Tame, TameLearner

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from tame_streams import (
    HOW,
    PRUNE,
    SHORT,
    WIDTH,
    batch,
    learner,
    net,
    same,
    streamed,
    tensors,
)


@pytest.fixture(scope="module")
def three() -> tuple[TameLearner, list]:
    one = learner()
    return one, streamed(one)


# -- what it finds ---------------------------------------------------------------------------------


def test_an_expert_for_each_stretch(three):
    one, events = three
    starts = [at for at, event in enumerate(events) if event.kind == "new"]
    assert starts == [0, 60, 120]
    assert [event.expert for event in events] == [0] * 60 + [1] * 60 + [2] * 60
    assert [alarm[:4] for alarm in one.alarms if alarm.kind == "new"] == [
        (0, "new", None, 0),
        (60, "new", 0, 1),
        (120, "new", 1, 2),
    ]
    assert one.report().learned == (0, 1, 2)


def test_decisions_follow_from_the_recorded_losses_alone(three):
    """The learner's own losses through a bare switch: the same thresholds and experts."""
    _, events = three
    bare = Switch(lambda: LossShiftDetector(window=20, start=math.log(2)))
    for event in events:
        found = bare.decide(event.losses.__getitem__)
        bare.take(found.loss)
        assert (found.expert, found.kind, found.alarm) == (event.expert, event.kind, event.alarm)
        assert (found.threshold, found.smoothed) == (event.threshold, event.smoothed)


def test_losses_are_of_eval_mode_and_before_the_step():
    def noisy():
        return nn.Sequential(
            nn.Linear(WIDTH, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
        )

    one = learner(make=noisy)
    for i in range(5):
        x, y = batch(0, i)
        expected = None
        if one.experts:
            assert not one.experts[0].training
            expected = float(nn.functional.cross_entropy(one.experts[0](x).detach(), y))
        found = one.observe(x, y)
        assert expected is None or found.loss == pytest.approx(expected, abs=1e-7)


def test_one_step_is_sgd_at_the_scheduled_rate():
    how = Tame(
        lr=0.3,
        momentum=0.9,
        weight_decay=0.01,
        warmup=2,
        milestones=(3,),
        gamma=0.1,
        k_sigma=1e6,  # nothing alarms
    )
    assert [how.rate(step) for step in range(5)] == pytest.approx([0.15, 0.3, 0.3, 0.03, 0.03])
    one = learner(how, make=lambda: nn.Linear(WIDTH, 2))
    one.observe(*batch(0, 0))
    again = TameLearner(lambda: nn.Linear(WIDTH, 2), net, 2, Tame(lr=1e-9, k_sigma=1e6))
    again.observe(*batch(0, 0))
    weight, bias = (p.detach().clone() for p in again.experts[0].parameters())  # as it was drawn
    pace = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for i, rate in enumerate((0.15, 0.3, 0.3, 0.03)):
        x, y = batch(0, i)
        if i:
            one.observe(x, y)
        gap = (torch.softmax(x @ weight.T + bias, 1) - torch.eye(2)[y]) / len(y)
        pace[0] = 0.9 * pace[0] + gap.T @ x + 0.01 * weight
        pace[1] = 0.9 * pace[1] + gap.sum(0) + 0.01 * bias
        weight, bias = weight - rate * pace[0], bias - rate * pace[1]
    assert set(one.experts) == {0}
    torch.testing.assert_close(one.experts[0].weight.detach(), weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.experts[0].bias.detach(), bias, atol=1e-5, rtol=1e-4)


def test_a_task_that_comes_again_gets_its_expert_back():
    one = learner()
    events = streamed(one, (0, 1, 0))
    assert [event.expert for event in events[-60:]] == [0] * 60
    assert events[120].kind == "switch"
    assert one.report().switches == 1


def test_the_selector_routes_samples_and_labels_follow(three):
    one, _ = three
    fitted = one.fit_selector()
    assert fitted.accuracy > 0.95
    assert fitted.samples == sum(fitted.won.values()) == 120
    for task in range(3):
        x, y = batch(task, 9999, 200)
        found = one.predict(x, return_expert=True)
        assert (found.experts == task).float().mean() > 0.9
        assert (found.labels == y).float().mean() > 0.85
        wide = one.predict(x, class_incremental=True)
        assert torch.equal(wide, found.labels + 2 * found.experts)
        own = torch.stack([one.logits(x, int(e))[i] for i, e in enumerate(found.experts)])
        assert torch.equal(own.argmax(1), found.labels)
    assert one.report().selector == (0, 1, 2)


def test_one_expert_needs_no_selector():
    one = learner()
    streamed(one, (0,))
    x, y = batch(0, 500, 300)
    found = one.predict(x, return_expert=True)
    assert (found.labels == y).float().mean() > 0.9
    assert not found.experts.any()
    assert one.fit_selector().accuracy == 1.0
    assert one.selector is None


def test_a_stream_that_nobody_learns_is_told_as_such():
    """Labels without any relation to x: one expert, and a report that does not call it one task."""
    one = learner(HOW)
    for i in range(80):
        x, _ = batch(0, i)
        one.observe(x, torch.arange(32) % 2)
    told = one.report()
    assert told.learned == ()
    assert any(note.startswith("no expert ever learned") for note in told.warnings)
    assert "NEVER LEARNED" in str(told)
    good = learner()
    streamed(good, (0,))
    assert good.report().learned == (0,)
    assert not good.report().warnings


def test_an_expert_that_became_blind_is_told():
    one = learner()
    streamed(one, (0,))
    detector = one.switch.detectors[0]
    detector.losses.extend([0.9] * 20)
    detector.alarmed()
    assert one.report().learned == (0,)
    assert [note[:30] for note in one.report().warnings] == ["the current expert's threshold"]


def test_the_sigmoid_head_takes_the_loss_of_sigmoids():
    one = learner(Tame(head="sigmoid", prune=None))
    for i in range(200):
        x, y = batch(0, i)
        logits = one.experts[0](x).detach() if one.experts else None
        found = one.observe(x, y)
        if logits is not None:
            wanted = nn.functional.cross_entropy(torch.sigmoid(logits), y)
            assert found.loss == pytest.approx(float(wanted), abs=1e-6)
        assert 0.3132 < found.loss < 1.3133


def test_max_experts():
    one = learner(Tame(lr=0.2, momentum=0.5, window=20, prune=None, max_experts=1))
    events = streamed(one)
    assert set(one.experts) == {0}
    assert any(event.forced for event in events)
    assert any("max_experts = 1" in note for note in one.report().warnings)


def test_losses_of_others_on_an_alarm_alone():
    one = learner(Tame(lr=0.2, momentum=0.5, window=20, prune=None, lazy=True))
    events = streamed(one)
    assert [event.expert for event in events] == [0] * 60 + [1] * 60 + [2] * 60
    assert all(len(event.losses) == 1 for event in events if not event.alarm)


def test_momentum_of_experts_at_rest_is_let_go(three):
    one, _ = three
    assert [e.optimiser is None for e in one.kept_experts.values()] == [True, True, False]


def test_the_same_seed_gives_the_same_bits_and_torchs_draws_are_left_alone(three):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    again = learner()
    streamed(again)
    assert torch.equal(torch.rand(2), expected)
    for one, other in zip(three[0].experts.values(), again.experts.values(), strict=True):
        same(dict(one.state_dict()), dict(other.state_dict()))
    other = learner(seed=1)
    streamed(other, (0,), 2)
    assert not torch.equal(other.experts[0][0].weight, again.experts[0][0].weight)


# -- buffer ----------------------------------------------------------------------------------------


def test_samples_that_come_again_are_buffered_once():
    one = learner()
    x, y = batch(0, 0)
    for _ in range(3):
        one.observe(x, y, ids=torch.arange(32))
    assert one.buffer.seen == 32
    one.observe(x, y, ids=torch.tensor([31, 99] * 16))
    assert one.buffer.seen == 33
    without = learner()
    for _ in range(3):
        without.observe(x, y)
    assert without.buffer.seen == 96


def test_the_buffer_is_shared_between_classes():
    one = learner(Tame(buffer=40, classes=4, prune=None))
    x, y = batch(0, 0, 200)
    one.observe(x, y, classes=y + 2)
    assert one.buffer.counts() == {2: 10, 3: 10}
    assert one.buffered().owner.tolist() == [0] * 20


def test_without_classes_expert_and_label_stand_for_them(three):
    assert three[0].buffer.counts() == dict.fromkeys(range(6), 20)


# -- pruning ---------------------------------------------------------------------------------------


def test_an_expert_is_pruned_as_the_next_one_starts_and_keeps_its_zeros():
    how = Tame(lr=0.2, momentum=0.5, window=20, prune=PRUNE, selector=SHORT)
    one = learner(how)
    streamed(one, (0, 1))
    told = one.report().experts
    assert [expert.pruned for expert in told] == [True, False]
    first = prune.weights(one.experts[0])
    count = sum(weight.numel() for weight in first.values())
    assert sum(int((weight == 0).sum()) for weight in first.values()) == round(0.5 * count)
    x, y = batch(0, 5000, 300)
    assert (one.logits(x, 0).argmax(1) == y).float().mean() > 0.85
    zeros = {name: weight == 0 for name, weight in first.items()}
    before = one.experts[0][0].weight.clone()
    assert streamed(one, (0,), 30, first=300)[-1].expert == 0
    after = prune.weights(one.experts[0])
    assert not torch.equal(before, one.experts[0][0].weight)  # it did learn
    assert all(not after[name][zeros[name]].any() for name in zeros)
    one.finish()
    assert [expert.pruned for expert in one.report().experts] == [True, True]
    dense = one.report().dense
    assert one.report().stored <= 2 * (dense - round(0.5 * count))
    saved = one.state_dict()
    one.finish()
    same(saved, one.state_dict())


def test_the_pruning_reservoir_is_the_newest_experts():
    how = Tame(lr=0.2, momentum=0.5, window=20, prune=PRUNE, prune_buffer=50)
    one = learner(how)
    streamed(one, (0,), 40)
    assert (one.young_of, len(one.young), one.young.seen) == (0, 50, 40 * 32)
    streamed(one, (1,), 40)
    assert (one.young_of, one.young.seen) == (1, 40 * 32)
    streamed(one, (0,), 20)  # switches back: the first one's samples are not the second one's
    assert (one.young_of, one.young.seen) == (1, 40 * 32)


def test_an_expert_that_starts_in_a_later_epoch_is_pruned_too():
    """All its samples were seen before it, so that the buffer has none of it."""
    one = learner(replace(HOW, prune=PRUNE))
    x, y = batch(0, 0)
    for flipped in (False, True):
        for _ in range(60):
            one.observe(x, 1 - y if flipped else y, ids=torch.arange(32))
    assert list(one.experts) == [0, 1]
    assert (one.buffer.seen, one.young.seen) == (32, 32)
    one.finish()
    assert [told.pruned for told in one.report().experts] == [True, True]


# -- fewer experts ---------------------------------------------------------------------------------


def test_an_expert_that_wins_nothing_is_dropped():
    one = learner()
    streamed(one, (0, 1, 2))
    assert one.drop_unused() == ()
    one.experts[1].load_state_dict(one.experts[0].state_dict())  # of equals the first wins
    assert one.drop_unused() == (1,)
    assert list(one.experts) == [0, 2]
    assert set(one.buffered().owner.tolist()) == {0, 2}
    assert one.drop_unused() == ()
    with pytest.raises(InputError, match="call fit_selector"):
        one.predict(batch(0, 0)[0])
    one.fit_selector()
    found = one.predict(batch(2, 700)[0], True)
    assert set(found.experts.tolist()) <= {0, 2}
    assert one.observe(*batch(2, 1)).expert == 2


def test_twins_are_merged_and_others_are_not():
    one = learner()
    streamed(one, (0, 1))
    assert one.merge() == {}
    twin = one.kept_experts[0]
    one.kept_experts[1].net.load_state_dict(twin.net.state_dict())
    x = batch(0, 3, 60)[0]
    y = one.logits(x, 0).argmax(1)
    one.buffer = type(one.buffer)(120)  # samples of the first task, half of them the twin's
    for owner in (0, 1):
        rng = torch.Generator().manual_seed(owner)
        one.buffer.offer(x, y, owner, (owner * 2 + y).tolist(), rng)
    assert one.merge(0.1) == {1: 0}
    assert (list(one.experts), one.current) == ([0], 0)
    assert not one.buffered().owner.any()
    assert list(one.buffer.counts()) == [0, 1]  # keys of the one that stays
    assert one.observe(*batch(0, 8)).expert == 0
    with pytest.raises(InputError, match="tolerance"):
        one.merge(math.nan)


# -- keeping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 45, 100])
def test_a_restored_learner_goes_on_bit_for_bit(at):
    def dropping():
        return nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), calm_head())

    def calm_head():
        head = nn.Linear(8, 2)
        nn.init.zeros_(head.weight)
        return head

    how = replace(HOW, prune=PRUNE, prune_buffer=40, prune_selector=PRUNE)
    one = learner(how, make=dropping)
    batches = [batch(task, i) for task in (0, 1, 0) for i in range(50)]
    for i, (x, y) in enumerate(batches[:at]):
        one.observe(x, y, ids=torch.arange(32) + 16 * i)
    one.fit_selector()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = learner(how, make=dropping)
    other.load_state_dict(torch.load(file, weights_only=True))
    same(one.state_dict(), other.state_dict())
    for i, (x, y) in enumerate(batches[at:]):
        ids = torch.arange(32) + 16 * (at + i)
        assert one.observe(x, y, ids=ids) == other.observe(x, y, ids=ids)
    one.finish()
    other.finish()
    assert one.fit_selector() == other.fit_selector()
    same(one.state_dict(), other.state_dict())
    assert one.alarms == other.alarms
    assert torch.equal(one.predict(batches[0][0]), other.predict(batches[0][0]))


def test_a_state_is_a_copy():
    one = learner()
    streamed(one, (0,), 3)
    state = one.state_dict()
    before = [tensor.clone() for tensor in tensors(state)]
    streamed(one, (1,), 30)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(state), strict=True))


def test_states_that_are_refused_change_nothing(three):
    state = three[0].state_dict()
    one = learner()
    streamed(one, (0,), 3)
    before = one.state_dict()
    other = learner(Tame(alpha=0.3))
    with pytest.raises(MismatchError, match=r"alpha is 0.2 in the state, but 0.3 here"):
        other.load_state_dict(state)
    with pytest.raises(FormatError, match="version 9"):
        one.load_state_dict({**state, "version": 9})
    for lacking in ("experts", "switch", "buffer", "ids", "batches"):
        with pytest.raises(FormatError, match="not the state"):
            one.load_state_dict({key: v for key, v in state.items() if key != lacking})
    with pytest.raises(FormatError, match="not the state"):
        one.load_state_dict({"version": 1, "settings": 3})
    same(before, one.state_dict())
    wide = learner(make=lambda: nn.Linear(WIDTH, 2))
    with pytest.raises(MismatchError, match="expert 0: the factory makes another network"):
        wide.load_state_dict(state)
    assert not wide.experts


@pytest.mark.parametrize("where", ["step", "zeros", "prune", "buffer"])
def test_an_interruption_leaves_the_learner_as_it_was(monkeypatch, where):
    """Ctrl-C within the step, after it, within pruning: the batch was never there."""
    how = Tame(lr=0.2, momentum=0.5, window=20, prune=PRUNE)
    one, whole = learner(how), learner(how)
    for each in (one, whole):
        for i in range(60):
            each.observe(*batch(0, i), ids=torch.arange(32) + 32 * i)
    before = one.state_dict()

    def stop(*args, **keywords):
        raise KeyboardInterrupt

    real = torch.optim.SGD.step

    def halfway(self, *args):
        real(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "step":
            patch.setattr(torch.optim.SGD, "step", halfway)
        elif where == "zeros":
            patch.setattr(torch.optim.SGD, "zero_grad", stop)
        elif where == "prune":
            patch.setattr(prune, "tune", stop)
        else:
            patch.setattr(type(one.buffer), "offer", stop)
        with pytest.raises(KeyboardInterrupt):
            one.observe(*batch(1, 0), ids=torch.arange(32) + 9000)
    same(before, one.state_dict())
    for each in (one, whole):
        for i in range(40):
            each.observe(*batch(1, i), ids=torch.arange(32) + 9000 + 32 * i)
    same(whole.state_dict(), one.state_dict())
