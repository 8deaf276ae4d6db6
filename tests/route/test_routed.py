"""A composite equals, row by row, the merge of the base with that row's parts."""

import copy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.route import Bottleneck, Dense, LowRank, Masked, Routed, Scaled
from pluribus.route.parts import packed, unpacked
from pluribus.tasks.encoders.transformer import VisionTransformer

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from layers import Conv1D


class Mean(nn.Module):
    """A mean over places, so that a sequence gives features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (b, d)."""
        return x.mean(1)


class Rms(nn.Module):
    """An RMSNorm under the name that transformers gives them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normed x."""
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class LlamaRMSNorm(Rms):
    """Found by its name."""


class Token(nn.Module):
    """A class token in front, and a table that is read without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.places = nn.Embedding(6, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return class scores."""
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places.weight
        return self.out(torch.tanh(x).mean(1))


class Packed(nn.Module):
    """PyTorch's attention, which reads its projections without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (b, d)."""
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


def vision() -> nn.Module:
    return VisionTransformer(channels=3, side=16, patch=8, width=16, depth=1, stem="convolutions")


def images(batch: int) -> torch.Tensor:
    return torch.rand(batch, 3, 16, 16)


def sequence(batch: int) -> torch.Tensor:
    return torch.randn(batch, 5, 8)


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 4)), None),
    "sequence": (lambda: nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), Mean()), sequence),
    "conv1d": (lambda: nn.Sequential(Conv1D(12, 8), nn.Tanh(), Mean()), sequence),
    "rms": (lambda: nn.Sequential(LlamaRMSNorm(8), nn.Linear(8, 4, bias=False), Mean()), sequence),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8), Mean()),
        lambda b: torch.randint(11, (b, 5)),
    ),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8, padding="same"),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 6, 1, bias=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ),
        images,
    ),
    "vision": (vision, images),
    "token": (Token, sequence),
    "packed": (Packed, sequence),
}


def made(model, form: str, count: int = 3, seed: int = 0):
    """Return the model and parts of one form for all of its floating tensors."""
    torch.manual_seed(seed)
    base = model().eval()
    vectors = {n: 0.2 * torch.randn_like(t) for n, t in base.state_dict().items() if _float(t)}
    parts = {}
    for number in range(count):
        part = {}
        for name, tensor in base.state_dict().items():
            if not _float(tensor):
                continue
            if form == "low_rank" and tensor.ndim > 1:
                rank = 2 + number % 2
                a, b = torch.randn(rank, tensor[0].numel()), torch.randn(len(tensor), rank)
                part[name] = LowRank(0.1 * a, b)
            elif form == "masked":
                part[name] = Masked(packed(torch.rand(tensor.shape) < 0.5), vectors[name])
            elif form == "scaled":
                part[name] = Scaled(1 + 0.2 * torch.randn(len(tensor)))
            else:
                delta = 0.2 * torch.randn_like(tensor)
                part[name] = Dense(delta.abs() if "running_var" in name else delta)
        parts[f"p{number}"] = part
    return base, parts


def _float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim > 0


