"""Tiny real tokenizers, trained on the spot."""

import json
from pathlib import Path

import pytest

BASE_TEXT = ["the low river runs lower than the lowest road", "a slow river is a low road"]
CHEMISTRY = ["the phosphate binds the polymer", "polymer and phosphate bind slowly", "binding the"]
CODE = ["return the lowest index", "index and return the polymer", "while index returns"]


@pytest.fixture(scope="session")
def build():
    """Train a byte-level BPE tokenizer into a folder and return its vocabulary."""
    tokenizers = pytest.importorskip("tokenizers")

    def _build(
        folder: Path, text: list[str], size: int, special=("<s>", "</s>"), late=(), config=None
    ) -> dict[str, int]:
        tok = tokenizers.Tokenizer(tokenizers.models.BPE())
        tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(special), show_progress=False
        )
        tok.train_from_iterator(text, trainer)
        tok.add_special_tokens(list(late))  # ids after the ordinary tokens
        folder.mkdir(parents=True, exist_ok=True)
        tok.save(str(folder / "tokenizer.json"))
        values = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": 128,
        } | (config or {})
        (folder / "tokenizer_config.json").write_text(json.dumps(values))
        return tok.get_vocab()

    return _build


@pytest.fixture(scope="session")
def folders(build, tmp_path_factory):
    """Return three folders with different vocabularies: base, chem and code."""
    root = tmp_path_factory.mktemp("tokenizers")
    build(root / "base", BASE_TEXT, 60, late=["<pad>"], config={"pad_token": "<pad>"})
    build(root / "chem", CHEMISTRY, 64, late=["<|im_start|>", "<|im_end|>"])
    build(root / "code", CODE, 58, special=("</s>", "<s>"), late=["<|im_end|>", "<tool>"])
    return {name: root / name for name in ("base", "chem", "code")}
