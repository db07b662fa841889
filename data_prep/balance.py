"""Sampling weights of training samples: higher for rare labels, and by the requested shares of the sources."""

import random
from bisect import bisect_left
from collections import Counter, defaultdict
from itertools import accumulate

MODES = {"none": 0.0, "sqrt": 0.5, "full": 1.0}  # a label's samples are drawn by count ** -exponent


def sampling_weights(
    labels: list[str | None], sources: list[str], *, balance: str = "none", shares: dict[str, float] | None = None
) -> list[float]:
    """Return a weight for each training sample; their mean is 1.

    Args:
        labels: label of each sample; those without one count as one label.
        sources: source of each sample.
        balance: "none", "sqrt" (between) or "full" (all labels equally often).
        shares: relative share of each source; by their numbers of samples when None.

    Raises:
        ValueError: an unknown mode.
    """
    if balance not in MODES:
        raise ValueError(f"balance: expected one of {', '.join(MODES)}, found {balance!r}")
    counts = Counter(labels)
    weights = [counts[label] ** -MODES[balance] for label in labels]
    if shares:
        totals = defaultdict(float)
        for source, weight in zip(sources, weights, strict=True):
            totals[source] += weight
        weights = [shares[source] * weight / totals[source] for source, weight in zip(sources, weights, strict=True)]
    scale = len(weights) / sum(weights) if weights else 1.0
    return [weight * scale for weight in weights]


def effective_counts(labels: list[str | None], weights: list[float]) -> dict[str | None, float]:
    """Return the mean number of samples of each label in an epoch."""
    counts = defaultdict(float)
    for label, weight in zip(labels, weights, strict=True):
        counts[label] += weight
    return dict(counts)


def draw(weights: list[float], *, seed: int) -> list[int]:
    """Return as many indices as there are weights, each in proportion to its weight (systematic sampling).

    One random offset and even steps from there: an index with weight w appears floor(w) or ceil(w) times.
    """
    ends = list(accumulate(weights))
    step = ends[-1] / len(weights)
    start = random.Random(seed).random() * step
    return [min(bisect_left(ends, start + n * step), len(weights) - 1) for n in range(len(weights))]
