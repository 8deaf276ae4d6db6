"""The whole token map is compared: what is refused, and what `prefix` lets through."""

import sys
from pathlib import Path

import pytest
import torch

from pluribus.core.errors import InputError, MismatchError
from pluribus.decode import Fused, StaticFusion
from pluribus.decode._align import Shared, aligned

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from members import ids, moved, tiny  # type: ignore[import-not-found]

WORDS = {f"w{i}": i for i in range(6)}


def test_equal_maps_and_sizes():
    assert aligned({"a": 6, "b": 6}, {"a": WORDS, "b": dict(WORDS)}, "same") == Shared(6, True)
    assert aligned({"a": 8, "b": 8}, {"a": WORDS, "b": WORDS}, "same") == Shared(8, True)
    assert aligned({"a": 6, "b": 6}, None, "same") == Shared(6, False)


def test_appended_tokens():
    more = {**WORDS, "<pad>": 6}
    assert aligned({"a": 6, "b": 7}, {"a": WORDS, "b": more}, "prefix") == Shared(6, True)
    padded = {"a": 128, "b": 64}  # more ids are scored than there are tokens
    assert aligned(padded, {"a": WORDS, "b": WORDS}, "prefix") == Shared(6, True)


SWAPPED = {**WORDS, "w2": 3, "w3": 2}
OTHER = {**{f"w{i}": i for i in range(5)}, "else": 5}


@pytest.mark.parametrize(
    ("sizes", "maps", "align", "error", "said"),
    [
        ((6, 7), None, "same", MismatchError, "'b' scores 7 tokens, 'a' 6.*align='prefix'"),
        (
            (6, 6),
            (WORDS, SWAPPED),
            "same",
            MismatchError,
            "'w2' is id 2 of 'a', but 'b' has it as 3",
        ),
        ((6, 6), (WORDS, SWAPPED), "prefix", MismatchError, "'w2' is id 2"),
        ((6, 6), (WORDS, OTHER), "same", MismatchError, "'w5' is id 5 of 'a'.*does not have it"),
        (
            (7, 7),
            (WORDS, {**WORDS, "x": 6}),
            "same",
            MismatchError,
            r"1 tokens that 'a' lacks.*'x'",
        ),
        (
            (6, 6),
            ({k: v for k, v in WORDS.items() if v != 3}, WORDS),
            "prefix",
            MismatchError,
            "'w3' of 'b' .id 3. is not appended",
        ),
        ((4, 6), (WORDS, WORDS), "prefix", MismatchError, "'a' scores 4 ids.*tokenizer has 6"),
        ((6, 7), None, "prefix", InputError, "give tokenizers"),
        ((6, 6), None, "suffix", InputError, "expected 'same' or 'prefix'"),
        ((6, 6), (WORDS, "words"), "same", InputError, "str is no tokenizer"),
    ],
)
def test_what_is_refused(sizes, maps, align, error, said):
    tokenizers = None if maps is None else dict(zip("ab", maps, strict=True))
    with pytest.raises(error, match=said):
        aligned(dict(zip("ab", sizes, strict=True)), tokenizers, align)


def test_a_tokenizer_for_each():
    with pytest.raises(InputError, match="none for 'b'"):
        aligned({"a": 6, "b": 6}, {"a": WORDS}, "same")


def test_a_fused_model_of_members_with_more_and_less():
    vocabulary = {f"w{i}": i for i in range(60)}
    base = tiny(1, vocabulary=60)
    expert, large = moved(base, 2), tiny(0, vocabulary=63)
    expert.generation_config.pad_token_id = 61
    maps = {
        "large": {**vocabulary, "<more>": 60, "<pad>": 61},
        "base": vocabulary,
        "expert": vocabulary,
    }
    models = {"large": large, "base": base, "expert": expert}
    with pytest.raises(MismatchError, match="align='prefix'"):
        Fused(models, StaticFusion(), maps)
    fused = Fused(models, StaticFusion(), maps, align="prefix")
    prompt = ids(2, 6, vocabulary=60)
    with torch.no_grad():
        given = {r: m.runs(prompt).logits[:, -1, :60] for r, m in fused.members_by_role.items()}
        found = fused(prompt).logits[:, -1]
    assert found.shape == (2, 60)
    torch.testing.assert_close(found, fused.fuser(given).log_probs, atol=1e-5, rtol=1e-5)
    left = torch.cat((torch.full((2, 3), 61), prompt), 1)  # padding that the small ones don't know
    mask = torch.tensor([[0] * 3 + [1] * 6] * 2)
    settings = {"max_new_tokens": 6, "do_sample": False}
    written = fused.generate(left, attention_mask=mask, **settings)[:, 9:]
    assert torch.equal(written, fused.generate(prompt, **settings)[:, 6:])
    prompt[1, 2] = 60
    with pytest.raises(InputError, match="token id 60 is not known to all members"):
        fused(prompt)
