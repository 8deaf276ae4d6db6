"""Bottleneck adapters at any module: values, placements, files, and what is refused."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from pluribus.core.errors import FormatError, InputError, MismatchError, MissingError, OutputError
from pluribus.route.adapters import (
    AdapterSet,
    BottleneckAdapter,
    added,
    attach,
    fresh,
    sites,
)
from pluribus.route.parts import Bottleneck

HAND = Bottleneck(
    torch.tensor([[1.0, -1.0], [0.0, 2.0]]),  # down
    torch.tensor([0.0, -1.0]),
    torch.tensor([[1.0, 0.5], [0.0, -1.0]]),  # up
    torch.tensor([0.1, 0.2]),
)


class PostNorm(nn.Module):
    """A feed-forward block as BERT has it: LN(x + W2 gelu(W1 x))."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 9), nn.Linear(9, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (b, s, 6)."""
        return self.norm(x + self.outer(nn.functional.gelu(self.inner(x))))


def drawn(width: int = 6, bottleneck: int = 3, seed: int = 0) -> Bottleneck:
    rng = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    return Bottleneck(
        some(bottleneck, width), some(bottleneck), some(width, bottleneck), some(width)
    )


def test_worked_by_hand():
    """x = (3, 1): down x + bias = (2, 1), relu keeps both, up (2, 1) + bias = (2.6, -0.8)."""
    x = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    expected = torch.tensor([[2.6, -0.8], [0.1, 0.2]])  # of (0, 0): relu(0, -1) = 0
    torch.testing.assert_close(added(x, HAND), expected)
    made = BottleneckAdapter.of(HAND)
    torch.testing.assert_close(made(x), expected)
    back = made.part()
    assert torch.equal(back.up, HAND.up)
    assert not back.up.requires_grad


def test_behind_adds_to_what_a_module_puts_out():
    base = nn.Linear(2, 2)
    x = torch.tensor([[1.0, 2.0]])
    plain = base(x)
    with AdapterSet({"0": HAND}).attach(nn.Sequential(base)) as attached:
        torch.testing.assert_close(attached.model(x), plain + added(plain, HAND))
    torch.testing.assert_close(nn.Sequential(base)(x), plain)  # gone again


def test_the_first_of_several_outputs_is_adapted():
    class Pair(nn.Module):
        def forward(self, x):
            return x, "kept"

    net = nn.Sequential(Pair())
    x = torch.tensor([[3.0, 1.0]])
    with AdapterSet({"0": HAND}).attach(net):
        out, kept = net(x)
    assert kept == "kept"
    torch.testing.assert_close(out, torch.tensor([[5.6, 0.2]]))


def test_post_norm_is_the_placement_of_pfeiffer():
    """u sees LN(ff + x); the host's norm then sees u + ff + x."""
    torch.manual_seed(0)
    net, x, one = PostNorm(), torch.randn(4, 5, 6), drawn()
    ff = net.outer(nn.functional.gelu(net.inner(x)))
    u = added(net.norm(ff + x), one)
    expected = net.norm(u + ff + x)
    with AdapterSet({"norm": one}, "post_norm").attach(net) as attached:
        torch.testing.assert_close(net(x), expected)
    attached.check_ran()


def test_new_adapters_train_and_repeat():
    found = sites(net := PostNorm(), "norm|outer")
    assert found == {"outer": 6, "norm": 6}
    made = fresh(found, 2, generator=torch.Generator().manual_seed(3))
    again = fresh(found, 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(made["norm"].down, again["norm"].down)
    assert sum(p.numel() for one in made.values() for p in one.parameters()) == 2 * (
        12 + 2 + 12 + 6
    )
    with attach(net, made, "behind"):
        net(torch.randn(3, 6)).square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in made["outer"].parameters())


def test_a_file_of_adapters_comes_back_the_same(tmp_path):
    torch.manual_seed(0)
    net, x = PostNorm(), torch.randn(2, 6)
    kept = AdapterSet({"norm": drawn()}, "post_norm")
    kept.save(tmp_path / "a.safetensors", net)
    back = AdapterSet.load(tmp_path / "a.safetensors", net)
    assert back.digest == kept.digest
    assert back.placement == "post_norm"
    with kept.attach(net):
        expected = net(x)
    with back.attach(net):
        assert torch.equal(net(x), expected)
    with pytest.raises(OutputError, match="exists already"):
        kept.save(tmp_path / "a.safetensors", net)
    with torch.no_grad():
        net.outer.bias.add_(1)
    with pytest.raises(MismatchError, match="other tensors than the model it was made for"):
        AdapterSet.load(tmp_path / "a.safetensors", net)


def test_files_that_are_none(tmp_path):
    net = PostNorm()
    with pytest.raises(MissingError, match="no such file"):
        AdapterSet.load(tmp_path / "none.safetensors", net)
    (tmp_path / "broken.safetensors").write_bytes(b"12345678")
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        AdapterSet.load(tmp_path / "broken.safetensors", net)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match="not a file of 'pluribus adapters 1'"):
        AdapterSet.load(tmp_path / "other.safetensors", net)


