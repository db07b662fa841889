"""From answered questions to the content of `metrics.json`."""

import numpy as np

from data_prep.labels import label_key, read_label, strip_thinking
from evaluation import metrics
from evaluation.calibration import LabelScores, probability_metrics
from evaluation.clusters import cluster_samples, describe_clusters
from evaluation.comparison import compare_paired, split_gain
from evaluation.label_matching import asks_for_label, describe_unread_rows
from evaluation.text_metrics import text_metrics

SUBGROUP_COLUMNS = ("skin_type", "sex", "age", "site", "source")
HIGH_RISK_LABELS = ("melanoma",)  # sensitivity is reported for these by default


def summarise(
    runs: dict[str, list[dict]],
    label_map: dict,
    *,
    clusters: list[int] | None = None,
    columns: list[str],
    sensitivity_of: list[str],
    min_group: int,
) -> dict:
    """Return the content of `metrics.json`.

    Args:
        runs: rows of "adapter" and, if they exist, "base", "shuffled" and "validation". The first three hold the same
            samples in the same order.
        label_map: see `build_label_map`; empty when the data have no labels.
        clusters: number of each sample's cluster, see `cluster_samples`; from ids and groups alone when None.
        columns: columns to report subgroups by.
        sensitivity_of: labels whose sensitivity is reported; when empty, those of `HIGH_RISK_LABELS` that occur.
        min_group: smallest size of a subgroup whose metrics are reported, samples.
    """
    labels, rows = list(label_map), runs["adapter"]
    clusters = np.array(cluster_samples(rows) if clusters is None else clusters)
    sensitivity_of = sensitivity_of or [label for label in labels if label_key(label) in HIGH_RISK_LABELS]
    asks = np.array([bool(label_map) and asks_for_label(row, label_map) for row in rows], dtype=bool)
    kept = {name: _answered_samples(runs[name], name) for name in ("adapter", "base", "shuffled") if name in runs}
    summary = {"samples": len(rows), "diagnosed": int(asks.sum()), "labels": labels}
    if unread := describe_unread_rows(rows, label_map, quote=False):  # it is pushed
        summary["unread"] = unread
    figures_of = asks if asks.any() else np.ones(len(rows), dtype=bool)
    summary |= describe_clusters(_select(rows, figures_of), clusters[figures_of].tolist())
    summary |= {"clusters_needed": metrics.MIN_CLUSTERS, "label_clusters_needed": metrics.MIN_LABEL_CLUSTERS}
    summary |= {"unseen_share": metrics.unseen_share(summary["clusters"])}
    if "base" in kept or "shuffled" in kept:
        summary["shuffled_left_out"] = len(rows) - int(kept.get("shuffled", np.zeros(1)).sum())
    kept = {name: mask for name, mask in kept.items() if mask.any()}
    summary["runs"] = {name: _text_metrics(runs[name], mask, clusters) for name, mask in kept.items()}
    diagnosed = {name: mask & asks for name, mask in kept.items() if (mask & asks).any()}
    for name, mask in diagnosed.items():
        validation = runs.get("validation", []) if name == "adapter" else []
        questions = _select(runs[name], mask)
        summary["runs"][name] |= _label_metrics(questions, validation, label_map, clusters[mask], sensitivity_of)
    if asks.any():
        questions, options = _select(rows, asks), {"columns": columns, "min_group": min_group}
        summary["subgroups"] = _subgroups(questions, _encode(questions, label_map, clusters[asks]), **options)
    if "shuffled" in diagnosed:
        shuffled = _select(runs["shuffled"], diagnosed["shuffled"])
        summary["shuffled_same_label"] = _share_of_same_label(shuffled, rows)
    others = [name for name in diagnosed if name != "adapter"]
    comparisons = {name: _compare(runs, name, diagnosed[name], label_map, clusters) for name in others}
    return summary | {f"against_{name}": comparison for name, comparison in comparisons.items()}


def _label_metrics(
    questions: list[dict], validation: list[dict], label_map: dict, clusters: np.ndarray, sensitivity_of: list[str]
) -> dict:
    """Return the figures of a run's answers that name labels, and of the labels' likelihoods where there are any."""
    labels = list(label_map)
    found = {"diagnosis": metrics.diagnosis_metrics(_encode(questions, label_map, clusters))}
    if scores := _label_scores(questions, labels, clusters):
        options = {"validation": _validation_scores(validation, labels), "sensitivity_of": sensitivity_of}
        found["probabilities"] = probability_metrics(scores, **options)
    return found


def _answered_samples(run: list[dict], name: str) -> np.ndarray:
    """Return which samples a run has figures of; those that could not get another's images are no shuffled ones."""
    return np.array([name != "shuffled" or "image_of" in row for row in run], dtype=bool)


def _select(rows: list[dict], mask: np.ndarray) -> list[dict]:
    return [rows[index] for index in np.flatnonzero(mask)]


def _subgroups(questions: list[dict], diagnoses: metrics.Diagnoses, *, columns: list[str], min_group: int) -> dict:
    found = {name: metrics.subgroup_metrics(questions, diagnoses, name, min_size=min_group) for name in columns}
    return {name: subgroups for name, subgroups in found.items() if subgroups}


def _compare(runs: dict[str, list[dict]], name: str, mask: np.ndarray, label_map: dict, clusters: np.ndarray) -> dict:
    """Return the adapter beside another run, on that run's samples, and what the gain over the base consists of."""
    pair = [_select(runs[run], mask) for run in ("adapter", name)]
    diagnoses = [_encode(rows, label_map, clusters[mask]) for rows in pair]
    scores = [_label_scores(rows, list(label_map), clusters[mask]) for rows in pair]
    comparison = compare_paired(*diagnoses)
    if name == "base" and all(scores):
        comparison["gain"] = split_gain(*diagnoses, *scores)
    return comparison


def _share_of_same_label(shuffled: list[dict], rows: list[dict]) -> float:
    """Return the share of shuffled samples whose image has the same label: the accuracy of a perfect observer."""
    label_of = {row["id"]: row["label"] for row in rows}
    shown = [label_of[row.get("image_of", row["id"])] for row in shuffled]  # without images nothing is shuffled
    return metrics.rounded(np.mean([label == row["label"] for label, row in zip(shown, shuffled, strict=True)]))


def _text_metrics(run: list[dict], mask: np.ndarray, clusters: np.ndarray) -> dict:
    rows = _select(run, mask)
    text = text_metrics(*([strip_thinking(row[side]) for row in rows] for side in ("reference", "prediction")))
    counts = {"samples": len(rows), "clusters": metrics.count_clusters(clusters[mask])}
    return {**counts, "cut": sum("cut" in row for row in rows), "text": text}


def _encode(rows: list[dict], label_map: dict, clusters: np.ndarray) -> metrics.Diagnoses:
    answered = [{**row, "answered": read_label(row["prediction"], label_map)} for row in rows]
    return metrics.encode_diagnoses(answered, list(label_map), clusters)


def _label_scores(rows: list[dict], labels: list[str], clusters: np.ndarray) -> LabelScores | None:
    """Return the scores of the labels; None if a row has none."""
    if not all("scores" in row for row in rows):
        return None
    logits = np.array([[row["scores"][label] for label in labels] for row in rows])
    return LabelScores(labels, logits, np.array([labels.index(row["label"]) for row in rows]), clusters)


def _validation_scores(rows: list[dict], labels: list[str]) -> LabelScores | None:
    scored = [row for row in rows if "scores" in row]
    return _label_scores(scored, labels, np.array(cluster_samples(scored))) if scored else None
