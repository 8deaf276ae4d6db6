"""Twin-Merging: a shared expert and small exclusive parts, mixed for each input by a router.

On merge8 as its page says; and on text6, six text sets on MiniLM, where merges of all experts are
nearly as good (claim `composite`), so that no margin over them is asserted.
"""

import torch
from torch import Tensor, nn

from pluribus.claims import Check, Claim, OnStep
from pluribus.claims._bed import DATA, GRID, METRIC, MODEL, Bed, State, merge8
from pluribus.claims.composite import composite_score
from pluribus.claims.ties import ties
from pluribus.compress import Twin
from pluribus.core.registry import MERGERS
from pluribus.route import fit_router as train_router
from pluribus.route import from_store
from pluribus.tasks import zoo as zoos
from pluribus.tasks.specialise import threads

TRAIN, TEST = 300, 40  # router's inputs a task; mixed test inputs a task
TEXTS = 200  # test texts of each set

CLAIM = Claim(
    name="twin-merging",
    title="A shared expert with routed low-rank parts nearly equals the specialists",
    paper="arXiv:2406.15479",
    data=(
        f"{DATA}; here {TEST} mixed test inputs of each, routed without their task; "
        f"text6: six real text sets, {TEXTS} test texts of each"
    ),
    model=(
        f"{MODEL}; router: an MLP on the shared expert's features, {TRAIN} inputs a task; "
        "MiniLM-L6 (22 M, of which 11 M are tuned)"
    ),
    metric=METRIC,
    checks=(
        Check(text="twin (density 0.1), routed", left="twin", margin=95.0),
        Check(
            text="twin over the best static merge of average, TA, TIES, breadcrumbs, PCB",
            left="twin",
            right="best_static",
            margin=5.0,
        ),
        Check(
            text="bytes, percent of eight checkpoints",
            left="storage",
            margin=40.0,
            at_most=True,
            each=True,
        ),
        Check(text="router's accuracy on held-out inputs", left="router", margin=88.0),
        Check(
            text="parts of theta_t - shared over parts of theta_t - theta_0, same rank, true route",
            left="twin_true_route",
            right="parts_on_base",
        ),
        Check(text="texts: twin (density 0.1), routed", left="texts_twin", margin=95.0),
        Check(
            text="texts: bytes, percent of six checkpoints",
            left="texts_storage",
            margin=40.0,
            at_most=True,
            each=True,
        ),
        Check(text="texts: router's accuracy on held-out inputs", left="texts_router", margin=88.0),
        Check(
            text="texts: parts of theta_t - shared over parts of theta_t - theta_0, true route",
            left="texts_true_route",
            right="texts_parts_on_base",
            asserted=False,
        ),
    ),
)


def measure(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return all figures for one seed."""
    bed = merge8(seed, on_step)
    store = Twin(density=0.1).fit(bed.zoo.base, bed.zoo.experts)
    shared = {name: store.shared[name] for name in store.shared}
    parts = [
        {name: weights[name] - shared[name] for name in weights}
        for weights in (store.expand(task) for task in bed.tasks)
    ]
    router = fit_router(bed, shared, seed)
    inputs = {task: _some(bed, task, seed) for task in bed.tasks}
    report = store.report()
    base = Twin(shared="sum >> scale(scale=0.0)", density=0.1).fit(bed.zoo.base, bed.zoo.experts)
    return {
        "twin": routed(bed, shared, parts, router, inputs),
        "twin_true_route": true_route(bed, store, inputs),
        "parts_on_base": true_route(bed, base, inputs),
        "router": router_accuracy(bed, shared, router),
        "storage": 100 * report["ratio"],
        **static(bed, inputs),
        **{f"texts_{name}": value for name, value in texts(seed, on_step).items()},
    }


def texts(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return the figures of text6, by the composite itself."""
    zoo = zoos.build("text6", seed, on_step=on_step)
    out: dict[str, float] = {}
    with threads(1):
        on_base = Twin(shared="sum >> scale(scale=0.0)", density=0.1)
        for name, twin in (("", Twin(density=0.1)), ("base", on_base)):
            store = twin.fit(zoo.base, zoo.experts)
            routed = from_store(zoo.module(), store, features="output", heads=zoo.heads)
            if name:
                out["parts_on_base"] = composite_score(zoo, routed, true=True, limit=TEXTS)
                continue
            told = train_router(
                routed,
                {task: data.train.x[:TRAIN] for task, data in zoo.tasks.items()},
                {task: data.split("val")[0] for task, data in zoo.tasks.items()},
                seed=seed,
            )
            out |= {
                "twin": composite_score(zoo, routed, limit=TEXTS),
                "true_route": composite_score(zoo, routed, true=True, limit=TEXTS),
                "router": 100 * told.accuracy,
                "storage": 100 * store.report()["ratio"],
            }
    return out


def _some(bed: Bed, task: str, seed: int) -> tuple[Tensor, Tensor]:
    x, y = bed.zoo.tasks[task].split("test")
    draw = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(x), generator=draw)[:TEST]
    return x[picked], y[picked]


