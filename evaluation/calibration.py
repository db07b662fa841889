"""Probabilities of the labels: AUROC, sensitivity, calibration, and accuracy when unsure answers are withheld."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from evaluation.abstention import abstention_level
from evaluation.metrics import (
    MIN_CLUSTERS,
    MIN_LABEL_CLUSTERS,
    bootstrap_weights,
    clusters_by_label,
    count_clusters,
    fewest_clusters,
    interval,
    rounded,
)

BINS = 10  # of confidence, for the calibration error
MIN_CALIBRATION = 50  # samples, five a bin; with fewer the error says more about chance than about the model
SPECIFICITY = 0.9  # at which sensitivity is reported
MIN_NEGATIVES = 10  # samples without the label that a threshold at that specificity is taken from
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class LabelScores:
    """Log-likelihoods (N, K) of K labels' answers to N samples, the true labels (N,) and the clusters (N,)."""

    labels: list[str]
    logits: np.ndarray
    true: np.ndarray
    clusters: np.ndarray


def fit_temperature(scores: LabelScores) -> float:
    """Return the temperature that minimises the negative log-likelihood of the true labels.

    Source:
        Guo et al., On Calibration of Modern Neural Networks, 2017.
    """

    def loss(log_temperature: float) -> float:
        logs = log_softmax(scores.logits / np.exp(log_temperature), axis=1)
        return -logs[np.arange(len(scores.true)), scores.true].mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x))


def probability_metrics(
    scores: LabelScores, *, validation: LabelScores | None = None, sensitivity_of: list[str]
) -> dict:
    """Return the metrics of the labels' probabilities, the softmax over their answers' log-likelihoods.

    Args:
        scores: of the samples to evaluate.
        validation: of another split, that temperature and thresholds are taken from; without it there are no metrics
            after temperature scaling, and the thresholds are those of the evaluated samples.
        sensitivity_of: labels whose sensitivity at `SPECIFICITY` is reported.
    """
    weights, clusters = bootstrap_weights(scores.clusters), count_clusters(scores.clusters)
    probabilities = softmax(scores.logits, axis=1)
    correct = probabilities.argmax(1) == scores.true
    metrics = {
        "choice_accuracy": interval(correct.mean(), weights @ correct / weights.sum(1), clusters),
        **_ranking_metrics(scores, probabilities, weights),
        "abstention": accuracy_by_coverage(probabilities, scores.true),
        "sensitivity": {label: _sensitivity(scores, validation, label, weights) for label in sensitivity_of},
    }
    if enough := len(scores.true) >= MIN_CALIBRATION and clusters >= MIN_CLUSTERS:
        metrics["calibration"] = _calibration(probabilities, scores.true)
    if validation is not None:
        temperature = fit_temperature(validation)
        metrics |= {"temperature": rounded(temperature), "validation_samples": len(validation.true)}
        metrics["abstain"] = abstention_level(softmax(validation.logits / temperature, axis=1), validation.true)
        if enough:
            metrics["calibration_tempered"] = _calibration(softmax(scores.logits / temperature, axis=1), scores.true)
    return metrics


def _ranking_metrics(scores: LabelScores, probabilities: np.ndarray, weights: np.ndarray) -> dict:
    """Return AUROC and average precision of each label against all others, and their means over the labels."""
    per_label, resampled = {}, []
    for number, label in enumerate(scores.labels):
        positive, probability = scores.true == number, probabilities[:, number]
        if positive.all() or not positive.any():
            continue  # undefined without positives and negatives
        resampled.append(auroc(probability, positive, weights))
        per_label[label] = {
            "auroc": rounded(auroc(probability, positive, np.ones((1, len(positive))))[0]),
            "average_precision": rounded(average_precision(probability, positive)),
        }
    if not per_label:
        return {"macro_auroc": interval(np.nan, np.array([]), 0), "per_label": {}}
    clusters = count_clusters(scores.clusters)
    if fewest_clusters(scores.true, scores.clusters) < MIN_LABEL_CLUSTERS:
        clusters = 0
    means = {name: np.mean([row[name] for row in per_label.values()]) for name in ("auroc", "average_precision")}
    return {
        "macro_auroc": interval(
            means["auroc"],
            np.mean(resampled, axis=0),
            clusters,
            spread=clusters_by_label(scores.true, scores.clusters),
        ),
        "macro_average_precision": rounded(means["average_precision"]),
        "per_label": per_label,
    }


