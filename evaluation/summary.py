"""From answered questions to the content of `metrics.json`."""

import numpy as np

from evaluation import metrics
from evaluation.calibration import LabelScores, fit_temperature, probability_metrics
from evaluation.label_matching import asks_for_label, read_label

SUBGROUP_COLUMNS = ("skin_type", "sex", "age", "site", "source")
HIGH_RISK_LABELS = ("melanoma",)  # sensitivity is reported for these by default


def summarise(
    runs: dict[str, list[dict]], label_map: dict, *, columns: list[str], sensitivity_of: list[str], min_group: int
) -> dict:
    """Return the content of `metrics.json`.

    Args:
        runs: rows of "adapter" and, if they exist, "base", "shuffled" and "validation". The first three hold the same
            samples in the same order.
        label_map: see `build_label_map`; empty when the data have no labels.
        columns: columns to report subgroups by.
        sensitivity_of: labels whose sensitivity is reported; when empty, those of `HIGH_RISK_LABELS` that occur.
        min_group: smallest size of a subgroup whose metrics are reported, samples.
    """
    labels, rows = list(label_map), runs["adapter"]
    sensitivity_of = sensitivity_of or [label for label in HIGH_RISK_LABELS if label in labels]
    diagnosed = [n for n, row in enumerate(rows) if label_map and asks_for_label(row, label_map)]
    answers = {name: runs[name] for name in ("adapter", "base", "shuffled") if name in runs}
    summary = {"samples": len(rows), "diagnosed": len(diagnosed), "labels": labels}
    summary["runs"] = {name: {"text": _text_metrics(run)} for name, run in answers.items()}
    if not diagnosed:
        return summary
    questions = {name: [run[n] for n in diagnosed] for name, run in answers.items()}
    diagnoses = {name: _encode_answers(run, label_map) for name, run in questions.items()}
    temperature = _fit_temperature(runs.get("validation", []), labels)
    for name, run in questions.items():
        summary["runs"][name]["diagnosis"] = metrics.diagnosis_metrics(diagnoses[name])
        if all("scores" in row for row in run):
            options = {"temperature": temperature if name == "adapter" else None, "sensitivity_of": sensitivity_of}
            summary["runs"][name]["probabilities"] = probability_metrics(_label_scores(run, labels), **options)
    adapter = diagnoses.pop("adapter")
    summary["subgroups"] = {}
    for column in columns:
        if groups := metrics.subgroup_metrics(questions["adapter"], adapter, column, min_size=min_group):
            summary["subgroups"][column] = groups
    if "shuffled" in questions:
        summary["shuffled_same_label"] = _share_of_same_label(questions["shuffled"], rows)
    return summary | {f"against_{name}": metrics.compare_paired(adapter, other) for name, other in diagnoses.items()}


def _share_of_same_label(shuffled: list[dict], rows: list[dict]) -> float:
    """Return the share of shuffled samples whose image has the same label: the accuracy of a perfect observer."""
    label_of = {row["id"]: row["label"] for row in rows}
    return metrics.rounded(np.mean([label_of[row["image_of"]] == row["label"] for row in shuffled]))


def _text_metrics(rows: list[dict]) -> dict:
    return metrics.text_metrics([row["reference"] for row in rows], [row["prediction"] for row in rows])


def _encode_answers(rows: list[dict], label_map: dict) -> metrics.Diagnoses:
    answered = [{**row, "answered": read_label(row["prediction"], label_map)} for row in rows]
    return metrics.encode_diagnoses(answered, list(label_map))


def _label_scores(rows: list[dict], labels: list[str]) -> LabelScores:
    logits = np.array([[row["scores"][label] for label in labels] for row in rows])
    encoded = metrics.encode_diagnoses([{**row, "answered": row["label"]} for row in rows], labels)
    return LabelScores(labels, logits, encoded.true, encoded.groups)


def _fit_temperature(rows: list[dict], labels: list[str]) -> float | None:
    scored = [row for row in rows if "scores" in row]
    return fit_temperature(_label_scores(scored, labels)) if scored else None
