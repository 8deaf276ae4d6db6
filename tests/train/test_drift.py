"""Thresholds and choices of experts from recorded losses, against a slow telling of the rules."""

import math

import numpy as np
import pytest

from pluribus.core.errors import InputError, NonFiniteError
from pluribus.train.continual.drift import LossShiftDetector, Switch

LN2 = math.log(2)


def switch(most=None, lazy=False, **settings) -> Switch:
    return Switch(lambda: LossShiftDetector(start=LN2, **settings), most, lazy)


def retold(matrix: np.ndarray, alpha=0.2, window=35, k=3.0, floor=0.005):
    """The page's steps 1 to 5 in plain numpy; every list is kept whole and cut when it is used."""
    everything, trained, wins, thresholds = [[]], [[]], [[LN2]], [None]
    current, told = 0, []
    for row in matrix:
        losses = [float(row[j]) for j in range(len(wins))]
        for j, loss in enumerate(losses):
            last = everything[j][-1] if everything[j] else loss
            everything[j].append(alpha * loss + (1 - alpha) * last)
        recent = np.array(wins[current][-window:])
        thresholds[current] = recent.mean() + k * max(recent.std(), floor)
        held = thresholds[current]
        alarm = everything[current][-1] > held
        if alarm:
            chosen = None
            for j, loss in enumerate(losses):
                last = trained[j][-1] if trained[j] else loss
                fits = (
                    thresholds[j] is not None and alpha * loss + (1 - alpha) * last < thresholds[j]
                )
                if chosen is None and fits:
                    chosen = j
            if chosen is None:
                chosen = len(wins)
                everything.append([])
                trained.append([])
                wins.append([LN2])
                thresholds.append(None)
                losses.append(float(row[chosen]))
            current = chosen
        last = trained[current][-1] if trained[current] else losses[current]
        trained[current].append(alpha * losses[current] + (1 - alpha) * last)
        wins[current].append(losses[current])
        told.append((current, held, alarm))
    return told


