"""AdaMerging: the loop against an explicit one, the replay, and what goes wrong."""

import warnings

import numpy as np
import pytest
import torch
import yaml
from torch.func import functional_call
from torch.nn.functional import linear

from pluribus import Pool, Weights, recipe
from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.engine.driver import copy
from pluribus.tune import AdaMerging, ModuleForward

from .conftest import TASKS


@pytest.mark.parametrize("by", ["tensor", "model"])
@pytest.mark.parametrize("plus_plus", [False, True])
def test_twenty_steps_equal_an_explicit_graph(bed, by, plus_plus):
    tuned = AdaMerging(by=by, plus_plus=plus_plus, steps=20, lr=0.03).fit(
        bed.pool, bed.forward, bed.inputs
    )
    tau = {n: torch.stack([bed.experts[t][n] - bed.base[n] for t in TASKS]) for n in bed.floats}
    if plus_plus:
        from pluribus.tune import Blend

        blend = Blend(bed.pool, of=tuned.of)  # checked against the authors' rule in test_blend
        tau = {n: blend.task_vectors(n).reshape(tau[n].shape) for n in bed.floats}
    rows = 1 if by == "model" else len(bed.floats)
    raw = torch.full((rows, 3), 0.3, requires_grad=True)
    optimiser = torch.optim.Adam([raw], lr=0.03)
    for step in range(20):
        scale = raw.clamp(0, 1)
        parameters = dict(bed.base)
        for j, name in enumerate(bed.floats):
            row = scale[0 if by == "model" else j]
            parameters[name] = bed.base[name] + torch.tensordot(row, tau[name], 1)
        loss = torch.zeros(())
        for task in TASKS:
            head = bed.heads[task]
            x = functional_call(bed.net, parameters, (bed.inputs[task][step % 4],))
            p = linear(x, head["weight"], head["bias"]).softmax(1)
            loss = loss - (p * p.log()).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        assert tuned.history[step]["loss"] == pytest.approx(float(loss.detach()), abs=1e-4)
    wanted = raw.detach().clamp(0, 1)
    for j, name in enumerate(bed.floats):
        got = tuned.coefficients.of(name)
        np.testing.assert_allclose(got, wanted[0 if by == "model" else j], atol=1e-5)


def folders(bed, tmp_path):
    places = {"base": tmp_path / "base", **{t: tmp_path / t for t in TASKS}}
    copy(Weights.of(bed.base), places["base"])
    for task in TASKS:
        copy(Weights.of(bed.experts[task]), places[task])
    return {label: str(place) for label, place in places.items()}


@pytest.mark.parametrize("plus_plus", [False, True])
def test_the_exported_recipe_replays_the_same_bits(bed, tmp_path, plus_plus):
    places = folders(bed, tmp_path)
    pool = Pool(places["base"], {task: places[task] for task in TASKS})
    tuned = AdaMerging(steps=5, lr=0.05, plus_plus=plus_plus).fit(pool, bed.forward, bed.inputs)
    saved = tuned.save(tmp_path / "tuned")
    told = tmp_path / "tuned" / "recipe.yml"
    recipe.run(recipe.load(told), tmp_path / "again")
    again = Weights.open(tmp_path / "again")
    in_memory = tuned.weights
    assert list(again) == list(saved)
    for name in again:
        assert again.source(name).load().tobytes() == saved.source(name).load().tobytes()
        assert again.source(name).load().tobytes() == in_memory.source(name).load().tobytes()
    found = bed.base["stem.weight"] != again["stem.weight"]
    assert bool(found.any()), "nothing was merged"
    record = yaml.safe_load((tmp_path / "tuned" / "tuning.json").read_text())
    assert record["steps"] == 5
    assert set(record["coefficients"]) == set(bed.floats)


