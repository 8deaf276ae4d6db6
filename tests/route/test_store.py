"""Composites from stores, checkpoints and adapters; saved and read again."""

import json

import pytest
import torch
from torch import nn

from pluribus.compress import TallMasks, Twin
from pluribus.compress.emr import Emr
from pluribus.core.errors import (
    FormatError,
    InputError,
    MismatchError,
    MissingError,
    OutputError,
)
from pluribus.route import Bottleneck, Routed, Scaled, fit_router, from_checkpoints, from_store


class Net(nn.Module):
    """A small perceptron with norms."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, width), nn.LayerNorm(width)
        self.second = nn.Linear(width, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features."""
        return self.second(torch.tanh(self.norm(self.first(x))))


@pytest.fixture
def pool():
    torch.manual_seed(0)
    base = {n: t.clone() for n, t in Net().state_dict().items()}
    experts = {
        task: {n: t + 0.1 * torch.randn_like(t) for n, t in base.items()}
        for task in ("maths", "code", "chat")
    }
    return base, experts


def run(state, x):
    return torch.func.functional_call(Net(), state, (x,))


def test_without_compression_a_part_is_its_expert(pool):
    base, experts = pool
    routed, x = from_checkpoints(Net(), base, experts, density=1.0), torch.randn(5, 8)
    for task, expert in experts.items():
        torch.testing.assert_close(routed(x, weights=task), run(expert, x), rtol=1e-5, atol=1e-5)
    mean = {n: sum(e[n] for e in experts.values()) / 3 for n in base}
    found = routed(x, weights=dict.fromkeys(experts, 1 / 3))
    torch.testing.assert_close(found, run(mean, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        Twin(rank=3),
        Twin(compress="magnitude", density=0.3),
        Twin(density=0.4, exclude=("second",)),
        TallMasks(mask_lambda=0.4),
        Emr(),
    ],
)
def test_parts_are_what_a_store_expands(pool, tmp_path, method):
    base, experts = pool
    store = method.fit(base, experts)
    routed, x = from_store(Net(), store), torch.randn(6, 8)
    names = [*experts] * 2
    expected = torch.cat([run(dict(store[task]), x[i : i + 1]) for i, task in enumerate(names)])
    torch.testing.assert_close(routed(x, weights=names), expected, rtol=1e-4, atol=1e-5)
    store.save(tmp_path / "store")
    again = from_store(Net(), tmp_path / "store", base=None if isinstance(method, Twin) else base)
    assert torch.equal(again(x, weights=names), routed(x, weights=names))


