"""The block budget: scores against inner products of a plain gradient, and what is kept."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from pluribus.core.errors import NonFiniteError
from pluribus.loss.cross_entropy import CrossEntropy
from pluribus.tune import Blend
from pluribus.tune._budget import block_scores, drawn, greatest
from pluribus.tune._fit import Problem
from pluribus.tune.atlas import Atlas

from .conftest import TASKS


def gradient_of_the_base(bed, given):
    leaves = {n: t.clone().requires_grad_() if n in bed.floats else t for n, t in bed.base.items()}
    for task in TASKS:
        x, y = given[task][0]
        cross_entropy(bed.forward(leaves, x, task), y).backward()
    return {name: leaves[name].grad for name in bed.floats}


def test_one_pass_scores_every_block(bed):
    given = bed.labelled()
    passes = []

    def forward(parameters, inputs, task):
        passes.append(task)
        return bed.forward(parameters, inputs, task)

    blend = Blend(bed.pool, init=0.0)
    problem = Problem(blend, forward, given, CrossEntropy())
    got = block_scores(problem, blend.leaves())
    assert passes == list(TASKS)
    slopes = gradient_of_the_base(bed, given)
    for name, row in blend.tensors.items():
        for t, task in enumerate(TASKS):
            tau = bed.experts[task][name] - bed.base[name]
            wanted = abs(float((slopes[name] * tau).sum()))
            assert float(got[row, t]) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert blend.coefficients.grad is None


def test_the_greatest_are_kept_and_of_equal_ones_the_first(bed):
    blend = Blend(bed.pool, init=0.0)
    scores = torch.zeros(len(blend.rows), 3)
    scores[0] = torch.tensor([0.1, 3.0, 0.2])
    kept = greatest(blend, scores, 2)
    assert kept[bed.floats[0]] == (1, 2)
    assert kept[bed.floats[1]] == (0, 1)


def test_a_draw_depends_on_seed_and_name_alone(bed):
    blend = Blend(bed.pool, init=0.0)
    one = drawn(blend, 2, seed=0)
    assert one == drawn(blend, 2, seed=0)
    assert one != drawn(blend, 2, seed=1)
    assert all(len(kept) == 2 for kept in one.values())
    assert len(set(one.values())) > 1


@pytest.mark.parametrize("by", ["gradient", "random"])
@pytest.mark.parametrize("partitions", [1, 2])
def test_only_what_is_kept_is_learned(bed, by, partitions):
    scope = "partition" if partitions > 1 else "block"
    method = Atlas(
        scope=scope,
        partitions=partitions,
        budget=1,
        budget_by=by,
        lr=0.05,
        epochs=1,
        steps_per_epoch=4,
        keep="last",
    )
    tuned = method.fit(bed.pool, bed.forward, bed.labelled())
    blend = Blend(bed.pool, init=0.0, partitions=partitions)
    if by == "random":
        wanted = drawn(blend, 1, 0)
    else:
        problem = Problem(blend, bed.forward, bed.labelled(), CrossEntropy())
        wanted = greatest(blend, block_scores(problem, blend.leaves()), 1)
    for name in bed.floats:
        moved = np.abs(tuned.coefficients.of(name).reshape(3, -1)).sum(1) > 0
        assert tuple(np.flatnonzero(moved)) == wanted[name]


def test_a_budget_of_all_is_no_budget(bed):
    told = {"lr": 0.05, "epochs": 1, "steps_per_epoch": 3, "keep": "last"}
    given = {task: batches[1:] for task, batches in bed.labelled().items()}
    first = {task: batches[:1] for task, batches in bed.labelled().items()}
    scored = {task: first[task] + given[task] for task in TASKS}  # the first batch scores
    one = Atlas(budget=3, **told).fit(bed.pool, bed.forward, scored)
    two = Atlas(**told).fit(bed.pool, bed.forward, given)
    assert one.coefficients.digest == two.coefficients.digest


def test_a_gradient_that_is_not_finite(bed):
    given = bed.labelled()
    given["b"] = [(x * float("nan"), y) for x, y in given["b"]]
    with pytest.raises(NonFiniteError, match="loss of task b"):
        Atlas(budget=1, epochs=1).fit(bed.pool, bed.forward, given)
