"""Measure what data-driven merges need of each expert: diagonal Fishers and input Gram matrices.

    F = mean over examples of sum_j (d loss_j / d theta)^2    the shape of theta    for `fisher`
    G = mean over inputs x of a layer of x x^T                (c, c)                for `regmean`

F with loss_j = sqrt(p_j) log p_j over classes j, p held fixed (`expected`), is the Fisher
information of a classifier; with the loss on the true label it is the empirical Fisher. Gradients
are squared one example at a time: squaring a batch's summed gradient, as FusionBench does, adds the
products of different examples' gradients.

Both are folds over batches: `init`, `update`, `join`, `finish`. Workers may each take a part of the
data and join; sums are float64, so the order changes nothing that float32 shows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.core.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor, nn

# (model, batch) -> the loss of one example, (), or several terms whose squared gradients add up
Loss = Callable[["nn.Module", Any], "Tensor"]


@dataclass
class Sums:
    """A fold's state: float64 sums by tensor name, and how many examples or inputs went in."""

    totals: "dict[str, Tensor]" = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: "Tensor", count: int) -> None:
        """Add `count` observations that sum to `value`."""
        known = self.totals.get(name)
        if known is None:
            self.totals[name] = value.double()
        elif known.shape != value.shape:
            raise MismatchError(
                f"{name}: sums of shapes {list(known.shape)} and {list(value.shape)} don't add up; "
                "the workers measured different models"
            )
        else:
            known += value
        self.counts[name] = self.counts.get(name, 0) + count


class _Means:
    """What both folds share: joining sums, and dividing them."""

    kind = ""

    def init(self) -> Sums:
        """Return the empty state."""
        return Sums()

    def join(self, one: Sums, other: Sums) -> Sums:
        """Return the state of both sets of batches; changes `one`."""
        for name, total in other.totals.items():
            one.add(name, total, other.counts[name])
        return one

    def finish(self, state: Sums) -> Weights:
        """Return the means as float32 weights. Raises InputError if there was no data."""
        if not state.totals:
            raise InputError(f"{self.kind}: no batches were given")
        means = {name: (t / state.counts[name]).float() for name, t in state.totals.items()}
        broken = [name for name, mean in means.items() if not bool(mean.isfinite().all())]
        if broken:
            raise NonFiniteError(f"{self.kind} of {broken[0]!r} is not finite; check the loss")
        weights = Weights.of(means, label=self.kind)
        count = max(state.counts.values())
        weights.metadata = {"pluribus.calibration": self.kind, "pluribus.count": str(count)}
        return weights


class FisherFold(_Means):
    """Diagonal Fisher of a model's parameters, a fold over batches.

    `split=False` takes each batch as one example.
    """

    kind = "fisher"

    def __init__(self, model: "nn.Module", loss: Loss, *, split: bool = True) -> None:
        self.model, self.loss, self.split = model, loss, split

    def update(self, state: Sums, batch: Any) -> Sums:
        """Take in one batch. Raises InputError if the loss does not depend on the parameters."""
        import torch

        # A shared parameter appears once, under its first name, as in a checkpoint.
        named = {name: p for name, p in self.model.named_parameters() if p.is_floating_point()}
        flags = [p.requires_grad for p in named.values()]
        with _evaluating(self.model), torch.enable_grad():
            try:
                for parameter in named.values():
                    parameter.requires_grad_(True)
                for example in examples(batch) if self.split else [batch]:
                    for name, square in self._squares(named, example).items():
                        state.add(name, square, 1)
            finally:
                for parameter, flag in zip(named.values(), flags, strict=True):
                    parameter.requires_grad_(flag)
        return state

    def _squares(self, named: "Mapping[str, nn.Parameter]", example: Any) -> "dict[str, Tensor]":
        import torch

        terms = self.loss(self.model, example).reshape(-1)
        if not terms.requires_grad:
            raise InputError("fisher: the loss does not depend on the model's parameters")
        squares = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
        for place, term in enumerate(terms):
            slopes = torch.autograd.grad(
                term,
                list(named.values()),
                retain_graph=place + 1 < len(terms),
                allow_unused=True,
            )
            for name, slope in zip(named, slopes, strict=True):
                if slope is not None:
                    squares[name] += slope.double().square()
        return squares


