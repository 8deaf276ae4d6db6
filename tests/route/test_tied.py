"""A tensor with several names, as tied embeddings have, is moved once, wherever it stands."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from pluribus.core.errors import MismatchError
from pluribus.route import Dense, LowRank, Routed, from_checkpoints
from pluribus.route.store import load

WORDS, WIDTH = 13, 8


class Tied(nn.Module):
    """Reads words from a table and scores them by the same one."""

    def __init__(self, *, called: bool = True) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.called = called

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return scores (b, s, words) of ids (b, s)."""
        x = torch.tanh(self.words(ids))
        return self.head(x) if self.called else x @ self.head.weight.t()


def parts_of(form: str, names: tuple[str, ...]) -> dict:
    torch.manual_seed(1)
    parts = {}
    for number in range(3):
        delta = Dense(0.3 * torch.randn(WORDS, WIDTH))
        if form == "low_rank":
            delta = LowRank(0.3 * torch.randn(2, WIDTH), torch.randn(WORDS, 2))
        parts[f"p{number}"] = dict.fromkeys(names, delta)
    return parts


def alone(base: nn.Module, parts: dict, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    rows = []
    for row, weights in enumerate(table):
        own = base.words.weight.detach().clone()
        for weight, part in zip(weights, parts.values(), strict=True):
            own += weight * next(iter(part.values())).delta(own)
        rows.append(functional_call(base, {"words.weight": own}, (ids[row : row + 1],)))
    return torch.cat(rows)


@pytest.mark.parametrize(
    "names", [("words.weight",), ("head.weight",), ("words.weight", "head.weight")]
)
@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("form", ["low_rank", "dense"])
def test_a_tied_tensor_is_moved_once(form, called, names):
    torch.manual_seed(0)
    base, parts = Tied(called=called).eval(), parts_of(form, names)
    routed = Routed(base, parts)
    table, ids = torch.rand(5, 3), torch.randint(WORDS, (5, 4))
    with torch.no_grad():
        expected = alone(base, parts, table, ids)
        for _ in range(2):
            torch.testing.assert_close(routed(ids, weights=table), expected, rtol=1e-4, atol=1e-5)
        merged = routed.materialise("p1")
        assert torch.equal(merged["words.weight"], merged["head.weight"])
        torch.testing.assert_close(
            functional_call(base, merged, (ids,), tie_weights=False),
            alone(base, parts, torch.eye(3)[[1] * 5], ids),
        )
        routed.switch("p1")
        torch.testing.assert_close(base(ids), routed(ids, weights="p1"))
    report = routed.report()
    own = parts["p0"][names[0]]
    size = WORDS * WIDTH if form == "dense" else own.a.numel() + own.b.numel()
    assert report["parts_bytes"] == 3 * 4 * size
    assert list(routed.part("p0")) == ["words.weight"]
    assert bool(report["run_apart"]) != called


def test_two_deltas_of_one_tensor_are_refused():
    parts = {"p0": {n: Dense(torch.randn(WORDS, WIDTH)) for n in ("words.weight", "head.weight")}}
    message = "part p0: words.weight and head.weight are one tensor in the base"
    with pytest.raises(MismatchError, match=message):
        Routed(Tied(), parts)


def test_one_module_with_two_names_is_one():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    base.append(base[0])
    delta = Dense(torch.randn(4, 4))
    routed = Routed(base, {"p": {"2.weight": delta}, "q": {"0.weight": Dense(-delta.values)}})
    x = torch.randn(2, 4)
    with torch.no_grad():
        found = routed(x, weights=["p", "q"])
        for row, sign in enumerate((1, -1)):
            own = base[0].weight + sign * delta.values
            expected = torch.tanh(x[row] @ own.t() + base[0].bias) @ own.t() + base[0].bias
            torch.testing.assert_close(found[row], expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_whole_checkpoints_with_tied_embeddings_generate_in_one_batch(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0, "vocab_size": 40}
    torch.manual_seed(0)

    def made() -> nn.Module:
        if kind == "gpt2":
            config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **ends)
            return transformers.GPT2LMHeadModel(config).eval()
        config = transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
            **ends,
        )
        return transformers.LlamaForCausalLM(config).eval()

    net = made()
    base = {n: t.clone() for n, t in net.state_dict().items()}
    experts = {}
    for label in ("a", "b", "c"):
        noise = {}
        for tensor in net.state_dict().values():
            noise.setdefault(tensor.data_ptr(), 0.2 * torch.randn(tensor.shape))
        experts[label] = {n: t + noise[t.data_ptr()] for n, t in net.state_dict().items()}
    routed = from_checkpoints(net, base, experts, density=1.0)
    names, ids = ["b", "a", "c", "a"], torch.randint(1, 40, (4, 5))
    settings = {"max_new_tokens": 6, "do_sample": False}

    def written(composite: Routed) -> torch.Tensor:
        return composite.generate(
            ids, attention_mask=torch.ones_like(ids), weights=names, **settings
        )

    expected = []
    for row, name in enumerate(names):
        one = made()
        one.load_state_dict(experts[name])
        expected.append(one.generate(ids[row : row + 1], **settings))
    assert torch.equal(written(routed), torch.cat(expected))
    assert routed.report()["run_apart"] == []
    routed.save(tmp_path / "composite")
    assert torch.equal(written(load(tmp_path / "composite")), written(routed))
