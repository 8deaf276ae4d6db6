"""The stream learner: what it refuses, and that it is then as it was."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.train.continual.tame import Tame, TameLearner

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from tame_streams import (
    WIDTH,
    batch,
    calm,
    learner,
    net,
    same,
    streamed,
)


@pytest.fixture(scope="module")
def three() -> tuple[TameLearner, list]:
    one = learner()
    return one, streamed(one)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda x, y: (x, y + 1), InputError, r"batch 2: labels span 1 \.\. 2, .* labels 0 \.\. 1"),
        (lambda x, y: (x, y - 1), InputError, r"batch 2: labels span -1 \.\. 0"),
        (lambda x, y: (x[:0], y[:0]), InputError, "batch 2: there are no samples"),
        (lambda x, y: (x[:5], y), InputError, "one whole number for each"),
        (lambda x, y: (x, y.float()), InputError, "one whole number for each"),
        (
            lambda x, y: (x[:, :4], y),
            MismatchError,
            r"a sample is \[4\], but those before .* \[6\]",
        ),
        (lambda x, y: (x * math.nan, y), NonFiniteError, "batch 2, expert 0: the loss is nan"),
        (lambda x, y: (x * math.inf, y), NonFiniteError, "batch 2, expert 0: the loss is nan"),
    ],
)
def test_batches_that_are_refused_change_nothing(change, error, said):
    one = learner(make=net)
    streamed(one, (0,), 2)
    before = one.state_dict()
    with pytest.raises(error, match=said):
        one.observe(*change(*batch(0, 7)))
    same(before, one.state_dict())


def test_an_infinite_loss_is_refused():
    one = learner(make=lambda: nn.Linear(WIDTH, 2))
    x, y = batch(0, 0)
    one.observe(x, y)
    with torch.no_grad():
        one.experts[0].weight.fill_(1e38)
    with pytest.raises(NonFiniteError, match=r"batch 1, expert 0: the loss is (inf|nan)"):
        one.observe(x * 1e3, y)


def test_a_gradient_that_is_no_number_is_refused():
    class Odd(nn.Module):
        """Its loss is finite in eval mode, and its gradient is not in train mode."""

        def __init__(self):
            super().__init__()
            self.line = nn.Linear(WIDTH, 2)
            nn.init.zeros_(self.line.weight)
            nn.init.zeros_(self.line.bias)

        def forward(self, x):
            out = self.line(x)
            return out * math.inf if self.training and self.armed else out

        armed = False

    one = learner(make=Odd)
    one.observe(*batch(0, 0))
    before = one.state_dict()
    one.experts[0].armed = True
    with pytest.raises(NonFiniteError, match=r"batch 1: the gradient holds NaN .* \(here 0\.2\)"):
        one.observe(*batch(0, 1))
    same(before, one.state_dict())


def test_predictions_that_cannot_be_made(three):
    with pytest.raises(InputError, match="observe a batch first"):
        learner().predict(batch(0, 0)[0])
    with pytest.raises(InputError, match="observe a batch first"):
        learner().fit_selector()
    one = learner()
    streamed(one, (0, 1))
    x = batch(0, 0)[0]
    with pytest.raises(InputError, match=r"2 experts, and no selector yet: call fit_selector"):
        one.predict(x)
    one.fit_selector()
    with pytest.raises(InputError, match="there are no samples"):
        one.predict(x[:0])
    with pytest.raises(MismatchError, match=r"a sample is \[4\]"):
        one.predict(x[:, :4])
    with pytest.raises(InputError, match="no expert 7; there are: 0, 1"):
        one.logits(x, 7)
    streamed(one, (2,), first=120)
    with pytest.raises(InputError, match="more than the selector knows"):
        one.predict(x)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"window": 1}, "window = 1"),
        ({"k_sigma": 0.0}, "k_sigma = 0.0"),
        ({"alpha": 2.0}, "alpha = 2.0"),
        ({"lr": -1.0}, "lr = -1.0"),
        ({"momentum": 1.0}, "momentum"),
        ({"warmup": -1}, "warmup = -1"),
        ({"milestones": (0,)}, "milestones"),
        ({"gamma": 0.0}, "gamma"),
        ({"head": "tanh"}, "there are 'logits' and 'sigmoid'"),
        ({"buffer": 0}, "capacity = 0"),
        ({"buffer": 3, "classes": 4}, "a buffer of 3 rows for 4 classes"),
        ({"prune_buffer": 0}, "capacity = 0"),
        ({"max_experts": 0}, "max_experts = 0"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(InputError, match=said):
        Tame(**settings)


def test_a_buffer_smaller_than_the_classes_seen():
    one = learner(Tame(buffer=3, prune=None))
    x, y = batch(0, 0)
    one.observe(x, y, classes=y)
    before = one.state_dict()
    with pytest.raises(InputError, match="3 rows cannot hold one of each of 4 classes"):
        one.observe(x, y, classes=y + 2)
    same(before, one.state_dict())


def test_classes_and_ids_that_cannot_be():
    one = learner()
    x, y = batch(0, 0)
    one.observe(x, y)
    with pytest.raises(InputError, match="classes with every batch, or with none"):
        one.observe(x, y, classes=y)
    with pytest.raises(InputError, match="ids are"):
        one.observe(x, y, ids=torch.arange(3))
    with pytest.raises(InputError, match="classes are"):
        learner().observe(x, y, classes=y.float())


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: nn.Linear(4, 2), MismatchError, "expert 0: the network does not take .* shape"),
        (lambda: nn.Linear(WIDTH, 3), MismatchError, r"gives \[2, 3\] for 2 .* expected \[2, 2\]"),
        (lambda: nn.ReLU(), InputError, "no parameters"),
    ],
)
def test_networks_that_do_not_fit(make, error, said):
    one = learner(make=make)
    with pytest.raises(error, match=said):
        one.observe(*batch(0, 0))
    assert not one.experts


def test_a_factory_that_gives_one_network_again():
    shared = calm()
    one = learner(make=lambda: shared)
    with pytest.raises(InputError, match="expert 1: the factory gave the same module again"):
        streamed(one)
    assert list(one.experts) == [0]


def test_a_selector_that_does_not_fit():
    one = learner(selector=lambda n: net(n + 1))
    streamed(one, (0, 1), 40)
    with pytest.raises(MismatchError, match=r"selector 80: the network gives \[2, 3\]"):
        one.fit_selector()


def test_learners_that_cannot_be():
    with pytest.raises(InputError, match="n_out = 1"):
        TameLearner(net, net, 1)
    with pytest.raises(InputError, match="device"):
        TameLearner(net, net, 2, device="warp")


def test_a_report_before_anything():
    told = learner().report()
    assert (told.batches, told.experts, told.warnings) == (0, (), ())
    assert told.to_dict()["dense"] == 0
    assert "0 batches" in str(told)
