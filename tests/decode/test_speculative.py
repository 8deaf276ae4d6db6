"""Drafting loses nothing: greedy choices are equal, and distributions are, by enumeration."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from pluribus.core.errors import InputError
from pluribus.decode import EFT, Fused, Product, SpeculativeDecoder, StaticFusion, upscale
from pluribus.decode.speculative import Drawn, residual, stands

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from members import ids, moved, tiny, trio  # type: ignore[import-not-found]


class Every:
    """Goes through every course that chance can take, each with its probability."""

    def __init__(self):
        self.script, self.at, self.mass, self.open = [], 0, 1.0, []

    def _take(self, probabilities):
        if self.at == len(self.script):
            options = [i for i, p in enumerate(probabilities) if p > 0]
            self.open += [[*self.script, other] for other in options[1:]]
            self.script.append(options[0])
        taken = self.script[self.at]
        self.at += 1
        self.mass *= probabilities[taken]
        return taken

    def token(self, probabilities):
        return self._take(probabilities.double().tolist())

    def accepts(self, probability):
        return self._take([1 - probability, probability]) == 1

    def runs(self):
        """Yield once a course; what is done in between decides what comes next."""
        todo = [[]]
        while todo:
            self.script, self.at, self.mass, self.open = todo.pop(), 0, 1.0, []
            yield
            todo += self.open


def small(seed, **changes):
    return tiny(seed, vocabulary=4, width=16, layers=1, **changes)


def direct(fused, prompt, length, temperature):
    """The probability of every continuation, from forwards of the whole."""
    found = {}
    for ahead in itertools.product(range(4), repeat=length):
        with torch.no_grad():
            logits = fused(torch.tensor([[*prompt, *ahead]])).logits[0].double()
        log = (logits / temperature).log_softmax(-1)
        at = len(prompt) - 1
        found[ahead] = float(sum(log[at + i, token] for i, token in enumerate(ahead)).exp())
    return found


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_whole_distribution_is_the_fusions(k, temperature):
    base = small(1)
    fused = Fused({"ref": small(0), "tuned": moved(base, 2, 0.3), "base": base}, EFT(), None)
    prompt, length = [1, 3, 2], 3
    decoder = SpeculativeDecoder(fused, "tuned", k=k, adaptive=False)
    chance, found, courses, taken = Every(), {}, 0, 0
    for _ in chance.runs():
        out = decoder.generate(
            torch.tensor([prompt]),
            max_new_tokens=length,
            do_sample=True,
            temperature=temperature,
            chance=chance,
            eos_token_id=[],
        )
        ahead = tuple(out.sequences[0, 3:].tolist())
        found[ahead] = found.get(ahead, 0.0) + chance.mass
        courses += 1
        taken += out.stats.accepted
    expected = direct(fused, prompt, length, temperature)
    assert courses > 64
    assert taken > 0
    assert set(found) == set(expected)
    for ahead, mass in expected.items():
        assert found[ahead] == pytest.approx(mass, rel=1e-4, abs=1e-7)


@pytest.mark.slow
def test_many_samples_have_the_distribution():
    from scipy.stats import chisquare

    rng = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 30, generator=rng) * 1.5).softmax(-1)
    chance = Drawn(rng)
    counts = torch.zeros(30)
    for _ in range(20_000):
        token = chance.token(q)
        counts[token if stands(token, p, q, chance) else chance.token(residual(p, q))] += 1
    assert (
        chisquare(
            counts.numpy(),
            (p * 20_000).double().numpy() * (20_000 / float((p * 20_000).double().sum())),
        ).pvalue
        > 0.001
    )


def test_residual_by_hand():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.7, 0.1])
    torch.testing.assert_close(residual(p, q), torch.tensor([0.75, 0.0, 0.25]))
    assert torch.equal(residual(p, p), p)


@pytest.mark.parametrize("draft", ["tuned", "base", "ref"])
def test_greedy_text_is_the_plain_one(draft):
    base = tiny(1)
    up = upscale(tiny(1, layers=2), moved(base, 2, 0.02), base)
    told = []
    for seed in range(3):
        prompt = ids(1, 7, seed)
        plain = up.generate(prompt, max_new_tokens=30, do_sample=False)
        out = SpeculativeDecoder(up, draft, k=4).generate(
            prompt, max_new_tokens=30, on_token=told.append
        )
        assert torch.equal(out.sequences, plain)
        assert out.stats.written == plain.shape[1] - 7 == out.weights["tuned"].shape[1]
    assert told[-1] == int(plain[0, -1])


def test_a_good_draft_saves_forwards_and_k_follows():
    base = tiny(1)
    fused = Fused({"large": tiny(0, layers=3), "base": base, "expert": base}, StaticFusion())
    out = SpeculativeDecoder(fused, "large", k=3).generate(
        ids(1), max_new_tokens=60, eos_token_id=[]
    )
    assert out.stats.acceptance == 1.0  # the fusion is the large model itself
    assert out.stats.per_token("base") < 0.2  # k grew
    assert out.stats.forwards["base"] == out.stats.rounds + 1
    fixed = SpeculativeDecoder(fused, "large", k=3, adaptive=False).generate(
        ids(1), max_new_tokens=60, eos_token_id=[]
    )
    assert fixed.stats.per_token("base") == pytest.approx(1 / 4, abs=0.03)


def test_transformers_assistant_gives_the_same_text():
    """For a fusion of one, transformers' own drafting is an implementation of its own."""
    one, helper = tiny(0), moved(tiny(0), 3, 0.03)
    fused = Fused({"one": one, "helper": helper}, Product(weights={"one": 1.0, "helper": 0.0}))
    prompt = {"input_ids": ids(1), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    theirs = one.generate(**prompt, max_new_tokens=20, do_sample=False, assistant_model=helper)
    ours = SpeculativeDecoder(fused, "helper").generate(ids(1), max_new_tokens=20)
    assert torch.equal(ours.sequences, theirs)
    assert ours.stats.accepted > 0


def test_roles_with_prompts_of_their_own():
    base = tiny(1)
    up = upscale(tiny(1), moved(base, 2, 0.02), base)
    own = {"tuned": {"input_ids": ids(1, 4, 5)}, "base": {"input_ids": ids(1, 4, 5)}}
    plain = up.generate(ids(1), max_new_tokens=20, do_sample=False, member_inputs=own)
    out = SpeculativeDecoder(up, "tuned").generate(ids(1), max_new_tokens=20, member_inputs=own)
    assert torch.equal(out.sequences, plain)
    drawn = [
        SpeculativeDecoder(up, "tuned")
        .generate(
            ids(1),
            max_new_tokens=9,
            do_sample=True,
            top_p=0.9,
            generator=torch.Generator().manual_seed(3),
        )
        .sequences
        for _ in range(2)
    ]
    assert torch.equal(*drawn)


def test_windows_are_drafted_in_too():
    """Caches of sliding windows forget only what they were asked to keep."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        eos_token_id=None,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
        initializer_range=0.3,
        bos_token_id=None,
    )
    one = MistralForCausalLM(config).eval()
    helper = tiny(3, vocabulary=60)
    fused = Fused({"one": one, "helper": helper}, Product())
    prompt = ids(1, 12, vocabulary=60)
    plain = fused.generate(prompt, max_new_tokens=25, do_sample=False, eos_token_id=None)
    out = SpeculativeDecoder(fused, "helper", k=3).generate(
        prompt, max_new_tokens=25, eos_token_id=[]
    )
    assert torch.equal(out.sequences, plain)


def test_what_is_refused():
    fused = Fused(trio(positions=32), StaticFusion())
    with pytest.raises(InputError, match=r"'expret' is no role.*Did you mean 'expert'"):
        SpeculativeDecoder(fused, "expret")
    for k in (0, 17, 2.5, True):
        with pytest.raises(InputError, match="give 1 to 16"):
            SpeculativeDecoder(fused, "expert", k=k)
    decoder = SpeculativeDecoder(fused, "expert")
    with pytest.raises(InputError, match="one prompt at a time"):
        decoder.generate(ids(2), max_new_tokens=3)
    with pytest.raises(InputError, match="takes a generator"):
        decoder.generate(ids(1), max_new_tokens=3, do_sample=True)
    with pytest.raises(InputError, match="temperature > 0"):
        decoder.generate(ids(1), max_new_tokens=3, temperature=0.0)
    with pytest.raises(
        InputError, match="9 tokens of a prompt and 24 new ones are more than the 32"
    ):
        decoder.generate(ids(1), max_new_tokens=24)


def test_a_recurrent_member_decodes_plainly_alone():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        state_size=4,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    one = MambaForCausalLM(config).eval()
    fused = Fused({"one": one, "helper": tiny(3, vocabulary=60)}, Product())
    prompt = ids(1, 5, vocabulary=60)
    cached = fused.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(
        cached,
        fused.generate(
            prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=False
        ),
    )
    with pytest.raises(InputError, match="cannot forget tokens"):
        SpeculativeDecoder(fused, "helper").generate(prompt, max_new_tokens=5)
