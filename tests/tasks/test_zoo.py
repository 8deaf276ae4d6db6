import pytest
import torch

from pluribus.core.errors import InputError, MismatchError
from pluribus.tasks import cache, zoo
from pluribus.tasks.encoders.mlp import ResidualMLP
from pluribus.tasks.sets import DataError
from pluribus.tasks.specialise import _schedule, drawn, skeleton
from pluribus.tasks.views import generator

SMALL = {"train": 120, "val": 60, "test": 60, "width": 32, "depth": 2, "epochs": 40, "threads": 1}


@pytest.fixture(scope="module")
def small():
    return zoo.build("demo8", 0, cache=False, **SMALL)


def same(a, b):
    return all(
        torch.equal(x[name], y[name])
        for x, y in [(a.base, b.base), *((a.experts[t], b.experts[t]) for t in a.tasks)]
        for name in a.base
    )


def average(made):
    return {
        name: torch.stack([expert[name] for expert in made.experts.values()]).mean(0)
        for name in made.base
    }


def test_experts_beat_the_base_on_their_own_tasks(small):
    assert list(small.experts) == list(small.heads) == list(small.tasks)
    ceilings, floor = small.expert_scores(), small.scores(small.base)
    assert sum(ceilings.values()) > sum(floor.values()) + 0.5
    assert set(small.base) == set(small.model().state_dict())


def test_scores_are_accuracies_counted_by_hand(small):
    x, y = small.tasks["rot90"].val
    encoder = small.model()
    encoder.load_state_dict(small.experts["rot90"])
    head = small.heads["rot90"]
    guess = (encoder(x) @ head["weight"].T + head["bias"]).argmax(1)
    expected = (guess == y).sum().item() / len(y)
    assert small.score(small.experts["rot90"], "rot90", "val") == pytest.approx(expected)
    first = (guess == y)[:7].sum().item() / 7
    assert small.score(small.experts["rot90"], "rot90", "val", 7) == pytest.approx(first)


def test_an_expert_is_one_when_normalised_to_itself(small):
    for task, expert in small.experts.items():
        assert small.normalised(expert)[task] == 1.0
        assert small.normalised(expert, "val", 30)[task] == 1.0
    accuracy = small.scores(average(small))["identity"]
    assert small.normalised(average(small))["identity"] == pytest.approx(
        accuracy / small.expert_scores()["identity"]
    )


def test_scoring_changes_no_weights_and_keeps_no_state(small):
    before = {name: tensor.clone() for name, tensor in small.base.items()}
    first = small.scores(small.base)
    small.scores(average(small))
    assert small.scores(small.base) == first
    assert all(torch.equal(before[name], small.base[name]) for name in before)
    assert not any(tensor.requires_grad for tensor in small.base.values())
    small.expert_scores()["identity"] = 0.0
    assert small.expert_scores()["identity"] > 0


def test_half_precision_weights_are_scored_in_float32(small):
    halves = {name: tensor.bfloat16() for name, tensor in small.base.items()}
    rounded = {name: tensor.float() for name, tensor in halves.items()}
    assert small.scores(halves) == small.scores(rounded)


def test_order_of_names_does_not_matter(small):
    backwards = dict(reversed(small.base.items()))
    assert small.scores(backwards) == small.scores(small.base)


def test_refuses_weights_that_do_not_fit(small):
    lacking = {name: tensor for name, tensor in small.base.items() if name != "stem.bias"}
    with pytest.raises(MismatchError, match=r"lack stem\.bias"):
        small.scores(lacking)
    with pytest.raises(MismatchError, match="has no odd"):
        small.scores(small.base | {"odd": torch.zeros(1)})
    with pytest.raises(MismatchError, match=r"stem\.bias has shape \[3\], but \[32\]"):
        small.scores(small.base | {"stem.bias": torch.zeros(3)})


def test_unknown_names_get_the_nearest(small):
    with pytest.raises(InputError, match="Did you mean 'rot90'"):
        small.score(small.base, "rot9")
    with pytest.raises(InputError, match="limit is 0"):
        small.score(small.base, "rot90", limit=0)
    with pytest.raises(InputError, match="Did you mean 'merge8'"):
        zoo.build("merge9")
    with pytest.raises(InputError, match="Did you mean 'epochs'"):
        zoo.build("demo8", epoch=3)


def test_zoos_are_found_by_file_name():
    assert {"demo8", "merge8"} <= set(zoo.names())


def test_same_seed_same_bits(small):
    torch.manual_seed(123)  # global chance must not matter
    torch.rand(5)
    assert same(small, zoo.build("demo8", 0, cache=False, **SMALL))
    assert not same(small, zoo.build("demo8", 1, cache=False, **SMALL))


def test_building_leaves_threads_and_global_chance_alone():
    state, count = torch.get_rng_state(), torch.get_num_threads()
    zoo.build("demo8", 0, cache=False, **SMALL | {"epochs": 1, "threads": count + 1})
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == count


def test_reports_every_step(own_folders):
    seen = []
    zoo.build(
        "demo8", 0, cache=False, on_step=lambda *step: seen.append(step), **SMALL | {"epochs": 1}
    )
    assert seen[:2] == [("base", 1, 40), ("base", 2, 40)]
    assert seen[40:42] == [("identity", 1, 2), ("identity", 2, 2)]
    assert len(seen) == 40 + 8 * 2