def weights_of(kind: str, rows: int, count: int) -> torch.Tensor:
    if kind == "one-hot":
        return nn.functional.one_hot(torch.arange(rows) % count, count).float()
    found = torch.rand(rows, count)
    if kind == "zeros":
        found[: rows // 2] = 0
        found[rows // 2 :, 0] = 0
    if kind == "equal":
        found = found[:1].expand(rows, -1).clone()
    return found


def reference(routed: Routed, table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Merge for every row, and run the row alone."""
    rows = []
    for row, weights in zip(x, table, strict=True):
        state = routed.materialise(dict(zip(routed.names, weights.tolist(), strict=True)))
        rows.append(functional_call(routed.base, state, (row[None],)))
    return torch.cat(rows)


@pytest.mark.parametrize("kind", ["one-hot", "soft", "zeros", "equal"])
@pytest.mark.parametrize("form", ["low_rank", "dense", "masked", "scaled"])
@pytest.mark.parametrize("model", MODELS)
def test_each_row_is_its_own_merge(model, form, kind):
    build, draw = MODELS[model]
    base, parts = made(build, form)
    routed = Routed(base, parts)
    x = (draw or (lambda b: torch.randn(b, 8)))(7)
    table = weights_of(kind, 7, 3)
    with torch.no_grad():
        expected = reference(routed, table, x)
        for _ in range(2):  # the first batch looks how odd tensors can be mixed
            found = routed(x, weights=table)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((expected - routed.base(x)).abs().max()) > 0 or kind == "zeros"


@pytest.mark.parametrize("kind", ["one-hot", "soft", "equal"])
@pytest.mark.parametrize("model", ["linear", "conv1d", "embedding", "convolution"])
def test_parts_in_half_precision_are_what_they_round_to(model, kind):
    build, draw = MODELS[model]
    base, parts = made(build, "low_rank")

    def halved(wide: torch.dtype) -> dict:
        return {
            label: {
                name: LowRank(delta.a.half().to(wide), delta.b.half().to(wide))
                for name, delta in part.items()
                if isinstance(delta, LowRank)
            }
            for label, part in parts.items()
        }

    x, table = (draw or (lambda b: torch.randn(b, 8)))(7), weights_of(kind, 7, 3)
    half, whole = Routed(copy.deepcopy(base), halved(torch.half)), Routed(base, halved(torch.float))
    with torch.no_grad():
        found = half(x, weights=table)
        torch.testing.assert_close(found, whole(x, weights=table), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, reference(half, table, x), rtol=1e-4, atol=1e-4)
        half.switch("p1")
        torch.testing.assert_close(half.base(x), whole(x, weights="p1"), rtol=1e-4, atol=1e-4)
    assert 2 * half.report()["parts_bytes"] == whole.report()["parts_bytes"]


class Turned(nn.Module):
    """Gives places and values in each other's order, as a view."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (b, d, s) as (b, s, d)."""
        return x.transpose(1, 2)


@pytest.mark.parametrize("kind", ["one-hot", "soft", "zeros"])
@pytest.mark.parametrize("way", ["fused", "by row", "packed", "whole"])
def test_every_way_of_adding_takes_inputs_as_they_lie(way, kind, monkeypatch):
    monkeypatch.setattr("pluribus.route._adding.quickest", lambda *_, **__: way)
    build = partial(nn.Sequential, Turned(), nn.Linear(8, 16), nn.Tanh(), Turned(), nn.Linear(5, 3))
    base, parts = made(build, "low_rank")
    routed, x = Routed(base, parts), torch.randn(9, 8, 5)
    table = weights_of(kind, 9, 3)
    with torch.no_grad():
        found = routed(x, weights=table)
        torch.testing.assert_close(found, reference(routed, table, x), rtol=1e-4, atol=1e-4)


def test_what_is_known_of_batches_stays_small(monkeypatch):
    """A server sees thousands of lengths; and rows in no order are right with and without it."""
    monkeypatch.setattr("pluribus.route.routed.SHAPES", 3)
    base, parts = made(MODELS["sequence"][0], "low_rank")
    routed, table = Routed(base, parts), weights_of("one-hot", 4, 3)
    with torch.no_grad():
        for places in (1, 2, 3, 4, 5, 1, 5):
            x = torch.randn(4, places, 8)
            expected = reference(routed, table, x)
            torch.testing.assert_close(routed(x, weights=table), expected, rtol=1e-4, atol=1e-4)
    assert len(routed._unsorted) == 3


def test_weights_that_change_in_place_are_seen():
    """The last route is kept for the next batch of the same weights, and for no other."""
    base, parts = made(MODELS["sequence"][0], "low_rank")
    routed, x = Routed(base, parts), torch.randn(4, 4, 8)
    table = weights_of("one-hot", 4, 3)
    before, other = table.clone(), weights_of("soft", 4, 3)
    with torch.no_grad():
        routed(x, weights=table)  # here the layers' ways are found, and whether to sort
        first = routed(x, weights=table)
        kept = routed._last
        torch.testing.assert_close(routed(x, weights=before), first, rtol=0, atol=0)
        assert routed._last is kept
        table.numpy()[:] = other.numpy()  # which torch does not notice
        changed = routed(x, weights=table)
        torch.testing.assert_close(changed, reference(routed, other, x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(routed(x, weights=before), first, rtol=0, atol=0)
        routed(x, weights=other)
        torch.testing.assert_close(routed(x, weights=other.double()), changed, rtol=1e-4, atol=1e-4)
    table = before.requires_grad_()
    routed(x, weights=table).sum().backward()  # nothing that was kept is in the way
    assert table.grad is not None


@pytest.mark.parametrize("way", ["fused", "by row", "packed", "whole"])
def test_a_row_that_is_not_finite_spoils_no_other(way, monkeypatch):
    """Rows are padded with the first one; its values must not come through."""
    monkeypatch.setattr("pluribus.route._adding.quickest", lambda *_, **__: way)
    base, parts = made(MODELS["sequence"][0], "low_rank")
    routed, x = Routed(base, parts), torch.randn(5, 4, 8)
    x[0] = torch.nan
    table = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0, 0], [0.2, 0.3, 0.5]])
    with torch.no_grad():
        found = routed(x, weights=table)
        assert found[0].isnan().any()
        expected = reference(routed, table[1:], x[1:])
        torch.testing.assert_close(found[1:], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_rows_may_be_mapped_and_differentiated_forwards():
    """What runs outside of torch would fail in the one, and lose the parts' share in the other."""
    base, parts = made(MODELS["linear"][0], "low_rank")
    routed, x = Routed(base, parts), torch.randn(5, 4, 8)
    table, ahead = weights_of("one-hot", 4, 3), torch.randn(4, 8)
    with torch.no_grad():
        one_by_one = torch.stack([routed(some, weights=table) for some in x])
        mapped = torch.func.vmap(lambda some: routed(some, weights=table))(x)
        torch.testing.assert_close(mapped, one_by_one)
        _, by_function = torch.func.jvp(lambda some: routed(some, weights=table), (x[0],), (ahead,))
        with forward_ad.dual_level():
            y = routed(forward_ad.make_dual(x[0], ahead), weights=table)
            by_dual = forward_ad.unpack_dual(y).tangent
        reference_to = partial(reference, routed, table)
        _, expected = torch.func.jvp(reference_to, (x[0],), (ahead,))
    torch.testing.assert_close(by_function, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_dual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_many_parts_are_gathered(rows):
    """With few parts a row of many, factors are gathered; the result is the same."""
    base, parts = made(MODELS["sequence"][0], "low_rank", count=16)
    routed, x = Routed(base, parts), torch.randn(rows, 40, 8)
    with torch.no_grad():
        for used in (1, 2, 16):
            table = torch.zeros(rows, 16)
            for row in range(rows):
                table[row, torch.randperm(16)[:used]] = torch.rand(used)
            found = routed(x, weights=table)
            torch.testing.assert_close(found, reference(routed, table, x), rtol=1e-4, atol=1e-4)


def test_adapters_are_functions_of_the_output():
    torch.manual_seed(0)
    first = nn.Linear(8, 6)
    base = nn.Sequential(first, nn.Tanh())
    parts = {
        name: {
            "0": Bottleneck(
                torch.randn(2, 6), torch.randn(2), torch.randn(6, 2), torch.randn(6), "gelu"
            )
        }
        for name in ("a", "b")
    }
    routed, x = Routed(base, parts), torch.randn(4, 8)
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.6], [0.0, 0.0]])
    y = nn.functional.linear(x, first.weight, first.bias)
    for number, name in enumerate(("a", "b")):
        one = parts[name]["0"]
        plain = nn.functional.linear(x, first.weight, first.bias)
        hidden = nn.functional.gelu(plain @ one.down.t() + one.down_bias)
        u = hidden @ one.up.t() + one.up_bias
        assert hidden.shape == (4, 2)
        y = y + table[:, number : number + 1] * u
    torch.testing.assert_close(routed(x, weights=table), torch.tanh(y))
    with pytest.raises(InputError, match="adapter behind 0, which is no delta of a tensor"):
        routed.materialise("a")


def test_how_weights_may_be_given():
    base, parts = made(MODELS["linear"][0], "low_rank")
    routed, x = Routed(base, parts), torch.randn(2, 8)
    table = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    expected = routed(x, weights=table)
    assert torch.equal(routed(x, weights=["p1", "p0"]), expected)
    by_name = {"p1": torch.tensor([1.0, 0.0]), "p0": torch.tensor([0.0, 1.0])}
    assert torch.equal(routed(x, weights=by_name), expected)
    assert torch.equal(routed(x, weights="p2"), routed(x, weights={"p2": 1.0}))
    assert torch.equal(routed(x, weights={"p0": 0.0}), base(x))


def test_heads_choose_no_part():
    base, parts = made(MODELS["linear"][0], "low_rank")
    head = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}
    routed, x = Routed(base, parts, heads={"signs": head}), torch.randn(2, 8)
    plain = routed(x, weights="p1")
    expected = nn.functional.linear(plain, head["weight"], head["bias"])
    torch.testing.assert_close(routed(x, weights="p1", task="signs"), expected)
    with pytest.raises(InputError, match=r"no head for task 'sings'.*Did you mean 'signs'"):
        routed(x, weights="p1", task="sings")


