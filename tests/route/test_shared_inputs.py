"""Tables whose ids all inputs of a batch share, as places do, give each row its own deltas."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from pluribus.core.errors import InputError
from pluribus.route import Dense, LowRank, Routed

WORDS, PLACES, WIDTH = 11, 16, 8


class Net(nn.Module):
    """Words and places into a mean over tokens; `how` places are looked up varies."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.kinds, self.out = nn.Embedding(3, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, ids: torch.Tensor, kind: torch.Tensor | None = None) -> torch.Tensor:
        """Return (b, 4) of ids (b, s)."""
        b, s = ids.shape
        x = self.words(ids.flatten()).view(b, s, -1) if self.how == "flat" else self.words(ids)
        if self.how == "row":
            x = x + self.places(torch.arange(s)[None])
        elif self.how == "repeated":
            x = x + self.places(torch.arange(s).expand(b, s))
        elif self.how == "line":  # as in small models that people write themselves
            x = x + self.places(torch.arange(s))
        elif self.how == "line, one more axis":
            x = x + self.places(torch.arange(s)).unsqueeze(0)
        elif self.how == "backwards":
            x = x + self.places(torch.arange(s).flip(0))
        elif self.how == "pairs":  # no axis that a row's deltas could be on
            steps = torch.arange(s)
            x = x + self.places((steps[:, None] - steps).abs()).permute(2, 0, 1).mean(2).t()
        elif self.how == "one":
            x = x + self.places(torch.tensor(3))
        if kind is not None:
            x = x + self.kinds(kind)[:, None]
        return self.out(torch.tanh(x).mean(1))


HOW = ("row", "repeated", "line", "line, one more axis", "backwards", "pairs", "one", "flat")


def composite(how: str, form: str) -> Routed:
    torch.manual_seed(0)
    base = Net(how).eval()
    unused = ("kinds", "places") if how == "flat" else ("kinds",)  # they would be run apart
    parts = {
        label: {n: d for n, d in part.items() if not n.startswith(unused)}
        for label, part in parts_of(base, form).items()
    }
    return Routed(base, parts)


def parts_of(base: nn.Module, form: str) -> dict:
    return {
        f"p{number}": {
            name: LowRank(0.3 * torch.randn(2, WIDTH), torch.randn(len(tensor), 2))
            if form == "low_rank" and tensor.ndim > 1
            else Dense(0.3 * torch.randn_like(tensor))
            for name, tensor in base.state_dict().items()
        }
        for number in range(3)
    }


