"""Multi-Head Adapter Routing: tasks share an inventory of small adapters, and learn how to mix it.

Caccia et al., NeurIPS 2023, https://arxiv.org/abs/2211.03831 (MHR, MHR-z, MHR-mu); Ponti et al.,
EACL 2023, https://arxiv.org/abs/2202.13914 (Poly: heads = 1). Formulas are in `_inventory`.

    model = mhr.wrap(base, r".*(query|value)", rank=4, skills=8, heads=8, tasks=["nli", "qa"])
    optimiser = torch.optim.AdamW(model.trainable("all"))   # two learning rates
    with model.tasks(["qa", "nli"]):                        # the task of each row
        loss = cross_entropy(model(x), y)
    groups = model.new_task("tables", adapt="z")            # few-shot: routing alone
    model.collapse("tables").save("tables/")                # a LoRA adapter, as PEFT reads them

What a new task trains: `mhr` inventory and a fresh row of routing logits, `z` that row alone, `mu`
one adapter of its own that starts as the inventory's mean. The authors' code keeps S copies in the
last case; the collapsed form here follows their mean exactly under Adam without weight decay and
clipping, with S times fewer numbers.
"""

import os
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Generator, Tensor, nn

from pluribus.core.errors import (
    FormatError,
    InputError,
    MismatchError,
    listing,
    nearest,
)
from pluribus.core.shapes import Int
from pluribus.route._around import Around
from pluribus.route._inventory import (
    AdapterInventory,
    CurrentTasks,
    Mode,
    TaskBatch,
    TaskRouter,
    attach,
    checked_mode,
)
from pluribus.route._skills import (
    Collapsed,
    Granularity,
    Routing,
    read,
    routing,
    shared_by,
    targets,
    task_type,
    write,
)
from pluribus.route.store import digest

Adapt = Literal["mhr", "z", "mu"]
What = Literal["all", "z", "mu"]
Tasks = Sequence[str] | Sequence[int] | Int[Tensor, " b"] | str

