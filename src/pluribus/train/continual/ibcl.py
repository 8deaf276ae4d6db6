"""IBCL: a credal set of posteriors that grows with the tasks, and models for any preference.

Lu et al., https://arxiv.org/abs/2310.02995 (also 2305.14782), algorithms 1 and 2; code at
github.com/ibcl-anon/ibcl, `fgcs_update.py` and `zero_shot_model_locate.py`.

    learn task i:  q_i^j = inference with prior q_{i-1}^j on task i's data,   j = 1..m
                   (q_0^j = N(0, s_j^2)); if a stored point lies within d_thr, it stands for q_i^j
                   (reuse[i, j]) and is the next prior, else q_i^j is stored
    ask for w:     beta_{i,j} = w_i / m through the reuse map
                   mean = sum beta mu, std = sum beta sigma, model in the mean's box of `mass`

At most m networks are trained a task, none a preference. Points are never changed after they are
stored, so what a preference over learned tasks gives stays as it is.

Differs from the authors' code: see `posterior` and `variational`; data comes as features, since
what makes them (a frozen encoder) is nobody's posterior.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Generator, nn

from pluribus.core.errors import InputError
from pluribus.train.continual import metrics, report, store
from pluribus.train.continual.network import Labelled, Network, State, stream
from pluribus.train.continual.posterior import Distance, GaussianPosterior, combined
from pluribus.train.continual.preference import Preference, shares
from pluribus.train.continual.preference import sweep as preferences
from pluribus.train.continual.variational import Inference, centred, fit


class Learned(NamedTuple):
    """What one task added to the knowledge base."""

    task: str
    points: tuple[int, ...]  # the point that stands for each of the m posteriors
    stored: tuple[bool, ...]  # whether that is a new one
    nearest: tuple[float | None, ...]  # distance to the nearest point stored before it
    examples: int
    steps: int


class CredalBase:
    """A knowledge base over one small network; `learn` tasks, then ask for models.

    `net_factory` makes the network: its output is one logit a row (labels 0 and 1) or C of them.
    `prior_stds` are the m first priors. `d_thr` is in the units of `distance`: "official" divides
    by the number of weights, "w2" does not. The rest is in `Inference`. Raises InputError for no
    priors, a standard deviation or learning rate that is not above 0, and a negative `d_thr`.
    """

    def __init__(
        self,
        net_factory: Callable[[], nn.Module],
        prior_stds: Sequence[float] = (0.2, 0.25, 0.3),
        *,
        d_thr: float = 0.01,
        distance: Distance = "official",
        kl_weight: float | Literal["elbo"] = 1.0,
        warm_start: bool = True,
        epochs: int = 10,
        steps: int | None = None,
        lr: float = 1e-3,
        batch_size: int = 64,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        if not len(prior_stds):
            raise InputError("prior_stds is empty: give at least one, such as (0.2, 0.25, 0.3)")
        if not (isfinite(d_thr) and d_thr >= 0):
            raise InputError(f"d_thr = {d_thr!r}: give a distance of 0 (nothing is reused) or more")
        if distance not in ("official", "w2"):
            raise InputError(f"distance {distance!r}: there are 'official' and 'w2'")
        self.inference = Inference(
            kl_weight=kl_weight,
            warm_start=warm_start,
            epochs=epochs,
            steps=steps,
            lr=lr,
            batch_size=batch_size,
        )
        self.prior_stds = tuple(float(std) for std in prior_stds)
        self.d_thr, self.seed = float(d_thr), seed
        self.distance: Distance = distance
        self.network = Network(net_factory, device)
        self._priors = tuple(centred(self.network, std) for std in self.prior_stds)
        self._points: list[GaussianPosterior] = []
        self._learned: list[Learned] = []

    # -- what is known ---------------------------------------------------------------------------

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks learned, in their order."""
        return tuple(learned.task for learned in self._learned)

    @property
    def points(self) -> tuple[GaussianPosterior, ...]:
        """The stored extreme points."""
        return tuple(self._points)

    @property
    def learned(self) -> tuple[Learned, ...]:
        """What each task added, in their order."""
        return tuple(self._learned)

    @property
    def reuse(self) -> dict[str, tuple[int, ...]]:
        """For each task the numbers of the points that stand for its m posteriors."""
        return {learned.task: learned.points for learned in self._learned}

    # -- learning --------------------------------------------------------------------------------

    def learn(self, task_name: str, data: Any) -> Learned:
        """Find the m posteriors of a task and store those that are new.

        `data` is a pair (features (b, ...), labels (b,)) or batches of such pairs. Raises
        InputError for a name that is taken or no data, and what `Network.checked` and `fit` raise;
        the knowledge base is then as it was.
        """
        if not task_name or task_name in self.tasks:
            raise InputError(
                f"the task name {task_name!r} is {'taken' if task_name else 'empty'}; learned "
                f"are: {', '.join(self.tasks) or 'none'}. Give another name"
            )
        known = self.network.checked(data, task_name)
        before = self._current()
        points, numbers = list(self._points), []
        stored, nearest, steps = [], [], 0
        for j, prior in enumerate(before):
            rng = stream(self.seed, task_name, f"point {j}")
            found = fit(self.network, prior, known, self.inference, rng, task=task_name)
            steps += found.steps
            gaps = [found.posterior.distance(point, self.distance) for point in points]
            closest = min(range(len(gaps)), key=gaps.__getitem__, default=None)
            nearest.append(None if closest is None else gaps[closest])
            if closest is None or gaps[closest] > self.d_thr:
                closest = None
                points.append(found.posterior)
            numbers.append(len(points) - 1 if closest is None else closest)
            stored.append(closest is None)
        self.network.settle(known, task_name)
        self._points = points
        self._learned.append(
            Learned(task_name, tuple(numbers), tuple(stored), tuple(nearest), len(known.y), steps)
        )
        return self._learned[-1]

    def _current(self) -> tuple[GaussianPosterior, ...]:
        if not self._learned:
            return self._priors
        return tuple(self._points[number] for number in self._learned[-1].points)

    # -- asking ----------------------------------------------------------------------------------

    def betas(self, preference: Preference, *, normalise: bool = False) -> tuple[float, ...]:
        """Return the share of every stored point. Raises InputError as `preference.shares` does."""
        parts = shares(preference, self.tasks, normalise=normalise)
        out = [0.0] * len(self._points)
        for part, learned in zip(parts, self._learned, strict=True):
            for number in learned.points:
                out[number] += part / len(learned.points)
        return tuple(out)

    def posterior(self, preference: Preference, *, normalise: bool = False) -> GaussianPosterior:
        """Return the one Gaussian of a preference, N(sum beta mu, diag (sum beta sigma)^2)."""
        return combined(self._points, self.betas(preference, normalise=normalise))

    def mean(self, preference: Preference, *, normalise: bool = False) -> State:
        """Return mu-bar, the middle of the preference's region, as a state dict on the CPU."""
        return self.posterior(preference, normalise=normalise).mu

    def model(
        self,
        preference: Preference,
        n: int = 1,
        mass: float = 0.01,
        *,
        independent: bool = True,
        combine: Literal["gaussian", "mixture"] = "gaussian",
        normalise: bool = False,
        generator: Generator | None = None,
    ) -> list[State]:
        """Return n models sampled for a preference, as state dicts on the CPU.

        "gaussian" draws evenly from the box in which every coordinate of the combined Gaussian has
        `mass` of its probability (with `independent=False` one number a tensor, as the code does).
        "mixture" draws a point by its share and then a model from that point, within its own box of
        `mass`, which keeps distinct modes apart. Without a generator the same question has the same
        answer. Raises InputError for a preference, mass or n that cannot be used.
        """
        if n < 1:
            raise InputError(f"n = {n!r}: ask for at least 1 model")
        if combine not in ("gaussian", "mixture"):
            raise InputError(f"combine = {combine!r}: there are 'gaussian' and 'mixture'")
        betas = self.betas(preference, normalise=normalise)
        rng = generator or stream(self.seed, repr(betas), "models")
        if combine == "gaussian":
            middle = combined(self._points, betas)
            return [middle.within(mass, rng, independent=independent) for _ in range(n)]
        import torch

        drawn = torch.multinomial(torch.tensor(betas), n, replacement=True, generator=rng)
        return [self._points[int(number)].truncated(mass, rng) for number in drawn]

    def sweep(
        self, task: str, points: int, rest: Preference | None = None
    ) -> Iterator[tuple[dict[str, float], State]]:
        """Give preferences whose share of one task rises from 0 to 1, each with its mu-bar."""
        for preference in preferences(task, points, self.tasks, rest):
            yield preference, self.mean(preference)

    def front(
        self,
        n_preferences: int | Iterable[Preference],
        data: Mapping[str, Any],
        *,
        models: int = 0,
        **sampling: Any,
    ) -> "metrics.AccuracyTable":
        """Return the accuracies on each task's data for random (or given) preferences.

        Every preference is answered by mu-bar, or by `models` sampled ones (`sampling` goes to
        `model`). Raises InputError if a learned task has no data.
        """
        asked = (
            metrics.drawn(self.tasks, n_preferences, stream(self.seed, "front", "preferences"))
            if isinstance(n_preferences, int)
            else list(n_preferences)
        )

        def answer(preference: Preference) -> list[State]:
            if models:
                return self.model(preference, models, **sampling)
            return [self.mean(preference)]

        return metrics.measure(answer, asked, self.checked(data), self.network.accuracy)

    def checked(self, data: Mapping[str, Any]) -> dict[str, Labelled]:
        """Return each learned task's data. Raises InputError for a task without any."""
        lacking = [task for task in self.tasks if task not in data]
        if lacking:
            raise InputError(f"there is no data for {', '.join(lacking)}; give it by task name")
        return {task: self.network.checked(data[task], task) for task in self.tasks}

    # -- telling ---------------------------------------------------------------------------------

    def cost(self) -> "report.Cost":
        """Return what has been trained and what is kept."""
        return report.cost(self)

    def report(self, mass: float = 0.01) -> "report.Report":
        """Return what is guaranteed, with warnings; `str` of it is for people."""
        return report.report(self, mass)

    # -- keeping ---------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write the knowledge base into a folder of its own, whole or not at all.

        Raises OutputError if the folder holds something else.
        """
        return store.save(self, Path(folder))

    @classmethod
    def load(
        cls, folder: str | Path, net_factory: Callable[[], nn.Module], device: str = "cpu"
    ) -> "CredalBase":
        """Read a knowledge base; the network's code is not in it, so the factory is given again.

        Raises MissingError or FormatError for files that are absent or not as written,
        MismatchError if the network has other weights, InputError for standard deviations of 0 or
        less.
        """
        settings, points, learned, shape = store.load(Path(folder))
        base = cls(net_factory, **settings, device=device)
        empty = base._priors[0]
        for point in points:
            point.distance(empty)  # raises MismatchError for another network's tensors
        base._points = list(points)
        base._learned = [Learned(**entry) for entry in learned]
        base.network.features, base.network.outputs = shape
        return base

    def settings(self) -> dict[str, Any]:
        """Return all arguments but the network and the device, as plain values."""
        how = self.inference
        return {
            "prior_stds": self.prior_stds,
            "d_thr": self.d_thr,
            "distance": self.distance,
            "kl_weight": how.kl_weight,
            "warm_start": how.warm_start,
            "epochs": how.epochs,
            "steps": how.steps,
            "lr": how.lr,
            "batch_size": how.batch_size,
            "seed": self.seed,
        }
