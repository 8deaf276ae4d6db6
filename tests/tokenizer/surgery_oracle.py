"""Run the real mergekit-tokensurgeon on tiny Llama models; for MERGEKIT_PYTHON, not ours.

    surgery_oracle.py JOBS.json

JOBS: {"models": {folder: [rows, width, tied]}, "runs": {name: arguments}}. Each model folder has a
tokenizer and gets random weights. A run writes the model folder of its name beside JOBS, or
error.txt in it.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
import transformers
from mergekit.scripts.tokensurgeon import main as tokensurgeon


def make(folder: Path, rows: int, width: int, tied: bool, seed: int) -> None:
    """Write a random model, with entries of order 1, beside the tokenizer of a folder."""
    config = transformers.LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)


def main(path: Path) -> None:
    """Make the models, then run the transplants."""
    jobs = json.loads(path.read_text())
    for seed, (folder, about) in enumerate(jobs["models"].items()):
        make(Path(folder), *about, seed=seed)
    for name, arguments in jobs["runs"].items():
        out = path.parent / name
        try:
            tokensurgeon.main([*arguments[:2], str(out), *arguments[2:]], standalone_mode=False)
        except Exception:
            out.mkdir(exist_ok=True)
            (out / "error.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