def alone(routed: Routed, table: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    rows = []
    for row, weights in enumerate(table.tolist()):
        state = routed.materialise(dict(zip(routed.names, weights, strict=True)))
        rows.append(functional_call(routed.base, state, tuple(x[row : row + 1] for x in inputs)))
    return torch.cat(rows)


@pytest.mark.parametrize("mixture", ["one-hot", "soft", "same"])
@pytest.mark.parametrize("places", [6, 4, 12, 5, 1])
@pytest.mark.parametrize("form", ["low_rank", "dense"])
@pytest.mark.parametrize("how", HOW)
def test_rows_that_share_ids_have_their_own_deltas(how, form, places, mixture):
    """As many places as rows, twice as many, fewer: shapes alone do not tell whose they are."""
    routed = composite(how, form)
    table = nn.functional.one_hot(torch.arange(6) % 3, 3).float()
    if mixture != "one-hot":
        table = torch.rand(6, 3) if mixture == "soft" else torch.rand(1, 3).expand(6, 3)
    with torch.no_grad():
        for steps in (places, 6, 7):  # what was found for one shape holds for others
            ids = torch.randint(WORDS, (6, steps))
            expected = alone(routed, table, ids)
            for _ in range(2):
                found = routed(ids, weights=table)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert float((expected - routed.base(ids)).abs().max()) > 1e-3
    apart = how in ("line, one more axis", "pairs", "one") and mixture != "same"
    together = {"words.weight"} if how == "pairs" and places == 6 else set()  # as they look alike
    assert set(routed.report()["run_apart"]) == ({"places.weight"} | together if apart else set())


@pytest.mark.parametrize("kinds", [[0, 1, 2], [2, 0, 2]])
def test_an_id_for_each_input_is_no_place(kinds):
    """Whether or not they happen to count up."""
    torch.manual_seed(0)
    base = Net("row").eval()
    routed, ids, table = (
        Routed(base, parts_of(base, "dense")),
        torch.randint(WORDS, (3, 5)),
        torch.eye(3),
    )
    given = torch.tensor(kinds)
    with torch.no_grad():
        expected = alone(routed, table, ids, given)
        for _ in range(2):
            found = routed(ids, given, weights=table)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert routed.report()["run_apart"] == []


@pytest.mark.parametrize("how", HOW)
def test_gradients_of_the_weights_are_those_of_rows_alone(how):
    routed, ids = composite(how, "low_rank"), torch.randint(WORDS, (6, 6))
    table = torch.rand(6, 3)
    found = table.clone().requires_grad_()
    routed(ids, weights=found).square().sum().backward()
    expected = torch.zeros_like(table)
    for row in range(6):
        one = table[row : row + 1].clone().requires_grad_()
        routed(ids[row : row + 1], weights=one).square().sum().backward()
        expected[row] = one.grad[0]
    torch.testing.assert_close(found.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["line", "backwards", "repeated"])
def test_low_precision_is_no_disagreement(how):
    routed, ids = composite(how, "dense"), torch.randint(WORDS, (6, 5))
    routed.to(torch.bfloat16)
    with torch.no_grad():
        routed(ids, weights=torch.rand(6, 3))
    assert routed.report()["run_apart"] == []


def test_a_base_whose_rows_depend_on_each_other_still_runs():
    class Centred(Net):
        """Takes the batch's mean off."""

        def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            """Return (b, 4)."""
            out = super().forward(ids)
            return out - out.mean(0)

    torch.manual_seed(0)
    base = Centred("row").eval()
    routed = Routed(base, parts_of(base, "dense"))
    found = routed(torch.randint(WORDS, (6, 5)), weights=torch.rand(6, 3))
    assert found.shape == (6, 4)
    assert bool(found.isfinite().all())


class Channels(nn.LayerNorm):
    """Normed over the second axis, as in ConvNeXt."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (b, d, s), normed."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Wide(nn.LayerNorm):
    """Of double precision inside, as CLIP's is of single."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (b, s, d), normed."""
        return super().forward(x.double()).float() if x.ndim < 1 else super().forward(x)


class Shifted(nn.Embedding):
    """Looks up places, not the ids that it is given, as BART and OPT do."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return (s, d) of ids (b, s)."""
        return super().forward(torch.arange(ids.shape[1]) + 2)


class Own(nn.Module):
    """Layers with a forward of their own."""

    def __init__(self, norm: type[nn.LayerNorm]) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), Shifted(PLACES, WIDTH)
        self.norm = norm(WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return (b, 8) of ids (b, s)."""
        x = self.words(ids) + self.places(ids)
        turned = isinstance(self.norm, Channels)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2) if turned else self.norm(x)
        return torch.tanh(x).mean(1)


@pytest.mark.parametrize("norm", [Channels, Wide])
@pytest.mark.parametrize("places", [5, WIDTH])
def test_layers_with_a_forward_of_their_own(norm, places):
    torch.manual_seed(0)
    base = Own(norm).eval()
    routed = Routed(base, parts_of(base, "dense"))
    table, ids = torch.rand(6, 3), torch.randint(WORDS, (6, places))
    with torch.no_grad():
        expected = alone(routed, table, ids)
        for _ in range(2):
            found = routed(ids, weights=table)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    apart = routed.report()["run_apart"]
    assert ("norm.weight" in apart) == (norm is Channels)
    assert "places.weight" not in apart


class Holder:
    """No kind of input whose rows can be taken."""


class Held(Net):
    """Has an argument that only it understands."""

    def forward(self, ids: torch.Tensor, held: Holder | None) -> torch.Tensor:  # type: ignore[override]
        """Return what the net returns."""
        return super().forward(ids)


def test_nothing_is_guessed_that_nothing_checks():
    torch.manual_seed(0)
    base = Held("line").eval()
    parts = {
        name: {"places.weight": part["places.weight"]}
        for name, part in parts_of(base, "dense").items()
    }
    routed, ids = Routed(base, parts), torch.randint(WORDS, (3, 5))
    with pytest.raises(InputError, match="places is not known yet; call the composite once"):
        routed(ids, Holder(), weights=torch.eye(3))
    with pytest.raises(InputError, match="places is not known yet"), routed.mixing(torch.eye(3)):
        base(ids, None)
    expected = torch.cat([routed(ids[r : r + 1], Holder(), weights=f"p{r}") for r in range(3)])
    torch.testing.assert_close(routed(ids, Holder(), weights="p1")[1], expected[1])
    torch.testing.assert_close(routed(ids, None, weights=torch.eye(3)), expected)
    torch.testing.assert_close(routed(ids, Holder(), weights=torch.eye(3)), expected)