def test_masks_share_one_vector(pool):
    base, experts = pool
    routed = from_store(Net(), TallMasks(mask_lambda=0.4).fit(base, experts))
    size = sum(t.numel() for t in base.values())
    masks = sum(3 * -(-t.numel() // 8) for t in base.values())
    assert routed.report()["parts_bytes"] == 4 * size + masks


@pytest.fixture
def routed(pool):
    base, experts = pool
    made = from_checkpoints(Net(), base, experts, rank=2, features="module:norm", top_k=2)
    inputs = {task: torch.randn(40, 8) + 2 * i for i, task in enumerate(experts)}
    told = fit_router(made, inputs, epochs=20, lr=1e-2, batch_size=16)
    assert told.accuracy > 0.5
    return made


def test_saved_and_read_again_bit_for_bit(routed, tmp_path):
    x = torch.randn(9, 8)
    expected = routed(x)
    routed.save(tmp_path / "composite")
    torch.manual_seed(5)
    again = Routed.load(tmp_path / "composite", Net())
    assert torch.equal(again(x), expected)
    assert again.names == routed.names
    assert again.top_k == 2
    again.save(tmp_path / "composite", overwrite=True)
    assert torch.equal(Routed.load(tmp_path / "composite", Net())(x), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["composite"]


def test_every_form_is_kept(pool, tmp_path):
    base, experts = pool
    bank = from_store(Net(), TallMasks(mask_lambda=0.4).fit(base, experts))
    parts = {name: bank.part(name) for name in bank.names}
    parts["chat"] = {
        "first.weight": Scaled(torch.rand(12)),
        "norm": Bottleneck(
            torch.randn(2, 12), torch.randn(2), torch.randn(12, 2), torch.randn(12), "silu"
        ),
    }
    module = Net()
    module.load_state_dict(base)
    heads = {"signs": {"weight": torch.randn(2, 6), "bias": torch.randn(2)}}
    made, x = Routed(module, parts, heads=heads), torch.randn(3, 8)
    made.save(tmp_path / "c")
    again, names = Routed.load(tmp_path / "c", Net()), ["code", "chat", "maths"]
    assert torch.equal(again(x, weights=names), made(x, weights=names))
    assert torch.equal(again(x, weights=names, task="signs"), made(x, weights=names, task="signs"))
    told = made.report()
    assert again.report() == told


def test_without_the_bases_tensors_it_must_be_the_one(pool, routed, tmp_path):
    routed.save(tmp_path / "c", base=False)
    module = Net()
    module.load_state_dict(routed.base.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(Routed.load(tmp_path / "c", module)(x), routed(x))
    with pytest.raises(MismatchError, match="this base has other tensors than the one"):
        Routed.load(tmp_path / "c", Net())
    with pytest.raises(InputError, match="give the base, a Net: the composite was saved without"):
        Routed.load(tmp_path / "c")


def test_bad_folders(routed, tmp_path):
    with pytest.raises(MissingError, match="no composite in it"):
        Routed.load(tmp_path, Net())
    routed.save(tmp_path / "c")
    with pytest.raises(OutputError, match="exists already; choose another name"):
        routed.save(tmp_path / "c")
    with pytest.raises(MismatchError, match=r"first.bias is \[12\] .* \[13\] in Net"):
        Routed.load(tmp_path / "c", Net(13))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="exists and is no composite"):
        routed.save(tmp_path / "notes", overwrite=True)
    manifest = tmp_path / "c" / "routed.json"
    table = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(table | {"version": 9}))
    with pytest.raises(FormatError, match="version 9 of the format; this release reads 1"):
        Routed.load(tmp_path / "c", Net())
    manifest.write_text("{")
    with pytest.raises(FormatError, match="not the manifest of a composite"):
        Routed.load(tmp_path / "c", Net())
    manifest.write_text(json.dumps(table | {"parts": table["parts"][::-1]}))
    with pytest.raises(MismatchError, match="holds the parts maths, code, chat in this order"):
        Routed.load(tmp_path / "c", Net())
    wider = table["router"] and {**table["router"], "width": 99}
    manifest.write_text(json.dumps(table | {"router": wider}))
    with pytest.raises(FormatError, match=r"the router is not what routed\.json says"):
        Routed.load(tmp_path / "c", Net())
    manifest.write_text(json.dumps(table))
    parts = tmp_path / "c" / "parts.safetensors"
    parts.write_bytes(parts.read_bytes()[:-9])
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        Routed.load(tmp_path / "c", Net())
    parts.unlink()
    with pytest.raises(MissingError, match=r"named by routed.json, but not there"):
        Routed.load(tmp_path / "c", Net())


def test_what_has_no_name_cannot_be_kept(pool, tmp_path):
    base, experts = pool
    made = from_checkpoints(Net(), base, experts, rank=2, features=lambda model, x: model(x))
    with pytest.raises(InputError, match="have no name to be saved by"):
        made.save(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_inputs_of_every_part_are_wanted(pool):
    base, experts = pool
    made = from_checkpoints(Net(), base, experts, rank=2)
    with pytest.raises(InputError, match="no inputs are given for chat"):
        fit_router(made, {"maths": torch.randn(4, 8), "code": torch.randn(4, 8)})
    with pytest.raises(InputError, match=r"no part 'math'.*Did you mean 'maths'"):
        fit_router(made, {"math": torch.randn(4, 8)})
    with pytest.raises(MismatchError, match="do not fit the module"):
        from_checkpoints(nn.Linear(2, 2), base, experts)
