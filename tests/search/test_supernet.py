"""A network of all points: each choice is, to the bit, the module that the program builds."""

import dataclasses

import pytest
import torch
from torch import nn

from pluribus import search
from pluribus.core.errors import InputError, MismatchError
from pluribus.search.decisions import choice_of, decisions, dna_of, everything, heaviest
from pluribus.search.sized import Sized
from pluribus.search.supernet import batch_statistics, supernet
from pluribus.search.switch import Setting, Switch, SwitchFactory

X = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(0))


class Conv(nn.Sequential):
    def __init__(self, channels):
        super().__init__(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))


class Pool(nn.MaxPool2d):
    def __init__(self, channels):
        super().__init__(3, 1, 1)


class Twice(nn.Module):
    def __init__(self, channels):
        super().__init__()

    def forward(self, x):
        return 2 * x


def program(point):
    """Width, kernel and operation of a small classifier."""
    width, kernel = point["width"], point["kernel"]
    return nn.Sequential(
        nn.Conv2d(2, width, kernel, padding=kernel // 2),
        nn.BatchNorm2d(width),
        nn.Sigmoid(),  # not 0 at 0: channels that aren't there must not leak
        point["op"](width),
        nn.Conv2d(width, 2 * point["last"], 1),
        nn.GroupNorm(2, 2 * point["last"]),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * point["last"], 3),
    )


def space():
    return search.space(
        {
            "width": search.oneof([8, 4, 12]),
            "kernel": search.oneof([1, 3, 5]),
            "op": search.oneof([Conv, Pool, Twice]),
            "last": search.oneof([1, 3]),
        }
    )


@pytest.fixture(scope="module")
def net():
    made = supernet(space(), program, X)
    made.train()
    for _ in range(3):  # statistics of batch norm that are not 0 and 1
        made(X, {"width": 2, "kernel": 2, "op": 0, "last": 1})
    return made


# -- a choice is the program's own module ----------------------------------------------------------


def test_every_choice_equals_the_module_the_program_builds(net):
    with torch.no_grad():
        for choice in everything(net.decisions):
            child = net.child(choice)
            assert torch.equal(net.eval()(X, choice), child.eval()(X)), choice
    assert len(list(everything(net.decisions))) == 3 * 3 * 3 * 2


def test_a_narrow_layer_is_the_first_channels_and_a_small_kernel_the_centre(net):
    whole = dict(net.named_parameters())
    child = net.child({"width": 1, "kernel": 1, "op": 1, "last": 0}).state_dict()
    first = whole["net.0.whole.weight"]
    assert first.shape == (12, 2, 5, 5)
    assert torch.equal(child["0.weight"], first[:4, :, 1:4, 1:4])
    assert torch.equal(child["4.weight"], whole["net.4.whole.weight"][:2, :4])
    assert torch.equal(child["8.weight"], whole["net.8.whole.weight"][:, :8])


def test_a_chosen_size_equals_the_layer_written_by_hand(net):
    layer = net.net[0]
    assert isinstance(layer, Sized)
    net.setting.choice = {"width": 1, "kernel": 0}
    with torch.no_grad():
        ours = layer(X)
        weight, bias = layer.whole.weight[:4, :, 2:3, 2:3], layer.whole.bias[:4]
        theirs = nn.functional.conv2d(X, weight.contiguous(), bias)
    net.setting.choice = {}
    assert torch.equal(ours[:, :4], theirs)
    assert torch.equal(ours[:, 4:], torch.zeros(5, 8, 8, 8))


def test_gradients_reach_only_what_was_chosen(net):
    net.zero_grad()
    net(X, {"width": 1, "kernel": 0, "op": 1, "last": 0}).sum().backward()
    gradient = dict(net.named_parameters())["net.0.whole.weight"].grad
    assert gradient is not None
    used = torch.zeros_like(gradient, dtype=torch.bool)
    used[:4, :, 2, 2] = True
    assert not gradient[~used].any()
    assert gradient[used].abs().sum() > 0
    assert all(p.grad is None for n, p in net.named_parameters() if "candidates.0" in n)


def test_statistics_of_batch_norm_are_shared():
    made = supernet(space(), program, X).train()
    before = made.net[1].whole.running_mean.clone()
    made(X, {"width": 1, "kernel": 0, "op": 1, "last": 0})
    after = made.net[1].whole.running_mean
    assert (after[:4] != before[:4]).all()
    assert torch.equal(after[4:], before[4:])
    with batch_statistics(made), torch.no_grad():
        assert not made.training
        assert made.net[1].whole.training
    assert made.training


# -- mixtures --------------------------------------------------------------------------------------