FLAT = 0.05  # logits that all stay below this have not learned to route


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an inventory is like; two with other settings do not exchange tensors."""

    targets: str
    rank: int
    skills: int
    heads: int
    granularity: Granularity
    alpha: float
    mode: Mode


def wrap(
    model: nn.Module,
    targets: str,
    rank: int,
    skills: int,
    heads: int = 1,
    granularity: Granularity = "layer",
    tasks: Sequence[str] = (),
    *,
    alpha: float = 1.0,
    mode: Mode = "sigmoid",
    seed: int = 0,
) -> "Skilled":
    """Return the model with an inventory of adapters beside each layer that `targets` matches.

    `targets` is a regular expression for whole module names. `granularity` says which layers share
    routing logits: none (layer), those of one parent module, block or stack (encoder, decoder), or
    all (model). The model is frozen and otherwise stays as it is. Raises InputError for targets
    that match nothing or no linear layer, sizes that do not fit, repeated or no tasks.
    """
    settings = Settings(
        targets=targets,
        rank=rank,
        skills=skills,
        heads=heads,
        granularity=granularity,
        alpha=alpha,
        mode=mode,
    )
    return Skilled(model, settings, tasks, seed=seed)


def load(path: str | os.PathLike[str], model: nn.Module, *, seed: int = 0) -> "Skilled":
    """Return a model wrapped as the one whose inventory a file holds, with those tensors.

    Raises MissingError, FormatError, or MismatchError for another model.
    """
    table, _ = read(Path(path))
    _check_base(path, table, model)
    tasks = [*table["tasks"], *table["own"]]
    try:
        settings = Settings(**table["settings"])
    except TypeError as error:
        raise FormatError(f"{path}: its settings are not an inventory's ({error})") from None
    wrapped = Skilled(model, settings, tasks, seed=seed)
    wrapped.load(path)
    return wrapped


class Skilled(Around):
    """A frozen base whose layers mix adapters by the task of each row; made by `wrap`.

    Called as the base is, inside `with model.tasks(ids)` or with `task_ids=`; the base called by
    itself, outside such a block, is what it was. Starts in evaluation mode, in which the base's
    batch norms stay.
    """

    def __init__(
        self, base: nn.Module, settings: Settings, tasks: Sequence[str], *, seed: int = 0
    ) -> None:
        super().__init__()
        if settings.granularity not in get_args(Granularity):
            raise InputError(
                f"granularity {settings.granularity!r}; expected one of "
                f"{', '.join(get_args(Granularity))}"
            )
        checked_mode(settings.mode)
        if not tasks or isinstance(tasks, str):
            raise InputError("give the names of the tasks, at least one: tasks=['nli', 'qa']")
        if repeated := [task for i, task in enumerate(tasks) if task in tasks[:i]]:
            raise InputError(f"tasks are named twice: {listing(repeated)}")
        self.settings = settings
        self.generator = Generator().manual_seed(seed)
        layers = targets(base, settings.targets)
        self.paths = tuple(layers)
        inventories = []
        for path, layer in layers.items():
            try:
                made = AdapterInventory(
                    layer,
                    settings.rank,
                    settings.skills,
                    settings.heads,
                    settings.alpha,
                    generator=self.generator,
                )
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
            inventories.append(made)
        self.base = base.requires_grad_(False).eval()
        self.inventories = nn.ModuleList(inventories)
        self._keys = [shared_by(path, settings.granularity) for path in self.paths]
        self.router_keys = tuple(dict.fromkeys(self._keys))
        self.routers = nn.ModuleList(
            TaskRouter(
                len(tasks),
                settings.skills,
                settings.heads,
                settings.mode,
                generator=self.generator,
            ).to(next(base.parameters()).device)
            for _ in self.router_keys
        )
        self.routed_tasks: list[str] = list(tasks)
        self.own_tasks: list[str] = []
        self._current = CurrentTasks()
        handles = [
            attach(layers[path], inventory, self._router(key), self._current)
            for path, inventory, key in zip(self.paths, self._inventories, self._keys, strict=True)
        ]
        self._detached = weakref.finalize(self, _remove, handles)
        self.eval()

    @property
    def _inventories(self) -> list[AdapterInventory]:
        return list(self.inventories)  # type: ignore[arg-type]

    @property
    def _routers(self) -> list[TaskRouter]:
        return list(self.routers)  # type: ignore[arg-type]

    def _router(self, key: str) -> TaskRouter:
        return self._routers[self.router_keys.index(key)]

    # -- running ---------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """All tasks: those that mix the inventory, then those with adapters of their own."""
        return (*self.routed_tasks, *self.own_tasks)

    def number(self, task: str | int) -> int:
        """Return a task's number, negative if it has adapters of its own.

        An integer counts `names`. Raises InputError for an unknown task.
        """
        known = self.names
        if isinstance(task, str):
            if task not in known:
                raise InputError(
                    f"there is no task {task!r}; there are: {listing(known)}."
                    f"{nearest(task, known)} Or add it: model.new_task({task!r})"
                )
            place = known.index(task)
        else:
            if not isinstance(task, int):
                raise InputError(f"task id {task!r} is neither a name nor a whole number")
            place = task
            if not 0 <= place < len(known):
                raise InputError(
                    f"there is no task number {place}; there are {len(known)}, from 0: "
                    f"{listing(known)}. Add one with model.new_task(NAME)"
                )
        routed = len(self.routed_tasks)
        return place if place < routed else -1 - (place - routed)

    @contextmanager
    def tasks(self, ids: Tasks) -> Iterator["Skilled"]:
        """Set the task of each row of the batches that run inside the block; one name for all rows.

        Where rows are repeated, as beams are, so are their tasks. Run `backward` inside the block
        if the base checkpoints its activations. Raises InputError for an unknown task or no ids.
        """
        given: Any = [ids] if isinstance(ids, str) else ids
        given = given.tolist() if hasattr(given, "tolist") else list(given)
        if not isinstance(given, list) or not given:
            raise InputError("no task id is given; give one for each row of the batch")
        batch = TaskBatch(torch.tensor([self.number(task) for task in given]))
        before, self._current.batch = self._current.batch, batch
        try:
            yield self
        finally:
            self._current.batch = before

    def forward(self, *args: Any, task_ids: Tasks | None = None, **kwargs: Any) -> Any:
        """Return what the base returns, each row with its task's adapters.

        Raises InputError if no task ids are set, MismatchError if there are too few or too many.
        """
        return self._run(self.base, task_ids, args, kwargs)

    def generate(self, *args: Any, task_ids: Tasks | None = None, **kwargs: Any) -> Any:
        """Write with the base's own `generate`. Raises InputError if the base cannot."""
        run = getattr(self.base, "generate", None)
        if run is None:
            raise InputError(f"{type(self.base).__name__} cannot generate: it has no such method")
        return self._run(run, task_ids, args, kwargs)

    def _run(self, run: Any, task_ids: Tasks | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        if task_ids is not None:
            with self.tasks(task_ids):
                return run(*args, **kwargs)
        if self._current.batch is None:
            raise InputError(
                "the batch has no task ids: run it inside `with model.tasks(ids)`, or give "
                "task_ids=; the base alone is model.base"
            )
        return run(*args, **kwargs)

    def train(self, mode: bool = True) -> "Skilled":
        """Switch training (noise, dropout) on or off; the frozen base's batch norms stay as is."""
        super().train(mode)
        for module in self.base.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def anneal(self, fraction: float) -> None:
        """Move all weights towards 1 / S by cos(pi/2 fraction); for the last steps of training.

        Raises InputError outside [0, 1].
        """
        if not 0 <= fraction <= 1:
            raise InputError(f"fraction is {fraction}; it must be within [0, 1]")
        for router in self._routers:
            router.anneal = fraction

    # -- training --------------------------------------------------------------------------------

    def new_task(self, name: str, adapt: Adapt = "mhr") -> list[dict[str, Any]]:
        """Add a task, and return the parameter groups that learn it (see `trainable`).

        mhr: inventory and fresh logits (other tasks move too: adapt a `copy()`); z: the logits
        alone; mu: an adapter of its own, the inventory's mean. Raises InputError for a known name.
        """
        if adapt not in get_args(Adapt):
            raise InputError(f"adapt {adapt!r}; expected one of {', '.join(get_args(Adapt))}")
        if name in self.names:
            raise InputError(f"task {name!r} is there already; choose another name")
        if adapt == "mu":
            self.own_tasks.append(name)
            for inventory in self._inventories:
                inventory.add_own()
            return self.trainable("mu", task=name)
        self.routed_tasks.append(name)
        for router in self._routers:
            router.add()
        return self.trainable("all" if adapt == "mhr" else "z", task=name)

    def trainable(
        self,
        what: What = "all",
        *,
        task: str | None = None,
        lr: float = 1e-3,
        router_lr: float = 0.1,
    ) -> list[dict[str, Any]]:
        """Return parameter groups for an optimiser, and freeze everything else.

        all: adapters at `lr` and logits at `router_lr` without weight decay; z: logits alone; mu:
        the tasks' own adapters. `task` keeps to the logits (or own adapters) of one task; tasks
        given to `wrap` share one table of logits, of which other rows then get no gradient. With
        one rate for both, routing stays uniform. Raises InputError if there is nothing to train.
        """
        number = None if task is None else self.number(task)
        adapters, logits = self._adapters(what, number), self._logits(what, number)
        if not adapters and not logits:
            raise InputError(
                f"there is nothing to train as {what!r}"
                + (f" for task {task!r}" if task is not None else "")
                + "; tasks with adapters of their own come from new_task(NAME, adapt='mu')"
            )
        for module in (self.inventories, self.routers):
            module.requires_grad_(False)
        for parameter in (*adapters, *logits):
            parameter.requires_grad_(True)
        groups: list[dict[str, Any]] = []
        if adapters:
            groups.append({"params": adapters, "lr": lr})
        if logits:
            groups.append({"params": logits, "lr": router_lr, "weight_decay": 0.0})
        return groups

    def _adapters(self, what: What, number: int | None) -> list[nn.Parameter]:
        if what not in get_args(What):
            raise InputError(f"{what!r} is nothing to train; expected all, z or mu")
        if what == "all":
            return [p for one in self._inventories for p in (one.a, one.b)]
        if what == "z" or (number is not None and number >= 0):
            return []
        keys = (
            [str(i) for i in range(len(self.own_tasks))] if number is None else [str(-1 - number)]
        )
        return [p for one in self._inventories for k in keys for p in (one.own_a[k], one.own_b[k])]

    def _logits(self, what: What, number: int | None) -> list[nn.Parameter]:
        if what == "mu" or (number is not None and number < 0):
            return []
        if number is None:
            return [p for one in self._routers for p in (one.logits, *one.added)]
        found = []
        for router in self._routers:
            place = number - len(router.logits)
            found.append(router.logits if place < 0 else router.added[place])
        return found

    def copy(self) -> "Skilled":
        """Return another inventory with the same values on the same base, to adapt apart.

        Tasks that were added have their logits in the common table there.
        """
        found = Skilled(self.base, self.settings, self.routed_tasks)
        found.generator.set_state(self.generator.get_state())
        found._fill(self._tensors(), self.routed_tasks, self.own_tasks)
        return found.train(self.training)

    def __deepcopy__(self, memo: dict) -> NoReturn:
        """Refuse: the layers of a copied base would go on calling these adapters."""
        raise InputError("a wrapped model cannot be deep-copied; call model.copy()")

    # -- fixing a mixture ------------------------------------------------------------------------

    def collapse(self, task: str | int | None) -> Collapsed:
        """Return a task's adapters as one LoRA; "mean" is the mean of the inventory.

        A task of that name goes before. Raises InputError for an unknown task, or none: a routed
        layer has no one weight.
        """
        if task is None:
            raise InputError(
                "a routed layer has no one weight to merge; name a task, or 'mean' for the mean: "
                f"tasks are {listing(self.names)}"
            )
        mean = task == "mean" and "mean" not in self.names
        number = torch.tensor([0 if mean else self.number(task)])
        factors, transposed = {}, set()
        for path, inventory, key in zip(self.paths, self._inventories, self._keys, strict=True):
            with torch.no_grad():
                if mean:
                    a, b = inventory.mean()
                else:
                    router = self._router(key)
                    weights = router(number.clamp(min=0).to(router.logits.device), noise=False)
                    a, b = (x[0] for x in inventory.adapters(weights, number.tolist()))
                b = b * inventory.scale
                name = f"{path}.weight"
                if inventory.transposed:
                    transposed.add(name)
                    factors[name] = (b.clone(), a.clone())
                else:
                    factors[name] = (a.t().contiguous(), b.t().contiguous())
        return Collapsed(factors, frozenset(transposed), task_type(self.base))

    def materialise(self, task: str | int | None) -> dict[str, Tensor]:
        """Return the base's state dict with a task's adapters merged in. Raises as `collapse`."""
        state = {name: t.detach().clone() for name, t in self.base.state_dict().items()}
        for name, delta in self.collapse(task).part().items():
            state[name] = state[name] + delta.delta(state[name]).to(state[name].dtype)
        return state

    def detach(self) -> nn.Module:
        """Take the adapters out of the base for good, and return the base.

        This happens by itself when nobody holds the wrapped model any more.
        """
        self._detached()
        return self.base

    # -- looking in ------------------------------------------------------------------------------

    def diagnostics(self) -> dict[str, Routing]:
        """Return what each table of logits has learned, by the modules that share it.

        Warns if no logit is beyond 0.05: routing then is uniform, and the model an average LoRA.
        """
        found = {
            key: routing(router)
            for key, router in zip(self.router_keys, self._routers, strict=True)
        }
        self._warn_if_flat(found)
        return found

    def _warn_if_flat(self, found: Mapping[str, Routing]) -> None:
        if self.settings.skills > 1 and all(one.largest < FLAT for one in found.values()):
            warnings.warn(
                f"no routing logit is beyond {FLAT}: all tasks mix all skills alike, as one "
                "averaged LoRA would; train the logits at about 100 times the adapters' rate",
                stacklevel=3,
            )

    # -- on disk ---------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write inventory, logits and own adapters to one safetensors file, without the base.

        Raises OutputError if it exists or cannot be written.
        """
        table = {
            "settings": asdict(self.settings),
            "tasks": self.routed_tasks,
            "own": self.own_tasks,
            "base": digest(self.base),
        }
        write(Path(path), table, self._tensors(), overwrite=overwrite)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over tasks and tensors of a file that `save` wrote; optimisers must be made anew.

        Raises MissingError, FormatError, or MismatchError if rank, skills, heads, granularity,
        layers or base differ; nothing is changed then.
        """
        table, tensors = read(Path(path))
        own = asdict(self.settings)
        for name in ("skills", "heads", "rank", "granularity", "alpha", "mode"):
            if table["settings"].get(name) != own[name]:
                raise MismatchError(
                    f"{path}: {name} is {table['settings'].get(name)!r} in the file, but "
                    f"{own[name]!r} here; wrap the model with the file's, or use mhr.load"
                )
        theirs = {name[2:] for name in tensors if name.startswith("a/")}
        if theirs != set(self.paths):
            odd = sorted(theirs ^ set(self.paths))
            raise MismatchError(f"{path}: not for the same layers; they differ in {listing(odd)}")
        _check_base(path, table, self.base)
        shapes = self._shapes(len(table["tasks"]), len(table["own"]))
        for name, shape in shapes.items():
            if name not in tensors or tuple(tensors[name].shape) != shape:
                given = list(tensors[name].shape) if name in tensors else "not there"
                raise FormatError(f"{path}: {name} is {given}, expected {list(shape)}")
        self._fill(tensors, table["tasks"], table["own"])

    def _tensors(self) -> dict[str, Tensor]:
        found = {}
        for path, one in zip(self.paths, self._inventories, strict=True):
            found |= {f"a/{path}": one.a, f"b/{path}": one.b}
            for i in range(len(self.own_tasks)):
                found[f"own_a/{i}/{path}"] = one.own_a[str(i)]
                found[f"own_b/{i}/{path}"] = one.own_b[str(i)]
        for key, router in zip(self.router_keys, self._routers, strict=True):
            found[f"z/{key}"] = router.table()
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    def _shapes(self, tasks: int, own: int) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for path, one in zip(self.paths, self._inventories, strict=True):
            found |= {f"a/{path}": tuple(one.a.shape), f"b/{path}": tuple(one.b.shape)}
            for i in range(own):
                found[f"own_a/{i}/{path}"] = (one.inputs, self.settings.rank)
                found[f"own_b/{i}/{path}"] = (self.settings.rank, one.outputs)
        width = self.settings.heads * self.settings.skills
        return found | {f"z/{key}": (tasks, width) for key in self.router_keys}

    def _fill(
        self, tensors: Mapping[str, Tensor], tasks: Sequence[str], own: Sequence[str]
    ) -> None:
        for path, one in zip(self.paths, self._inventories, strict=True):
            one.a.data.copy_(tensors[f"a/{path}"])
            one.b.data.copy_(tensors[f"b/{path}"])
            one.own_a.clear()
            one.own_b.clear()
            for i in range(len(own)):
                for table, name in ((one.own_a, "own_a"), (one.own_b, "own_b")):
                    table[str(i)] = nn.Parameter(tensors[f"{name}/{i}/{path}"].to(one.a).clone())
        for key, router in zip(self.router_keys, self._routers, strict=True):
            router.logits = nn.Parameter(tensors[f"z/{key}"].to(router.logits).clone())
            router.added = nn.ParameterList()
        self.routed_tasks, self.own_tasks = list(tasks), list(own)


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()


def _check_base(path: str | os.PathLike[str], table: Mapping[str, Any], base: nn.Module) -> None:
    if table["base"] != digest(base):
        raise MismatchError(
            f"{path}: this base has other tensors than the one the inventory was trained on; "
            "give that one"
        )
