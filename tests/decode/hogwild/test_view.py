"""Turning queries against turning keys, and against the model alone."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))

from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from turned_keys import Block, step

from pluribus.core.errors import InputError, MismatchError
from pluribus.decode.hogwild import view as view_of
from pluribus.decode.hogwild.blocks import KVBlock
from pluribus.decode.hogwild.reader import Reader
from pluribus.decode.hogwild.rotation import Rotation
from pluribus.decode.hogwild.view import SharedView

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 128,
}


def model(kind=LlamaForCausalLM, config=LlamaConfig, **more):
    torch.manual_seed(0)
    return kind(config(**SIZES | more)).eval()


def rows_of(layout: str, workers: int, made):
    """Return rows of blocks by name: shared ones, and one of each worker's own."""
    common, head, mark = made(), made(), made()
    own = [made() for _ in range(workers)]
    rows = []
    for w in range(workers):
        others = own[w + 1 :] + own[:w]
        rows.append(
            {
                "combined": [common, head, *others, mark, own[w]],
                "interleaved": [common, own[w]],
                "contiguous": [common, *others, mark, own[w]],
            }[layout]
        )
    return common, head, mark, own, rows


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("layout", ["combined", "interleaved", "contiguous"])
def test_queries_turned_are_keys_turned(layout, workers):
    """Many steps, with several tokens at once at times, and blocks that move."""
    lm = model()
    reader = Reader(lm)
    frequencies = lm.model.rotary_emb.inv_freq
    ours = rows_of(layout, workers, KVBlock)
    theirs = rows_of(layout, workers, lambda: Block(3))
    rng = torch.Generator().manual_seed(workers)

    def drawn(count: int) -> list[int]:
        return torch.randint(60, (count,), generator=rng).tolist()

    worst = 0.0
    for shared, other in zip(ours[:3], theirs[:3], strict=True):
        before = [[ours[0]], [theirs[0]]] if shared is not ours[0] else [[], []]
        tokens = drawn(6)
        with reader.sharing():
            found = reader.read([*before[0], shared], tokens)
        expected = step(lm, [[*before[1], other]], [tokens], frequencies)
        worst = max(worst, float((found - expected).abs().max()))
    for number in range(64):
        counts = [1 + (number + w) % 3 * (number % 8 == 3) for w in range(workers)]
        tokens = [drawn(count) for count in counts]
        with reader.sharing():
            found = reader.step(SharedView(ours[4], reader.rotation), tokens)
        expected = step(lm, theirs[4], tokens, frequencies)
        worst = max(worst, float((found - expected).abs().max()))
        if number % 10 == 9 and layout != "contiguous":
            mover = number // 10 % workers
            ours[3][mover].move_into(ours[0], reader.rotation)
            theirs[3][mover].move_into(theirs[0], frequencies)
    assert worst < 2e-4 * float(expected.abs().max())
    assert ours[0].n() == theirs[0].n()


