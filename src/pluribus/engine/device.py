"""Blocks on a GPU: pinned staging memory and a stream for each thread.

Two driver threads on one device overlap copying with arithmetic: while one thread's block is being
merged, the other's is on its way.
"""

import numpy as np

from pluribus.core.errors import InputError


class Uploader:
    """Copies float blocks of one thread to a torch device."""

    def __init__(self, device: str) -> None:
        import torch

        try:
            self.device = torch.device(device.removeprefix("torch:"))
        except RuntimeError:
            raise InputError(f"device {device!r}: expected cpu, cuda or cuda:N") from None
        if self.device.type == "cuda":
            count = torch.cuda.device_count()
            if not torch.cuda.is_available():
                raise InputError(f"device {device!r}: no CUDA device is available here; use cpu")
            if (self.device.index or 0) >= count:
                raise InputError(f"device {device!r}: the last one here is cuda:{count - 1}")
        elif self.device.type == "meta":
            raise InputError(f"device {device!r} holds no values; expected cpu, cuda or cuda:N")
        self._pinned: torch.Tensor | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, block: np.ndarray):
        """Return `block` on the device."""
        import torch

        host = torch.from_numpy(np.ascontiguousarray(block))
        if self._stream is None:
            return host.clone().to(self.device)
        if self._pinned is None or self._pinned.nbytes < host.nbytes:
            self._pinned = torch.empty(host.nbytes, dtype=torch.uint8, pin_memory=True)
        staged = self._pinned[: host.nbytes].view(host.dtype).reshape(host.shape)
        torch.cuda.set_stream(self._stream)
        self._stream.synchronize()  # the previous block has left the staging memory
        staged.copy_(host)
        return staged.to(self.device, non_blocking=True)
