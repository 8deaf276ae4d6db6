"""Run the real transformer_lens; for its interpreter (TRANSFORMER_LENS_PYTHON), not ours.

    lens_oracle.py MODEL TOKENS.npz OUT.npz

TOKENS: clean, corrupt (b, s) of one length, answers, alternatives (b,). OUT: z, pattern by layer,
logits; paths (l, h, b), D once each head's z at the end is corrupted, all others there frozen;
queries (l, h, b), the same path to the queries of head 1 of the last layer, read by its hooks; and
direct (l, h), mean D by its own direct-path patching to those queries, without the parts behind
attention.
"""

import sys

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.patching import get_act_patch_direct_path
from transformers import AutoModelForCausalLM

HEAD = 1


def main() -> None:
    """Write what the three runs gave."""
    folder, tokens, out = sys.argv[1:]
    given = {name: torch.tensor(value) for name, value in np.load(tokens).items()}
    clean, corrupt = given["clean"], given["corrupt"]
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = TransformerBridge.boot_transformers(folder, hf_model=hf, tokenizer=None, device="cpu")
    model.eval()
    rows = torch.arange(len(clean))

    def difference(logits: torch.Tensor) -> torch.Tensor:
        return logits[rows, -1, given["answers"]] - logits[rows, -1, given["alternatives"]]

    with torch.no_grad():
        logits, own = model.run_with_cache(clean)
        _, twin = model.run_with_cache(corrupt)
        layers, heads = model.cfg.n_layers, model.cfg.n_heads
        names = [f"blocks.{layer}.attn.hook_z" for layer in range(layers)]
        z = [own[name].view(*clean.shape, heads, -1) for name in names]
        z_twin = [twin[name].view(*clean.shape, heads, -1) for name in names]
        query = f"blocks.{layers - 1}.attn.hook_q"
        paths = np.zeros((layers, heads, len(clean)))
        queries = np.zeros((layers, heads, len(clean)))
        for layer in range(layers):
            for head in range(heads):

                def frozen(value, hook, layer=layer, head=head):
                    number = int(hook.name.split(".")[1])
                    shape = value.shape
                    value = value.clone().view(*shape[:2], heads, -1)
                    value[:, -1] = z[number][:, -1]
                    if number == layer:
                        value[:, -1, head] = z_twin[number][:, -1, head]
                    return value.view(shape)

                taken = {}

                def take(value, hook, taken=taken):
                    taken["q"] = value.clone()

                hooks = [(name, frozen) for name in names]
                told = model.run_with_hooks(clean, fwd_hooks=[*hooks, (query, take)])
                paths[layer, head] = difference(told)

                def put(value, hook, taken=taken):
                    shape = value.shape
                    value = value.clone().view(*shape[:2], heads, -1)
                    new = taken["q"].view(*shape[:2], heads, -1)
                    value[:, -1, HEAD] = new[:, -1, HEAD]
                    return value.view(shape)

                told = model.run_with_hooks(clean, fwd_hooks=[(query, put)])
                queries[layer, head] = difference(told)
        direct = np.full((layers, heads), np.nan)
        for layer in range(layers - 1):
            for head in range(heads):
                found = get_act_patch_direct_path(
                    model, clean, twin, own, lambda told: difference(told).mean(),
                    layer, head, "q", verbose=False,
                )  # fmt: skip
                direct[layer, head] = found[layers - 1, HEAD]
    np.savez(
        out,
        z=torch.stack(z).numpy(),
        pattern=np.stack([own[f"blocks.{n}.attn.hook_pattern"].numpy() for n in range(layers)]),
        logits=logits[:, -1].numpy(),
        paths=paths,
        queries=queries,
        direct=direct,
    )


if __name__ == "__main__":
    main()