def test_the_base_is_neither_copied_nor_changed():
    base, parts = made(MODELS["vision"][0], "low_rank")
    before = {name: t.clone() for name, t in base.state_dict().items()}
    pointers = {name: t.data_ptr() for name, t in base.state_dict().items()}
    routed = Routed(base, parts)
    routed(images(3), weights=["p0", "p1", "p2"])
    assert {n: t.data_ptr() for n, t in base.state_dict().items()} == pointers
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
    assert routed.detach() is base
    x = images(3)
    assert torch.equal(base(x), functional_call(base, before, (x,)))


class Switched(nn.Module):
    """A router by one feature."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names or ("p1", "p0", "p2")

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Return p1 for negative features, p0 for others."""
        first = (features[:, :1] < 0).float()
        return torch.cat([first, 1 - first, torch.zeros_like(first)], 1)


def test_a_router_is_matched_by_name():
    base, parts = made(MODELS["linear"][0], "low_rank")
    routed, x = Routed(base, parts, Switched()), torch.randn(6, 8)
    names = ["p1" if one < 0 else "p0" for one in base(x)[:, 0]]
    assert torch.equal(routed(x), routed(x, weights=names))
    with pytest.raises(MismatchError, match=r"knows the parts p0, p1, p3; here are p0, p1, p2"):
        routed.set_router(Switched("p0", "p1", "p3"))


