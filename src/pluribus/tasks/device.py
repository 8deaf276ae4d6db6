"""Whether a device can be computed on: known before models are read, not after."""

from pluribus.core.errors import InputError


def usable(device: object) -> str:
    """Return the name of a device of torch that works here. Raises InputError saying why not."""
    import torch

    try:
        found = torch.device(device if isinstance(device, str) else str(device))
    except RuntimeError:
        raise InputError(f"device {device!r}: expected cpu, cuda or cuda:N") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r}: no CUDA device is available here; use cpu")
    try:
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch says it with
        told = str(error).strip().partition("\n")[0]
        raise InputError(f"device {device!r} cannot be used here ({told}); use cpu") from None
    return str(device)
