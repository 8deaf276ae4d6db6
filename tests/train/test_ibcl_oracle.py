"""Inference against its exact optimum by quadrature, and against pyro's."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from pluribus.train.continual.network import Labelled, Network, stream
from pluribus.train.continual.posterior import GaussianPosterior
from pluribus.train.continual.variational import Inference, fit

STD = 0.7  # of the prior
MEAN = torch.tensor([0.2, -0.1, 0.0, 0.1])  # of the prior; the last one is the bias
COPIES = 16  # of the problem side by side: their mean is free of the draws' noise


@pytest.fixture(scope="module")
def data() -> Labelled:
    """200 rows of three features and a one; a tenth of the labels are flipped."""
    rng = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(200, 3, generator=rng), torch.ones(200, 1)], 1)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.3]) > 0
    return Labelled(x, (y ^ (torch.rand(200, generator=rng) < 0.1)).long())


def exact(data: Labelled, kl_weight: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the optimal mean-field Gaussian: means and standard deviations, (4,) each.

    Under it a row's logit is normal with mean x.mu and variance x^2.sigma^2, so the expected loss
    is a one-dimensional integral: 60 points of Gauss-Hermite quadrature, minimised by L-BFGS.
    """
    nodes, weights = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(60))
    weights = weights / weights.sum()
    x, sign = data.x.double(), 2 * data.y.double() - 1
    mu = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    rho = torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [mu, rho], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10
    )

    def loss():
        optimiser.zero_grad()
        spread = (x.square() @ rho.exp().square()).sqrt()
        logits = (x @ mu)[:, None] + spread[:, None] * nodes
        expected = (torch.nn.functional.softplus(-sign[:, None] * logits) * weights).sum()
        kl = sum(
            torch.log(STD / s) + (s**2 + (m - p) ** 2) / (2 * STD**2) - 0.5
            for m, s, p in zip(mu, rho.exp(), MEAN.double(), strict=True)
        )
        total = expected + kl_weight * kl
        total.backward()
        return total

    optimiser.step(loss)
    return mu.detach(), rho.detach().exp()


def copied(data: Labelled) -> Labelled:
    """Return the problem COPIES times, each on columns of its own: weights that never meet."""
    x = torch.block_diag(*[data.x] * COPIES)
    return Labelled(x, data.y.repeat(COPIES))


