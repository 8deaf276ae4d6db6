"""Negation against cross-entropy, and whose share has which sign."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from pluribus.core.errors import InputError
from pluribus.loss import loss_of, needs
from pluribus.loss.negate import Negate


def test_it_is_minus_the_cross_entropy():
    outputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 1, 0])
    torch.testing.assert_close(Negate()(outputs, labels), -cross_entropy(outputs, labels))
    assert needs(loss_of("negate")) == "labels"


def test_the_control_is_learned_and_the_others_are_unlearned():
    assert Negate(control="b").shares(["a", "b", "c"]) == {"a": -1.0, "b": 1.0, "c": -1.0}


def test_without_a_control():
    with pytest.raises(InputError, match="without a control"):
        Negate().shares(["a"])
    with pytest.raises(InputError, match=r"'bb' has no stream.*Did you mean 'b'"):
        Negate(control="bb").shares(["a", "b"])
    with pytest.raises(InputError, match="no task to forget"):
        Negate(control="a").shares(["a"])
    with pytest.raises(InputError, match="floor"):
        Negate(control="a", floor=1.5)
