"""A language model of a few thousand parameters with a byte-level tokenizer, made on the spot."""

import torch

CORPUS = [
    "Review: a fine and funny film\nSentiment: positive",
    "Review: a dull and tired film\nSentiment: negative",
    "Question: How far is it ?\nAnswer: yes no maybe",
    *["Sentiment: positive negative yes no"] * 9,
    *("accept reservations", "account blocked", "alarm", "out of scope", "12 34 56 7 8 90"),
]


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


def model(seed=0, positions=512, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=330,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.3,  # predictions that depend on what was read
        **changes,
    )
    return LlamaForCausalLM(config).eval()


def save(folder, seed=0):
    model(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
