"""Tiny random models of three layouts, and a tokenizer that knows the tasks' words whole."""

import functools

import torch

from pluribus.inspect.circuits import tasks

SIZE = 400


def gpt2(seed=0, vocabulary=SIZE, layers=3, **changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=128, n_embd=32, n_layer=layers, n_head=4,
        initializer_range=0.3, bos_token_id=None, eos_token_id=0, **changes,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def llama(seed=0, vocabulary=SIZE, layers=3, heads=4, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=0, initializer_range=0.3, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def neox(seed=0, vocabulary=SIZE, layers=3, **changes):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=128, rotary_pct=0.5,
        bos_token_id=None, eos_token_id=0, initializer_range=0.3, **changes,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


KINDS = {
    "gpt2": gpt2,
    "llama": llama,
    "neox": neox,
    "neox, in turn": functools.partial(neox, use_parallel_residual=False),
}


@functools.cache
def tokenizer():
    """Words and their leading space are tokens; what is not in the tasks is split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Digits(individual_digits=True)
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [p.clean + p.answer for t in tasks.TASKS.values() for p in t.generate(0, 300)]
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


def drawn(rows=5, shortest=7, longest=11, seed=0, names=("here",)):
    """Random prompts of unequal length with twins that differ in one token, and a named place."""
    from pluribus.inspect.circuits import Prompt, Prompts

    rng = torch.Generator().manual_seed(seed)
    ends = torch.randint(shortest - 1, longest, (rows,), generator=rng)
    ends[0], ends[1] = shortest - 1, longest - 1
    clean = torch.randint(1, SIZE, (rows, longest), generator=rng)
    places = {name: (torch.rand(rows, generator=rng) * (ends - 2)).long() + 2 for name in names}
    corrupt = clean.clone()
    corrupt[:, 1] = torch.randint(1, SIZE, (rows,), generator=rng)
    answers = torch.randint(1, SIZE, (rows, 2), generator=rng)
    return Prompts(
        tuple(Prompt("", "", "", "") for _ in range(rows)),
        clean,
        corrupt,
        ends,
        answers[:, 0],
        answers[:, 1],
        places,
        tuple((int(a), int(b)) for a, b in answers),
        tuple((int(a),) for a, _ in answers),
    )