def stages(epochs=2, **sizes):
    """Build with the cache; returns the zoo and whether anything was trained."""
    seen = []
    made = zoo.build(
        "demo8", 0, on_step=lambda *step: seen.append(step), **SMALL | sizes | {"epochs": epochs}
    )
    return made, bool(seen)


def test_cache_round_trip(own_folders):
    made, trained = stages()
    assert trained
    again, trained = stages()
    assert not trained
    assert same(made, again)
    assert again.scores(again.base) == made.scores(made.base)
    assert all(torch.equal(made.heads[t]["bias"], again.heads[t]["bias"]) for t in made.tasks)
    (path,) = (own_folders[1] / "zoos").iterdir()
    assert path.name.startswith("demo8-0-")
    assert stages(epochs=3)[1], "other parameters are another zoo"


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_corrupt_cache_is_rebuilt(own_folders, damage):
    made, _ = stages()
    (path,) = (own_folders[1] / "zoos").iterdir()
    whole = bytearray(path.read_bytes())
    if damage == "flip":
        whole[-9] ^= 1
    broken = {"cut": whole[:-100], "flip": whole, "empty": b"", "text": b"not weights"}[damage]
    path.write_bytes(broken)
    again, trained = stages()
    assert trained
    assert same(made, again)
    assert not stages()[1]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written_warns_and_goes_on(own_folders):
    own_folders[1].write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="set PLURIBUS_CACHE"):
        made, trained = stages()
    assert trained
    assert made.base


def test_without_cache_nothing_is_written(own_folders):
    zoo.build("demo8", 0, cache=False, **SMALL | {"epochs": 1})
    assert not own_folders[1].exists()


def test_merge8_without_data_says_so(own_folders):
    with pytest.raises(DataError, match="Set PLURIBUS_DATA"):
        zoo.build("merge8")


def test_merge8_small_end_to_end(real_data):
    made = zoo.build("merge8", 0, cache=False, **SMALL | {"width": 64})
    assert sum(made.expert_scores().values()) > sum(made.scores(made.base).values())


@pytest.mark.slow
def test_demo8_is_worth_comparing(own_folders):
    made = zoo.build("demo8")
    mean = lambda scores: sum(scores.values()) / len(scores)  # noqa: E731
    assert mean(made.expert_scores()) > 0.9
    assert mean(made.normalised(average(made))) < 0.9


def test_digest_tells_apart_what_differs():
    a, b = torch.zeros(2, 3), torch.zeros(3, 2)
    assert cache.digest([a]) == cache.digest([a.clone()])
    assert len({cache.digest(x) for x in ([a], [b], [a.int()], [a, a], ["a", "b"], ["ab"])}) == 6


def test_encoder_is_the_pages():
    encoder = skeleton(lambda: ResidualMLP(784, 512, 6))
    assert sum(p.numel() for p in encoder.parameters()) == 3_560_960
    assert all(p.is_meta for p in encoder.parameters())


def test_encoder_by_hand():
    encoder = ResidualMLP(1, 2, 1)
    weights = {name: torch.zeros_like(p) for name, p in encoder.state_dict().items()}
    weights["stem.weight"][:] = torch.tensor([[1.0], [3.0]])
    weights["blocks.0.norm.weight"][:] = 1
    weights["blocks.0.up.weight"][:] = 100 * torch.eye(2)  # LN gives -1, 1: GELU gives 0, 100
    weights["blocks.0.down.weight"][:] = torch.tensor([[0.0, 0.04], [0.0, 0.0]])
    weights["norm.weight"][:] = 2
    encoder.load_state_dict(weights)
    # stem 1, 3; the block adds 4, 0: 5, 3; the last norm gives 1, -1, times 2
    result = encoder(torch.ones(1, 1))
    torch.testing.assert_close(result, torch.tensor([[2.0, -2.0]]), atol=1e-3, rtol=0)


def test_weights_are_drawn_as_torch_does():
    encoder = skeleton(lambda: ResidualMLP(100, 32, 2))
    weights = drawn(encoder, generator(0, "t", "init"))
    assert list(weights) == list(encoder.state_dict())
    assert weights["stem.weight"].abs().max() <= 0.1
    assert weights["stem.weight"].abs().max() > 0.099
    assert weights["stem.weight"].mean().abs() < 0.005
    assert torch.equal(weights["norm.weight"], torch.ones(32))


def test_schedule_by_hand():
    assert [_schedule(s, 10, 2) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert _schedule(6, 10, 2) == pytest.approx(0.5)
    assert 0 < _schedule(9, 10, 2) < 0.05


def test_weights_are_kept_whatever_their_layout(tmp_path):
    kernel = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    cache.save(tmp_path / "kept.safetensors", {"kernel": kernel, "turned": torch.randn(3, 5).t()})
    found = cache.load(tmp_path / "kept.safetensors")
    assert found is not None
    assert torch.equal(found["kernel"], kernel)
    assert found["turned"].shape == (5, 3)