def test_a_recipe_of_changed_coefficients_is_refused(bed, tmp_path):
    places = folders(bed, tmp_path)
    pool = Pool(places["base"], {task: places[task] for task in TASKS})
    fit = AdaMerging(steps=1, lr=0.05).fit
    fit(pool, bed.forward, bed.inputs).save(tmp_path / "one")
    other = AdaMerging(steps=2, lr=0.05).fit(pool, bed.forward, bed.inputs)
    other.coefficients.save(tmp_path / "one" / "coefficients.safetensors")
    with pytest.raises(MismatchError, match="changed or replaced"):
        recipe.run(recipe.load(tmp_path / "one" / "recipe.yml"), tmp_path / "again")


def test_references_stay_and_local_paths_become_absolute(bed, tmp_path, monkeypatch):
    tuned = AdaMerging(steps=1).fit(bed.pool, bed.forward, bed.inputs)
    for name in ("base", "lora"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    told = tuned.recipe(models={"base": "base", "a": "base+lora", "b": "org/b@v1", "c": "org/c"})
    assert told["base_model"] == str(tmp_path / "base")
    assert [entry["model"] for entry in told["models"]] == [
        f"{tmp_path / 'base'}+{tmp_path / 'lora'}",
        "org/b@v1",
        "org/c",
    ]
    with pytest.raises(InputError, match="c was given in memory"):
        tuned.recipe(models={"base": "base", "a": "base", "b": "base"})


def test_models_in_memory_have_no_recipe_but_are_saved(bed, tmp_path):
    tuned = AdaMerging(steps=1).fit(bed.pool, bed.forward, bed.inputs)
    with pytest.raises(InputError, match="given in memory"):
        tuned.recipe()
    tuned.save(tmp_path / "out")
    assert not (tmp_path / "out" / "recipe.yml").exists()
    assert (tmp_path / "out" / "coefficients.safetensors").exists()


def test_supervised_learns_from_labels_and_lowers_their_loss(bed):
    labelled = bed.labelled()
    fit = AdaMerging(steps=40, lr=0.03).fit
    tuned = fit(bed.pool, bed.forward, labelled, objective="cross_entropy")
    assert tuned.history[-1]["loss"] < tuned.history[3]["loss"]


def test_divergence_from_the_experts_falls(bed):
    tuned = AdaMerging(steps=40, lr=0.03).fit(bed.pool, bed.forward, bed.inputs, objective="kl")
    assert tuned.history[-1]["loss"] < tuned.history[0]["loss"]


def test_labels_must_not_reach_an_unsupervised_objective(bed):
    fit = AdaMerging(steps=1).fit
    with pytest.raises(InputError, match="must not see any"):
        fit(bed.pool, bed.forward, bed.labelled())
    named = {t: [{"x": x[0], "labels": x[0]}] for t, x in bed.inputs.items()}
    with pytest.raises(InputError, match="'labels'"):
        fit(bed.pool, bed.forward, named)
    with pytest.raises(InputError, match="needs labels"):
        fit(bed.pool, bed.forward, bed.inputs, objective="cross_entropy")


def test_tasks_without_a_head_or_a_stream(bed):
    fit = AdaMerging(steps=1).fit
    with pytest.raises(InputError, match="'d' has a stream but no head"):
        fit(bed.pool, bed.forward, {**bed.inputs, "d": bed.inputs["a"]})
    with pytest.raises(InputError, match="'c' has a head but no stream"):
        fit(bed.pool, bed.forward, {t: bed.inputs[t] for t in "ab"})
    with pytest.raises(InputError, match="is empty"):
        fit(bed.pool, bed.forward, {**bed.inputs, "b": []})


def test_a_stream_that_ends_stops_the_tuning_and_says_so(bed):
    streams = {**bed.inputs, "b": iter(bed.inputs["b"])}
    tuned = AdaMerging(steps=10).fit(bed.pool, bed.forward, streams)
    assert len(tuned.history) == 4
    assert "task b ended after 4 of 10 steps" in tuned.log.stopped
    with pytest.raises(InputError, match="no batch left"):
        AdaMerging(steps=1).fit(bed.pool, bed.forward, {**bed.inputs, "b": iter(())})


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_coefficients(bed):
    broken = torch.full((16, 6), float("nan"))
    streams = {**bed.inputs, "b": [*bed.inputs["b"][:3], broken]}
    three = AdaMerging(steps=3, lr=0.05).fit(bed.pool, bed.forward, bed.inputs)
    tuned = AdaMerging(steps=10, lr=0.05).fit(bed.pool, bed.forward, streams)
    assert len(tuned.history) == 3
    assert "step 4: the loss of task b is not finite" in tuned.log.stopped
    assert "coefficients of step 3 are kept" in tuned.warnings[0]
    two = AdaMerging(steps=2, lr=0.05).fit(bed.pool, bed.forward, bed.inputs)
    name = bed.floats[0]
    np.testing.assert_array_equal(tuned.coefficients.of(name), two.coefficients.of(name))
    assert (tuned.coefficients.of(name) != three.coefficients.of(name)).any()
    with pytest.raises(NonFiniteError, match="step 1"):
        AdaMerging(steps=3).fit(bed.pool, bed.forward, {**bed.inputs, "b": [broken]})


def test_an_expert_that_equals_the_base_is_allowed_and_warned_of(bed):
    pool = Pool(bed.base, {**bed.experts, "c": {n: t.clone() for n, t in bed.base.items()}})
    tuned = AdaMerging(steps=2).fit(pool, bed.forward, bed.inputs)
    assert any("c equals the base" in text for text in tuned.warnings)
    assert float(tuned.coefficients.of(bed.floats[0])[2]) == pytest.approx(0.3)


def test_running_statistics_stay_the_base_and_are_warned_of():
    net = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6))
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    expert = {n: t + 1 for n, t in base.items()}
    forward = ModuleForward(net, {"a": lambda x: x})
    tuned = AdaMerging(steps=2).fit(Pool(base, {"a": expert}), forward, {"a": [torch.rand(8, 6)]})
    assert any("running statistics" in text for text in tuned.warnings)
    assert torch.equal(tuned.weights["1.running_mean"], base["1.running_mean"])
    assert not torch.equal(tuned.weights["1.weight"], base["1.weight"])