def _roc_points(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return true and false positive rates at each of U distinct scores, the highest first: shapes (R, U).

    scikit-learn takes one set of weights at a time; here are a thousand resamples for every label.
    """
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.inf))
    with np.errstate(invalid="ignore"):
        rates = [
            np.add.reduceat(weights[:, order] * side[order], starts, axis=1).cumsum(1) / (weights @ side)[:, None]
            for side in (positive, ~positive)
        ]
    return rates[0], rates[1]


def auroc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve for each row of weights, shape (R,); NaN without positives or negatives.

    Args:
        score: shape (N,).
        positive: shape (N,), bool.
        weights: of each sample, shape (R, N).
    """
    true_rate, false_rate = _roc_points(score, positive, weights)
    zero = np.zeros((len(weights), 1))
    return np.trapezoid(np.hstack([zero, true_rate]), np.hstack([zero, false_rate]), axis=1)


def average_precision(score: np.ndarray, positive: np.ndarray) -> float:
    """Return the mean precision at each score where recall rises, weighted by how much; the arguments of `auroc`."""
    recall, false_rate = (rates[0] for rates in _roc_points(score, positive, np.ones((1, len(score)))))
    hits, misses = recall * positive.sum(), false_rate * (~positive).sum()
    return float(np.sum(np.diff(recall, prepend=0) * hits / (hits + misses)))


def _sensitivity(scores: LabelScores, validation: LabelScores | None, label: str, weights: np.ndarray) -> dict:
    """Return the sensitivity for a label, and the specificity, at a threshold taken from `validation`.

    Without it, or with fewer than `MIN_NEGATIVES` samples of other labels there, the threshold is that of the
    evaluated samples, which makes the sensitivity too high. The number of clusters is that of those with the label.
    """
    number = scores.labels.index(label)
    positive, probability = scores.true == number, softmax(scores.logits, axis=1)[:, number]
    source = "validation"
    if validation is None or (validation.true != number).sum() < MIN_NEGATIVES:
        source, validation = "evaluated", scores
    negatives = softmax(validation.logits, axis=1)[validation.true != number, number]
    above = probability > threshold_at_specificity(negatives)
    return {
        **_share(above, positive & (len(negatives) > 0), weights, scores.clusters),
        "specificity": SPECIFICITY,
        "threshold_from": source,
        "threshold_negatives": len(negatives),
        "specificity_found": _share(~above, ~positive, weights, scores.clusters),
        "positives": int(positive.sum()),
        "clusters": count_clusters(scores.clusters[positive]),
    }


def threshold_at_specificity(negatives: np.ndarray) -> float:
    """Return the lowest score that at most a share of 1 - `SPECIFICITY` of the negatives exceeds; NaN without any."""
    allowed = int((1 - SPECIFICITY) * len(negatives) + 1e-9)
    return np.sort(negatives)[::-1][allowed] if len(negatives) else np.nan


def _share(hit: np.ndarray, among: np.ndarray, weights: np.ndarray, clusters: np.ndarray) -> dict:
    """Return the share of hits among the samples of a mask, with its interval."""
    with np.errstate(invalid="ignore"):
        resampled = weights @ (hit & among) / (weights @ among)
    value = hit[among].mean() if among.any() else np.nan
    return interval(value, resampled, count_clusters(clusters[among]))


def _calibration(probabilities: np.ndarray, true: np.ndarray) -> dict:
    """Return the expected calibration error over `BINS` equal bins of confidence, and the bins that hold samples.

    It has no interval: it is too high by chance, resamples are so twice, and their percentiles can all exceed it.
    """
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == true
    bin_number = np.minimum((confidence * BINS).astype(int), BINS - 1)
    masks = [bin_number == number for number in np.unique(bin_number)]
    error = sum(abs((confidence - correct)[mask].sum()) for mask in masks) / len(true)
    bins = [
        {
            "samples": int(mask.sum()),
            "confidence": rounded(confidence[mask].mean()),
            "accuracy": rounded(correct[mask].mean()),
        }
        for mask in masks
    ]
    return {"expected_calibration_error": rounded(error), "bins": bins}


def accuracy_by_coverage(probabilities: np.ndarray, true: np.ndarray) -> list[dict]:
    """Return the accuracy over the most confident share of the samples, for each share in `COVERAGES`."""
    order = np.argsort(-probabilities.max(1), kind="stable")
    correct = (probabilities.argmax(1) == true)[order]
    sizes = [max(1, round(coverage * len(true))) for coverage in COVERAGES]
    return [
        {"coverage": coverage, "accuracy": rounded(correct[:size].mean())}
        for coverage, size in zip(COVERAGES, sizes, strict=True)
    ]