class GramFold(_Means):
    """Mean input Gram matrix of every linear layer and convolution, a fold over batches.

    `names` limits it to some weights. A convolution's inputs are the patches its kernel sees. A
    layer called several times counts all its calls.
    """

    kind = "gram"

    def __init__(
        self,
        model: "nn.Module",
        *,
        names: Sequence[str] | None = None,
        forward: Callable[["nn.Module", Any], Any] | None = None,
    ) -> None:
        self.model, self.forward = model, forward or call
        self.layers = _layers(model)
        if names is not None:
            absent = [name for name in names if name not in self.layers]
            if absent:
                raise InputError(
                    f"gram: {absent[0]!r} is not the weight of a linear layer or convolution"
                )
            self.layers = {name: self.layers[name] for name in names}
        if not self.layers:
            raise InputError(f"gram: {type(model).__name__} has no linear layer or convolution")

    def update(self, state: Sums, batch: Any) -> Sums:
        """Take in one batch."""
        import torch

        def watching(name: str) -> Callable[..., None]:
            def watch(module: "nn.Module", inputs: tuple, keywords: dict) -> None:
                x = inputs[0] if inputs else keywords["input"]
                rows = _rows(module, x.detach())
                state.add(name, rows.mT @ rows, rows.shape[0])

            return watch

        hooks = [
            layer.register_forward_pre_hook(watching(name), with_kwargs=True)
            for name, layer in self.layers.items()
        ]
        try:
            with _evaluating(self.model), torch.no_grad():
                self.forward(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return state


def fisher(
    model: "nn.Module", batches: Iterable[Any], loss: Loss, *, split: bool = True
) -> Weights:
    """Return the diagonal Fisher of every parameter, by its name: for the merge method `fisher`.

    `loss(model, batch)` gets batches of one example, cut from yours along the first axis of every
    tensor in them (`split=False`: a batch as it is), and returns a scalar, or several terms whose
    squared gradients are added, such as `expected` does. The model is in evaluation mode meanwhile
    and is left as it was.
    """
    return folded(FisherFold(model, loss, split=split), batches)


def gram(
    model: "nn.Module",
    batches: Iterable[Any],
    *,
    names: Sequence[str] | None = None,
    forward: Callable[["nn.Module", Any], Any] | None = None,
) -> Weights:
    """Return the mean input Gram matrix of linear layers, by their weights' names: for `regmean`.

    `forward(model, batch)` runs the model (default: a tensor or tuple goes in as arguments, a
    mapping as keywords). GPT-2's Conv1D counts as a linear layer.
    """
    return folded(GramFold(model, names=names, forward=forward), batches)


def folded(fold: Any, batches: Iterable[Any]) -> Weights:
    """Run a fold over batches, one after the other."""
    state = fold.init()
    for batch in batches:
        state = fold.update(state, batch)
    return fold.finish(state)


def expected(model: "nn.Module", batch: Any) -> "Tensor":
    """Return the terms sqrt(p) log p of a classifier: their squared gradients sum to its Fisher.

    The batch is the model's input; a pair's second part (the label) is left out. Costs one backward
    pass for each class.
    """
    import torch

    if isinstance(batch, tuple | list) and len(batch) == 2:
        batch = batch[0]
    if isinstance(batch, Mapping):
        batch = {key: value for key, value in batch.items() if key != "labels"}
    out = call(model, batch)
    logs = torch.log_softmax(getattr(out, "logits", out).double(), -1)
    return logs.detach().div(2).exp() * logs


def call(model: "nn.Module", batch: Any) -> Any:
    """Run a model on a batch: a mapping as keywords, a tuple or list as arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def examples(batch: Any) -> list[Any]:
    """Cut a batch into batches of one, along the first axis of every tensor in it.

    Raises InputError if the tensors' first axes differ, or there is none.
    """
    lengths: set[int] = set()
    _walk(batch, lambda tensor: lengths.add(len(tensor) if tensor.ndim else -1))
    if len(lengths) != 1 or -1 in lengths:
        raise InputError(
            f"fisher: the batch's tensors have first axes {sorted(lengths)}; give batches whose "
            "tensors all have one row an example, or split=False"
        )
    return [_walk(batch, lambda tensor, i=i: tensor[i : i + 1]) for i in range(lengths.pop())]


def _walk(batch: Any, change: Callable[["Tensor"], Any]) -> Any:
    """Apply a function to every tensor of a batch; other things stay."""
    if hasattr(batch, "detach"):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _walk(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_walk(value, change) for value in batch)
    return batch


@contextmanager
def _evaluating(model: "nn.Module"):
    """Put every module into evaluation mode, and back into its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _layers(model: "nn.Module") -> "dict[str, nn.Module]":
    """Return the layers that multiply their input by a weight, by that weight's name."""
    from torch import nn

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found, seen = {}, set()
    for name, module in model.named_modules():
        conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # transformers'
        grouped = getattr(module, "groups", 1) != 1
        if (isinstance(module, kinds) or conv1d) and not grouped and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[f"{name}.weight" if name else "weight"] = module
    return found


def _rows(module: "nn.Module", x: "Tensor") -> "Tensor":
    """Return what a layer's weight is multiplied with, one input a row, in float64: (b, c)."""
    import torch
    from torch import nn

    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return x.reshape(-1, x.shape[-1]).double()
    axes = len(module.kernel_size)
    x = x.double() if x.ndim == axes + 2 else x.double()[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = torch.nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, step, gap) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    # (b, c, places ..., kernel ...) -> (b places, c kernel), the order of a flattened weight
    order = [0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes)]
    return x.permute(order).reshape(-1, module.weight[0].numel())
