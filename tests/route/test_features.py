"""What a router looks at."""

import pytest
import torch
from torch import nn

from pluribus.core.errors import InputError, MismatchError
from pluribus.route.features import features_of, pooled, spread


class Body(nn.Module):
    """What transformers calls a model without its head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)

    def forward(self, x, attention_mask=None):
        """Return an object with a last hidden state."""
        return type("Out", (), {"last_hidden_state": torch.tanh(self.first(x))})()


class Model(nn.Module):
    """A body with a head, counted when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model, self.head, self.runs = Body(), nn.Linear(4, 2), 0
        self.spare = nn.Linear(2, 2)

    def forward(self, x, attention_mask=None):
        """Return scores for every place."""
        self.runs += 1
        return self.head(self.base_model(x).last_hidden_state)


def test_each_kind_by_hand():
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    hidden = torch.tanh(model.base_model.first(x))
    found = features_of("hidden")(model, x, attention_mask=mask)
    torch.testing.assert_close(found, torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0)]))
    assert model.runs == 0  # the head is not needed
    torch.testing.assert_close(features_of("output")(model, x), model.head(hidden).mean(1))
    inside = features_of("module:base_model.first")(model, x)
    torch.testing.assert_close(inside, model.base_model.first(x).mean(1))
    model.runs = 0
    both = features_of("module:base_model.first+output")(model, x)
    assert model.runs == 1
    spread_out = features_of("spread:base_model.first")(model, x, attention_mask=mask)
    first = model.base_model.first(x)
    torch.testing.assert_close(
        spread_out, torch.stack([first[0, :2].std(0, correction=0), first[1].std(0, correction=0)])
    )
    torch.testing.assert_close(both, torch.cat([inside, model.head(hidden).mean(1)], 1))
    assert not model.base_model.first._forward_hooks


def test_maps_are_averaged_over_places():
    maps = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pooled(maps), maps.mean((2, 3)))
    torch.testing.assert_close(spread(maps), maps.std((2, 3), correction=0))


def test_rows_without_a_place_that_counts_are_zero():
    out, mask = torch.randn(2, 3, 4), torch.tensor([[0, 0, 0], [0, 1, 0]])
    torch.testing.assert_close(pooled(out, mask), torch.stack([torch.zeros(4), out[1, 1]]))
    assert not spread(out, mask).any()


def test_a_pass_ends_where_all_that_is_looked_at_has_run():
    runs = []
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].register_forward_hook(lambda *_: runs.append(2))
    x = torch.randn(2, 5, 3)
    found = features_of("module:0+spread:0")(model, x)
    assert not runs
    out = model[0](x)
    torch.testing.assert_close(found, torch.cat([out.mean(1), out.std(1, correction=0)], 1))
    features_of("module:0+output")(model, x)
    assert runs == [2]
    assert not model[0]._forward_hooks


def test_of_a_module_that_runs_twice_the_first_output_counts():
    layer = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    late = nn.Sequential(layer, layer, nn.Linear(3, 1))
    torch.testing.assert_close(features_of("module:0")(late, x), layer(x))
    torch.testing.assert_close(
        features_of("module:0+output")(late, x), torch.cat([layer(x), late(x)], 1)
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("outputs", "expected one of output, hidden, module:NAME, spread:NAME"),
        ("module:", "name the module, as in module:"),
        ("spread:", "name the module, as in spread:"),
        ("output+hidden", "take a pass each"),
    ],
)
def test_names_that_are_none(name, said):
    with pytest.raises(InputError, match=said):
        features_of(name)


def test_bad_input():
    model, x = Model(), torch.randn(2, 5, 3)
    with pytest.raises(InputError, match=r"no module 'base_model.frist'.*Did you mean"):
        features_of("module:base_model.frist")(model, x)
    assert not model.base_model.first._forward_hooks
    with pytest.raises(MismatchError, match="module spare did not run"):
        features_of("module:spare")(model, x)
    with pytest.raises(MismatchError, match="Linear has no last hidden state"):
        features_of("hidden")(nn.Linear(3, 2), x)
    with pytest.raises(MismatchError, match="no places to be spread over; take module:"):
        features_of("spread:first")(model.base_model, x[:, 0])
    with pytest.raises(MismatchError, match="have no row for each input"):
        pooled(torch.randn(3))