@pytest.mark.parametrize(
    ("kind", "config", "more", "pairs"),
    [
        (LlamaForCausalLM, LlamaConfig, {}, "halves"),
        (LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN}, "halves"),
        (Qwen2ForCausalLM, Qwen2Config, {}, "halves"),
        (GPTNeoXForCausalLM, GPTNeoXConfig, {}, "halves"),  # a quarter of each head
        (CohereForCausalLM, CohereConfig, {"pad_token_id": 0}, "neighbours"),
    ],
)
def test_one_worker_is_the_model_alone(kind, config, more, pairs):
    lm = model(kind, config, **more)
    reader = Reader(lm)
    assert reader.rotation.pairs == pairs
    ids = torch.randint(60, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = lm(ids).logits[0]
    history, own = KVBlock(), KVBlock()
    with reader.sharing():
        reader.read([history], ids[0, :10].tolist())
        for place in range(10, 40):
            found = reader.step(
                SharedView([[history, own]], reader.rotation), [[int(ids[0, place])]]
            )
            torch.testing.assert_close(found[0], expected[place], rtol=1e-4, atol=1e-4)
            if place % 7 == 0:
                own.move_into(history, reader.rotation)
    assert history.n() + own.n() == 40
    with torch.no_grad():  # and attends as before
        torch.testing.assert_close(lm(ids).logits[0], expected)


def test_a_prompt_is_read_in_chunks(monkeypatch):
    lm = model()
    reader = Reader(lm)
    ids = torch.randint(60, (50,), generator=torch.Generator().manual_seed(4)).tolist()
    monkeypatch.setattr("pluribus.decode.hogwild.reader.CHUNK", 7)
    with reader.sharing():
        found = reader.read([KVBlock()], ids)
    with torch.no_grad():
        torch.testing.assert_close(
            found[0], lm(torch.tensor([ids])).logits[0, -1], rtol=1e-4, atol=1e-4
        )


def test_half_precision_keeps_up():
    lm = model().to(torch.bfloat16)
    reader = Reader(lm)
    ids = torch.randint(60, (30,), generator=torch.Generator().manual_seed(5)).tolist()
    with reader.sharing():
        block, other = KVBlock(), KVBlock()
        reader.read([block], ids[:20])
        found = reader.read([block, other], ids[20:])
    with torch.no_grad():
        expected = lm(torch.tensor([ids])).logits[0, -1].float()
    assert float((found[0] - expected).abs().max()) < 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_attention_of_one_block(kind, monkeypatch):
    """Softmax written out, what torch has fused, and the way without it."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 16, generator=rng).to(kind) for n in (5, 40, 40))
    k, v = k[:, 3:30], v[:, 3:30]  # as blocks have them: views of buffers
    scores = (q.double() @ k.double().transpose(1, 2)) * 0.3
    expected = scores.softmax(-1) @ v.double()
    close = {"rtol": 0, "atol": 1e-5 if kind == torch.float32 else 3e-2}
    mask = torch.ones(2, 5, 27, dtype=torch.bool)
    for given in (None, mask):
        out, total = view_of.attention(q, k, v, 0.3, given)
        torch.testing.assert_close(out.double(), expected, **close)
        torch.testing.assert_close(total.double(), scores.logsumexp(-1), **close)
    monkeypatch.setattr(view_of, "FUSED", None)
    torch.testing.assert_close(view_of.attention(q, k, v, 0.3)[0].double(), expected, **close)
    mask[:, 2, :7] = False
    out, total = view_of.attention(q, k, v, 0.3, mask)
    part = (scores[:, 2, 7:].softmax(-1)[:, None] @ v[:, 7:].double())[:, 0]
    torch.testing.assert_close(out[:, 2].double(), part, **close)
    torch.testing.assert_close(total[:, 2].double(), scores[:, 2, 7:].logsumexp(-1), **close)


def test_memory_is_kept_once():
    reader = Reader(model())
    common, own = KVBlock(), [KVBlock() for _ in range(4)]
    with reader.sharing():
        reader.read([common], [3] * 400)
        one = common.nbytes()
        view = SharedView([[common, o] for o in own], reader.rotation)
        for _ in range(10):
            reader.step(view, [[4]] * 4)
    assert one == 2 * 3 * 2 * 400 * 8 * 4  # keys and values, layers, heads, tokens, values, bytes
    assert view.nbytes() == one + sum(block.nbytes() for block in own) < 1.5 * one


def test_turns_add_up_and_have_no_scale():
    rotation = Rotation(torch.tensor([1.0, 0.1]), "neighbours")
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    there = rotation.turn(x, *rotation.angles(torch.tensor(7)))
    torch.testing.assert_close(there.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(there[:, 4], x[:, 4])
    torch.testing.assert_close(rotation.turn(there, *rotation.angles(torch.tensor(-7))), x)
    by_hand = x[0, 0] * torch.cos(torch.tensor(7.0)) - x[0, 1] * torch.sin(torch.tensor(7.0))
    torch.testing.assert_close(there[0, 0], by_hand)


def test_views_that_make_no_sense_are_refused():
    rotation = Rotation(torch.ones(4))
    a, b = KVBlock("a"), KVBlock("b")
    for rows, write, message in (
        ([], None, "at least one block"),
        ([[a], []], None, "at least one block"),
        ([[a], [b, a]], None, "two rows write"),
        ([[a]], [b], "does not see"),
        ([[a, a]], None, "twice"),
        ([[a]], [a, b], "2 blocks to write for 1 rows"),
    ):
        with pytest.raises(InputError, match=message):
            SharedView(rows, rotation, write)
    view = SharedView([[a]], rotation)
    with pytest.raises(InputError, match="begin a step"):
        view.update(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8), 0)
    with pytest.raises(MismatchError, match="for 1 rows"):
        view.begin([1, 1])
    view.begin([1])
    with pytest.raises(MismatchError, match="batch of 2"):
        view.update(torch.zeros(2, 1, 1, 8), torch.zeros(2, 1, 1, 8), 0)
    a.append(0, torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))
    with pytest.raises(InputError, match="cannot be cut to 3"):
        a.crop(3)
    with pytest.raises(InputError, match="into itself"):
        a.move_into(a, rotation)


@pytest.mark.parametrize(
    ("kind", "config", "more", "message"),
    [
        (GPT2LMHeadModel, GPT2Config, {}, "no rotary positions"),
        (MistralForCausalLM, MistralConfig, {"sliding_window": 16}, "within a window"),
        (
            LlamaForCausalLM,
            LlamaConfig,
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "'dynamic', whose turns depend on the length",
        ),
    ],
)
def test_models_that_cannot_share_are_refused(kind, config, more, message):
    with pytest.raises(InputError, match=message):
        Reader(model(kind, config, **more))


def test_attention_that_does_more_is_refused():
    lm = model()
    lm.model.rotary_emb.register_forward_pre_hook(  # turns by the squares of places
        lambda module, args, kwargs: (args, kwargs | {"position_ids": kwargs["position_ids"] ** 2}),
        with_kwargs=True,
    )
    with pytest.raises(InputError, match="does more than turn"):
        Reader(lm)


def test_what_is_no_language_model_is_refused():
    with pytest.raises(InputError, match="no transformers model"):
        Reader(torch.nn.Linear(2, 2))
