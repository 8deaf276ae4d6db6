"""A network of all points of a space, from the program that builds one of them.

Peng et al., "PyGlove", NeurIPS 2020, https://arxiv.org/abs/2101.08809, section 4: a transform of
the space turns each placeholder into a part that the algorithm sets, so the program is unchanged.

    oneof(module factories)    Switch of all candidates
    oneof(whole numbers)       the widest layer, or the largest kernel, of which a part is used;
                               what a number sets is found by building the program with each
    manyof(k, ...)             k of either

Factories are classes or functions that make a module, so that trials share no weights by accident.
A network is checked on an example before it is returned: candidates agree in their shapes, and for
choices that together use every candidate its output is that of the module that the program builds
for this point, given the same weights.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pluribus.core.errors import InputError, MismatchError, listing
from pluribus.core.random import key
from pluribus.search import torch_glue as glue
from pluribus.search._pyglove import pg
from pluribus.search.decisions import Choice, Decision, choice_of, decisions, dna_of, walk
from pluribus.search.sized import Sized, Sizes
from pluribus.search.space import Space
from pluribus.search.space import space as space_of
from pluribus.search.switch import Setting, Switch, SwitchFactory
from pluribus.search.training import seeded

ROUNDS = 24  # most choices that are compared with the program's own modules


class SuperNet(nn.Module):
    """Holds the weights of all points; called with an input and a choice."""

    def __init__(
        self, space: Space, build: Callable[[Any], nn.Module], net: nn.Module, setting: Setting
    ) -> None:
        super().__init__()
        self.space, self.build, self.setting = space, build, setting
        self.decisions: dict[str, Decision] = decisions(space)
        self.net = net

    def forward(self, x: Tensor, choice: Mapping[str, int | Tensor]) -> Tensor:
        """Return the output for a choice (path -> index), or a mixture (path -> weights (c,)).

        A mixture needs every decision; a choice may leave out those that don't exist in it.
        """
        self.setting.choice = choice
        try:
            return self.net(x)
        finally:
            self.setting.choice = {}

    def dna(self, choice: Choice) -> Any:
        """Return the point of a choice."""
        return dna_of(self.space, choice)

    def choice(self, dna: Any) -> dict[str, int]:
        """Return the choice of a point."""
        return choice_of(self.space, dna)

    def child(self, choice: Choice) -> nn.Module:
        """Return the module that the program builds for a choice, with a copy of its weights here.

        Raises MismatchError if the module has other weights than the network holds for it.
        """
        module = self.build(self.space.decode(self.dna(choice)))
        weights = {name: tensor.detach() for name, tensor in _state(self.net, "", choice)}
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            raise MismatchError(
                f"the program's module for {dict(choice)} is not the part of the shared network "
                f"that stands for it: {error}"
            ) from None
        return module.to(next(iter(weights.values())).device if weights else "cpu")


def supernet(
    space: Any, build: Callable[[Any], nn.Module], example: Tensor, *, seed: int = 0
) -> SuperNet:
    """Make the network of all points of `space`; `build(point)` makes the module of one.

    `example` is an input batch; it isn't trained on. Raises InputError, naming the path, for a
    placeholder that can't share weights (a float, a text, a module instead of a factory, a number
    that sets no layer's size); MismatchError for candidates whose outputs differ in shape, and for
    a program whose modules the network can't stand for.
    """
    space = space_of(space)
    setting = Setting()
    program = _Program(space, setting)

    def built(sizes: Sizes) -> nn.Module:
        module = seeded(build, program.at(sizes), seed=key(seed, "supernet", "weights"))
        if not isinstance(module, nn.Module):
            raise InputError(f"build returned a {type(module).__name__}, expected a torch module")
        return module

    whole = built(program.largest)
    net = _sized(whole, built, program, setting)
    made = SuperNet(space, build, net, setting)
    _check(made, example, seed)
    return made


class _Program:
    """The space's value with switches and numbers in place of its placeholders."""

    def __init__(self, space: Space, setting: Setting) -> None:
        if space.function is not None or space.value is space.spec:
            raise InputError(
                "weights are shared among the points of an object with placeholders; a traced "
                "function or a DNASpec shows no placeholders to put switches in place of"
            )
        self.value, self.setting = space.value, setting
        self.known = decisions(space)
        self.sizes: dict[str, tuple[int, ...]] = {}  # path -> numbers to choose from
        self.at({})

    @cached_property
    def largest(self) -> dict[str, int]:
        """The index of the largest number at each size decision."""
        return {path: sizes.index(max(sizes)) for path, sizes in self.sizes.items()}

    def at(self, sizes: Sizes) -> Any:
        """Return what `build` is given: all candidates, and numbers of these sizes."""
        return glue.lower(self._set(self.value, "", sizes))

    def _set(self, value: Any, path: str, sizes: Sizes) -> Any:
        if isinstance(value, pg.hyper.ManyOf) and f"{path}[0]" in self.known:
            return pg.List(
                [self._chosen(value, f"{path}[{i}]", sizes) for i in range(value.num_choices)]
            )
        if isinstance(value, pg.hyper.Choices):
            return self._chosen(value, path, sizes)
        if isinstance(value, pg.Dict | pg.List | pg.Object) and not pg.is_deterministic(value):
            inner = {
                key: self._set(each, _joined(path, key), sizes) for key, each in value.sym_items()
            }
            if isinstance(value, pg.List):
                return pg.List(list(inner.values()))
            return pg.Dict(inner) if isinstance(value, pg.Dict) else type(value)(**inner)
        return value

    def _chosen(self, value: Any, path: str, sizes: Sizes) -> Any:
        count = len(value.candidates)
        candidates = [
            glue.lower(self._set(candidate, f"{path}[={i}/{count}]", sizes))
            for i, candidate in enumerate(value.candidates)
        ]
        if all(isinstance(each, int) and not isinstance(each, bool) for each in candidates):
            self.sizes[path] = tuple(candidates)
            return candidates[sizes.get(path, 0)]
        for number, each in enumerate(candidates):
            if isinstance(each, nn.Module):
                raise InputError(
                    f"{path}: candidate {number} is a {type(each).__name__}, whose weights all "
                    "trials would share; give a class or function that makes one"
                )
            if not callable(each):
                raise InputError(
                    f"{path}: candidate {number} is {each!r}; weights can be shared among factories"
                    " of modules or among whole numbers. Use factories, or an algorithm that trains"
                    " each point alone"
                )
        return SwitchFactory(path, tuple(candidates), self.setting)


