"""Gaussians of IBCL against torch's, scipy's and numbers worked by hand."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.train.continual.posterior import GaussianPosterior, combined, divergence, weighted


def posterior(seed: int, std: float = 1.0) -> GaussianPosterior:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"weight": (3, 4), "bias": (3,), "scale": ()}
    return GaussianPosterior(
        {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()},
        {name: std * (0.1 + torch.rand(shape, generator=rng)) for name, shape in shapes.items()},
    )


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in state.values()])


# -- divergence and distances ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_kl_is_torchs(seed):
    one, other = posterior(seed), posterior(seed + 10, 3.0)
    p = Independent(Normal(flat(one.mu).double(), flat(one.sigma).double()), 1)
    q = Independent(Normal(flat(other.mu).double(), flat(other.sigma).double()), 1)
    assert one.kl(other) == pytest.approx(float(kl_divergence(p, q)), rel=1e-6)
    assert one.kl(one) == 0


def test_kl_has_the_gradient_of_torchs():
    """The training loss uses it on flat vectors in float32."""
    mu, rho = torch.randn(9, requires_grad=True), torch.randn(9, requires_grad=True)
    prior_mu, prior_sigma = torch.randn(9), torch.rand(9) + 0.5
    ours = divergence(mu, rho.exp(), prior_mu, prior_sigma)
    theirs = kl_divergence(Normal(mu, rho.exp()), Normal(prior_mu, prior_sigma)).sum()
    for one, other in zip(
        torch.autograd.grad(ours, [mu, rho]), torch.autograd.grad(theirs, [mu, rho]), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_distances_worked_by_hand():
    one = GaussianPosterior(
        {"w": torch.tensor([0.0, 3.0]), "b": torch.tensor([1.0])},
        {"w": torch.tensor([1.0, 1.0]), "b": torch.tensor([2.0])},
    )
    other = GaussianPosterior(
        {"w": torch.tensor([0.0, 0.0]), "b": torch.tensor([5.0])},
        {"w": torch.tensor([1.0, 13.0]), "b": torch.tensor([2.0])},
    )
    assert one.distance(other, "w2") == pytest.approx(13.0)  # sqrt(9 + 16 + 144)
    assert one.distance(other, "official") == pytest.approx(5 / 3 + 12 / 3)
    assert one.distance(other) == one.distance(other, "w2")
    assert other.distance(one) == one.distance(other)
    assert one.distance(one, "official") == 0


# -- regions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mass", [1e-6, 0.01, 0.5, 0.95, 0.999999])
def test_region_is_scipys_interval(mass):
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with scikit-learn")
    point = GaussianPosterior(
        {name: value.double() for name, value in posterior(0).mu.items()},
        {name: value.double() for name, value in posterior(0).sigma.items()},
    )
    low, high = point.region(mass)
    for name, mean in point.mu.items():
        bounds = stats.norm.interval(mass, mean.numpy(), point.sigma[name].numpy())
        torch.testing.assert_close(low[name], torch.as_tensor(bounds[0]), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(high[name], torch.as_tensor(bounds[1]), rtol=1e-6, atol=1e-6)


def test_draws_within_are_even_over_the_box_and_free_of_each_other():
    point = GaussianPosterior({"w": torch.zeros(200, 100)}, {"w": torch.full((200, 100), 2.0)})
    low, high = point.region(0.5)
    drawn = point.within(0.5, torch.Generator().manual_seed(0))["w"]
    place = (drawn - low["w"]) / (high["w"] - low["w"])
    assert 0 <= place.min() < 0.001
    assert 0.999 < place.max() <= 1
    counts = torch.histc(place, 10, 0, 1) / place.numel()
    torch.testing.assert_close(counts, torch.full((10,), 0.1), atol=0.01, rtol=0)
    assert abs(float(torch.corrcoef(place[:, :2].T)[0, 1])) < 0.2


def test_one_number_a_tensor_as_the_authors_code_draws():
    point = posterior(1)
    low, high = point.region(0.3)
    rng = torch.Generator().manual_seed(0)
    drawn = point.within(0.3, rng, independent=False)
    places = {n: (drawn[n] - low[n]) / (high[n] - low[n]) for n in ("weight", "bias")}
    for place in places.values():
        torch.testing.assert_close(place, place.flatten()[0].expand_as(place), atol=1e-4, rtol=0)
    assert abs(float(places["weight"][0, 0] - places["bias"][0])) > 1e-3


def test_truncated_draws_keep_the_posteriors_shape_inside_the_box():
    point = GaussianPosterior({"w": torch.full((40_000,), 1.0)}, {"w": torch.full((40_000,), 2.0)})
    drawn = point.truncated(0.9, torch.Generator().manual_seed(0))["w"]
    low, high = point.region(0.9)
    assert (drawn >= low["w"] - 1e-5).all()
    assert (drawn <= high["w"] + 1e-5).all()
    reach = 1.6448536
    density = math.exp(-(reach**2) / 2) / math.sqrt(2 * math.pi)
    variance = 4 * (1 - 2 * reach * density / 0.9)  # of a normal cut at +-reach
    assert float(drawn.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(drawn.var()) == pytest.approx(variance, rel=0.03)


def test_samples_have_mean_and_deviation():
    point = GaussianPosterior({"w": torch.full((50_000,), 3.0)}, {"w": torch.full((50_000,), 0.5)})
    drawn = point.sample(torch.Generator().manual_seed(0))["w"]
    assert float(drawn.mean()) == pytest.approx(3.0, abs=0.01)
    assert float(drawn.std()) == pytest.approx(0.5, abs=0.01)
    again = point.sample(torch.Generator().manual_seed(0))["w"]
    assert torch.equal(drawn, again)


# -- sums ------------------------------------------------------------------------------------------


def test_combined_is_the_weighted_sum_of_means_and_of_deviations():
    points = [posterior(seed) for seed in range(3)]
    betas = (0.5, 0.2, 0.3)
    found = combined(points, betas)
    for name in found.mu:
        for part in ("mu", "sigma"):
            wide = [getattr(point, part)[name].double() for point in points]
            exact = wide[0] * betas[0] + wide[1] * betas[1] + wide[2] * betas[2]
            assert torch.equal(getattr(found, part)[name], exact.float())


def test_a_share_of_zero_takes_no_part():
    states = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1e30, 5.0])}]
    assert torch.equal(weighted(states, (1.0, 0.0))["w"], states[0]["w"])


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.0, -1.0])
def test_a_deviation_that_is_not_above_zero_is_refused(std):
    with pytest.raises(InputError, match=r"w: a standard deviation is .*above 0"):
        GaussianPosterior({"w": torch.zeros(2)}, {"w": torch.tensor([1.0, std])})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(value):
    with pytest.raises(NonFiniteError, match="w: a mean or standard deviation is NaN"):
        GaussianPosterior({"w": torch.tensor([value])}, {"w": torch.ones(1)})
    with pytest.raises(NonFiniteError):
        GaussianPosterior({"w": torch.zeros(1)}, {"w": torch.tensor([value])})


def test_names_and_shapes_that_differ_are_refused():
    with pytest.raises(MismatchError, match="different tensors: v, w"):
        GaussianPosterior({"w": torch.zeros(1)}, {"v": torch.ones(1)})
    with pytest.raises(MismatchError, match=r"w is \[2\] in the means, but \[3\]"):
        GaussianPosterior({"w": torch.zeros(2)}, {"w": torch.ones(3)})
    one = GaussianPosterior({"w": torch.zeros(2)}, {"w": torch.ones(2)})
    other = GaussianPosterior({"w": torch.zeros(3)}, {"w": torch.ones(3)})
    for compare in (one.kl, one.distance):
        with pytest.raises(MismatchError, match=r"w is \[2\] in one posterior, but \[3\]"):
            compare(other)
    with pytest.raises(InputError, match="no tensor"):
        GaussianPosterior({}, {})
    with pytest.raises(InputError, match="must be floating point"):
        GaussianPosterior({"w": torch.zeros(2)}, {"w": torch.ones(2, dtype=torch.long)})


@pytest.mark.parametrize("mass", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_mass_outside_is_refused(mass):
    point, rng = posterior(0), torch.Generator().manual_seed(0)
    for ask in (lambda: point.region(mass), lambda: point.truncated(mass, rng)):
        with pytest.raises(InputError, match="mass = "):
            ask()


def test_another_kind_of_distance_is_refused():
    with pytest.raises(InputError, match="there are 'official' and 'w2'"):
        posterior(0).distance(posterior(1), "euclid")  # type: ignore[arg-type]
