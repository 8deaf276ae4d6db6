"""A vector as a combination of a few given ones: matching pursuit, and nearest neighbours.

    min_c |x - sum_i c_i p_i|,  at most k of the c_i not 0        x: (d,), p: (n, d), c: (n,)

The same c over another model's vectors for the same tokens is the approximation there.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Weighting = Literal["distance_proportional", "barycentric", "least_squares"]
NOTHING = 1e-6  # a residual of this share of its vector is rounding noise in float32
SPANNED = 1e-5  # likewise what is left of a point beside those chosen before


class Mix(NamedTuple):
    """Combinations of k points for b vectors."""

    index: "Tensor"  # (b, k), int64
    share: "Tensor"  # (b, k), float32

    def of(self, points: "Tensor") -> "Tensor":
        """Return the combinations (b, d) of points (n, d)."""
        return (self.share.to(points.dtype)[:, None] @ points[self.index])[:, 0]


def pursue(targets: "Tensor", points: "Tensor", k: int) -> Mix:
    """Orthogonal matching pursuit (Pati et al. 1993), for all targets (b, d) at once.

    Each step takes the point (n, d) of the largest inner product with what is left, as it is and
    not scaled to unit length (as mergekit 0.1.5 does), and fits all points chosen so far. Each new
    point is made orthogonal twice, which keeps the basis orthogonal to rounding error. A target
    that is met, or has nothing left that a point could explain, takes no further points: their
    shares are 0.
    """
    import torch

    (b, d), k = targets.shape, min(k, len(points))
    basis = targets.new_zeros(b, k, d)
    upper = torch.eye(k, dtype=targets.dtype, device=targets.device).repeat(b, 1, 1)
    along = targets.new_zeros(b, k)
    index = torch.zeros(b, k, dtype=torch.long, device=targets.device)
    taken = torch.zeros(b, len(points), dtype=torch.bool, device=targets.device)
    left = targets.clone()
    enough = NOTHING * targets.norm(dim=1)
    live = torch.ones(b, dtype=torch.bool, device=targets.device)
    for t in range(k):
        live &= left.norm(dim=1) > enough
        if not live.any():
            break
        best = (left @ points.T).abs_().masked_fill_(taken, -1.0).argmax(1)
        index[:, t] = best
        taken.scatter_(1, best[:, None], True)
        point = points[best]
        rest, inside = point, targets.new_zeros(b, t)
        for _ in range(2):
            part = (basis[:, :t] @ rest[:, :, None])[:, :, 0]
            rest = rest - (part[:, None] @ basis[:, :t])[:, 0]
            inside = inside + part
        length = rest.norm(dim=1)
        live &= length > SPANNED * point.norm(dim=1)
        unit = torch.where(live[:, None], rest / length.clamp_min(1e-30)[:, None], 0.0)
        basis[:, t] = unit
        upper[:, :t, t] = torch.where(live[:, None], inside, 0.0)
        upper[:, t, t] = torch.where(live, length, 1.0)
        along[:, t] = (unit * left).sum(1)
        left = left - along[:, t, None] * unit
    share = torch.linalg.solve_triangular(upper, along[:, :, None], upper=True)[:, :, 0]
    return Mix(index, share)


def nearest(
    targets: "Tensor", points: "Tensor", k: int, weighting: Weighting, cosine: bool = False
) -> Mix:
    """Combine the k nearest points, by Euclidean or cosine distance.

    "distance_proportional" weighs them by 1 / distance (cosine: by similarity), normalised to sum
    1; "barycentric" are the weights of sum 1, "least_squares" any weights, that come nearest to the
    target; where several do, the smallest.
    """
    import torch

    k = min(k, len(points))
    if cosine:
        lengths = targets.norm(dim=1)[:, None] * points.norm(dim=1)
        far = 1 - (targets @ points.T) / lengths.clamp_min(1e-6)
        far, index = far.topk(k, dim=1, largest=False)
    else:
        # Expanded squares find the neighbours; their distances are then taken without cancelling.
        squares = points.square().sum(1) - 2 * (targets @ points.T)
        index = squares.topk(k, dim=1, largest=False).indices
        far = (points[index] - targets[:, None]).norm(dim=2)
    if weighting == "distance_proportional":
        share = 1 - far if cosine else 1 / far.clamp_min(1e-6)
        total = share.sum(1, keepdim=True)
        even = torch.full_like(share, 1 / k)
        return Mix(index, torch.where(total > 1e-6, share / total, even))
    near, goal = points[index].double(), targets.double()[:, :, None]
    if weighting == "least_squares":
        share = torch.linalg.pinv(near.mT) @ goal
    else:  # stationary point of the Lagrangian of sum 1
        system = near.new_ones(len(near), k + 1, k + 1)
        system[:, :k, :k] = near @ near.mT
        system[:, k, k] = 0
        right = torch.cat([near @ goal, goal.new_ones(len(near), 1, 1)], 1)
        share = (torch.linalg.pinv(system, hermitian=True) @ right)[:, :k]
    return Mix(index, share[:, :, 0].to(targets.dtype))
