"""aTLAS: the loop against an explicit graph, what it is for, the replay, and what goes wrong."""

import math

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear

from pluribus import Pool, Weights, recipe
from pluribus.core.coefficients import groups
from pluribus.core.errors import InputError, NonFiniteError
from pluribus.core.registry import MERGERS
from pluribus.engine.driver import copy, merge
from pluribus.loss.negate import Negate
from pluribus.tune import AdaMerging, Blend
from pluribus.tune._clipped import auto_lr, penalty
from pluribus.tune._examples import Examples
from pluribus.tune.atlas import Atlas

from .conftest import TASKS

STEPS = 20
SCOPES = [
    {"scope": "block"},
    {"scope": "vector"},
    {"scope": "partition", "partitions": 3, "seed": 5},
    {"scope": "block", "penalty": 1},
    {"scope": "partition", "partitions": 2, "penalty": 2},
]


def row(scope: str, index: int) -> int:
    return 0 if scope == "vector" else index


def explicit(bed, raw, scope, partitions, seed):
    """Merge through a graph: one scale for each coordinate."""
    parameters = dict(bed.base)
    for j, name in enumerate(bed.floats):
        base = bed.base[name]
        own = torch.from_numpy(groups(name, base.numel(), partitions, seed))
        for t, task in enumerate(TASKS):
            scale = raw[row(scope, j), t][own].reshape(base.shape)
            parameters[name] = parameters[name] + scale * (bed.experts[task][name] - base)
    return parameters


def score(bed, parameters, x, task):
    return linear(functional_call(bed.net, parameters, (x,)), **bed.heads[task])