def _joined(path: str, key: str | int) -> str:
    inner = str(pg.KeyPath([key]))
    return inner if not path else f"{path}{inner}" if inner.startswith("[") else f"{path}.{inner}"


def _sized(
    whole: nn.Module, built: Callable[[Sizes], nn.Module], program: _Program, setting: Setting
) -> nn.Module:
    """Put a `Sized` in place of each layer that a number sets."""
    if not program.sizes:
        return whole

    @lru_cache(maxsize=8)
    def other(changed: tuple[tuple[str, int], ...]) -> nn.Module:
        return built({**program.largest, **dict(changed)})

    touched: dict[str, set[str]] = {}  # layer -> the decisions that set its size
    for path, sizes in program.sizes.items():
        found: set[str] = set()
        for index in range(len(sizes)):
            if sizes[index] != max(sizes):
                found |= _differing(whole, other(((path, index),)), path)
        if not found and len(set(sizes)) > 1:
            raise InputError(
                f"{path}: no layer differs between {', '.join(map(str, sizes))}; weights can be "
                "shared among numbers that set a width or a kernel size"
            )
        for name in found:
            touched.setdefault(name, set()).add(path)

    replaced: dict[int, Sized] = {}
    for name, layer in whole.named_modules():
        if name in touched:
            paths = [path for path in program.sizes if path in touched[name]]

            def smaller(sizes: Sizes, name: str = name) -> nn.Module:
                return other(tuple(sizes.items())).get_submodule(name)

            replaced[id(layer)] = Sized(
                name or "the module",
                layer,
                {path: len(program.sizes[path]) for path in paths},
                {path: program.largest[path] for path in paths},
                smaller,
                setting,
            )
    for parent in list(whole.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in replaced:
                parent._modules[name] = replaced[id(child)]
    return replaced.get(id(whole), whole)


def _differing(whole: nn.Module, child: nn.Module, path: str) -> set[str]:
    """Return the names of the layers that differ between two builds of one program."""
    ours, theirs = dict(whole.named_modules()), dict(child.named_modules())
    if extra := sorted(ours.keys() ^ theirs.keys()):
        raise InputError(
            f"{path} decides which modules there are ({listing(extra)}), not only their sizes; "
            "give the modules as candidates of a oneof"
        )
    found = set()
    for name, one in ours.items():
        two = theirs[name]
        leaf = not any(True for _ in one.children())
        if _shapes(one) == _shapes(two) and (not leaf or one.extra_repr() == two.extra_repr()):
            continue
        if not leaf:
            raise InputError(
                f"{path}: the module {name or 'at the top'} ({type(one).__name__}) has parameters "
                "of its own beside other modules, and their shapes depend on it; put them in a "
                "module of their own"
            )
        found.add(name)
    return found


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tensor.shape for name, tensor in own}


