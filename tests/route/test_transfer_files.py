"""What a transfer writes and reads, what it refuses, and its page."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pluribus.core.errors import (
    FormatError,
    InputError,
    MismatchError,
    MissingError,
    NonFiniteError,
)
from pluribus.route.transfer import (
    METHODS,
    AdapterFusion,
    Examples,
    ScaLearn,
    SingleAdapter,
    Target,
    _recipe,
    fit,
    load,
)

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from transfers import data, net, source, sources

PAGE = Path(__file__).parents[2] / "docs" / "transfer.md"


@pytest.mark.parametrize("name", METHODS)
def test_a_result_comes_back_from_its_file(name, tmp_path):
    model, task = net(), data()
    result = fit(model, sources(), task, 3, METHODS[name], steps=12, lr=0.01)
    result.save(tmp_path / "r.safetensors")
    shuffled = {key: sources()[key] for key in ("c", "a", "b")}  # by name, not by place
    back = load(tmp_path / "r.safetensors", net(), shuffled)
    assert torch.equal(back.logits(model, task.test.x), result.logits(model, task.test.x))
    assert back.contributions() == result.contributions()
    assert (back.method, back.test, back.numbers) == (result.method, result.test, result.numbers)


def test_files_that_do_not_fit(tmp_path):
    path = tmp_path / "r.safetensors"
    result = fit(net(), sources(), data(), 3, ScaLearn(), steps=3)
    result.save(path)
    other = net()
    with torch.no_grad():
        other.stem.weight.add_(1)
    with pytest.raises(MismatchError, match="other tensors than the model it was made for"):
        load(path, other, sources())
    with pytest.raises(MismatchError, match="with the source c, which is not given"):
        load(path, net(), {name: sources()[name] for name in "ab"})
    with pytest.raises(MismatchError, match="source b has other tensors"):
        load(path, net(), sources() | {"b": source(7)})
    with pytest.raises(MissingError, match="no such file"):
        load(tmp_path / "none.safetensors", net(), sources())
    source(1).save(tmp_path / "a.safetensors", net())
    with pytest.raises(FormatError, match="not a file of 'pluribus transfer 1'"):
        load(tmp_path / "a.safetensors", net(), sources())


def test_another_shape_of_omega_is_refused(tmp_path):
    result = fit(net(), sources(), data(), 3, ScaLearn(), steps=3)
    with torch.no_grad():
        result.mixer.omega = nn.Parameter(result.mixer.omega[:, :2].clone())  # type: ignore[union-attr]
    result.save(tmp_path / "r.safetensors")
    said = r"omega is \[2, 2, 8\], but \[2, 3, 8\] for 3 sources at 2 layers"
    with pytest.raises(MismatchError, match=said):
        load(tmp_path / "r.safetensors", net(), sources())


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (source(2, width=9), "source odd, unlike a, is 9 wide at up, not 8"),
        (source(2, layers=("up",)), "source odd, unlike a, has 1 layers, not 2.*down"),
        (source(2, placement="post_norm"), "is placed post_norm, not behind"),
        (source(2, activation="gelu"), "source odd has the activation gelu"),
    ],
)
def test_sources_that_do_not_fit_together(odd, said):
    with pytest.raises(MismatchError, match=said):
        fit(net(), {"a": source(1), "odd": odd}, data(), 3)


def test_what_is_refused():
    model, task = net(), data()
    with pytest.raises(InputError, match="no source adapter"):
        fit(model, {}, task, 3)
    with pytest.raises(InputError, match="source 'a' is named twice"):
        fit(model, [("a", source(1)), ("a", source(2))], task, 3)
    with pytest.raises(InputError, match="stands nowhere"):
        fit(model, {}, task, 3, SingleAdapter())
    for dropout in (1.0, -0.1):
        with pytest.raises(InputError, match="dropout is"):
            ScaLearn(dropout=dropout)
    for wrong in ({"scope": "all"}, {"shape": "matrix"}, {"normalise": "max"}):
        with pytest.raises(InputError, match="expected one of"):
            ScaLearn(**wrong)
    with pytest.raises(InputError, match="bottleneck 0; both >= 1"):
        fit(model, sources(), task, 3, SingleAdapter(bottleneck=0))
    with pytest.raises(InputError, match="temperature is 0"):
        AdapterFusion(temperature=0)
    with pytest.raises(InputError, match="steps is 0"):
        fit(model, sources(), task, 3, steps=0)
    with pytest.raises(InputError, match="lr is -1"):
        fit(model, sources(), task, 3, lr=-1)
    with pytest.raises(InputError, match="has no omega"):
        _ = fit(model, sources(), task, 3, SingleAdapter(), steps=1).omega
    with pytest.raises(InputError, match="no one adapter equals"):
        fit(model, sources(), task, 3, AdapterFusion(), steps=1).export()
    wide = {"a": source(1, layers=("up", "away"))}
    with pytest.raises(MismatchError, match="no module 'away'"):
        fit(model, wide, task, 3)


def test_heads_and_labels_that_do_not_fit():
    model, task = net(), data()
    for wrong in (nn.Linear(9, 3), {"weight": torch.zeros(3, 9), "bias": torch.zeros(3)}):
        with pytest.raises(MismatchError, match=r"model's features are 8 wide; give \[3, 8\]"):
            fit(model, sources(), task, wrong)
    with pytest.raises(MismatchError, match="go from 0 to 2, but the head has 2 classes"):
        fit(model, sources(), task, 2)
    with pytest.raises(InputError, match="a head of 1 classes"):
        fit(model, sources(), task, 1)
    with pytest.raises(InputError, match="a head is a number of classes"):
        fit(model, sources(), task, {"weight": torch.zeros(3, 8)})
    short = Target(Examples(task.train.x, task.train.y[:5]))
    with pytest.raises(MismatchError, match="train has 24 inputs and 5 labels"):
        fit(model, sources(), short, 3)
    broken = Target(Examples(task.train.x * float("nan"), task.train.y))
    with pytest.raises(NonFiniteError, match="the loss is nan at step 1"):
        fit(model, sources(), broken, 3)
    given = nn.Linear(8, 3)
    kept = copy.deepcopy(given.state_dict())
    fit(model, sources(), task, given, steps=5)
    assert all(torch.equal(kept[n], t) for n, t in given.state_dict().items())


def test_sources_that_would_train_or_change_are_refused():
    model, given = net(), sources()
    given["b"].layers["up"].down.requires_grad_(True)
    with pytest.raises(InputError, match="source b would train: down at up requires a gradient"):
        fit(model, given, data(), 3)
    given = sources()

    def meddle(stage: str, done: int, total: int) -> None:
        given["c"].layers["down"].up.add_(1e-3)

    with pytest.raises(MismatchError, match="source c was changed during training"):
        fit(model, given, data(), 3, steps=2, on_step=meddle)


def test_the_page_is_true(tmp_path, monkeypatch, capsys):
    """Its Python runs, in its order, and finds what it says; its recipe is read."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = PAGE.read_text("utf-8")
    names: dict = {}
    found = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(found) == 1
    exec(compile(found[0], str(PAGE), "exec"), names)
    expected = names["result"].logits(names["encoder"], names["few"].test.x)
    torch.testing.assert_close(names["scores"], expected, atol=1e-5, rtol=0)
    assert names["again"].contributions() == names["result"].contributions()
    means = {k: sum(v.values()) for k, v in names["result"].contributions().items()}
    assert max(means, key=lambda name: means[name]) == "intents"  # whose rule the target has
    assert names["result"].test.accuracy > 0.45  # by chance 0.33
    assert capsys.readouterr().out.startswith("192 Score(")  # 2 layers, 3 sources, 32 features
    (recipe,) = re.findall(r"^```yml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "recipe.yml").write_text(recipe)
    assert _recipe.load(tmp_path / "recipe.yml").method == "scalearn"
