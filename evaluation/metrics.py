"""Accuracy of the diagnoses with bootstrap intervals: overall, by label and by subgroup."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.special import ndtr, stdtrit

from data_prep.labels import NONE, SEVERAL
from evaluation.clusters import cluster_samples

RESAMPLES, SEED = 1000, 0
CONFIDENCE = 0.95
MIN_LABEL_CLUSTERS = 5  # of each label; below it an AUROC has no interval, as too few ranks differ
MIN_CLUSTERS = 10  # below it there are no intervals: so few patients do not show how much patients differ
AGE_BANDS = ((20, "under 20"), (40, "20 to 39"), (60, "40 to 59"), (80, "60 to 79"), (np.inf, "80 and over"))
MAIN_METRICS = ("accuracy", "balanced_accuracy", "macro_f1")
DIAGNOSIS_METRICS = (*MAIN_METRICS, "no_label", "several_labels")
DIGITS = 6  # of every number in `metrics.json`: enough to compare, and the same on every machine


@dataclass(frozen=True)
class Diagnoses:
    """True and answered labels of N samples, as numbers 0 to K - 1.

    Attributes:
        labels: the K labels.
        true: label of each sample, shape (N,).
        answered: label that each answer names, shape (N,); K if it names none, K + 1 if several.
        clusters: number of each sample's cluster, shape (N,). Samples of one patient or lesion are not independent.
    """

    labels: list[str]
    true: np.ndarray
    answered: np.ndarray
    clusters: np.ndarray

    def select(self, mask: np.ndarray) -> "Diagnoses":
        return Diagnoses(self.labels, self.true[mask], self.answered[mask], self.clusters[mask])


def encode_diagnoses(rows: list[dict], labels: list[str], clusters: list[int] | None = None) -> Diagnoses:
    """Return rows with `id`, `label`, `answered`, `group` and `source` as numbers; see `cluster_samples` for None."""
    number = {label: index for index, label in enumerate((*labels, NONE, SEVERAL))}
    return Diagnoses(
        labels=list(labels),
        true=np.array([number[row["label"]] for row in rows], dtype=int),
        answered=np.array([number[row["answered"]] for row in rows], dtype=int),
        clusters=np.array(cluster_samples(rows) if clusters is None else clusters, dtype=int),
    )


def count_clusters(clusters: np.ndarray) -> int:
    return len(np.unique(clusters))


def bootstrap_weights(clusters: np.ndarray, *, resamples: int = RESAMPLES) -> np.ndarray:
    """Resample clusters with replacement; return how often each sample is drawn, shape (resamples, N)."""
    unique, members = np.unique(clusters, return_inverse=True)
    drawn = np.random.default_rng(SEED).multinomial(len(unique), np.full(len(unique), 1 / len(unique)), size=resamples)
    return drawn[:, members].astype(np.float64)


def fewest_clusters(true: np.ndarray, clusters: np.ndarray) -> int:
    """Return the number of clusters of the label that has fewest, of those that occur; see `clusters_by_label`."""
    return min(count_clusters(clusters[true == label]) for label in np.unique(true))


def clusters_by_label(true: np.ndarray, clusters: np.ndarray) -> float:
    """Return the number of clusters that the spread of a mean over the labels corresponds to: the harmonic mean of the
    labels' numbers, as each label's share varies with one over the number of its own. Two at least.

    Args:
        true: label of each sample, shape (N,).
        clusters: number of each sample's cluster, shape (N,).
    """
    counts = [count_clusters(clusters[true == label]) for label in np.unique(true)]
    return max(2.0, len(counts) / sum(1 / count for count in counts))


def interval(value: float, resampled: np.ndarray, clusters: int, *, spread: float | None = None) -> dict:
    """Return a value with its 95 % interval: percentiles of the resamples, wider for few clusters.

    Args:
        value: of all samples.
        resampled: of each resample; NaN where it is not defined.
        clusters: number of clusters.
        spread: number of clusters that the interval's width follows, see `clusters_by_label`; all when None.

    `low` and `high` are None with fewer than `MIN_CLUSTERS` clusters, and when all resamples agree, as they do about
    an accuracy of 1: resampling says nothing about errors that did not occur, see `unseen_share`.

    Source:
        Hesterberg, What Teachers Should Know About the Bootstrap, 2015: the expanded percentile interval. Plain
        percentiles of 15 clusters cover the truth in 85 to 90 of 100. Means over labels that a few clusters each have
        need the same in proportion to those (`benchmarks/coverage.py`).
    """
    if np.isnan(value):
        return {"value": None, "low": None, "high": None}
    valid = resampled[~np.isnan(resampled)]
    if clusters < MIN_CLUSTERS or len(valid) == 0:
        return {"value": rounded(value), "low": None, "high": None}
    spread = spread or clusters
    tail = ndtr(-np.sqrt(spread / (spread - 1)) * stdtrit(spread - 1, (1 + CONFIDENCE) / 2))
    low, high = np.quantile(valid, [tail, 1 - tail])
    ends = (None, None) if low == high else (rounded(low), rounded(high))
    return {"value": rounded(value), "low": ends[0], "high": ends[1]}


def unseen_share(clusters: int) -> float:
    """Return the share of clusters with an error that goes unseen in that many clusters one time in twenty."""
    return rounded(1 - (1 - CONFIDENCE) ** (1 / clusters))


def rounded(value: float) -> float:
    return round(float(value), DIGITS)


def confusion_counts(diagnoses: Diagnoses, weights: np.ndarray | None = None) -> np.ndarray:
    """Return weighted counts by true and answered label, shape (R, K, K + 2).

    Args:
        diagnoses: N samples.
        weights: of each sample, shape (R, N); one row of ones when None.
    """
    size, count = len(diagnoses.labels), len(diagnoses.true)
    weights = np.ones((1, count)) if weights is None else weights
    cell = diagnoses.true * (size + 2) + diagnoses.answered
    one_hot = sparse.csr_matrix((np.ones(count), (np.arange(count), cell)), shape=(count, size * (size + 2)))
    return (weights @ one_hot).reshape(len(weights), size, size + 2)


def compute_metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return `DIAGNOSIS_METRICS` of R confusion matrices (R, K, K + 2), each of shape (R,).

    Balanced accuracy and macro-F1 are means over the labels that occur. An answer that names no label, or several, is
    wrong.
    """
    size = counts.shape[1]
    correct = np.einsum("rkk->rk", counts[:, :, :size])
    support, answered, total = counts.sum(2), counts[:, :, :size].sum(1), counts.sum((1, 2))
    occurs = support > 0
    recall = np.divide(correct, support, out=np.zeros_like(correct), where=occurs)
    f1 = np.divide(2 * correct, support + answered, out=np.zeros_like(correct), where=support + answered > 0)
    return {
        "accuracy": correct.sum(1) / total,
        "balanced_accuracy": recall.sum(1) / occurs.sum(1),
        "macro_f1": np.where(occurs, f1, 0).sum(1) / occurs.sum(1),
        "no_label": counts[:, :, size].sum(1) / total,
        "several_labels": counts[:, :, size + 1].sum(1) / total,
    }


