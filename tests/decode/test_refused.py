"""What a `Fused` refuses, with words that say what to do."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

from pluribus.core.errors import InputError, MissingError
from pluribus.decode import (
    EFT,
    DynamicFusion,
    Fused,
    Product,
    StaticFusion,
    Unadapted,
    dial,
    implicit_reward,
    plot_weights,
)

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from members import ids, moved, tiny, tokenizer, trio  # type: ignore[import-not-found]


@pytest.fixture(scope="module")
def fused():
    return Fused(trio(positions=32), StaticFusion())


def encoder_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=330, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )


def headless():
    return tiny(0).model


@pytest.mark.parametrize(
    ("models", "fuser", "said"),
    [
        (dict, Product(), "no model to fuse"),
        (lambda: {"a": torch.nn.Linear(2, 2)}, Product(), "'a' is a Linear; expected a transf"),
        (lambda: {"a": encoder_decoder()}, Product(), "encoder-decoder model"),
        (lambda: {"a": headless()}, Product(), "has no language-model head"),
        (lambda: {"a": Unadapted(tiny(0))}, Product(), "Unadapted takes a PEFT model"),
        (lambda: {"large": tiny(0), "base": tiny(1)}, StaticFusion(), "static needs an expert"),
        (lambda: {"base": tiny(0), "t": tiny(1)}, EFT(), "say ref='base'"),
    ],
)
def test_members(models, fuser, said):
    with pytest.raises(InputError, match=said):
        Fused(models(), fuser)


def test_devices():
    with pytest.raises(InputError, match=r"devices places 'expret'.*Did you mean 'expert'"):
        Fused(trio(), StaticFusion(), devices={"expret": "cpu"})
    placed = Fused(trio(), StaticFusion(), devices={"expert": "cpu"})
    assert placed.device.type == "cpu"


def own(rows=3, **changes):
    return {"expert": {"input_ids": ids(3, 4), **changes}} if rows else {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"member_inputs": {"expret": {"input_ids": ids()}}}, "Did you mean 'expert'"),
        ({"member_inputs": {"expert": {"input_ids": ids(2)}}}, "has 2 rows; the batch has 3"),
        ({"member_inputs": {"expert": {"input_ids": ids(3, 0)}}}, "has no tokens in some row"),
        ({"member_inputs": {"expert": {"input_ids": [1, 2]}}}, "expected {'input_ids'"),
        (
            {"member_inputs": own(attention_mask=torch.tensor([[1, 1, 1, 0]] * 3))},
            "padded on the left",
        ),
        (
            {"member_inputs": own(attention_mask=torch.zeros(3, 4, dtype=torch.long))},
            "has no tokens in some row",
        ),
        ({"member_inputs": own(), "use_cache": False}, "leave use_cache on"),
        ({"member_inputs": own(), "labels": ids()}, r"score\(prompt, continuation\)"),
        ({"output_attentions": True}, "has no output_attentions"),
        ({"inputs_embeds": torch.zeros(3, 9, 32)}, "has no inputs_embeds"),
        ({"input_ids": None}, "give input_ids"),
        ({"cache": object()}, "another model's cache"),
        ({"input_ids": ids(1, 33)}, "33 tokens of a prompt are more than the 32 that"),
    ],
)
def test_inputs(fused, given, said):
    with pytest.raises(InputError, match=said):
        fused(**{"input_ids": ids(), **given})


def test_contexts(fused):
    settings = {"do_sample": False, "pad_token_id": 0}
    said = "9 tokens of a prompt and 24 new ones are more than the 32 that"
    with pytest.raises(InputError, match=said):
        fused.generate(ids(), max_new_tokens=24, **settings)
    assert fused.generate(ids(), max_new_tokens=23, eos_token_id=None, **settings).shape == (3, 32)
    long = {"expert": {"input_ids": ids(3, 20)}}
    with pytest.raises(InputError, match="20 tokens of a prompt and 13 new"):
        fused.generate(ids(), max_new_tokens=13, member_inputs=long, **settings)
    mask = torch.ones(3, 36, dtype=torch.long)
    mask[:, :27] = 0  # padding takes no room
    left = torch.cat((torch.zeros(3, 27, dtype=torch.long), ids()), 1)
    new = fused.generate(left, attention_mask=mask, max_new_tokens=20, **settings)[:, 36:]
    assert torch.equal(new, fused.generate(ids(), max_new_tokens=20, **settings)[:, 9:])


def test_generation_that_members_cannot_do(fused):
    with pytest.raises(InputError, match="members make their own caches"):
        fused.generate(ids(), max_new_tokens=3, cache_implementation="static")
    with pytest.raises(InputError, match="leave prefill_chunk_size out"):
        fused.generate(ids(), max_new_tokens=3, member_inputs=own(), prefill_chunk_size=2)


def test_a_base_that_is_not_the_experts():
    base, stranger = tiny(1), tiny(9)
    with torch.no_grad():
        for parameter in stranger.parameters():
            parameter.mul_(2.0)
    fused = Fused({"large": tiny(0), "base": base, "expert": stranger}, DynamicFusion())
    with pytest.warns(UserWarning, match="'expert' is .* nats away from the base on average"):
        fused(ids())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(ids())  # once is enough
        near = Fused({"large": tiny(0), "base": base, "expert": moved(base, 2)}, DynamicFusion())
        near(ids())


def test_weights_and_rewards(fused):
    with pytest.raises(InputError, match="has no weights to set: it finds them"):
        Fused(trio(), DynamicFusion()).set_weights(1.0)
    with pytest.raises(InputError, match="names 'other'"):
        fused.set_weights({"expert": 1.0, "other": 2.0})
    with pytest.raises(InputError, match="is nan"):
        fused.set_weights(float("nan"))
    assert fused.fuser == StaticFusion()
    base = tiny(1)
    with pytest.raises(InputError, match="cannot be called 'ref'"):
        dial(base, {"ref": moved(base, 2)})
    two = dial(base, {"a": moved(base, 2), "b": moved(base, 3)})
    with pytest.raises(InputError, match="there are 2 tuned models"):
        implicit_reward(two, [5, 6], [7])
    with pytest.raises(InputError, match="tuned='c' is none of a, b"):
        implicit_reward(two, [5, 6], [7], tuned="c")
    with pytest.raises(InputError, match="has no tuned model and base"):
        implicit_reward(fused, [5, 6], [7])


def test_scores_and_texts(fused):
    with pytest.raises(MissingError, match="give tokenizers"):
        fused.score("a fine film", " yes")
    with pytest.raises(InputError, match="need a token each"):
        fused.score([5, 6], [])
    with pytest.raises(InputError, match="one row of ids"):
        fused.score(ids(2), [5])
    with pytest.raises(InputError, match="39 tokens of a prompt are more than the 32"):
        fused.score(ids(1, 30), ids(1, 9))
    with pytest.raises(InputError, match=r"needs \{prompt\} where"):
        fused.set_prompts({"expert": "Review:"})
    with pytest.raises(InputError, match="template for 'exprt'"):
        fused.set_prompts({"exprt": "chat"})
    words = tokenizer()
    spoken = Fused(trio(), StaticFusion(), dict.fromkeys(("large", "base", "expert"), words))
    with pytest.raises(InputError, match="makes no tokens"):
        spoken.encode("")
    spoken.set_prompts({"expert": "chat"})
    with pytest.raises(MissingError, match="'expert' has no chat template"):
        spoken.encode("a film")
    words.chat_template = "{% for m in messages %}Question: {{ m.content }}\nAnswer:{% endfor %}"
    told = spoken.encode("a film")["member_inputs"]["expert"]["input_ids"][0]
    assert words.decode(told) == "Question: a film\nAnswer:"


def test_plots():
    with pytest.raises(InputError, match="'a' has 1 weights for 2 tokens"):
        plot_weights(["x", "y"], {"a": [1.0]})
    drawn = plot_weights(["x", " y<"], {"a": [1.0, 0.5], "b": [0.0, float("nan")]})
    assert drawn.count('<path class="line') == 2 + 2  # and in the key
    assert "y&lt;" in drawn
