"""One layer of the largest size that runs as any of its smaller ones: the weights are shared.

    width n of N     the first n channels:    W[:n]          (Yu et al., slimmable networks, 2018)
    kernel k of K    the centre:              W[..., (K-k)/2 : (K+k)/2, ...]
    mixture          sum_i p_i mask_i * W     for what is linear in its weights (Conv, Linear)
                     sum_i p_i layer_i(x)     for the rest

A chosen size cuts the weights and runs the layer that the program would have built, so it equals
that layer with these weights bit for bit; its output is filled up with zeros to the largest width,
and the next layer cuts them off again. In a mixture the zeros stay, as a mask: channel masking
after Wan et al., "FBNetV2", CVPR 2020.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from pluribus.core.errors import InputError, MismatchError
from pluribus.search.switch import Setting

Sizes = Mapping[str, int]  # path of a decision -> index of the size


class Sized(nn.Module):
    """A layer whose shape some decisions set.

    `counts` says how many sizes each decision offers and `largest` which of them `whole` has;
    `smaller(sizes)` returns the layer that the program builds there, whose weights aren't used.
    """

    def __init__(
        self,
        name: str,
        whole: nn.Module,
        counts: Sizes,
        largest: Sizes,
        smaller: Callable[[Sizes], nn.Module],
        setting: Setting,
    ) -> None:
        super().__init__()
        self.name, self.counts, self.largest = name, dict(counts), dict(largest)
        self.whole = whole
        self.setting = setting
        self._smaller = smaller
        self._cache: dict[tuple[int, ...], list[nn.Module]] = {}  # lists hide them from torch
        _takes(whole, name)
        linear = isinstance(whole, _ConvNd | nn.Linear)
        self._masked = linear and all(map(self._maskable, self._each({})))

    def layer(self, sizes: Sizes) -> nn.Module:
        """Return the layer of some sizes, without memory. Raises MismatchError for another type."""
        at = tuple(sizes[path] for path in self.counts)
        if at not in self._cache:
            made = self._smaller(sizes)
            if type(made) is not type(self.whole):
                raise MismatchError(
                    f"{self.name} is a {type(self.whole).__name__}, but a {type(made).__name__} "
                    f"for other values of {', '.join(self.counts)}; make the modules candidates"
                )
            self._cache[at] = [made.to("meta")]
        return self._cache[at][0].train(self.whole.training)

    def weights(self, sizes: Sizes) -> dict[str, Tensor]:
        """Return the part of each parameter and buffer that the layer of some sizes has.

        Parts are views. Raises MismatchError if a smaller layer's tensor is no part of the whole's.
        """
        shapes = {name: tensor.shape for name, tensor in _tensors(self.layer(sizes))}
        return {
            name: tensor[self._cut(name, shapes[name], tensor.shape)]
            for name, tensor in _tensors(self.whole)
        }

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer at the chosen sizes, or a mixture of them; the output is the widest."""
        if self.setting.checking:
            return self._compared(x)
        chosen = {path: self.setting.of(path) for path in self.counts}
        fixed = {path: index for path, index in chosen.items() if isinstance(index, int)}
        mixed = {path: p for path, p in chosen.items() if isinstance(p, Tensor)}
        if not mixed:
            return self._at(fixed, x)
        weighted = [
            (sizes, torch.stack([p[sizes[path]] for path, p in mixed.items()]).prod())
            for sizes in self._each(fixed)
        ]
        if self._masked:
            return self._mixture(weighted, x)
        return torch.stack([p * self._at(sizes, x) for sizes, p in weighted]).sum(0)

    def _at(self, sizes: Sizes, x: Tensor) -> Tensor:
        layer = self.layer(sizes)
        for dim, count in _takes(layer, self.name):
            if x.shape[dim] < count:
                raise MismatchError(
                    f"{self.name} takes {count} features on axis {dim}, but got {list(x.shape)}"
                )
            x = x.narrow(dim, 0, count)
        learned = dict(self.whole.named_parameters())
        # Buffers stay views, so that what batch norm writes into them arrives in the whole.
        parts = {
            name: part.contiguous() if name in learned else part
            for name, part in self.weights(sizes).items()
        }
        out = functional_call(layer, parts, (x.contiguous(),))
        for dim, count in _gives(self.whole, self.name):
            room = [0, 0] * (-dim - 1 if dim < 0 else out.ndim - 1 - dim)
            out = pad(out, [*room, 0, count - out.shape[dim]])
        return out

    def _compared(self, x: Tensor) -> Tensor:
        whole = self._at(self.largest, x)
        for path, count in self.counts.items():
            for index in range(count):
                shape = self._at({**self.largest, path: index}, x).shape
                if shape != whole.shape:
                    raise MismatchError(
                        f"{path}: {self.name} returns {list(shape)} for its candidate {index} and "
                        f"{list(whole.shape)} for {self.largest[path]}; give padding (kernel "
                        "size // 2) that keeps the shape"
                    )
        return whole

    def _cut(self, name: str, small: Sequence[int], large: Sequence[int]) -> tuple[slice, ...]:
        if len(small) != len(large) or any(n > m for n, m in zip(small, large, strict=True)):
            raise MismatchError(
                f"{self.name}.{name} has shape {list(small)} for some values of "
                f"{', '.join(self.counts)}, which is no part of {list(large)} at the largest"
            )
        places = range(2, len(large)) if isinstance(self.whole, _ConvNd) else range(0)
        cuts = []
        for dim, (n, m) in enumerate(zip(small, large, strict=True)):
            if dim in places and (m - n) % 2:
                raise InputError(
                    f"{', '.join(self.counts)}: {self.name} has kernels of {n} and {m}, and the "
                    "smaller has no place in the centre of the larger; give all odd or all even"
                )
            start = (m - n) // 2 if dim in places else 0
            cuts.append(slice(start, start + n))
        return tuple(cuts)

    # -- mixtures ----------------------------------------------------------------------------------

    def _each(self, fixed: Sizes) -> Iterator[dict[str, int]]:
        """Yield all combinations of sizes that agree with those fixed."""
        ranges = [
            [fixed[path]] if path in fixed else range(count) for path, count in self.counts.items()
        ]
        for at in itertools.product(*ranges):
            yield dict(zip(self.counts, at, strict=True))

    def _maskable(self, sizes: Sizes) -> bool:
        """Whether the smaller layer is the whole with the weights outside of its part at zero."""
        small, whole = self.layer(sizes), self.whole
        if not isinstance(small, _ConvNd) or not isinstance(whole, _ConvNd):
            return True
        same = ("groups", "stride", "dilation", "transposed", "padding_mode")
        if any(getattr(small, name) != getattr(whole, name) for name in same):
            return False
        if whole.transposed or whole.padding_mode != "zeros" or isinstance(whole.padding, str):
            return small.kernel_size == whole.kernel_size and small.padding == whole.padding
        places = zip(
            small.padding, small.kernel_size, whole.padding, whole.kernel_size, strict=True
        )
        return all(
            2 * (int(more_pad) - int(less_pad)) == dilation * (more - less)
            for (less_pad, less, more_pad, more), dilation in zip(
                places, whole.dilation, strict=True
            )
        )

    def _mixture(self, weighted: list[tuple[dict[str, int], Tensor]], x: Tensor) -> Tensor:
        masks = {name: torch.zeros_like(tensor) for name, tensor in _tensors(self.whole)}
        for sizes, p in weighted:
            for name, tensor in _tensors(self.layer(sizes)):
                part = torch.zeros_like(masks[name])
                part[self._cut(name, tensor.shape, part.shape)] = 1
                masks[name] = masks[name] + p * part
        masked = {name: masks[name] * tensor for name, tensor in _tensors(self.whole)}
        return functional_call(self.whole, masked, (x,))


