"""From answered questions to the content of `metrics.json`."""

import numpy as np

from evaluation.calibration import Scores, fit_temperature, probability_scores
from evaluation.label_matching import asks_for_label, read_label
from evaluation.metrics import Diagnoses, compare, diagnosis, read_diagnoses, rounded, subgroups, text_scores

COLUMNS = ("skin_type", "sex", "age", "site", "source")
ALARMING = ("melanoma",)  # labels whose sensitivity is told unless others are chosen


def evaluate(
    runs: dict[str, list[dict]], label_map: dict, *, columns: list[str], chosen: list[str], smallest: int
) -> dict:
    """Return all the numbers of an evaluation.

    Args:
        runs: rows of "adapter", and of "base", "shuffled" and "validation" when there are such. The first three hold
            the same samples in the same order.
        label_map: see `labels.build_label_map`; empty when the data have no labels.
        columns: facts to tell subgroups by.
        chosen: labels whose sensitivity is told; of `ALARMING` those that occur, when empty.
        smallest: samples that a subgroup must have.
    """
    labels, rows = list(label_map), runs["adapter"]
    chosen = chosen or [label for label in ALARMING if label in labels]
    kept = [n for n, row in enumerate(rows) if label_map and asks_for_label(row, label_map)]
    found = {"samples": len(rows), "diagnosed": len(kept), "labels": labels, "runs": {}}
    tested = {name: runs[name] for name in ("adapter", "base", "shuffled") if name in runs}
    diagnoses = {name: _diagnoses(own, kept, label_map) for name, own in tested.items()} if kept else {}
    temperature = _temperature(runs.get("validation", []), labels)
    for name, own in tested.items():
        found["runs"][name] = {"text": text_scores(*_texts(own))}
        if kept:
            found["runs"][name]["diagnosis"] = diagnosis(diagnoses[name])
            if all("scores" in own[n] for n in kept):
                scores = _scores([own[n] for n in kept], labels)
                options = {"temperature": temperature if name == "adapter" else None, "chosen": chosen}
                found["runs"][name]["probabilities"] = probability_scores(scores, **options)
    if kept:
        asked = [rows[n] for n in kept]
        told = {column: subgroups(asked, diagnoses["adapter"], column, smallest=smallest) for column in columns}
        found["subgroups"] = {column: groups for column, groups in told.items() if groups is not None}
    if "shuffled" in diagnoses:
        found["shuffled_same_label"] = _same_label([runs["shuffled"][n] for n in kept], rows)
    others = [name for name in diagnoses if name != "adapter"]
    return {**found, **{f"against_{name}": compare(diagnoses["adapter"], diagnoses[name]) for name in others}}


def _same_label(shuffled: list[dict], rows: list[dict]) -> float:
    """Return the share of shuffled samples that got an image of their own label: what looking alone would score."""
    label_of = {row["id"]: row["label"] for row in rows}
    return rounded(np.mean([label_of[row["image_of"]] == row["label"] for row in shuffled]))


def _texts(rows: list[dict]) -> tuple[list[str], list[str]]:
    return [row["reference"] for row in rows], [row["prediction"] for row in rows]


def _diagnoses(rows: list[dict], kept: list[int], label_map: dict) -> Diagnoses:
    asked = [{**rows[n], "answered": read_label(rows[n]["prediction"], label_map)} for n in kept]
    return read_diagnoses(asked, list(label_map))


def _scores(rows: list[dict], labels: list[str]) -> Scores:
    logits = np.array([[row["scores"][label] for label in labels] for row in rows])
    numbers = read_diagnoses([{**row, "answered": row["label"]} for row in rows], labels)
    return Scores(labels, logits, numbers.true, numbers.groups)


def _temperature(rows: list[dict], labels: list[str]) -> float | None:
    usable = [row for row in rows if "scores" in row]
    return fit_temperature(_scores(usable, labels)) if usable else None
