"""Run the real FusionBench on small models; for its interpreter (FUSIONBENCH_PYTHON), not ours.

    fusionbench_oracle.py INPUTS.npz OUTPUTS.npz

INPUTS: "base/<tensor>", "<expert>/<tensor>", "head/<expert>" (classes, 6), "x/<expert>" (steps, 16,
6), "layer" (experts, tensors) and "task" (experts,) coefficients, "mask/<tensor>". The network is a
Linear 6 -> 8, Tanh, Linear 8 -> 6. OUTPUTS: "layer/<tensor>", "task/<tensor>", "clamped/<tensor>",
"masked/<tensor>" (merged weights), "entropy" (steps, experts) of the merged model's outputs,
"adapted/layer" and "adapted/task" (coefficients after all steps), "drawn/<tensor>" (a soft mask of
its MaskModel, seed 5, in the order of the tensors, logits as in "logits/<tensor>").
"""

import copy
import sys

import numpy as np
import torch
from fusion_bench.method.adamerging.entropy_loss import entropy_loss
from fusion_bench.models.masks.mask_model import MaskModel
from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel
from fusion_bench.models.wrappers.task_wise_fusion import TaskWiseMergedModel
from torch import nn

LR = 0.03


def main(inputs: str, outputs: str) -> None:
    """Compute everything."""
    torch.set_num_threads(1)
    given = {name: torch.from_numpy(array) for name, array in np.load(inputs).items()}
    experts = [name.removeprefix("head/") for name in given if name.startswith("head/")]
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    names = [name for name, _ in net.named_parameters()]

    def model(label: str) -> nn.Module:
        own = copy.deepcopy(net)
        own.load_state_dict({name: given[f"{label}/{name}"] for name in names})
        return own

    def merged(kind, coefficients, **settings):
        models = [model(label) for label in experts]
        return kind(coefficients.clone(), model("base"), models, **settings)

    out = {}

    def keep(prefix, state):
        out.update({f"{prefix}/{name}": state[name].detach().numpy() for name in names})

    layer, task = given["layer"], given["task"]
    masks = {name: given[f"mask/{name}"] for name in names}
    keep("layer", merged(LayerWiseMergedModel, layer, clamp_weights=False).merge_weights())
    keep("clamped", merged(LayerWiseMergedModel, layer, clamp_weights=True).merge_weights())
    keep("task", merged(TaskWiseMergedModel, task, clamp_weights=False).merge_weights())
    found = merged(TaskWiseMergedModel, task, clamp_weights=False)
    keep("masked", found.merge_weights(task_vector_mask=masks))
    for label, kind, start in (
        ("layer", LayerWiseMergedModel, torch.full_like(layer, 0.3)),
        ("task", TaskWiseMergedModel, torch.full_like(task, 0.3)),
    ):
        whole = merged(kind, start, clamp_weights=True)
        weight = whole.merge_weight
        optimiser = torch.optim.Adam([weight], lr=LR)
        whole.merge_weights()
        terms = []
        for step in range(given[f"x/{experts[0]}"].shape[0]):
            row = []
            for expert in experts:
                logits = nn.functional.linear(
                    whole(given[f"x/{expert}"][step]), given[f"head/{expert}"]
                )
                loss = entropy_loss(logits)
                loss.backward(retain_graph=True)
                row.append(float(loss.detach()))
            terms.append(row)
            optimiser.step()
            optimiser.zero_grad()
            whole.merge_weights()
        out[f"adapted/{label}"] = weight.detach().numpy()
        out[f"entropy/{label}"] = np.array(terms)
    drawer = MaskModel(model("base"), parameter_type="logits")
    for name, parameter in drawer.named_parameters():
        parameter.data = given[f"logits/{name}"]
    torch.manual_seed(5)
    keep("drawn", drawer.sample_mask("continuous", temperature=0.5))
    np.savez(outputs, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
