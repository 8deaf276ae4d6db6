"""Slow, obvious versions in numpy and scipy, in float64: one row, one candidate at a time."""

import itertools

import numpy as np
from scipy.special import log_softmax
from scipy.stats import entropy


def grid_search(large, base, experts, grid, mode="one_hot", selected=False):
    """Weights (t,) and fused log-probabilities (v,) of one row, candidates in order."""
    p, q = log_softmax(large), log_softmax(base)
    qs = [log_softmax(one) for one in experts]
    count = len(experts)
    there = [entropy(np.exp(one), np.exp(q)) for one in qs]
    back = [entropy(np.exp(q), np.exp(one)) for one in qs]
    if mode == "joint":
        candidates = [(np.array(c), None) for c in itertools.product(grid, repeat=count)]
    else:
        candidates = [(np.zeros(count), None)]
        for t in range(count):
            candidates += [(c * np.eye(count)[t], t) for c in grid if c]
    best, found = np.inf, None
    for a, chosen in candidates:
        fused = log_softmax(p + sum(a[t] * (qs[t] - q) for t in range(count)))
        one, other = entropy(np.exp(fused), np.exp(p)), entropy(np.exp(p), np.exp(fused))
        terms = [(one - there[t]) ** 2 + (other - back[t]) ** 2 for t in range(count)]
        one = min(terms) if chosen is None else terms[chosen]
        loss = one if selected else sum(terms)
        if loss < best - 1e-15:
            best, found = loss, (a, fused)
    return found


def shifted(large, base, experts, weights):
    """log softmax of large + sum_t w_t (expert_t - base), of one row."""
    total = large.copy()
    for expert, weight in zip(experts, weights, strict=True):
        total = total + weight * (log_softmax(expert) - log_softmax(base))
    return log_softmax(total)


def nucleus(logits, p):
    """The smallest set of likeliest tokens with mass p at least, of one row."""
    probabilities = np.exp(log_softmax(logits))
    kept, mass = np.zeros(len(logits), bool), 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        if mass >= p:
            break
        kept[token] = True
        mass += probabilities[token]
    return kept
