"""Measure the statistics of a merged model's batch norms anew, on unlabelled inputs.

    mean_l, var_l = over all places and inputs of the merged model's own activations before norm l

The statistics that a checkpoint carries are those of its own activations, and an average of
experts' statistics is not that of the average's activations: merged convolutions have a smaller
variance (Jordan et al., ICLR 2023, https://arxiv.org/abs/2211.08403, "REPAIR", section 3, whose
reset this is for networks that have batch norms). No weight changes and no label is needed. The
result serves the inputs it was measured on: give a mixture of all tasks, or one task's for a model
of one task.

Statistics are cumulative averages of the batches' means and unbiased variances, all layers in one
pass, as in PyTorch with `momentum=None`; batches of equal length weigh alike. The spread between
batches does not count, so for several tasks every batch must be a mixture of all.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pluribus.core.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from torch import nn


def renorm(module: "nn.Module", batches: Iterable[Any]) -> int:
    """Replace the running statistics of a module's batch norms; return how many batches it took.

    `batches` are inputs (b, ...) for `module(batch)`; a batch of more places than one a channel is
    needed. Raises InputError if the module has no batch norm with statistics or there is no batch,
    NonFiniteError if a statistic is not finite; the module is then as it was.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.track_running_stats
    }
    if not norms:
        raise InputError(
            f"{type(module).__name__} has no batch norm that keeps statistics: nothing to measure"
        )
    modes = [(part, part.training) for part in module.modules()]
    before = {name: (norm.momentum, _copies(norm)) for name, norm in norms.items()}
    count = 0
    try:
        module.eval()
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for batch in batches:
                module(batch)
                count += 1
        if not count:
            raise InputError("no batch was given to measure the statistics on")
        for name, norm in norms.items():
            for key, value in norm.named_buffers(recurse=False):
                if not bool(value.isfinite().all()):
                    raise NonFiniteError(
                        f"{name}.{key} is not finite after {count} batches; look at the inputs"
                    )
    except BaseException:
        for name, norm in norms.items():
            for key, value in before[name][1].items():
                getattr(norm, key).copy_(value)
        raise
    finally:
        for name, norm in norms.items():
            norm.momentum = before[name][0]
        for part, training in modes:
            part.training = training
    return count


def _copies(norm: "nn.Module") -> dict[str, Any]:
    return {key: value.clone() for key, value in norm.named_buffers(recurse=False)}