def test_top_k_keeps_the_sum():
    class Fixed:
        names = ("p0", "p1", "p2")

        def __call__(self, features):
            return torch.tensor([[0.5, 0.3, 0.2]]).expand(len(features), 3)

    base, parts = made(MODELS["linear"][0], "low_rank")
    routed = Routed(base, parts, Fixed(), top_k=2)
    torch.testing.assert_close(
        routed.route(torch.randn(2, 8)), torch.tensor([[0.625, 0.375, 0.0]] * 2)
    )


def test_gradients_reach_the_weights():
    base, parts = made(MODELS["sequence"][0], "low_rank")
    routed, x = Routed(base, parts), sequence(4)
    table = torch.rand(4, 3, requires_grad=True)
    routed(x, weights=table).pow(2).sum().backward()
    assert table.grad is not None
    step = 1e-3
    with torch.no_grad():
        for t in range(3):
            shift = torch.zeros(4, 3)
            shift[1, t] = step
            up = routed(x, weights=table + shift).pow(2).sum()
            down = routed(x, weights=table - shift).pow(2).sum()
            assert float(table.grad[1, t]) == pytest.approx(float(up - down) / 2 / step, rel=0.02)


def test_bad_input():
    base, parts = made(MODELS["linear"][0], "low_rank")
    routed, x = Routed(base, parts), torch.randn(2, 8)
    with pytest.raises(InputError, match="there is no router yet"):
        routed(x)
    with pytest.raises(InputError, match="no part 'p7'; there are: p0, p1, p2"):
        routed(x, weights="p7")
    with pytest.raises(InputError, match=r"weights are \[2, 2\]; expected \[2, 3\]"):
        routed(x, weights=torch.ones(2, 2))
    with pytest.raises(InputError, match="3 parts were named for a batch of 2"):
        routed(x, weights=["p0", "p1", "p2"])
    with pytest.raises(InputError, match="the batch is empty"):
        routed(x[:0], weights="p0")
    broken = torch.ones(2, 3)
    broken[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="the route of row 1 is not finite"):
        routed(x, weights=broken)
    with pytest.raises(InputError, match="cannot be deep-copied; save it"):
        copy.deepcopy(routed)
    with pytest.raises(InputError, match="there is no part to route to"):
        Routed(base, {})
    with pytest.raises(InputError, match="top_k is 4; there are 3 parts"):
        Routed(base, parts, top_k=4)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"0.wieght": Dense(torch.ones(12, 8))}, "part x: the base has no tensor '0.wieght'"),
        (
            {"0.weight": Dense(torch.ones(12, 9))},
            r"0.weight is \[12, 8\] in the base, but \[12, 9\]",
        ),
        (
            {"0.weight": LowRank(torch.ones(2, 9), torch.ones(12, 2))},
            r"but the part's factors make \[12, 9\]",
        ),
        ({"0.weight": Scaled(torch.ones(3))}, r"its gains are \[3\]"),
        (
            {"0.weight": Masked(torch.zeros(3, dtype=torch.uint8), torch.ones(12, 8))},
            "has 96 values, but its mask 24 bits",
        ),
        (
            {
                "nowhere": Bottleneck(
                    torch.ones(2, 4), torch.ones(2), torch.ones(4, 2), torch.ones(4)
                )
            },
            "the base has no module 'nowhere'",
        ),
    ],
)
def test_parts_that_do_not_fit(part, said):
    base, _ = made(MODELS["linear"][0], "low_rank")
    with pytest.raises(MismatchError, match=said):
        Routed(base, {"x": part})


