"""`ConcreteMask`: one logit for each weight, drawn as a soft mask that gradients pass through.

Tang et al., https://arxiv.org/abs/2312.06173, section 3; the binary Concrete distribution is that
of Maddison et al. and Jang et al., ICLR 2017, https://arxiv.org/abs/1611.00712.

    soft_j = sigmoid((x_j + ln u - ln(1 - u)) / temperature)     u uniform in (0, 1), x the logits
    m_j    = soft_j / mean(soft_j)                               for tensor j, so that mean(m_j) = 1

The gradient passes through the mean as well. With a = dL/dm_j, mu = mean(soft_j), N entries:

    dL/dx_j = (a / mu - sum(a * soft_j) / (N mu^2)) * soft_j (1 - soft_j) / temperature

All logits lie in one flat tensor, so a step draws n uniforms at once. A tensor of one entry has no
logit: it would be rescaled to 1 whatever the logit says. `min_numel` leaves out larger ones too.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from pluribus.core.errors import FormatError, InputError, MismatchError, NonFiniteError, listing
from pluribus.core.random import key
from pluribus.core.weights import Weights

if TYPE_CHECKING:
    from pluribus.tune.concrete import Final

KEY = "pluribus.concrete"
EPS = torch.finfo(torch.float32).eps  # what torch keeps uniforms away from 0 and 1 by


class Draw(NamedTuple):
    """Masks of one draw, and what their gradient needs."""

    masks: dict[str, Tensor]  # rescaled, in the tensors' shapes
    soft: Tensor  # (n,) before the rescaling


class ConcreteMask(nn.Module):
    """Logits of a mask over named tensors.

    `flat` is the parameter to optimise, (n,); `logits` views it by name. `left_out` are the names
    without a logit, whose mask is 1. `init` is one number, or logits by name. Raises InputError,
    MismatchError for logits of other names or shapes, NonFiniteError for logits that are none.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        temperature: float = 0.5,
        init: float | Mapping[str, Any] = 0.0,
        min_numel: int = 1,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature = {temperature}: give a number above 0")
        if min_numel < 1:
            raise InputError(f"min_numel = {min_numel}: give at least 1")
        self.temperature, self.min_numel = temperature, min_numel
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        self.left_out = tuple(n for n, size in sizes.items() if size < max(2, min_numel))
        self._spans: dict[str, slice] = {}
        end = 0
        for name, size in sizes.items():
            if name not in self.left_out:
                self._spans[name] = slice(end, end + size)
                end += size
        if not end:
            raise InputError(
                f"none of {len(sizes)} tensors has at least {max(2, min_numel)} entries: there is "
                "nothing to mask"
            )
        self.flat = nn.Parameter(torch.zeros(end, device=device))
        if isinstance(init, Mapping):
            self._take(init)
        else:
            self.flat.detach().fill_(init)
        self.check()

    @property
    def logits(self) -> dict[str, Tensor]:
        """The logits by name, as views without a gradient."""
        flat = self.flat.detach()
        return {name: flat[span].view(self.shapes[name]) for name, span in self._spans.items()}

    def _take(self, given: Mapping[str, Any]) -> None:
        own = self.logits
        lacking = [name for name in own if name not in given]
        extra = [name for name in given if name not in own]
        if lacking or extra:
            what = f"lack {listing(lacking)}" if lacking else f"are also for {listing(extra)}"
            raise MismatchError(
                f"the logits {what}: they belong to another model, or to another min_numel"
            )
        for name, view in own.items():
            found = torch.as_tensor(given[name])
            if found.shape != view.shape:
                raise MismatchError(
                    f"the logits of {name!r} have shape {list(found.shape)}, but the tensor "
                    f"{list(view.shape)}"
                )
            view.copy_(found)

    def check(self) -> None:
        """Raise NonFiniteError, naming the tensor, for a logit that is not finite."""
        if bool(self.flat.detach().isfinite().all()):
            return
        name = next(n for n, x in self.logits.items() if not bool(x.isfinite().all()))
        raise NonFiniteError(f"the mask's logits of {name!r} are not finite; try a smaller lr")

    # -- masks -----------------------------------------------------------------------------------

    def draw(self, generator: Generator) -> Draw:
        """Draw soft masks, connected to `flat` for autograd where that is on.

        The generator's own device draws: another kind of device gives other numbers. Raises
        NonFiniteError.
        """
        self.check()
        u = torch.rand(self.flat.shape, generator=generator, device=generator.device)
        noise = torch.logit(u, eps=EPS).to(self.flat.device)
        soft = ((self.flat + noise) / self.temperature).sigmoid()
        return Draw(self._rescaled(soft), soft)

    def expected(self) -> dict[str, Tensor]:
        """Return the masks that draw nothing: sigmoid(logits), rescaled. Raises NonFiniteError."""
        self.check()
        return self._rescaled(self.flat.detach().sigmoid())

    def discrete(self, generator: Generator) -> dict[str, Tensor]:
        """Draw hard masks, Bernoulli(sigmoid(logits)), rescaled; one of zeros alone stays so.

        Raises NonFiniteError.
        """
        self.check()
        u = torch.rand(self.flat.shape, generator=generator, device=generator.device)
        return self._rescaled((u.to(self.flat.device) < self.flat.detach().sigmoid()).float())

    def final(self, kind: "Final", seed: int = 0) -> dict[str, Tensor]:
        """Return the masks to merge with: the expected ones, or a draw that `seed` decides."""
        if kind == "expected":
            return self.expected()
        generator = Generator(self.flat.device).manual_seed(key(seed, kind, "concrete"))
        if kind == "discrete":
            return self.discrete(generator)
        with torch.no_grad():
            return self.draw(generator).masks

    def _rescaled(self, flat: Tensor) -> dict[str, Tensor]:
        out = {}
        for name, span in self._spans.items():
            out[name] = (flat[span] / _divisor(flat[span])).view(self.shapes[name])
        return out

    def pull(self, draw: Draw, slopes: Mapping[str, Tensor]) -> None:
        """Turn the gradient with respect to a draw's masks into the logits' (`flat.grad`).

        A tensor without a slope counts as one of zeros.
        """
        with torch.no_grad():
            total = torch.zeros_like(self.flat)
            for name, span in self._spans.items():
                if name in slopes:
                    slope, soft = slopes[name].reshape(-1), draw.soft[span]
                    mean = _divisor(soft)
                    shift = torch.dot(slope, soft) / (soft.numel() * mean)
                    torch.sub(slope, shift, out=total[span]).div_(mean)
            total.mul_(draw.soft).mul_(1 - draw.soft).div_(self.temperature)
        self.flat.grad = total

    def sparsity(self, name: str | None = None) -> float:
        """Return the share of weights a hard mask drops on average, of one tensor or of all."""
        flat = self.flat.detach() if name is None else self.logits[name]
        return float((-flat).sigmoid().double().mean())

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the logits as safetensors, `logits/NAME`, under a temporary name first."""
        table = {
            "version": 1,
            "temperature": self.temperature,
            "min_numel": self.min_numel,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }
        tensors = {f"logits/{name}": logits for name, logits in self.logits.items()}
        Weights.of(tensors).save(Path(path), {KEY: json.dumps(table)})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu"
    ) -> "ConcreteMask":
        """Read a file of logits. Raises MissingError, FormatError, or as the constructor does."""
        weights = Weights.open(os.fspath(path))
        try:
            table = json.loads(weights.metadata.get(KEY, ""))
            version, temperature = int(table["version"]), float(table["temperature"])
            min_numel = int(table["min_numel"])
            shapes = {name: tuple(map(int, shape)) for name, shape in table["shapes"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FormatError(
                f"{path}: holds no logits of a mask; give a file that ConcreteMask.save wrote"
            ) from None
        if version != 1:
            raise FormatError(f"{path}: written by a newer pluribus (version {version})")
        logits = {name.removeprefix("logits/"): weights[name] for name in weights}
        return cls(shapes, temperature, logits, min_numel, device=device)


def _divisor(part: Tensor) -> Tensor:
    """Return the mean, or 1 where it is 0: what is divided by it is then all zeros."""
    mean = part.mean()
    return torch.where(mean > 0, mean, torch.ones_like(mean))