def recorded(seed: int, batches: int = 600, experts: int = 600) -> np.ndarray:
    """Losses of experts on a stream of five stretches that come again; noise makes false alarms."""
    draw = np.random.default_rng(seed)
    out = draw.normal(0.9, 0.3, (batches, experts)).clip(0.05)
    for at in range(batches):
        task = (at // 50) % 5
        for expert in range(experts):
            if expert % 5 == task:
                out[at, expert] = 0.08 + 0.6 * math.exp(-(at % 50) / 8) * draw.uniform(0.5, 1.2)
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("settings", [{}, {"alpha": 0.5, "window": 10, "k_sigma": 2.0}])
def test_a_recorded_matrix_gives_the_same_thresholds_and_experts(seed, settings):
    matrix = recorded(seed)
    plain = {"k" if name == "k_sigma" else name: value for name, value in settings.items()}
    wanted, ours = retold(matrix, **plain), switch(**settings)
    kinds = set()
    for at, (expert, threshold, alarm) in enumerate(wanted):
        found = ours.decide(lambda number, at=at: matrix[at, number])
        ours.take(found.loss)
        assert (found.expert, found.alarm) == (expert, alarm), at
        assert found.threshold == pytest.approx(threshold, abs=1e-9, rel=0)
        kinds.add((found.kind, found.alarm))
    assert {("new", True), ("same", False)} <= kinds
    if not settings:
        assert {("switch", True), ("same", True)} <= kinds
    assert ours.made == 1 + max(expert for expert, _, _ in wanted)


def test_the_threshold_of_a_constant_loss():
    """After W batches it is 3 floors above the loss; a jump of D alarms at once iff 0.2 D > 0.015.

    The page's closed form.
    """
    for jump, alarms in ((0.0749, False), (0.0751, True)):
        found = LossShiftDetector(start=LN2)
        for _ in range(35):
            found.update(0.3)
        found.alarmed()
        assert found.threshold == pytest.approx(0.315, abs=1e-12)
        for _ in range(20):  # the start has left the window, the smoothed loss comes to rest
            assert not found.update(0.3)
        assert found.update(0.3 + jump) is alarms


def test_losses_worked_by_hand():
    found = LossShiftDetector(alpha=0.5, window=2, k_sigma=2.0, std_floor=0.01, start=1.0)
    assert not found.update(0.6)  # window (1.0): 1.02; smoothed 0.6
    assert (found.threshold, found.smoothed) == (pytest.approx(1.02), 0.6)
    assert not found.update(0.4)  # window (1.0, 0.6): 0.8 + 2 * 0.2; smoothed 0.5
    assert (found.threshold, found.smoothed) == (pytest.approx(1.2), 0.5)
    assert found.update(2.0, trained=False)  # window (0.6, 0.4): 0.5 + 2 * 0.1; smoothed 1.25
    assert found.threshold == pytest.approx(0.7)
    assert found.settled == pytest.approx(0.5)  # 0.5 * 0.4 + 0.5 * 0.6; not of the 2.0
    assert found.excess(0.7) == pytest.approx(0.5 * 0.7 + 0.5 * 0.5 - 0.7)
    assert found.lowest == pytest.approx(0.7)


def test_without_a_start_nothing_alarms_before_training():
    found = LossShiftDetector()
    assert not found.update(5.0, trained=False)
    assert not found.update(0.1)
    assert found.update(3.0)


def drive(ours: Switch, matrix: np.ndarray) -> list:
    out = []
    for row in matrix:
        out.append(ours.decide(lambda number, row=row: row[number]))
        ours.take(out[-1].loss)
    return out


def test_no_more_experts_than_there_may_be():
    """The nearest of two takes over, and says that it was made to."""
    steady = np.full((60, 3), 0.1)
    steady[:, 1], steady[20:40] = 0.9, (3.0, 0.2, 0.3)
    steady[0, 0] = steady[20, 1] = 0.69
    steady[40:] = (9.0, 8.0, 0.3)  # fits neither
    found = drive(switch(most=2), steady)
    assert {entry.expert for entry in found} == {0, 1}
    assert any(entry.forced for entry in found)
    free = drive(switch(), steady)
    assert max(entry.expert for entry in free) == 2
    assert not any(entry.forced for entry in free)


def test_losses_of_others_on_an_alarm_alone():
    matrix = recorded(0, 400)
    eager, lazy = switch(), switch(lazy=True)
    one, other = drive(eager, matrix), drive(lazy, matrix)
    quiet = [entry for entry in other if not entry.alarm and entry.before is not None]
    assert all(list(entry.losses) == [entry.expert] for entry in quiet)
    assert all(len(entry.losses) > 1 for entry in other if entry.alarm)
    first = next(at for at, entry in enumerate(one) if entry.kind == "switch")
    assert [entry[:6] for entry in one[:first]] == [entry[:6] for entry in other[:first]]


def test_a_switch_back_may_alarm_once_more_and_choose_the_same():
    """The page's harmless spurious alarm: the smoothed loss still holds a stretch elsewhere."""
    matrix = np.full((120, 2), 5.0)
    matrix[:40, 0], matrix[40:80, 1], matrix[80:, 0] = 0.1, 0.1, 0.1
    matrix[0, 0] = matrix[40, 1] = 0.69
    found = drive(switch(), matrix)
    assert [entry.expert for entry in found] == [0] * 40 + [1] * 40 + [0] * 40
    assert found[80].kind == "switch"
    assert (found[81].kind, found[81].alarm) == ("same", True)
    assert not found[119].alarm


def test_a_state_and_a_copy_go_on_alike():
    matrix = recorded(1, 200)
    one = switch()
    drive(one, matrix[:100])
    other, third = switch(), one.copy()
    other.load_state_dict(one.state_dict())
    wanted = drive(one, matrix[100:])
    assert drive(other, matrix[100:]) == wanted
    assert drive(third, matrix[100:]) == wanted


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"window": 1}, "window = 1: a spread needs 2"),
        ({"k_sigma": 0.0}, "k_sigma = 0.0: give a number above 0"),
        ({"k_sigma": -1.0}, "k_sigma"),
        ({"std_floor": 0.0}, "std_floor"),
        ({"alpha": 0.0}, "alpha = 0.0"),
        ({"alpha": 1.5}, "alpha = 1.5"),
        ({"k_sigma": math.nan}, "k_sigma"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(InputError, match=said):
        LossShiftDetector(**settings)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_none_is_not_counted(loss):
    found = LossShiftDetector()
    found.update(0.5)
    before = found.state_dict()
    with pytest.raises(NonFiniteError, match="not counted"):
        found.update(loss)
    assert found.state_dict() == before