def found(data: Labelled, importance=None, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return our means and standard deviations, averaged over the copies."""
    network = Network(partial(nn.Linear, 4 * COPIES, 1, bias=False))
    prior = GaussianPosterior(
        {"weight": MEAN.repeat(COPIES)[None]}, {"weight": torch.full((1, 4 * COPIES), STD)}
    )
    how = Inference(
        **{"kl_weight": "elbo", "batch_size": 10_000, "lr": 2e-2, "steps": 800, **settings}
    )
    if importance is not None:
        importance = importance.repeat(COPIES)
    rng = stream(0, "task", "oracle")
    fitted = fit(network, prior, copied(data), how, rng, task="task", importance=importance)
    assert fitted.steps == how.steps
    parts = (fitted.posterior.mu["weight"], fitted.posterior.sigma["weight"])
    mu, sigma = (part.reshape(COPIES, 4).double().mean(0) for part in parts)
    return mu, sigma


def apart(one: torch.Tensor, other: torch.Tensor, sigma: torch.Tensor) -> float:
    return float(((one - other) / sigma).abs().max())


@pytest.mark.parametrize("weight", [1.0, 0.3, "elbo"])
@pytest.mark.parametrize("warm", [True, False])
def test_the_loss_of_a_step_is_the_formula(data, weight, warm):
    """One step of 50 rows, with the draws that `fit` makes: the order, then one eps a weight."""
    network = Network(partial(nn.Linear, 4, 1, bias=False))
    prior = GaussianPosterior({"weight": MEAN[None]}, {"weight": torch.full((1, 4), STD)})
    how = Inference(kl_weight=weight, warm_start=warm, steps=1, batch_size=50, lr=1e-6)
    done = fit(network, prior, data, how, stream(0, "task", "step"), task="task")
    rng = stream(0, "task", "step")
    rows = torch.randperm(200, generator=rng)[:50]
    mu, sigma = (MEAN, torch.full((4,), STD)) if warm else (torch.zeros(4), torch.ones(4))
    theta = mu + sigma * torch.randn(4, generator=rng)
    likely = torch.distributions.Bernoulli(logits=data.x[rows] @ theta)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mu, sigma), normal(MEAN, STD)).sum()
    share = 50 / 200 if weight == "elbo" else weight
    expected = share * kl - likely.log_prob(data.y[rows].float()).sum()
    assert done.loss == pytest.approx(float(expected), rel=1e-5)
    close = {"rtol": 0, "atol": 1e-5}  # the step itself is tiny: it began at mu and sigma
    torch.testing.assert_close(done.posterior.mu["weight"][0], mu, **close)
    torch.testing.assert_close(done.posterior.sigma["weight"][0], sigma, **close)


@pytest.mark.parametrize("warm", [True, False])
def test_converges_to_the_exact_optimum(data, warm):
    """Means within 0.1 sigma, as the page asks of any reference."""
    ours, spread = found(data, warm_start=warm)
    mu, sigma = exact(data)
    assert apart(ours, mu, sigma) < 0.1
    assert float((spread / sigma).log().abs().max()) < 0.1


def test_a_kl_counted_once_a_batch_counts_that_often(data):
    """Four batches an epoch and kl_weight 1 are the optimum of a KL counted four times."""
    how = Inference(kl_weight=1.0, batch_size=50)
    assert how.over_elbo(200) == 4
    ours, _ = found(data, kl_weight=1.0, batch_size=50 * COPIES)
    (mu, sigma), (single, _) = exact(data, 4.0), exact(data)
    assert apart(ours, mu, sigma) < 0.1
    assert apart(single, mu, sigma) > 0.5  # so they can be told apart


def test_importance_of_examples_is_repetition(data):
    """An example with weight 3 counts as three: the same optimum as with three copies."""
    importance = torch.ones(200)
    importance[:60] = 3
    ours, _ = found(data, importance)
    few, rest = (data.x[:60], data.y[:60]), (data.x[60:], data.y[60:])
    repeated = Labelled(
        *(torch.cat([more, *[some] * 3]) for some, more in zip(few, rest, strict=True))
    )
    (mu, sigma), (plain, _) = exact(repeated), exact(data)
    assert apart(ours, mu, sigma) < 0.1
    assert apart(plain, mu, sigma) > 0.2


@pytest.mark.slow
def test_agrees_with_pyro(data):
    """Mean-field SVI on the same model: posterior means within 0.1 sigma."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyro = pytest.importorskip("pyro", reason="pyro-ppl is not installed")
        from pyro import distributions as dist
        from pyro.infer import SVI, TraceMeanField_ELBO
        from pyro.infer.autoguide import AutoNormal
        from pyro.optim import ClippedAdam

        problem = copied(data)

        def model():
            prior = dist.Normal(MEAN.repeat(COPIES), STD).to_event(1)
            theta = pyro.sample("theta", prior)
            likelihood = dist.Bernoulli(logits=problem.x @ theta).to_event(1)
            pyro.sample("y", likelihood, obs=problem.y.float())

        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoNormal(model)
        optimiser = ClippedAdam({"lr": 2e-2, "lrd": 0.1 ** (1 / 800)})
        svi = SVI(model, guide, optimiser, TraceMeanField_ELBO())
        for _ in range(800):
            svi.step()
        theirs = guide.median()["theta"].detach().double().reshape(COPIES, 4).mean(0)
    ours, sigma = found(data)
    assert apart(ours, theirs, sigma) < 0.1