def fit_router(bed: Bed, shared: State, seed: int, epochs: int = 12) -> nn.Module:
    """Train an MLP to tell the task from the shared expert's features; no labels are used."""
    xs, ys = [], []
    for number, task in enumerate(bed.tasks):
        x = bed.zoo.tasks[task].split("train")[0][:TRAIN]
        xs.append(bed.zoo.features(shared, x).clone())
        ys.append(torch.full((len(x),), number))
    x, y = torch.cat(xs), torch.cat(ys)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = x.shape[1]
        router = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.LeakyReLU(0.01),
            nn.Linear(2 * width, len(bed.tasks)),
        )
    optimiser = torch.optim.AdamW(router.parameters(), lr=5e-4, weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=draw).split(64):
            loss = nn.functional.cross_entropy(router(x[batch]), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return router.eval()


def router_accuracy(bed: Bed, shared: State, router: nn.Module) -> float:
    """Return how often the router knows the task of a validation input, in percent."""
    right, seen = 0, 0
    for number, task in enumerate(bed.tasks):
        x = bed.zoo.tasks[task].split("val")[0]
        with torch.inference_mode():
            right += int((router(bed.zoo.features(shared, x)).argmax(1) == number).sum())
        seen += len(x)
    return 100 * right / seen


def routed(
    bed: Bed,
    shared: State,
    parts: list[State],
    router: nn.Module,
    inputs: dict[str, tuple[Tensor, Tensor]],
) -> float:
    """Run each input through its own mixture of the parts; the task only picks the head."""
    ceilings = expert_scores(bed, inputs)
    scores = []
    for task, (x, y) in inputs.items():
        with torch.inference_mode():
            weights = router(bed.zoo.features(shared, x)).softmax(1)
        right = 0
        for i in range(len(x)):
            state = dict(shared)
            for part, weight in zip(parts, weights[i].tolist(), strict=True):
                if weight > 1e-4:
                    state = {name: state[name] + weight * part[name] for name in state}
            right += int(bed.zoo.logits(state, task, x[i : i + 1]).argmax(1) == y[i])
        scores.append(right / len(x) / ceilings[task])
    return 100 * sum(scores) / len(scores)


def expert_scores(bed: Bed, inputs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return each expert's accuracy on the chosen inputs."""
    return {task: _accuracy(bed, bed.zoo.experts[task], task, *inputs[task]) for task in inputs}


def _accuracy(bed: Bed, state: State, task: str, x: Tensor, y: Tensor) -> float:
    return float((bed.zoo.logits(state, task, x).argmax(1) == y).double().mean())


def _normalised(bed: Bed, states: dict[str, State], inputs: dict[str, tuple[Tensor, Tensor]]):
    ceilings = expert_scores(bed, inputs)
    scores = [_accuracy(bed, states[t], t, *inputs[t]) / ceilings[t] for t in inputs]
    return 100 * sum(scores) / len(scores)


def true_route(bed: Bed, store, inputs: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Return the score of the experts that a store gives back."""
    states = {}
    for task in inputs:
        weights = store.expand(task)
        states[task] = {name: weights[name] for name in weights}
    return _normalised(bed, states, inputs)


def static(bed: Bed, inputs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the tuned static merges on the same inputs, and the best of them."""
    crumbs = {"density": 0.2, "gamma": 0.02, "scope": "row", "weight": 1.0}
    methods = {
        "task_arithmetic": MERGERS.build("task_arithmetic", {"weight": 1.0}),
        "ties": ties(agg="sum"),
        "breadcrumbs": MERGERS.build("breadcrumbs", crumbs),
        "pcb": MERGERS.build("pcb", {"ratio": 0.2, "lambda": 1.0}),
    }
    states = {"average": bed.merged(MERGERS.build("linear", {}))}
    for name, method in methods.items():
        grid = tuple(2 * s for s in GRID) if name == "pcb" else GRID
        states[name] = bed.best_scale(bed.update(method), grid)[1]
    out = {
        name: _normalised(bed, dict.fromkeys(inputs, state), inputs)
        for name, state in states.items()
    }
    return {**out, "best_static": max(out.values())}