def test_factors_that_do_not_multiply():
    with pytest.raises(MismatchError, match="do not multiply"):
        LowRank(torch.ones(2, 8), torch.ones(12, 3))


def test_batch_norm_in_training_is_refused():
    base, parts = made(MODELS["convolution"][0], "dense")
    routed = Routed(base, parts)
    routed.train()
    with pytest.raises(MismatchError, match="is a batch norm in training mode"):
        routed(images(2), weights="p0")


def test_flattened_rows_and_beams_repeat_the_route():
    base, parts = made(MODELS["linear"][0], "low_rank")
    routed, x = Routed(base, parts), torch.randn(6, 8)
    table = torch.rand(3, 3)
    with routed.mixing(table) as model:
        found = model(x)
    expected = routed(x, weights=table.repeat_interleave(2, 0))
    torch.testing.assert_close(found, expected)
    said = "given 5 rows, but the route is for a batch of 3"
    with pytest.raises(MismatchError, match=said), routed.mixing(table) as model:
        model(x[:5])


def test_odd_tensors_are_named_and_run_apart():
    base, parts = made(MODELS["packed"][0], "dense")
    routed = Routed(base, parts)
    assert sorted(routed.report()["run_apart"]) == sorted(base.state_dict())
    base, parts = made(partial(MODELS["vision"][0]), "low_rank")
    routed = Routed(base, parts)
    routed(images(3), weights=["p0", "p1", "p2"])
    assert routed.report()["run_apart"] == []  # the table of places takes a row each


def test_report_counts_bytes():
    base, parts = made(MODELS["linear"][0], "low_rank")
    told = Routed(base, parts).report()
    assert told["base_bytes"] == 4 * (96 + 12 + 48 + 4)
    ranks = (3, 3 * (8 + 12) + 3 * (12 + 4))  # padded to the largest of 2, 3, 2
    assert told["parts_bytes"] == 4 * (ranks[0] * ranks[1] + 3 * 16)
    assert told["forms"]["p0"] == {
        "0.weight": "LowRank",
        "0.bias": "Dense",
        "2.weight": "LowRank",
        "2.bias": "Dense",
    }


@pytest.mark.parametrize("size", [1, 15, 16, 17, 40])
def test_a_masked_delta_is_written_a_piece_at_a_time(size, monkeypatch):
    monkeypatch.setattr("pluribus.route.parts.PIECE", 2)  # bytes: 16 values
    rng = torch.Generator().manual_seed(size)
    base, vector = torch.randn(2, size, generator=rng)
    mask = torch.rand(size, generator=rng) < 0.5
    out = torch.full((size,), torch.nan)
    Masked(packed(mask), vector).write(base, out)
    assert torch.equal(out, torch.where(mask, base + vector, base))
    assert torch.equal(unpacked(packed(mask), size), mask)