def _tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from layer.named_parameters()
    yield from layer.named_buffers()


def _takes(layer: nn.Module, name: str) -> list[tuple[int, int]]:
    """Return the axes of its input that a layer counts, and how many features it takes on each."""
    match layer:
        case _ConvNd():
            return [(-len(layer.kernel_size) - 1, layer.in_channels)]
        case nn.Linear():
            return [(-1, layer.in_features)]
        case nn.Embedding():
            return []
        case _:
            return _keeps(layer, name)


def _gives(layer: nn.Module, name: str) -> list[tuple[int, int]]:
    """Return the same of its output."""
    match layer:
        case _ConvNd():
            return [(-len(layer.kernel_size) - 1, layer.out_channels)]
        case nn.Linear():
            return [(-1, layer.out_features)]
        case nn.Embedding():
            return [(-1, layer.embedding_dim)]
        case _:
            return _keeps(layer, name)


def _keeps(layer: nn.Module, name: str) -> list[tuple[int, int]]:
    """Return the same of a layer with as many features going out as coming in.

    Raises InputError for a layer with weights that is none of those known.
    """
    match layer:
        case _NormBase():
            return [(1, layer.num_features)]
        case nn.GroupNorm():
            return [(1, layer.num_channels)]
        case nn.LayerNorm() | nn.RMSNorm():
            shape = layer.normalized_shape
            return [(axis - len(shape), count) for axis, count in enumerate(shape)]
        case nn.PReLU():
            return [(1, layer.num_parameters)] if layer.num_parameters > 1 else []
        case _ if not any(True for _ in _tensors(layer)):
            return []
        case _:
            raise InputError(
                f"{name}: can't share the weights of a {type(layer).__name__} among sizes; known "
                "are convolutions, Linear, Embedding, PReLU and the norms. Make modules the "
                "candidates instead of sizes"
            )