def test_switch_is_its_candidate_or_their_weighted_sum():
    setting = Setting()
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    switch = Switch("op", [one, two], setting)
    x = torch.randn(4, 3)
    for index, each in enumerate((one, two)):
        setting.choice = {"op": index}
        assert torch.equal(switch(x), each(x))
    setting.choice = {"op": torch.tensor([0.25, 0.75])}
    torch.testing.assert_close(switch(x), 0.25 * one(x) + 0.75 * two(x))


def test_mixture_of_sizes_is_the_weighted_sum_of_the_layers(net):
    """By masks (convolution) and by layers (norms) alike."""
    p, q = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.6, 0.3, 0.1])
    wide = torch.randn(5, 12, 8, 8)
    with torch.no_grad():
        for number, x, mixed in ((0, X, {"width": p, "kernel": q}), (1, wide, {"width": p})):
            layer = net.net[number].eval()
            net.setting.choice = mixed
            ours, theirs = layer(x), 0
            for i in range(3):
                for j in range(3 if "kernel" in mixed else 1):
                    net.setting.choice = {"width": i, "kernel": j}
                    theirs = theirs + p[i] * (q[j] if "kernel" in mixed else 1) * layer(x)
            net.setting.choice = {}
            torch.testing.assert_close(ours, theirs)
    assert net.net[0]._masked
    assert not net.net[1]._masked


def test_a_mixture_that_is_certain_is_the_choice(net):
    choice = {"width": 1, "kernel": 1, "op": 2, "last": 0}
    certain = {path: torch.eye(net.decisions[path].count)[index] for path, index in choice.items()}
    with torch.no_grad():
        ours, theirs = net.eval()(X, certain), net.eval()(X, choice)
    torch.testing.assert_close(ours, theirs)


