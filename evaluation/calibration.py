"""Probabilities of the labels: AUROC, sensitivity, calibration, and accuracy when unsure answers are withheld."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import average_precision_score, roc_auc_score

from evaluation.metrics import bootstrap_weights, interval, rounded

BINS = 10  # of confidence, for the calibration error
SPECIFICITY = 0.9  # at which sensitivity is reported
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class LabelScores:
    """Log-likelihoods (N, K) of K labels' answers to N samples, the true labels (N,) and the groups (N,)."""

    labels: list[str]
    logits: np.ndarray
    true: np.ndarray
    groups: np.ndarray


def fit_temperature(scores: LabelScores) -> float:
    """Return the temperature that minimises the negative log-likelihood of the true labels.

    Source:
        Guo et al., On Calibration of Modern Neural Networks, 2017.
    """

    def loss(log_temperature: float) -> float:
        logs = log_softmax(scores.logits / np.exp(log_temperature), axis=1)
        return -logs[np.arange(len(scores.true)), scores.true].mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x))


def probability_metrics(scores: LabelScores, *, temperature: float | None, sensitivity_of: list[str]) -> dict:
    """Return the metrics of the labels' probabilities, the softmax over their answers' log-likelihoods.

    Args:
        scores: of the samples to evaluate.
        temperature: fitted on another split; no metrics after temperature scaling when None.
        sensitivity_of: labels whose sensitivity at `SPECIFICITY` is reported.
    """
    weights = bootstrap_weights(scores.groups)
    probabilities = softmax(scores.logits, axis=1)
    correct = probabilities.argmax(1) == scores.true
    metrics = {
        "choice_accuracy": interval(correct.mean(), weights @ correct / weights.sum(1)),
        **_ranking_metrics(scores, probabilities, weights),
        "calibration": _calibration(probabilities, scores.true, weights),
        "abstention": accuracy_by_coverage(probabilities, scores.true),
        "sensitivity": {label: _sensitivity(scores, probabilities, label, weights) for label in sensitivity_of},
    }
    if temperature is not None:
        scaled = softmax(scores.logits / temperature, axis=1)
        metrics["temperature"] = rounded(temperature)
        metrics["calibration_tempered"] = _calibration(scaled, scores.true, weights)
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
            "auroc": rounded(roc_auc_score(positive, probability)),
            "average_precision": rounded(average_precision_score(positive, probability)),
        }
    if not per_label:
        return {"macro_auroc": interval(np.nan, np.array([])), "per_label": {}}
    means = {name: np.mean([row[name] for row in per_label.values()]) for name in ("auroc", "average_precision")}
    return {
        "macro_auroc": interval(means["auroc"], np.mean(resampled, axis=0)),
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


def _sensitivity(scores: LabelScores, probabilities: np.ndarray, label: str, weights: np.ndarray) -> dict:
    """Return the highest sensitivity for a label at a specificity of at least `SPECIFICITY`."""
    number = scores.labels.index(label)
    positive = scores.true == number

    def at_specificity(weights: np.ndarray) -> np.ndarray:
        true_rate, false_rate = _roc_points(probabilities[:, number], positive, weights)
        best = np.where(false_rate <= 1 - SPECIFICITY + 1e-9, true_rate, 0).max(1)
        return np.where(np.isnan(true_rate[:, -1] + false_rate[:, -1]), np.nan, best)

    value = interval(at_specificity(np.ones((1, len(positive))))[0], at_specificity(weights))
    return {**value, "specificity": SPECIFICITY, "positives": int(positive.sum())}


def _calibration(probabilities: np.ndarray, true: np.ndarray, weights: np.ndarray) -> dict:
    """Return the expected calibration error over `BINS` equal bins of confidence, and the bins that hold samples."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == true
    bin_number = np.minimum((confidence * BINS).astype(int), BINS - 1)
    in_bin = bin_number[:, None] == np.arange(BINS)  # (N, BINS)

    def error(weights: np.ndarray) -> np.ndarray:
        return np.abs(weights @ (in_bin * (confidence - correct)[:, None])).sum(1) / weights.sum(1)

    means = [(int(mask.sum()), confidence[mask].mean(), correct[mask].mean()) for mask in in_bin.T if mask.any()]
    bins = [{"samples": n, "confidence": rounded(sure), "accuracy": rounded(share)} for n, sure, share in means]
    return {"expected_calibration_error": interval(error(np.ones((1, len(true))))[0], error(weights)), "bins": bins}


def accuracy_by_coverage(probabilities: np.ndarray, true: np.ndarray) -> list[dict]:
    """Return the accuracy over the most confident share of the samples, for each share in `COVERAGES`."""
    order = np.argsort(-probabilities.max(1), kind="stable")
    correct = (probabilities.argmax(1) == true)[order]
    sizes = [max(1, round(coverage * len(true))) for coverage in COVERAGES]
    return [
        {"coverage": coverage, "accuracy": rounded(correct[:size].mean())}
        for coverage, size in zip(COVERAGES, sizes, strict=True)
    ]