def metrics_with_intervals(diagnoses: Diagnoses, names: tuple[str, ...] = DIAGNOSIS_METRICS) -> dict[str, dict]:
    """Return the named metrics with intervals from a bootstrap over the clusters."""
    points = compute_metrics(confusion_counts(diagnoses))
    resampled = compute_metrics(confusion_counts(diagnoses, bootstrap_weights(diagnoses.clusters)))
    clusters = count_clusters(diagnoses.clusters)
    return {
        name: interval(points[name][0], resampled[name], clusters, spread=spread_of(name, diagnoses)) for name in names
    }


def spread_of(name: str, diagnoses: Diagnoses) -> float | None:
    """Return the `spread` of a metric's interval; macro-F1's covers the truth with that of all clusters."""
    return clusters_by_label(diagnoses.true, diagnoses.clusters) if name == "balanced_accuracy" else None


def diagnosis_metrics(diagnoses: Diagnoses) -> dict:
    """Return `DIAGNOSIS_METRICS` with intervals, the metrics of each label, and the confusion matrix."""
    labels, columns = diagnoses.labels, [*diagnoses.labels, NONE, SEVERAL]
    counts = confusion_counts(diagnoses)[0].astype(int)
    hits, support, answered = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)[: len(labels)]
    shares = {"precision": (hits, answered), "recall": (hits, support), "f1": (2 * hits, support + answered)}
    per_label = {
        label: {
            **{name: rounded(above[n] / max(1, below[n])) for name, (above, below) in shares.items()},
            "support": int(support[n]),
            "clusters": count_clusters(diagnoses.clusters[diagnoses.true == n]),
        }
        for n, label in enumerate(labels)
    }
    counts = counts.tolist()
    wrong = [(-count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if count and i != j]
    return {
        "samples": len(diagnoses.true),
        "clusters": count_clusters(diagnoses.clusters),
        **metrics_with_intervals(diagnoses),
        "per_label": per_label,
        "confusion": {"rows": labels, "columns": columns, "counts": counts},
        "top_confusions": [
            {"label": columns[i], "answered": columns[j], "count": -negative} for negative, i, j in sorted(wrong)[:10]
        ],
    }


def subgroup_metrics(rows: list[dict], diagnoses: Diagnoses, column: str, *, min_size: int) -> dict | None:
    """Return `MAIN_METRICS` for each value of a column, the group with the lowest accuracy and its gap to the highest.

    Groups of fewer than `min_size` samples are listed without metrics: a share of three samples means little, and may
    identify a person. None when the column has fewer than two values.
    """
    values = np.array([age_band(row[column]) if column == "age" else row[column] or "unknown" for row in rows])
    bands = {name: number for number, (_, name) in enumerate(AGE_BANDS)}
    names = sorted(set(values.tolist()), key=lambda name: (name == "unknown", bands.get(name, -1), name))
    if len(names) < 2:
        return None
    groups = {}
    for name in names:
        group = diagnoses.select(values == name)
        large = len(group.true) >= min_size
        metrics = metrics_with_intervals(group, MAIN_METRICS) if large else {"suppressed": True}
        groups[name] = {"samples": len(group.true), "clusters": count_clusters(group.clusters), **metrics}
    ranked = sorted((group["accuracy"]["value"], name) for name, group in groups.items() if "accuracy" in group)
    gap = rounded(ranked[-1][0] - ranked[0][0]) if ranked else 0.0
    return {"groups": groups, **({"worst": ranked[0][1], "gap": gap} if gap else {})}


def age_band(age: str | None) -> str:
    """Return the band of an age in years; other texts, such as bands that the data give, are returned unchanged."""
    try:
        years = float((age or "").replace(",", "."))
    except ValueError:
        return age or "unknown"
    if not math.isfinite(years):
        return "unknown"
    return next(name for limit, name in AGE_BANDS if years < limit)