@pytest.mark.parametrize("settings", SCOPES)
@pytest.mark.parametrize("clip", [0.02, 100.0])
def test_twenty_steps_equal_an_explicit_graph(bed, settings, clip):
    given = bed.labelled()
    method = Atlas(
        lr=0.02,
        clip=clip,
        epochs=1,
        steps_per_epoch=STEPS,
        schedule="cosine",
        keep="last",
        **settings,
    )
    tuned = method.fit(bed.pool, bed.forward, given)
    scope, partitions = method.scope, method.partitions
    rows = 1 if scope == "vector" else len(bed.floats)
    raw = torch.zeros(rows, 3, partitions, requires_grad=True)
    optimiser = torch.optim.AdamW([raw], lr=0.02, weight_decay=0.1)
    for step in range(STEPS):
        parameters = explicit(bed, raw, scope, partitions, method.seed)
        loss = torch.zeros(())
        for task in TASKS:
            x, y = given[task][step % 4]
            loss = loss + cross_entropy(score(bed, parameters, x, task), y)
        assert tuned.history[step]["loss"] == pytest.approx(float(loss.detach()), abs=1e-4)
        if method.penalty:
            for j in range(rows):
                for g in range(partitions):
                    norm = raw[j, :, g].norm(method.penalty)
                    loss = loss + 0.5 * norm / (rows * partitions)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([raw], clip)
        optimiser.param_groups[0]["lr"] = 0.02 * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimiser.step()
    merged = explicit(bed, raw.detach(), scope, partitions, method.seed)
    for j, name in enumerate(bed.floats):
        got = tuned.coefficients.of(name).reshape(3, partitions)
        np.testing.assert_allclose(got, raw.detach()[row(scope, j)], atol=1e-5)
        torch.testing.assert_close(tuned.weights[name], merged[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("settings", SCOPES[:3])
def test_weights_and_gradients_are_the_explicit_ones(bed, settings):
    scope, partitions = settings["scope"], settings.get("partitions", 1)
    seed = settings.get("seed", 0)
    by = "model" if scope == "vector" else "tensor"
    blend = Blend(bed.pool, by=by, init=0.0, partitions=partitions, seed=seed)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        blend.coefficients.copy_(torch.randn(blend.coefficients.shape, generator=rng))
    raw = blend.coefficients.detach().clone().requires_grad_()
    merged = explicit(bed, raw, scope, partitions, seed)
    leaves = blend.leaves()
    for name in bed.floats:
        torch.testing.assert_close(leaves[name], merged[name], rtol=0, atol=1e-6)
    x, y = bed.labelled()["b"][0]
    cross_entropy(score(bed, merged, x, "b"), y).backward()
    cross_entropy(bed.forward(blend.parameters(leaves), x, "b"), y).backward()
    blend.pull(leaves)
    torch.testing.assert_close(blend.coefficients.grad, raw.grad, rtol=1e-4, atol=1e-6)


def test_one_partition_is_the_block_form(bed):
    fit = {"lr": 0.02, "epochs": 1, "steps_per_epoch": 5, "keep": "last"}
    one = Atlas(scope="partition", partitions=1, **fit)
    block = Atlas(scope="block", **fit)
    results = [method.fit(bed.pool, bed.forward, bed.labelled()) for method in (one, block)]
    assert results[0].coefficients.digest == results[1].coefficients.digest


def test_partitions_move_tensors_of_every_rank_and_each_has_its_own(bed):
    """In the authors' code only stacks of matrices move, and equal shapes share a partition."""
    method = Atlas(
        scope="partition", partitions=2, lr=0.05, epochs=1, steps_per_epoch=3, keep="last"
    )
    tuned = method.fit(bed.pool, bed.forward, bed.labelled())
    for name in bed.floats:
        assert not torch.equal(tuned.weights[name], bed.base[name]), name
    one, other = (
        groups(f"blocks.{i}.0.weight", bed.base["blocks.0.0.weight"].numel(), 2, 0) for i in (0, 1)
    )
    assert (one != other).any()


def test_one_shared_coefficient_is_task_arithmetic(bed):
    blend = Blend(bed.pool, by="model", init=0.0)
    with torch.no_grad():
        blend.coefficients.fill_(0.4)
    wanted = merge(bed.pool, MERGERS.build("task_arithmetic", {"weight": 0.4}))
    for name, leaf in blend.leaves().items():
        torch.testing.assert_close(leaf.detach(), wanted[name], rtol=0, atol=1e-6)


def folders(bed, tmp_path):
    places = {"base": tmp_path / "base", **{t: tmp_path / t for t in TASKS}}
    copy(Weights.of(bed.base), places["base"])
    for task in TASKS:
        copy(Weights.of(bed.experts[task]), places[task])
    return {label: str(place) for label, place in places.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scope": "vector"},
        {"scope": "partition", "partitions": 4, "seed": 3, "budget": 2},
        {"budget": 1, "budget_by": "random"},
        {"linear": True, "task_vector_dtype": "float16"},
    ],
)
def test_the_exported_recipe_replays_the_same_bits(bed, tmp_path, settings):
    places = folders(bed, tmp_path)
    pool = Pool(places["base"], {task: places[task] for task in TASKS})
    method = Atlas(lr=0.1, epochs=1, steps_per_epoch=4, keep="last", **settings)
    tuned = method.fit(pool, bed.forward, bed.labelled())
    saved = tuned.save(tmp_path / "tuned")
    recipe.run(recipe.load(tmp_path / "tuned" / "recipe.yml"), tmp_path / "again")
    again = Weights.open(tmp_path / "again")
    assert list(again) == list(saved)
    for name in again:
        assert again.source(name).load().tobytes() == saved.source(name).load().tobytes()
        assert again.source(name).load().tobytes() == tuned.weights.source(name).load().tobytes()
    assert not torch.equal(bed.base["stem.weight"], again["stem.weight"])


# -- what it is for --------------------------------------------------------------------------------


def planted(bed, scale, task="a", count=256, seed=9):
    """Inputs of a task, labelled by the model with these coefficients."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=rng)
    model = {
        n: t if n not in bed.floats else t + sum(
            s * (bed.experts[k][n] - t) for k, s in zip(TASKS, scale, strict=True)
        )
        for n, t in bed.base.items()
    }  # fmt: skip
    return x, score(bed, model, x, task).argmax(1)


def accuracy(bed, weights, task, x, y):
    state = {name: weights[name] for name in bed.base}
    return float((score(bed, state, x, task).argmax(1) == y).double().mean())


def test_addition_finds_a_better_composition_than_the_base(bed):
    """Every task is labelled by one composition, which is neither the base nor an expert."""
    wanted = (0.9, -0.5, 0.4)
    sets = {task: planted(bed, wanted, task, seed=i) for i, task in enumerate(TASKS)}
    held = {task: planted(bed, wanted, task, seed=10 + i) for i, task in enumerate(TASKS)}
    method = Atlas(lr=0.05, epochs=8, batch_size=96)
    tuned = method.fit(bed.pool, bed.forward, sets, validation=held)
    base = sum(accuracy(bed, bed.base, t, *held[t]) for t in TASKS) / 3
    found = sum(accuracy(bed, tuned.weights, t, *held[t]) for t in TASKS) / 3
    assert found > base + 0.1
    # the bar and the choice are the mean of accuracies over each own expert's
    own = {t: accuracy(bed, bed.experts[t], t, *held[t]) for t in TASKS}
    ratios = [accuracy(bed, tuned.weights, t, *held[t]) / own[t] for t in TASKS]
    judged = [s["judged"] for s in tuned.history if s["judged"] is not None]
    bar = sum(accuracy(bed, bed.base, t, *held[t]) / own[t] for t in TASKS) / 3
    assert judged[0] == pytest.approx(bar, abs=0.01)
    assert sum(ratios) / 3 >= max(judged) - 1e-6
    assert len(judged) == 8  # the base, then one after each epoch but the last


def test_a_step_takes_an_equal_share_of_the_batch_from_every_task(bed):
    seen = []

    def forward(parameters, inputs, task):
        seen.append((task, len(inputs)))
        return bed.forward(parameters, inputs, task)

    sets = {task: planted(bed, (0, 0, 0), task, count=60) for task in TASKS}
    method = Atlas(lr=0.01, epochs=1, batch_size=30, keep="last")
    tuned = method.fit(bed.pool, forward, sets)
    assert len(tuned.history) == 6
    steps = [pair for pair in seen if pair[1] == 10]
    assert steps[-3:] == [("a", 10), ("b", 10), ("c", 10)]


def test_an_epoch_is_the_shortest_stream(bed):
    sets = {"a": planted(bed, (0, 0, 0), "a", 60), "b": planted(bed, (0, 0, 0), "b", 24)}
    pool = Pool(bed.base, {t: bed.experts[t] for t in "ab"})
    tuned = Atlas(lr=0.01, epochs=3, batch_size=16, keep="last").fit(pool, bed.forward, sets)
    assert len(tuned.history) == 9  # 24 inputs in batches of 8, three times


def test_few_shot_is_never_worse_than_the_base_on_what_it_is_chosen_on(bed):
    pool = Pool(bed.base, {t: bed.experts[t] for t in "bc"})
    shots = planted(bed, (0.0, 0.5, 0.5), count=16)
    held = {"a": planted(bed, (0.0, 0.0, 0.0), count=64, seed=4)}  # the base is right about all
    method = Atlas.few_shot(lr=5.0, clip=100.0)
    tuned = method.fit(pool, bed.forward, {"a": shots}, validation=held)
    assert tuned.log.best == 0
    assert not any(tuned.coefficients.of(name).any() for name in bed.floats)
    last = Atlas.few_shot(lr=5.0, keep="last").fit(pool, bed.forward, {"a": shots})
    assert accuracy(bed, last.weights, "a", *held["a"]) < 1.0


def test_few_shot_learns_from_others_experts(bed):
    pool = Pool(bed.base, {t: bed.experts[t] for t in "bc"})
    held = planted(bed, (0.0, 1.0, -1.0), count=256, seed=4)
    shots = planted(bed, (0.0, 1.0, -1.0), count=24)
    tuned = Atlas.few_shot(lr=0.1).fit(pool, bed.forward, {"a": shots}, validation={"a": held})
    gain = accuracy(bed, tuned.weights, "a", *held) - accuracy(bed, bed.base, "a", *held)
    assert gain > 0.1
    assert len(tuned.history) == 10 * math.ceil(24 * 11 / 128)  # one batch: repeated 11 times


def test_negation_forgets_the_target_and_holds_the_control(bed):
    pool = Pool(bed.base, {"a": bed.experts["a"]})
    sets = {"a": planted(bed, (0, 0, 0), "a"), "b": planted(bed, (0, 0, 0), "b")}
    method = Atlas(lr=0.02, epochs=30)
    tuned = method.fit(pool, bed.forward, sets, objective=Negate(control="b", floor=0.9))
    assert accuracy(bed, tuned.weights, "b", *sets["b"]) >= 0.9
    assert accuracy(bed, tuned.weights, "a", *sets["a"]) < 0.85
    assert not any("grows sure" in text for text in tuned.warnings)


def test_negation_stops_once_the_control_is_below_its_floor(bed):
    pool = Pool(bed.base, {"a": bed.experts["a"]})
    sets = {"a": planted(bed, (0, 0, 0), "a"), "b": planted(bed, (0, 0, 0), "b")}
    loss = Negate(control="b", floor=0.97)
    tuned = Atlas(lr=0.5, epochs=30).fit(pool, bed.forward, sets, objective=loss)
    assert "control b fell" in tuned.log.stopped
    assert len(tuned.history) < 30 * 4
    assert accuracy(bed, tuned.weights, "b", *sets["b"]) >= 0.97


def test_negation_loss_is_minus_target_plus_control(bed):
    pool = Pool(bed.base, {"a": bed.experts["a"]})
    sets = {t: planted(bed, (0, 0, 0), t, count=32) for t in "ab"}
    method = Atlas(lr=0.01, epochs=1, batch_size=64, keep="last")
    tuned = method.fit(pool, bed.forward, sets, objective=Negate(control="b"))
    ce = {t: float(cross_entropy(score(bed, bed.base, x, t), y)) for t, (x, y) in sets.items()}
    assert tuned.history[0]["loss"] == pytest.approx(ce["b"] - ce["a"], rel=1e-5)


def test_other_objectives_and_a_judge_of_ones_own(bed):
    for objective in ("entropy", "kl"):
        method = Atlas(lr=0.03, epochs=1, steps_per_epoch=20)
        tuned = method.fit(bed.pool, bed.forward, bed.inputs, objective=objective)
        assert tuned.history[-1]["loss"] < tuned.history[0]["loss"]
    asked = []

    def select(parameters):
        asked.append(float(parameters["stem.weight"].sum()))
        return float(len(asked) == 2)

    method = Atlas(lr=0.03, epochs=4, steps_per_epoch=2)
    tuned = method.fit(bed.pool, bed.forward, bed.labelled(), select=select)
    assert len(asked) == 5
    assert asked[0] == pytest.approx(float(bed.base["stem.weight"].sum()), abs=1e-4)
    assert tuned.log.best == 2
    assert float(tuned.weights["stem.weight"].sum()) == pytest.approx(asked[1], abs=1e-4)


def test_half_precision_task_vectors(bed):
    told = {"lr": 0.02, "epochs": 1, "steps_per_epoch": 5, "keep": "last"}
    method, plain = Atlas(task_vector_dtype="bfloat16", **told), Atlas(**told)
    one, two = (m.fit(bed.pool, bed.forward, bed.labelled()) for m in (method, plain))
    a, b = (np.stack([r.coefficients.of(n) for n in bed.floats]) for r in (one, two))
    assert (a != b).any()
    np.testing.assert_allclose(a, b, atol=0.01)


def test_task_vectors_read_from_their_files_give_the_same(bed):
    told = {"lr": 0.02, "epochs": 1, "steps_per_epoch": 3, "budget": 2, "keep": "last"}
    one = Atlas(**told).fit(bed.pool, bed.forward, bed.labelled())
    two = Atlas(resident=False, **told).fit(bed.pool, bed.forward, bed.labelled())
    assert one.coefficients.digest == two.coefficients.digest


def test_the_rate_that_fits_the_task_vectors(bed):
    blend = Blend(bed.pool, init=0.0)
    ratios = [
        float(bed.base[n].norm() / (bed.experts[t][n] - bed.base[n]).norm())
        for n in bed.floats
        for t in TASKS
    ]
    assert 1e-3 < auto_lr(blend) < 0.1
    assert auto_lr(blend) == pytest.approx(1e-3 * float(np.median(ratios)), rel=1e-5)
    near = {t: {n: x + 1e-7 if n in bed.floats else x for n, x in bed.base.items()} for t in "ab"}
    assert auto_lr(Blend(Pool(bed.base, near))) == 0.1
    same = Pool(bed.base, {"a": {n: t.clone() for n, t in bed.base.items()}})
    assert auto_lr(Blend(same)) == 0.1


def test_the_penalty_by_hand():
    raw = torch.tensor([[[3.0], [-4.0]], [[0.0], [0.0]]])  # two blocks, two experts
    assert float(penalty(raw, 1)) == pytest.approx(0.5 * 7 / 2)
    assert float(penalty(raw, 2)) == pytest.approx(0.5 * 5 / 2)


def test_the_same_run_gives_the_same_bits(bed):
    sets = {task: planted(bed, (0.5, 0.5, 0.5), task) for task in TASKS}
    fit = Atlas(epochs=2, lr=0.02).fit
    one, two = (fit(bed.pool, bed.forward, sets).coefficients.digest for _ in range(2))
    assert one == two
    assert (
        Atlas(epochs=2, lr=0.02, seed=1).fit(bed.pool, bed.forward, sets).coefficients.digest != one
    )


# -- bad input -------------------------------------------------------------------------------------


def test_a_new_tasks_own_expert_is_refused(bed):
    given = {"a": planted(bed, (0, 0, 0))}
    with pytest.raises(InputError, match="holds the expert of a itself"):
        Atlas.few_shot().fit(bed.pool, bed.forward, given)
    tuned = Atlas.few_shot(epochs=1, allow_own=True).fit(bed.pool, bed.forward, given)
    assert tuned.coefficients.experts == TASKS


def test_settings_that_contradict_each_other():
    with pytest.raises(InputError, match="scope='partition'"):
        Atlas(partitions=3)
    with pytest.raises(InputError, match="scope='vector'"):
        Atlas(scope="vector", budget=2)
    with pytest.raises(InputError, match="lr"):
        Atlas(lr=-1.0)
    with pytest.raises(InputError, match="not 'birds'"):
        Atlas.negation("birds")
    with pytest.raises(InputError, match="Did you mean 'budget'"):
        Atlas(budgets=2)
    assert (Atlas.negation("mnist").lr, Atlas.negation("mnist").epochs) == (3e-3, 7)
    assert (Atlas.addition().lr, Atlas.addition().epochs) == (1e-3, 20)
    assert Atlas.test_time().schedule == "cosine"


def test_a_budget_beyond_the_experts(bed):
    with pytest.raises(InputError, match="budget = 4, but there are 3 experts"):
        Atlas(budget=4).fit(bed.pool, bed.forward, bed.labelled())


def test_more_partitions_than_entries_are_warned_of(bed):
    method = Atlas(scope="partition", partitions=10, epochs=1, steps_per_epoch=1, lr=0.01)
    tuned = method.fit(bed.pool, bed.forward, bed.labelled())
    assert any("fewer than 10 entries" in text for text in tuned.warnings)


def test_streams_that_cannot_be_used(bed):
    fit = Atlas(epochs=1).fit
    with pytest.raises(InputError, match="no examples were given"):
        fit(bed.pool, bed.forward, {})
    with pytest.raises(InputError, match="the objective needs labels"):
        fit(bed.pool, bed.forward, {t: bed.inputs[t][0] for t in TASKS})
    with pytest.raises(InputError, match="must not see"):
        fit(bed.pool, bed.forward, {t: bed.labelled()[t][0] for t in TASKS}, objective="entropy")
    with pytest.raises(InputError, match="steps_per_epoch"):
        fit(bed.pool, bed.forward, {t: iter(bed.labelled()[t]) for t in TASKS})
    x, y = planted(bed, (0, 0, 0))
    with pytest.raises(InputError, match="different lengths"):
        Examples(x, y[:-1])
    with pytest.raises(InputError, match="no head for task 'd'"):
        fit(Pool(bed.base, {"d": bed.experts["a"]}), bed.forward, {"d": planted(bed, (0, 0, 0))})
    with pytest.raises(InputError, match="'a' has a stream but no stream"):
        fit(bed.pool, bed.forward, bed.labelled(), validation={"b": planted(bed, (0, 0, 0))})


def test_validation_that_cannot_be_read_again(bed):
    given = {task: iter(bed.labelled()[task]) for task in TASKS}
    with pytest.raises(InputError, match="validation is read more than once"):
        Atlas(epochs=1).fit(bed.pool, bed.forward, bed.labelled(), validation=given)


def test_negation_without_a_control(bed):
    pool = Pool(bed.base, {"a": bed.experts["a"]})
    with pytest.raises(InputError, match="without a control"):
        Atlas().fit(pool, bed.forward, {"a": planted(bed, (0, 0, 0))}, objective="negate")
    with pytest.raises(InputError, match="without a control"):
        AdaMerging(steps=1).fit(bed.pool, bed.forward, bed.labelled(), objective="negate")


def test_a_loss_that_is_not_finite(bed):
    given = bed.labelled()
    x, y = given["b"][2]
    given["b"][2] = (x * float("nan"), y)
    told = {"lr": 0.02, "epochs": 3, "keep": "last"}
    tuned = Atlas(**told).fit(bed.pool, bed.forward, given)
    assert "step 3: the loss of task b is not finite" in tuned.log.stopped
    assert len(tuned.history) == 2
    with pytest.raises(NonFiniteError, match="step 1"):
        Atlas(**told).fit(bed.pool, bed.forward, {**given, "b": [given["b"][2]]})


def test_an_expert_that_equals_the_base_is_warned_of(bed):
    pool = Pool(bed.base, {**bed.experts, "c": {n: t.clone() for n, t in bed.base.items()}})
    tuned = Atlas(epochs=1, steps_per_epoch=2).fit(pool, bed.forward, bed.labelled())
    assert any("c equals the base" in text for text in tuned.warnings)


def test_batches_serve_as_validation_if_they_can_be_read_again(bed):
    told = {"lr": 5.0, "clip": 100.0, "epochs": 2}
    right = {
        task: [(x, score(bed, bed.base, x, task).argmax(1)) for x in bed.inputs[task]]
        for task in TASKS
    }
    kept = Atlas(**told).fit(bed.pool, bed.forward, right)
    assert kept.log.best == 0  # the base names all of them right
    endless = {task: iter(batches) for task, batches in right.items()}
    last = Atlas(steps_per_epoch=2, **told).fit(bed.pool, bed.forward, endless)
    assert last.log.best is None
    assert any("the last step is kept" in note for note in last.log.notes)