def test_layers_that_are_not_masked_convolutions_mix_by_their_outputs():
    """Depthwise: groups change with the width. Circular padding: the border is not zero."""

    def build(point):
        c = point["c"]
        return nn.Sequential(
            nn.Conv2d(2, c, 1),
            nn.Conv2d(c, c, 3, padding=1, groups=c),
            nn.Conv2d(c, 4, point["k"], padding=point["k"] // 2, padding_mode="circular"),
        )

    made = supernet({"c": search.oneof([2, 4]), "k": search.oneof([1, 3])}, build, X).eval()
    assert [layer._masked for layer in made.net] == [True, False, False]
    wide, p = torch.randn(5, 4, 8, 8), torch.tensor([0.3, 0.7])
    made.setting.choice = {"c": 0, "k": p}
    mixed = made.net[2](wide)
    parts = []
    for k in (0, 1):
        made.setting.choice = {"c": 0, "k": k}
        parts.append(p[k] * made.net[2](wide))
    torch.testing.assert_close(mixed, sum(parts))


# -- decisions -------------------------------------------------------------------------------------


def test_points_and_choices_are_one_to_one(net):
    chosen = list(everything(net.decisions))
    points = [net.dna(choice) for choice in chosen]
    assert [net.choice(dna) for dna in points] == chosen
    assert sorted(points, key=str) == sorted(net.space.spec.iter_dna(), key=str)
    first = net.space.decode(points[0])
    assert first == {"width": 8, "kernel": 1, "op": Conv, "last": 1}


def test_manyof_makes_switches_that_obey_its_rules():
    def build(point):
        return nn.Sequential(*(op(2) for op in point["ops"]))

    for distinct, ordered in ((True, True), (True, False), (False, True), (False, False)):
        made_of = search.space(
            {"ops": search.manyof(2, [Conv, Pool, Twice], distinct=distinct, sorted=ordered)}
        )
        net = supernet(made_of, build, X)
        chosen = list(everything(net.decisions))
        assert len(chosen) == made_of.size
        assert {str(net.dna(c)) for c in chosen} == {str(d) for d in made_of.spec.iter_dna()}
        assert sum(isinstance(m, Switch) for m in net.modules()) == 2
    weights = {"ops[0]": torch.tensor([0.0, 1.0, 5.0]), "ops[1]": torch.tensor([9.0, 1.0, 2.0])}
    found = decisions(
        search.space({"ops": search.manyof(2, [1, 2, 3], distinct=True, sorted=True)})
    )
    assert heaviest(found, weights) == {"ops[0]": 1, "ops[1]": 2}  # 2 first would leave nothing


@dataclasses.dataclass(frozen=True)
class Block:
    """A factory with a choice inside."""

    kernel: int = 3

    def __call__(self, channels):
        return nn.Conv2d(channels, channels, self.kernel, padding=self.kernel // 2)


def test_a_choice_inside_a_candidate_exists_only_there():
    inner = search.symbolic(Block)(kernel=search.oneof([1, 3]))
    made_of = search.space(
        {"op": search.oneof([Pool, inner]), "again": search.oneof([Twice, Pool])}
    )
    net = supernet(made_of, lambda p: nn.Sequential(p["op"](2), p["again"](2)), X).eval()
    assert list(net.decisions) == ["op", "op[=1/2].kernel", "again"]
    chosen = list(everything(net.decisions))
    assert len(chosen) == made_of.size == 6
    for choice in chosen:
        assert choice_of(made_of, dna_of(made_of, choice)) == choice
        assert torch.equal(net(X, choice), net.child(choice).eval()(X))
    with pytest.raises(InputError, match="no point"):
        net.dna({"op": 1, "again": 0})
    with pytest.raises(InputError, match="nothing was chosen for op"):
        net(X, {"again": 0})


def test_a_placeholder_used_twice_is_one_decision():
    factory = SwitchFactory("op", (Pool, Twice), Setting())
    assert factory(2) is not factory(2)
    op = search.oneof([Conv, Twice])
    net = supernet({"op": op}, lambda p: nn.Sequential(p["op"](2), p["op"](2)), X).eval()
    assert torch.equal(net(X, {"op": 1}), 4 * X)
    assert len(net.decisions) == 1


# -- refusals --------------------------------------------------------------------------------------


def refused(kind, text, value, build=lambda p: nn.Sequential(p["op"](2))):
    with pytest.raises(kind, match=text):
        supernet({"op": value}, build, X)


def test_floats_and_texts_and_modules_are_refused_with_their_path():
    refused(InputError, r"op is a float", search.floatv(0.0, 1.0))
    refused(InputError, r"op: candidate 0 is 'relu'", search.oneof(["relu", "gelu"]))
    refused(InputError, r"op: candidate 1 is 2\.5", search.oneof([Pool, 2.5]))
    refused(InputError, r"op: candidate 1 made a int", search.oneof([Pool, lambda c: c]))
    with pytest.raises(InputError, match=r"trials would share|holds a Linear"):
        supernet({"op": search.oneof([Pool, nn.Linear(2, 2)])}, lambda p: p["op"], X)


def test_candidates_of_different_shapes_are_refused_with_path_and_shapes():
    refused(
        MismatchError,
        r"op: the candidates return different shapes: 0 \(Pool\) \[5, 2, 8, 8\], "
        r"1 \(MaxPool2d\) \[5, 2, 4, 4\]",
        search.oneof([Pool, nn.MaxPool2d]),
    )
    refused(
        MismatchError,
        r"op: 0 returns \[5, 3, 8, 8\] for its candidate 0 and \[5, 3, 6, 6\]",
        search.oneof([1, 3]),
        lambda p: nn.Sequential(nn.Conv2d(2, 3, p["op"])),
    )


def test_numbers_that_set_no_size_are_refused():
    refused(
        InputError,
        "op: no layer differs between 1, 2",
        search.oneof([1, 2]),
        lambda p: nn.Sequential(nn.Conv2d(2, 2, 1)),
    )
    refused(
        InputError,
        r"op decides which modules there are \(1\)",
        search.oneof([1, 2]),
        lambda p: nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(p["op"]))),
    )
    refused(
        InputError,
        "op: 0 has kernels of 2 and 3",
        search.oneof([2, 3]),
        lambda p: nn.Sequential(nn.Conv2d(2, 2, p["op"], padding="same")),
    )
    refused(
        InputError,
        "share the weights of a Bilinear",
        search.oneof([2, 3]),
        lambda p: nn.Sequential(nn.Bilinear(8, 8, p["op"])),
    )


class Beside(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, width, 1), nn.Conv2d(2, 3, 1)
        self.out = nn.Conv2d(width + 3, 2, 1)

    def forward(self, x):
        return self.out(torch.cat([self.a(x), self.b(x)], 1))


class Scaled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.scale = nn.Conv2d(2, width, 1), nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x):
        return self.a(x) * self.scale


def test_programs_that_the_network_cannot_stand_for_are_refused():
    """Concatenated widths are not the first channels of the sum; free parameters can't be cut."""
    sizes = search.oneof([1, 4])
    refused(MismatchError, "torch.cat", sizes, lambda p: Beside(p["op"]))
    refused(InputError, "at the top .* parameters of its own", sizes, lambda p: Scaled(p["op"]))
    refused(InputError, "build returned a int", sizes, lambda p: p["op"])


def test_traced_functions_are_refused():
    with pytest.raises(InputError, match="traced function"):
        supernet(lambda: search.oneof([Pool, Conv]), lambda p: p(2), X)
