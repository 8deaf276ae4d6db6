"""Ways of adding every row's own low-rank updates, beside one einsum."""

import pytest
import torch
from torch import nn

from pluribus.route._adding import WAYS
from pluribus.route._route import Route


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("kind", ["ones", "weighted", "some have none", "turned"])
def test_parts_in_turn(kind, learns):
    """Rows that lie part by part, not as many of each."""
    torch.manual_seed(0)
    chosen = torch.tensor([0, 0, 0, 2, 1, 1, 1, 1])
    table = nn.functional.one_hot(chosen, 4).float()
    if kind != "ones":
        table *= torch.rand(8, 1)
    if kind == "some have none":
        table[[0, 3, 7]] = 0  # part 2 then has none at all
    x, y, a, b = (torch.randn(*shape) for shape in ((8, 3, 5), (8, 3, 6), (4, 2, 5), (4, 2, 6)))
    if kind == "turned":
        x, y = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, y))
    table.requires_grad_(learns)
    found = Route(table).packed(8, (0, 1, 2, 3))
    assert [part for part, *_ in found.runs] == ([0, 1] if kind == "some have none" else [0, 2, 1])
    expected = y + torch.einsum("bsc,brc,brR,b->bsR", x, a[chosen], b[chosen], table.sum(1))
    (gradient,) = torch.autograd.grad(expected.sum(), table) if learns else (None,)
    with torch.set_grad_enabled(learns):
        out = WAYS["in turn"](x, y.clone(), a, b, found)
    torch.testing.assert_close(out, expected)
    if learns:
        (own,) = torch.autograd.grad(out.sum(), table)
        torch.testing.assert_close(own[table > 0], gradient[table > 0])


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_one_have_gradients(way):
    table = torch.eye(3)[[0, 0, 1, 1, 2, 2]].requires_grad_()
    x, y, a, b = (torch.randn(*shape) for shape in ((6, 2, 5), (6, 2, 4), (3, 2, 5), (3, 2, 4)))
    found = WAYS[way](x, y, a, b, Route(table).packed(6, (0, 1, 2)))
    expected = y + torch.einsum("bsc,prc,prR,bp->bsR", x, a, b, table)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(out.sin().sum(), table)[0] for out in (found, expected))
    own, right = (gradient[table > 0] for gradient in gradients)
    torch.testing.assert_close(own, right)


@pytest.mark.parametrize("chosen", [[0, 1, 0], [1, -1, 1]])
def test_rows_that_do_not_lie_part_by_part_have_no_turns(chosen):
    table = nn.functional.one_hot(torch.tensor(chosen).clamp(min=0), 2).float()
    table[torch.tensor(chosen) < 0] = 0
    assert Route(table).packed(3, (0, 1)).runs is None
    assert Route(torch.tensor([[1.0, 1.0]])).packed(1, (0, 1)).runs is None
