"""Pieces of text are the text; stop texts are never shown; bytes of tokens."""

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from server_help import rows, tokenizer  # type: ignore[import-not-found]

from pluribus.serve.text import Decoder, Stops, token_bytes, token_text

WORDS = tokenizer()
TEXTS = ["plain text", "Grüße, Ω≈ç√", "家 🦉🦉 👩‍🚀 end", "\ufffd a real one \ufffd", " lead\n\n"]


def pieces(ids):
    decoder = Decoder(WORDS)
    return [*(decoder.put(one) for one in ids), decoder.end()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text(text):
    found = pieces(WORDS(text)["input_ids"])
    assert "".join(found) == text
    if "\ufffd" not in text:
        assert not [piece for piece in found if "\ufffd" in piece]


def test_bytes_that_are_no_text_come_as_the_whole_decodes():
    for seed in range(40):
        [ids] = rows([30], seed)
        expected = WORDS.decode(ids, skip_special_tokens=True)
        assert "".join(pieces(ids)) == expected


def test_a_tokenizer_that_strips_the_first_space():
    """As SentencePiece's do: a token's own text depends on whether it is the first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "▁a": 1, "▁fine": 2, "ly": 3, "<0xE2>": 4, "<0x82>": 5, "<0xAC>": 6}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    words = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    decoder = Decoder(words)
    found = [decoder.put(one) for one in (1, 2, 3, 4, 5, 6, 1)]
    assert found == ["a", " fine", "ly", "", "", "€", " a"]
    run = [decoder.put(one) for one in (4, 5, 6, 4, 2, 3)]
    # The decoder writes a run with a byte too many anew; what was told stays, and it goes on.
    assert run == ["", "", "€", "", "\ufffd\ufffd\ufffd fine", "ly"]
    assert [token_bytes(words, i) for i in (2, 4, 6)] == [b"fine", b"\xe2", b"\xac"]


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (["END"], "abcENDdef", "abc"),
        (["END", "c"], "abcENDdef", "ab"),
        (["aab"], "aaaab", "aa"),
        (["ababc"], "abababc", "ab"),
        (["zz"], "abcz", "abcz"),
        (["Ω≈"], "aΩ≈b", "a"),
        ([], "abc", "abc"),
        (["abc"], "abc", ""),
    ],
)
def test_stop_texts_however_they_are_cut(stops, text, shown):
    for cuts in itertools.product((False, True), repeat=len(text) - 1):
        found, stopped, piece = "", False, ""
        one = Stops(stops)
        for i, letter in enumerate(text):
            piece += letter
            if i == len(text) - 1 or cuts[i]:
                told, stopped = one.put(piece)
                found, piece = found + told, ""
                if stopped:
                    break
                assert shown.startswith(found)  # nothing of a stop text was ever shown
        assert found + ("" if stopped else one.end()) == shown
        assert bool(stopped) == (shown != text)


def test_names_and_bytes_of_tokens():
    ids = WORDS("é 🦉")["input_ids"]
    assert b"".join(token_bytes(WORDS, i) for i in ids) == "é 🦉".encode()
    [space] = [i for i in ids if token_bytes(WORDS, i) == b" "]
    assert token_text(WORDS, space) == " "
    assert token_text(WORDS, ids[0]) == "bytes:\\xc3"