def _state(module: nn.Module, prefix: str, choice: Choice) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a choice under the names that the program's own module gives them."""
    if isinstance(module, Switch):
        yield from _state(module.candidates[choice[module.path]], prefix, choice)
        return
    if isinstance(module, Sized):
        sizes = {path: choice[path] for path in module.counts}
        tensors, source = module.weights(sizes).items(), module.whole
    else:
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        tensors, source = own, module
        for name, child in module._modules.items():
            if child is not None:
                yield from _state(child, f"{prefix}{name}.", choice)
    for name, tensor in tensors:
        if name not in source._non_persistent_buffers_set:
            yield f"{prefix}{name}", tensor


def _check(net: SuperNet, example: Tensor, seed: int) -> None:
    """Run all candidates on an example, then compare choices with the program's own modules."""
    net.eval()
    with torch.no_grad():
        net.setting.checking = True
        try:
            net.net(example)
        finally:
            net.setting.checking = False
        for choice in _covering(net, Generator().manual_seed(seed)):
            ours = net(example, choice)
            theirs = net.child(choice).eval()(example)
            if ours.shape != theirs.shape or not torch.allclose(ours, theirs, 1e-4, 1e-5):
                raise MismatchError(
                    f"for {choice} the shared network returns {list(ours.shape)}, other numbers "
                    f"than the program's own module ({list(theirs.shape)}) with the same weights: "
                    "a chosen width must reach each layer as its first channels (not inside a "
                    "torch.cat or a mean over channels)"
                )
    net.train()


def _covering(net: SuperNet, rng: Generator) -> Iterator[dict[str, int]]:
    """Yield random choices until each candidate was used, `ROUNDS` at most."""
    left = {path: set(range(decision.count)) for path, decision in net.decisions.items()}

    def choose(decision: Decision, allowed: Tensor) -> int:
        options = allowed.nonzero()[:, 0].tolist()
        new = [index for index in options if index in left[decision.path]] or options
        index = new[int(torch.randint(len(new), (1,), generator=rng))]
        left[decision.path].discard(index)
        return index

    for _ in range(ROUNDS):
        yield walk(net.decisions, choose)
        if not any(left.values()):
            return


@contextmanager
def batch_statistics(net: nn.Module) -> Iterator[None]:
    """Evaluate with the statistics of each batch: those stored are a blend of many points'."""
    mode = net.training
    net.eval()
    for module in net.modules():
        if isinstance(module, _NormBase):
            module.train()
    try:
        yield
    finally:
        net.train(mode)
