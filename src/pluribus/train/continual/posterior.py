"""Diagonal Gaussians over named tensors: the extreme points of a credal set, and their sums.

IBCL, https://arxiv.org/abs/2310.02995; code at github.com/ibcl-anon/ibcl, `fgcs_update.py` and
`zero_shot_model_locate.py`.

    q(theta) = N(mu, diag sigma^2)                                    all tensors together: (n,)
    KL(q, p) = sum log(s_p / s_q) + (s_q^2 + (m_q - m_p)^2) / (2 s_p^2) - 1/2
    w2       = sqrt(|m_q - m_p|^2 + |s_q - s_p|^2)                    2-Wasserstein (the paper's)
    official = |m_q - m_p| / n + |s_q - s_p| / n                      (the code's)
    combined = N(sum beta mu, diag (sum beta sigma)^2)                a mean of standard deviations
    region   = mu +- sigma z,  z = PHI^-1((1 + mass) / 2)             per coordinate

Differs from the authors' code: that appends the standard deviations twice before the distance, so
their term there is sqrt(2) / 2n of the norm; here it is 1 / n. `mass` is the probability that an
interval holds; the code's alpha = 0.01 is mass = 0.01, where the paper's alpha would be 0.99.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from torch import Generator, Tensor

from pluribus.core.errors import InputError, MismatchError, NonFiniteError, listing
from pluribus.core.shapes import Float

Distance = Literal["official", "w2"]
State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class GaussianPosterior:
    """A mean and a standard deviation for every weight, by tensor name.

    Construction raises MismatchError if names or shapes differ, NonFiniteError for NaN or infinity,
    InputError if a standard deviation is not above 0.
    """

    mu: State
    sigma: State

    def __post_init__(self) -> None:
        _fit("the means", self.mu, "the standard deviations", self.sigma)
        for name, mean in self.mu.items():
            std = self.sigma[name]
            if not (mean.is_floating_point() and std.is_floating_point()):
                raise InputError(
                    f"{name}: mean and standard deviation are {mean.dtype} and {std.dtype}; "
                    "both must be floating point"
                )
            if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
                raise NonFiniteError(f"{name}: a mean or standard deviation is NaN or infinite")
            if not (std > 0).all():
                raise InputError(
                    f"{name}: a standard deviation is {float(std.min()):g}; all must be above 0"
                )

    @property
    def size(self) -> int:
        """Number of coordinates, n."""
        return sum(mean.numel() for mean in self.mu.values())

    def kl(self, other: "GaussianPosterior") -> float:
        """Return KL(self, other) in nats, added up in float64. Raises MismatchError."""
        _fit("one posterior", self.mu, "the other", other.mu)
        return sum(
            float(
                divergence(
                    self.mu[name].double(),
                    self.sigma[name].double(),
                    other.mu[name].double(),
                    other.sigma[name].double(),
                )
            )
            for name in self.mu
        )

    def distance(self, other: "GaussianPosterior", kind: Distance = "w2") -> float:
        """Return the distance of two posteriors; `kind` as in the module's formulas.

        Raises MismatchError for other tensors, InputError for another kind.
        """
        _fit("one posterior", self.mu, "the other", other.mu)
        means = sum(_squares(self.mu[name], other.mu[name]) for name in self.mu)
        stds = sum(_squares(self.sigma[name], other.sigma[name]) for name in self.sigma)
        if kind == "w2":
            return (means + stds) ** 0.5
        if kind == "official":
            return (means**0.5 + stds**0.5) / self.size
        raise InputError(f"distance {kind!r}: there are 'official' and 'w2'")

    def sample(self, generator: Generator) -> State:
        """Return one draw of all weights."""
        return {
            name: mean + self.sigma[name] * _like(mean, generator, torch.randn)
            for name, mean in self.mu.items()
        }

    def region(self, mass: float) -> tuple[State, State]:
        """Return the least and greatest weights of the central interval of every coordinate.

        Each interval holds `mass` of its coordinate's probability; the box of all n holds mass^n.
        Raises InputError for a mass outside (0, 1).
        """
        reach = NormalDist().inv_cdf((1 + _checked(mass)) / 2)
        low = {name: mean - self.sigma[name] * reach for name, mean in self.mu.items()}
        high = {name: mean + self.sigma[name] * reach for name, mean in self.mu.items()}
        return low, high

    def within(self, mass: float, generator: Generator, *, independent: bool = True) -> State:
        """Draw weights evenly from the region: one number a coordinate, or one a tensor.

        The authors' code draws one for each weight tensor (`independent=False`), which moves all
        its weights together along one line.
        """
        low, high = self.region(mass)
        out = {}
        for name in low:
            like = low[name] if independent else low[name].new_empty(())
            out[name] = torch.lerp(low[name], high[name], _like(like, generator, torch.rand))
        return out

    def truncated(self, mass: float, generator: Generator) -> State:
        """Draw weights from the posterior itself, given that each lies in its interval."""
        _checked(mass)
        out = {}
        for name, mean in self.mu.items():
            place = 0.5 + mass * (_like(mean, generator, torch.rand).double() - 0.5)
            deviation = torch.special.ndtri(place).to(mean.dtype)
            out[name] = mean + self.sigma[name] * deviation
        return out


def divergence(
    mu: Float[Tensor, "*n"],
    sigma: Float[Tensor, "*n"],
    prior_mu: Float[Tensor, "*n"],
    prior_sigma: Float[Tensor, "*n"],
) -> Float[Tensor, ""]:
    """Return the KL divergence of a diagonal Gaussian from another, in nats."""
    spread = (sigma / prior_sigma).square()
    shift = ((mu - prior_mu) / prior_sigma).square()
    return 0.5 * (spread + shift - 1 - spread.log()).sum()


def combined(points: Sequence[GaussianPosterior], betas: Sequence[float]) -> GaussianPosterior:
    """Return the one Gaussian of a weighted set: N(sum beta mu, diag (sum beta sigma)^2).

    Both sums are merges by `linear` without normalisation, so the mean is, bit for bit, what the
    merge engine makes of the points' means as checkpoints.
    """
    return GaussianPosterior(
        weighted([point.mu for point in points], betas),
        weighted([point.sigma for point in points], betas),
    )


def weighted(states: Sequence[Mapping[str, Tensor]], betas: Sequence[float]) -> State:
    """Return sum_j beta_j state_j through the merge engine, rounded once to the states' type."""
    from pluribus.core.registry import MERGERS
    from pluribus.engine.driver import merge_tensors

    used = [(state, beta) for state, beta in zip(states, betas, strict=True) if beta]
    method = MERGERS.build(
        "linear", {"weight": tuple(beta for _, beta in used), "normalize": False}
    )
    return merge_tensors(None, [state for state, _ in used], method, threads=1)


def _fit(one: str, tensors: Mapping[str, Tensor], other: str, others: Mapping[str, Tensor]) -> None:
    if set(tensors) != set(others):
        apart = sorted(set(tensors) ^ set(others))
        raise MismatchError(f"{one} and {other} name different tensors: {listing(apart)}")
    for name, tensor in tensors.items():
        if tensor.shape != others[name].shape:
            raise MismatchError(
                f"{name} is {list(tensor.shape)} in {one}, but {list(others[name].shape)} in "
                f"{other}"
            )
    if not tensors:
        raise InputError(f"{one} hold no tensor; give at least one")


def _squares(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).square().sum())


def _checked(mass: float) -> float:
    if not 0 < mass < 1:
        raise InputError(
            f"mass = {mass!r}: give the probability that each coordinate's interval holds, above 0 "
            "and below 1 (0.01 is a tight box around the mean)"
        )
    return mass


def _like(tensor: Tensor, generator: Generator, draw: Callable[..., Tensor]) -> Tensor:
    """Draw numbers on the generator's device, in float32, and move them to the tensor's."""
    drawn = draw(tensor.shape, generator=generator, device=generator.device)
    return drawn.to(tensor)