def test_what_is_refused():
    net = PostNorm()
    with pytest.raises(InputError, match="matches no module"):
        sites(net, "outter")
    with pytest.raises(InputError, match="no regular expression"):
        sites(net, "(")
    with pytest.raises(InputError, match="how wide 0"):
        sites(nn.Sequential(nn.GELU()), "0")
    with pytest.raises(InputError, match="both >= 1"):
        BottleneckAdapter(4, 0, generator=torch.Generator())
    with pytest.raises(InputError, match="activation 'swish'"):
        BottleneckAdapter(4, 1, "swish", generator=torch.Generator())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no layer"):
        AdapterSet({})
    with pytest.raises(InputError, match="placement 'after'"):
        AdapterSet({"norm": drawn()}, "after")  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match=r"no module 'nrom'.*Did you mean 'norm'"):
        AdapterSet({"nrom": drawn()}).attach(net)
    with pytest.raises(InputError, match="outer is a Linear, but post_norm"):
        AdapterSet({"outer": drawn()}, "post_norm").attach(net)
    with pytest.raises(InputError, match="no part of a composite"):
        AdapterSet({"norm": drawn()}, "post_norm").part()


def test_a_module_that_does_not_run_is_named():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    net = Skips()
    with AdapterSet({"used": HAND, "unused": HAND}).attach(net) as attached:
        net(torch.zeros(1, 2))
        with pytest.raises(MismatchError, match="does not run unused"):
            attached.check_ran()


PEER = """
import sys, torch, transformers, adapters
from adapters.composition import Fuse
torch.manual_seed(0)
config = transformers.BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=20, attention_probs_dropout_prob=0.0)
model = transformers.BertModel(config, add_pooling_layer=False).eval()
plain = {n: t.clone() for n, t in model.state_dict().items()}
ids = torch.randint(50, (3, 7))
adapters.init(model)
for name in ("a", "b"):
    model.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=4))
hot = adapters.DynamicAdapterFusionConfig(temperature=True)
model.add_adapter_fusion(Fuse("a", "b"), config=hot)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "adapter" in name:
            parameter.copy_(0.5 * torch.randn(parameter.shape))
outs = {}
for name, setup in (("a", "a"), ("b", "b"), ("fused", Fuse("a", "b"))):
    model.set_active_adapters(setup)
    outs[name] = model.eval()(input_ids=ids).last_hidden_state.detach()
outs["fused_again"] = model(input_ids=ids).last_hidden_state.detach()  # one step cooler
state = {n: t for n, t in model.state_dict().items() if "adapter" in n}
torch.save({"plain": plain, "state": state, "ids": ids, "outs": outs}, sys.argv[1])
"""


def test_the_package_adapters_agrees(tmp_path):
    """Outputs of `adapters` (1.3.0 with transformers 4.57.6) with copied weights, atol 1e-5.

    Its `seq_bn` adapters alone, and `Fuse` with a temperature, at the first and the second forward.
    Run with ADAPTERS_PYTHON set to a Python that has the package.
    """
    python = os.environ.get("ADAPTERS_PYTHON")
    if not python:
        pytest.skip("needs the package adapters in an environment of its own: ADAPTERS_PYTHON")
    transformers = pytest.importorskip("transformers")
    from pluribus.route.transfer._mix import Fused, stacked, summands

    (tmp_path / "peer.py").write_text(PEER)
    done = subprocess.run(
        [python, str(tmp_path / "peer.py"), str(tmp_path / "out.pt")],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = torch.load(tmp_path / "out.pt", weights_only=True)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.load_state_dict(told["plain"])
    state = told["state"]

    def layer(number: int, name: str) -> Bottleneck:
        stem = f"encoder.layer.{number}.output.adapters.{name}."
        down, up = state[f"{stem}adapter_down.0.weight"], state[f"{stem}adapter_up.weight"]
        biases = (state[f"{stem}adapter_down.0.bias"], state[f"{stem}adapter_up.bias"])
        return Bottleneck(down, biases[0], up, biases[1])

    sets = {
        name: AdapterSet(
            {f"encoder.layer.{i}.output.LayerNorm": layer(i, name) for i in range(2)}, "post_norm"
        )
        for name in ("a", "b")
    }
    for name, one in sets.items():
        with one.attach(model), torch.no_grad():
            out = model(input_ids=told["ids"]).last_hidden_state
        torch.testing.assert_close(out, told["outs"][name], atol=1e-5, rtol=0)
    stack = stacked(sets)
    fused = Fused(stack, temperature=50.0, cooling=0.05, generator=torch.Generator())
    with torch.no_grad():
        for i in range(2):
            stem = f"encoder.layer.{i}.output.adapter_fusion_layer.a,b."
            for ours, theirs in (
                ("query", "query.weight"),
                ("query_bias", "query.bias"),
                ("key", "key.weight"),
                ("key_bias", "key.bias"),
                ("value", "value.weight"),
            ):
                getattr(fused, ours)[i].copy_(state[stem + theirs])
    fused.train()  # theirs cools in eval mode too
    for name in ("fused", "fused_again"):
        with attach(model, summands(fused, stack.paths), "post_norm"), torch.no_grad():
            out = model(input_ids=told["ids"]).last_hidden_state
        torch.testing.assert_close(out, told["outs"][name], atol=1e-5, rtol=0)
    assert (told["outs"]["fused"] - told["outs"]["fused_again"]).abs().max() > 1e-6
    assert "adapters" not in sys.modules