@pytest.mark.parametrize("keep", [0, 1, 2])
@pytest.mark.parametrize("form", ["low_rank", "dense", "masked", "scaled"])
def test_switching_writes_a_part_and_takes_it_back(form, keep):
    base, parts = made(MODELS["vision"][0], form)
    routed, x = Routed(base, parts, keep=keep), images(3)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    expected = {name: routed(x, weights=name) for name in routed.names}
    for name in ("p1", "p0", "p1"):
        assert routed.switch(name)
        torch.testing.assert_close(routed(x), expected[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(routed(x, weights=name), routed(x))
    with pytest.raises(InputError, match="switched to p1; call switch"):
        routed(x, weights="p0")
    with pytest.raises(InputError, match="switched to p1; call switch"):
        routed.materialise("p0")
    routed.switch(None)
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
    torch.testing.assert_close(routed(x, weights="p2"), expected["p2"], rtol=1e-4, atol=1e-4)
    routed.keep = 0
    assert torch.equal(routed(x, weights="p2"), expected["p2"])


def test_kept_experts_are_made_once_and_serve_batches_of_one_part():
    base, parts = made(MODELS["vision"][0], "low_rank")
    routed, x = Routed(base, parts), images(3)
    expected = {name: routed(x, weights=name) for name in routed.names}
    mixed = routed(x, weights=["p0", "p1", "p2"])
    routed.keep = 2
    made_at = {}
    with torch.no_grad():
        for name in ("p0", "p1", "p0", "p1"):
            torch.testing.assert_close(
                routed(x, weights=name), expected[name], rtol=1e-4, atol=1e-4
            )
            now = routed._switch._kept[name].tensors
            assert made_at.setdefault(name, now) is now
        assert list(routed._switch._kept) == ["p0", "p1"]
        routed(x, weights="p2")
        assert list(routed._switch._kept) == ["p1", "p2"]  # p0 was used longest ago
        several = routed(x, weights=["p0", "p1", "p2"])  # as before, through the parts
        torch.testing.assert_close(several, mixed, rtol=1e-4, atol=1e-4)
        half = routed(x, weights={"p1": 0.5})
    torch.testing.assert_close(half, routed(x, weights={"p1": 0.5}))
    assert list(routed._switch._kept) == ["p1", "p2"]
    wanting = x.clone().requires_grad_()
    routed(wanting, weights="p0").sum().backward()  # with gradients: through the parts
    assert wanting.grad is not None
    assert "p0" not in routed._switch._kept


def test_kept_experts_are_made_anew_when_the_base_changes():
    base, parts = made(MODELS["linear"][0], "low_rank")
    routed, x = Routed(base, parts, keep=1), torch.randn(4, 8)
    with torch.no_grad():
        routed(x, weights="p0")
        first = routed(x, weights="p0")
        base.load_state_dict({n: 2 * t for n, t in base.state_dict().items()})
        second = routed(x, weights="p0")
        routed.keep = 0
        torch.testing.assert_close(second, routed(x, weights="p0"))
    assert not torch.allclose(first, second)


def test_tied_tensors_switch_together():
    base, parts = made(MODELS["linear"][0], "dense")
    twin = nn.Linear(8, 12)
    twin.weight.data = base[0].weight.data  # another parameter in the same memory
    base.twin = twin
    origin = base[0].weight.clone()
    routed = Routed(base, parts, keep=1)
    routed.switch("p0")
    assert torch.equal(base.twin.weight, base[0].weight)
    assert not torch.equal(base[0].weight, origin)
    routed.switch(None)
    assert torch.equal(base.twin.weight, origin)


def test_what_cannot_be_kept():
    base, parts = made(MODELS["linear"][0], "dense")
    routed = Routed(base, parts)
    with pytest.raises(InputError, match="keep is -1; give the number of experts to keep"):
        routed.keep = -1
    routed.switch("p0")
    with pytest.raises(InputError, match="switched to p0; call switch"):
        routed.keep = 1
