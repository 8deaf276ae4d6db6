"""Vocabularies and tokenizers of a merge: alignment by token string, files, chat templates."""

from pluribus.tokenizer.align import (
    Alignment,
    AlignmentReport,
    Fill,
    Kind,
    RowMap,
    Run,
    VocabIn,
    align,
    apply,
)
from pluribus.tokenizer.chat import chat_template, read_chat_template, write_chat_template
from pluribus.tokenizer.config import TokenizerConfig, align_models, tokenizer_config
from pluribus.tokenizer.errors import TokenizerError
from pluribus.tokenizer.files import load_vocab, write_tokenizer

__all__ = [
    "Alignment",
    "AlignmentReport",
    "Fill",
    "Kind",
    "RowMap",
    "Run",
    "TokenizerConfig",
    "TokenizerError",
    "VocabIn",
    "align",
    "align_models",
    "apply",
    "chat_template",
    "load_vocab",
    "read_chat_template",
    "tokenizer_config",
    "write_chat_template",
    "write_tokenizer",
]
