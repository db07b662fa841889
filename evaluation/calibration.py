"""What the likelihood of each label's answer is worth: ranking, calibration, and when better to abstain."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import average_precision_score, roc_auc_score

from evaluation.metrics import interval, resample, rounded

BINS = 10  # of confidence, for the calibration error
SPECIFICITY = 0.9  # at which sensitivity is told
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Scores:
    """Log-likelihoods (N, K) of K labels' answers to N samples, the true labels (N,) and the groups (N,)."""

    labels: list[str]
    logits: np.ndarray
    true: np.ndarray
    groups: np.ndarray


def fit_temperature(scores: Scores) -> float:
    """Return the temperature that makes the probabilities of a validation split likeliest (Guo et al., 2017)."""

    def loss(log_temperature: float) -> float:
        logs = log_softmax(scores.logits / np.exp(log_temperature), axis=1)
        return -logs[np.arange(len(scores.true)), scores.true].mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x))


def probability_scores(scores: Scores, *, temperature: float | None, chosen: list[str], seed: int = 0) -> dict:
    """Return the figures of the labels' probabilities, by softmax over their answers' log-likelihoods.

    Args:
        scores: of the samples to evaluate.
        temperature: from another split; calibrated figures are left out when None.
        chosen: labels whose sensitivity at `SPECIFICITY` is told.
    """
    weights = resample(scores.groups, seed=seed)
    plain = softmax(scores.logits, axis=1)
    found = {
        "choice_accuracy": _mean(plain.argmax(1) == scores.true, weights),
        **_ranking(scores, plain, weights),
        "calibration": _calibration(plain, scores.true, weights),
        "abstention": abstention(plain, scores.true),
        "sensitivity": {label: _sensitivity(scores, plain, label, weights) for label in chosen},
    }
    if temperature is not None:
        tempered = softmax(scores.logits / temperature, axis=1)
        found["temperature"] = rounded(temperature)
        found["calibration_tempered"] = _calibration(tempered, scores.true, weights)
    return found


def _mean(values: np.ndarray, weights: np.ndarray) -> dict:
    return interval(values.mean(), weights @ values / weights.sum(1))


def _ranking(scores: Scores, probabilities: np.ndarray, weights: np.ndarray) -> dict:
    """Return AUROC and average precision of each label against all others, and their means over the labels."""
    per_label, resampled = {}, []
    for number, label in enumerate(scores.labels):
        positive = scores.true == number
        if positive.all() or not positive.any():
            continue  # a ranking needs both
        own = probabilities[:, number]
        resampled.append(auroc(own, positive, weights))
        per_label[label] = {
            "auroc": rounded(roc_auc_score(positive, own)),
            "average_precision": rounded(average_precision_score(positive, own)),
        }
    if not per_label:
        return {"macro_auroc": interval(np.nan, np.array([])), "per_label": {}}
    means = {name: np.mean([row[name] for row in per_label.values()]) for name in ("auroc", "average_precision")}
    with np.errstate(all="ignore"):
        spread = np.mean(resampled, axis=0)
    return {
        "macro_auroc": interval(means["auroc"], spread),
        "macro_average_precision": rounded(means["average_precision"]),
        "per_label": per_label,
    }


def _ladder(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares of positives and negatives at or above each distinct score, the highest first: (R, U) each.

    scikit-learn takes one set of weights at a time; a thousand resamples of every label want them all at once.
    """
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.inf))
    drawn = weights[:, order]
    with np.errstate(invalid="ignore"):
        shares = [
            np.add.reduceat(drawn * side[order], starts, axis=1).cumsum(1) / (weights @ side)[:, None]
            for side in (positive, ~positive)
        ]
    return shares[0], shares[1]


def auroc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve for each row of weights, shape (R,); NaN where one side was not drawn.

    Args:
        score: shape (N,).
        positive: shape (N,), bool.
        weights: how often each sample counts, shape (R, N).
    """
    hits, misses = _ladder(score, positive, weights)
    zero = np.zeros((len(weights), 1))
    return np.trapezoid(np.hstack([zero, hits]), np.hstack([zero, misses]), axis=1)


def _sensitivity(scores: Scores, probabilities: np.ndarray, label: str, weights: np.ndarray) -> dict:
    """Return the largest share of a label's samples found while `SPECIFICITY` of the others are left in peace."""
    number = scores.labels.index(label)
    positive = scores.true == number

    def at(weights: np.ndarray) -> np.ndarray:
        hits, misses = _ladder(probabilities[:, number], positive, weights)
        best = np.where(misses <= 1 - SPECIFICITY + 1e-9, hits, 0).max(1)
        return np.where(np.isnan(hits[:, -1] + misses[:, -1]), np.nan, best)

    found = interval(at(np.ones((1, len(positive))))[0], at(weights))
    return {**found, "specificity": SPECIFICITY, "positives": int(positive.sum())}


def _calibration(probabilities: np.ndarray, true: np.ndarray, weights: np.ndarray) -> dict:
    """Return the expected calibration error over `BINS` equal bins of confidence, and the bins themselves."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == true
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    member = place[:, None] == np.arange(BINS)  # (N, BINS)

    def error(weights: np.ndarray) -> np.ndarray:
        return np.abs(weights @ (member * (confidence - right)[:, None])).sum(1) / weights.sum(1)

    bins = [_bin(confidence[inside], right[inside]) for inside in member.T if inside.any()]
    found = interval(error(np.ones((1, len(true))))[0], error(weights))
    return {"expected_calibration_error": found, "bins": bins}


def _bin(confidence: np.ndarray, right: np.ndarray) -> dict:
    return {"samples": len(right), "confidence": rounded(confidence.mean()), "accuracy": rounded(right.mean())}


def abstention(probabilities: np.ndarray, true: np.ndarray) -> list[dict]:
    """Return the accuracy over the surest part of the samples, for each coverage: what abstaining on the rest buys."""
    order = np.argsort(-probabilities.max(1), kind="stable")
    right = (probabilities.argmax(1) == true)[order]
    sizes = [max(1, round(coverage * len(true))) for coverage in COVERAGES]
    return [
        {"coverage": coverage, "accuracy": rounded(right[:size].mean())}
        for coverage, size in zip(COVERAGES, sizes, strict=True)
    ]
