"""A small network over fixed features as a function of its named weights, and the data it takes.

One output a row is a logit with a Bernoulli likelihood and labels 0 and 1; C >= 2 outputs are the
logits of a softmax over labels 0 .. C-1.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from pluribus.core.errors import InputError, MismatchError, NonFiniteError, listing
from pluribus.core.random import key
from pluribus.core.shapes import Float, Int

State = dict[str, Tensor]


class Labelled(NamedTuple):
    """Features, one row an example, and their labels."""

    x: Float[Tensor, "b ..."]
    y: Int[Tensor, " b"]


class Network:
    """A module without weights of its own: they are an argument of every call.

    Raises InputError if the module has no parameters, or buffers (a batch norm's running averages
    would change with the data and have no posterior).
    """

    def __init__(self, factory: Callable[[], nn.Module], device: str = "cpu") -> None:
        with torch.random.fork_rng(devices=[]):
            self._module = factory().eval().to(device)
        self.device = torch.device(device)
        self.shapes = {name: tensor.shape for name, tensor in self._module.named_parameters()}
        buffers = [name for name, _ in self._module.named_buffers()]
        if not self.shapes:
            raise InputError("the network has no parameters; give one with at least one layer")
        if buffers:
            raise InputError(
                f"the network has buffers ({listing(buffers)}), which have no posterior; use "
                "layers without any, such as LayerNorm or GroupNorm in place of BatchNorm"
            )
        self.size = sum(prod(shape) for shape in self.shapes.values())
        self.features: tuple[int, ...] | None = None  # shape of one example, set by the first task
        self.outputs: int | None = None

    def initial(self, factory: Callable[[], nn.Module], seed: int, purpose: str) -> State:
        """Return weights as the factory draws them, the same for the same seed and purpose."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, purpose, "init") >> 1)
            return {name: p.detach().clone() for name, p in factory().named_parameters()}

    def flat(self, state: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
        """Return the weights as one vector on the network's device, in float32."""
        return torch.cat([state[name].reshape(-1) for name in self.shapes]).to(
            self.device, torch.float32
        )

    def named(self, flat: Float[Tensor, " n"]) -> State:
        """Return views of a vector as named weights."""
        parts = flat.split([prod(shape) for shape in self.shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def kept(self, flat: Float[Tensor, " n"]) -> State:
        """Return named weights on the CPU that share no memory."""
        return {name: part.detach().cpu().clone() for name, part in self.named(flat).items()}

    def logits(self, state: Mapping[str, Tensor], x: Float[Tensor, "b ..."]) -> Tensor:
        """Return (b,) logits of label 1, or (b, C) of a softmax."""
        out = functional_call(self._module, dict(state), (x,))
        return out[:, 0] if out.ndim == 2 and out.shape[1] == 1 else out

    def losses(
        self, state: Mapping[str, Tensor], x: Float[Tensor, "b ..."], y: Int[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """Return the negative log likelihood of each example, in nats."""
        logits = self.logits(state, x)
        if logits.ndim == 1:
            return binary_cross_entropy_with_logits(logits, y.to(logits.dtype), reduction="none")
        return cross_entropy(logits, y, reduction="none")

    @torch.no_grad()
    def accuracy(self, state: Mapping[str, Tensor], data: Labelled) -> float:
        """Return the share of examples whose likeliest label is theirs, from 0 to 1."""
        state = {name: tensor.to(self.device) for name, tensor in state.items()}
        right = 0
        for x, y in zip(data.x.split(8192), data.y.split(8192), strict=True):
            logits = self.logits(state, x.to(self.device))
            guess = (logits > 0).long() if logits.ndim == 1 else logits.argmax(1)
            right += int((guess == y.to(self.device)).sum())
        return right / len(data.y)

    def checked(self, data: Any, task: str) -> Labelled:
        """Read a task's data: a pair of tensors, or batches of pairs such as a DataLoader gives.

        Raises InputError for no data, labels that are no classes of the network, and a network
        whose output is neither (b,), (b, 1) nor (b, C); MismatchError for features of another shape
        than the first task's; NonFiniteError for NaN features.
        """
        found = _pair(data, task)
        x, y = found
        shape = tuple(x.shape[1:])
        if self.features is not None and shape != self.features:
            raise MismatchError(
                f"{task}: an example's features are {list(shape)}, but those of the first task "
                f"are {list(self.features)}; all tasks share one network"
            )
        if not torch.isfinite(x).all():
            raise NonFiniteError(f"{task}: the features hold NaN or infinity; clean them first")
        outputs = self._probed(x, task) if self.outputs is None else self.outputs
        most = max(outputs, 2)
        if int(y.min()) < 0 or int(y.max()) >= most:
            kinds = "0 and 1" if outputs == 1 else f"0 .. {outputs - 1}"
            raise InputError(
                f"{task}: labels span {int(y.min())} .. {int(y.max())}, but the network's "
                f"{outputs} output(s) stand for the labels {kinds}"
            )
        return found

    def settle(self, data: Labelled, task: str) -> None:
        """Take the shape of an example and the number of outputs from the first task learned."""
        if self.features is None:
            self.features, self.outputs = tuple(data.x.shape[1:]), self._probed(data.x, task)

    @torch.no_grad()
    def _probed(self, x: Tensor, task: str) -> int:
        state = {name: torch.zeros(shape) for name, shape in self.shapes.items()}
        state = {name: tensor.to(self.device) for name, tensor in state.items()}
        try:
            out = functional_call(self._module, state, (x[:2].to(self.device),))
        except RuntimeError as error:
            raise MismatchError(
                f"{task}: the network does not take examples of shape {list(x.shape[1:])} "
                f"({str(error).splitlines()[0]})"
            ) from None
        if out.ndim not in (1, 2) or len(out) != len(x[:2]) or (out.ndim == 2 and not out.shape[1]):
            raise InputError(
                f"the network gives {list(out.shape)} for {len(x[:2])} example(s); it must give "
                "one logit a row, or a row of C logits"
            )
        return 1 if out.ndim == 1 else out.shape[1]


def _pair(data: Any, task: str) -> Labelled:
    is_pair = isinstance(data, tuple | list) and len(data) == 2
    if is_pair and all(isinstance(part, Tensor) for part in data):
        batches: Sequence[Any] = [data]
    elif isinstance(data, Iterable):
        batches = list(data)
    else:
        raise InputError(
            f"{task}: data is {type(data).__name__}; give (features, labels) or batches of them"
        )
    if not all(
        isinstance(batch, tuple | list)
        and len(batch) == 2
        and all(isinstance(part, Tensor) for part in batch)
        for batch in batches
    ):
        raise InputError(f"{task}: every batch must be a pair of tensors (features, labels)")
    if not sum(len(batch[1]) for batch in batches):
        raise InputError(f"{task}: there are no examples; a loader can be read once only")
    x = torch.cat([batch[0] for batch in batches])
    y = torch.cat([batch[1] for batch in batches])
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or len(x) != len(y) or not x.is_floating_point():
        raise InputError(
            f"{task}: features are {x.dtype}{list(x.shape)} and labels {list(y.shape)}; expected "
            "floating-point rows and one label for each"
        )
    whole = y.long()
    if not torch.equal(whole.to(y.dtype), y):
        raise InputError(f"{task}: labels must be whole numbers, not such as {float(y[0]):g}")
    return Labelled(x, whole)


def stream(seed: int, name: str, purpose: str) -> Generator:
    """Return a fresh generator whose numbers depend on its three arguments alone."""
    return Generator().manual_seed(key(seed, name, purpose))


def batches(count: int, size: int, steps: int, rng: Generator) -> Iterator[Int[Tensor, " b"]]:
    """Give the rows of `steps` mini-batches, shuffled anew whenever all have been seen."""
    done = 0
    while done < steps:
        for rows in torch.randperm(count, generator=rng).split(size):
            yield rows
            done += 1
            if done == steps:
                return
