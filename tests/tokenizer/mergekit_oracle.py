"""Run the real mergekit on tiny Llama models; for its interpreter (MERGEKIT_PYTHON), not ours.

    mergekit_oracle.py JOBS.json

JOBS: {"models": {folder: rows}, "merges": {name: recipe}}. Each model folder has a tokenizer and
gets random weights and weights.npz. For each merge a folder beside JOBS holds weights.npz with the
embedding and the output head, vocab.json, template.json and rows.json; or error.txt.
"""

import json
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import load_file

NAMES = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Return the vocabulary-indexed matrices of a model folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return {key: tensors[name].float().numpy() for key, name in NAMES.items()}


def make(folder: Path, rows: int, seed: int) -> None:
    """Write a random model beside the tokenizer of a folder."""
    config = transformers.LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    np.savez(folder / "weights.npz", **weights(folder))


def merge(recipe: dict, out: Path) -> None:
    """Run one recipe and note its matrices and vocabulary, or its error."""
    out.mkdir()
    try:
        config = MergeConfiguration.model_validate(recipe)
        run_merge(config, str(out), MergeOptions(write_model_card=False, quiet=True))
        np.savez(out / "weights.npz", **weights(out))
        tok = transformers.AutoTokenizer.from_pretrained(out)
        (out / "vocab.json").write_text(json.dumps(tok.get_vocab()))
        (out / "template.json").write_text(json.dumps(tok.chat_template))
        rows = json.loads((out / "config.json").read_text())["vocab_size"]
        (out / "rows.json").write_text(json.dumps(rows))
    except Exception:
        (out / "error.txt").write_text(traceback.format_exc())


def main(path: Path) -> None:
    """Make the models, then run the merges."""
    jobs = json.loads(path.read_text())
    for seed, (folder, rows) in enumerate(jobs["models"].items()):
        make(Path(folder), rows, seed)
    for name, recipe in jobs["merges"].items():
        merge(recipe, path.parent / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
