"""The adapter beside another run on the same samples: paired differences, a test, and what a gain consists of."""

from math import gcd

import numpy as np

from evaluation.calibration import LabelScores
from evaluation.metrics import (
    MAIN_METRICS,
    Diagnoses,
    bootstrap_weights,
    compute_metrics,
    confusion_counts,
    count_clusters,
    interval,
    rounded,
    spread_of,
)


def compare_paired(ours: Diagnoses, theirs: Diagnoses) -> dict:
    """Return the differences of `MAIN_METRICS`, ours minus theirs on the same samples, and a permutation test."""

    def differences(weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        first, second = (compute_metrics(confusion_counts(diagnoses, weights)) for diagnoses in (ours, theirs))
        return {name: first[name] - second[name] for name in MAIN_METRICS}

    points, resampled = differences(), differences(bootstrap_weights(ours.clusters))
    clusters = count_clusters(ours.clusters)
    correct, their_correct = (diagnoses.answered == diagnoses.true for diagnoses in (ours, theirs))
    return {
        "samples": len(correct),
        "clusters": clusters,
        "our_accuracy": rounded(correct.mean()),
        **{
            name: {"difference": interval(points[name][0], resampled[name], clusters, spread=spread_of(name, ours))}
            for name in MAIN_METRICS
        },
        "permutation_test": {
            "better": int((correct & ~their_correct).sum()),
            "worse": int((~correct & their_correct).sum()),
            "p": permutation_test(correct.astype(int) - their_correct, ours.clusters),
        },
    }


def permutation_test(differences: np.ndarray, clusters: np.ndarray) -> float:
    """Return the two-sided p-value of a sum of paired differences, to three digits.

    If the two runs are exchangeable, the samples of a cluster may all swap runs: the sign of each cluster's sum flips
    with probability 1/2. All 2^clusters signs are enumerated, as the distribution of their sum. With one sample a
    cluster this is McNemar's exact test.

    Args:
        differences: correct by the one run minus correct by the other, -1, 0 or 1, shape (N,).
        clusters: number of each sample's cluster, shape (N,).
    """
    sums = np.abs(np.bincount(np.unique(clusters, return_inverse=True)[1], weights=differences)).astype(int)
    observed = abs(int(differences.sum()))
    step = gcd(*sums.tolist()) or 1
    shares = np.ones(1)  # probability of each sum, from -total to total in steps of two `step`
    for size in sums[sums > 0] // step:
        shares = (np.pad(shares, (0, size)) + np.pad(shares, (size, 0))) / 2
    totals = np.abs(np.arange(len(shares)) * 2 - (len(shares) - 1)) * step
    return float(f"{min(1.0, shares[totals >= observed].sum()):.3g}")


def split_gain(ours: Diagnoses, theirs: Diagnoses, our_scores: LabelScores, their_scores: LabelScores) -> dict:
    """Return which part of the difference in accuracy is knowledge and which is form.

    A model that answers in other words than the labels' names is wrong by form alone. The likelihoods of the labels do
    not depend on that: the difference in accuracy of the likeliest label is knowledge, the rest of the gain is form.
    """
    answers = (ours.answered == ours.true).astype(int) - (theirs.answered == theirs.true)
    choices = [scores.logits.argmax(1) == scores.true for scores in (our_scores, their_scores)]
    knowledge = choices[0].astype(int) - choices[1]
    weights, clusters = bootstrap_weights(ours.clusters), count_clusters(ours.clusters)

    def mean(values: np.ndarray) -> dict:
        return interval(values.mean(), weights @ values / weights.sum(1), clusters)

    return {
        "knowledge": {**mean(knowledge), "p": permutation_test(knowledge, ours.clusters)},
        "form": mean(answers - knowledge),
    }