def test_agreement_that_falls_is_diagnosed_and_can_choose_the_step(bed):
    """Small random nets with loud heads: entropy falls, agreement with the experts does too."""
    last = AdaMerging(steps=60, lr=0.03).fit(bed.pool, bed.forward, bed.inputs)
    assert any("grows sure without being right" in text for text in last.warnings)
    kept = AdaMerging(steps=60, lr=0.03, stop="agreement").fit(bed.pool, bed.forward, bed.inputs)
    agreement = {s["number"]: s["agreement"] for s in kept.history if s["agreement"] is not None}
    assert kept.log.best is not None
    assert kept.log.best < 60
    assert agreement[kept.log.best + 1] == max(agreement.values())


def test_coefficients_that_run_away_are_reported_not_clipped(bed):
    tuned = AdaMerging(steps=4, lr=6.0, clamp=None).fit(bed.pool, bed.forward, bed.inputs)
    assert any("ran away" in text for text in tuned.warnings)
    assert max(abs(tuned.coefficients.of(n)).max() for n in bed.floats) > 10


def test_outputs_that_are_no_scores(bed):
    forward = ModuleForward(bed.net, call=lambda net, x, _: net(x).sum())
    with pytest.raises(InputError, match="class scores"):
        AdaMerging(steps=1).fit(bed.pool, forward, bed.inputs)


def test_settings_are_checked():
    with pytest.raises(InputError, match="clamp"):
        AdaMerging(clamp=(1.0, 0.0))
    with pytest.raises(InputError, match="steps"):
        AdaMerging(steps=0)
    with pytest.raises(InputError, match="Did you mean 'steps'"):
        AdaMerging(step=3)
    assert AdaMerging.official().batches_per_step == 2


def test_the_same_run_gives_the_same_bits(bed):
    with warnings.catch_warnings():
        one, two = (AdaMerging(steps=5).fit(bed.pool, bed.forward, bed.inputs) for _ in range(2))
    assert one.coefficients.digest == two.coefficients.digest
