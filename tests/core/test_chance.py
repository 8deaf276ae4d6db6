"""Drawn tokens of rows: shares of [0, 1) by hand, and rows that do not matter to each other."""

import pytest
import torch

from pluribus.core.chance import drawn

P = [0.5, 0.0, 0.25, 0.125, 0.125, 0.0]


@pytest.mark.parametrize(
    ("u", "top_p", "token"),
    [
        (0.0, 1.0, 0),
        (0.49, 1.0, 0),
        (0.51, 1.0, 2),
        (0.76, 1.0, 3),
        (0.999999, 1.0, 4),  # not 5, whose share is empty
        (0.66, 0.75, 0),  # the nucleus is 0 and 2, with two thirds and one
        (0.67, 0.75, 2),
        (0.999999, 0.5, 0),
        (0.81, 0.8, 2),  # 0, 2 and the first of two equal ones: 4/7, 2/7, 1/7
        (0.86, 0.8, 3),
    ],
)
def test_shares_by_hand(u, top_p, token):
    logits = torch.tensor([P]).log()
    found = drawn(logits, torch.tensor([u]), 1.0, top_p)
    assert found.tolist() == [token]


def test_temperature_by_hand():
    logits = torch.tensor([[0.0, 1.0]]).log1p()  # 1 to 2, at temperature 1/2 1 to 4
    u = torch.tensor([0.19])
    assert drawn(logits, u, 1.0).tolist() == [0]
    assert drawn(logits, u, 0.5).tolist() == [0]
    assert drawn(logits, u + 0.02, 0.5).tolist() == [1]
    assert drawn(logits, u, 0.0).tolist() == [1]  # taken as very cold


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_each_row_is_drawn_alone(top_p):
    rng = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(64, 100, generator=rng)
    u = torch.rand(64, generator=rng, dtype=torch.float64)
    found = drawn(logits, u, 0.8, top_p)
    alone = [int(drawn(logits[i : i + 1], u[i : i + 1], 0.8, top_p)) for i in range(64)]
    assert found.tolist() == alone
    assert len(set(alone)) > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    logits = torch.tensor([P]).log().clamp(min=-30).to(dtype)
    assert drawn(logits, torch.tensor([0.51]), 1.0).tolist() == [2]
