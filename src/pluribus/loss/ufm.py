"""UFM: learn from guesses on weak views that must hold for strong ones; no labels.

Zhang et al., aTLAS, NeurIPS 2024, https://arxiv.org/abs/2407.02880, section 4.3 and appendix; a
form of FixMatch, Sohn et al., https://arxiv.org/abs/2001.07685.

    q    = softmax(f(weak))^(1/T), renormalised; one-hot for a trusted input     (b, v)
    w_b  = 1[max q_b > threshold]
    loss = sum_b w_b CE(f(strong)_b, q_b) / max(sum_b w_b, 1)

Sharpening is a power, that is, softmax of the scores over T; the authors' code multiplies by T and
renormalises, which changes nothing. "adaptive" lowers the bar of classes that are rarely sure, as
FlexMatch does (Zhang et al., https://arxiv.org/abs/2110.08263, equations 5 to 11):

    n_c   = inputs whose last sure guess (max q > top) is class c; n_0 those with none
    bar_c = top * M(n_c / max(max_c n_c, n_0)),     M(x) = x / (2 - x)
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pluribus.core.errors import InputError
from pluribus.core.merger import Fraction, Positive
from pluribus.loss import logits_of, loss

if TYPE_CHECKING:
    from torch import Tensor


@loss("ufm", paper="arXiv:2407.02880", needs="guesses")
@dataclass(frozen=True, kw_only=True)
class Ufm:
    """Cross-entropy of strong views with sure guesses on weak ones."""

    threshold: Literal["adaptive"] | Fraction = 0.99
    temperature: Positive = 0.5
    top: Fraction = 0.99  # the highest bar, if threshold is "adaptive"

    @property
    def sure(self) -> float:
        """The bar that an input must pass to count as learnt."""
        return self.top if self.threshold == "adaptive" else self.threshold

    def bars(self, counts: "Tensor", unsure: int) -> "Tensor":
        """Return each class's bar, (v,), from how many inputs are surely of it."""
        if self.threshold != "adaptive":
            return counts.float().new_full(counts.shape, self.threshold)
        most = max(int(counts.max()), unsure, 1)
        reached = counts.float() / most
        return self.top * reached / (2 - reached)

    def guess(self, outputs: "Tensor", trusted: "Tensor | None" = None) -> "Tensor":
        """Return the guesses q, (b, v), without a gradient.

        `trusted` gives the label of each trusted input and -1 for others, (b,).
        """
        q = (logits_of(outputs).detach() / self.temperature).softmax(-1)
        if trusted is not None:
            known = trusted >= 0
            q[known] = 0.0
            q[known, trusted[known]] = 1.0
        return q

    def __call__(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Return the loss, (); of no sure guess it is 0.

        Rows of zeros don't count: that is how a bar of a class's own is applied (see `masked`).
        Raises InputError for guesses of another shape.
        """
        outputs = logits_of(outputs)
        if targets is None or targets.shape != outputs.shape:
            given = "nothing" if targets is None else str(list(targets.shape))
            raise InputError(
                f"ufm compares scores {list(outputs.shape)} with guesses of the same shape, not "
                f"{given}; its batches are mappings with 'weak' and 'strong' views"
            )
        bar = 0.0 if self.threshold == "adaptive" else self.threshold
        counted = (targets.amax(1) > bar).to(outputs.dtype)
        each = -(targets * outputs.log_softmax(-1)).sum(-1)
        return (counted * each).sum() / counted.sum().clamp(min=1)


def masked(q: "Tensor", bars: "Tensor") -> "Tensor":
    """Return the guesses with zeros where the class named is not surer than its bar: (b, v)."""
    highest, named = q.max(1)
    return q * (highest > bars[named])[:, None]
