"""From answered questions to `metrics.json`; answers are kept as they come, so that a killed evaluation goes on."""

import json
from pathlib import Path

import numpy as np

from labels import asks_for_label, read_label
from metrics import Diagnoses, compare, diagnosis, read_diagnoses, rounded, subgroups, text_scores
from probabilities import Scores, fit_temperature, probability_scores

PREDICTIONS = "predictions.jsonl"
SETTINGS = "settings.json"
COLUMNS = ("skin_type", "sex", "age", "site", "source")
ALARMING = ("melanoma",)  # labels whose sensitivity is told unless others are chosen


class Journal:
    """The answers so far, in `predictions.jsonl`; with several processes each appends to a file of its own.

    Args:
        folder: where the files are.
        settings: what the answers depend on. Answers made with others are not mixed with new ones.
        rank: number of this process.

    Raises:
        ValueError: the folder holds answers made with other settings; the message names the first difference.
    """

    def __init__(self, folder: Path, settings: dict, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rows = folder, {}
        self.own = folder / (PREDICTIONS if rank == 0 else f"predictions.{rank}.jsonl")
        self._check(settings, write=rank == 0)
        for path in sorted(folder.glob("predictions*.jsonl")):
            self.rows |= {(row["run"], row["index"]): row for row in _read_lines(path)}

    @staticmethod
    def clear(folder: Path) -> None:
        """Drop the answers that a folder holds."""
        for path in (*folder.glob("predictions*.jsonl"), folder / SETTINGS):
            path.unlink(missing_ok=True)

    def _check(self, settings: dict, *, write: bool) -> None:
        path = self.folder / SETTINGS
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            if changed := [key for key in settings if settings[key] != before.get(key)]:
                was, now = before.get(changed[0]), settings[changed[0]]
                where = f"--out: {self.folder} holds answers made with other settings"
                rule = "add --overwrite to drop them, or choose another folder"
                raise ValueError(f"{where}, {changed[0]} was {was!r} and is {now!r}; {rule}")
        elif write:
            path.write_text(json.dumps(settings, indent=1), encoding="utf-8")

    def has(self, run: str, indices: range) -> bool:
        return all((run, index) in self.rows for index in indices)

    def add(self, rows: list[dict]) -> None:
        """Append a batch's answers. A batch is answered whole or again, so that its company is always the same."""
        with self.own.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.rows |= {(row["run"], row["index"]): row for row in rows}

    def finish(self, runs: dict[str, int]) -> dict[str, list[dict]]:
        """Put all processes' answers in order into one file and return them by run; `runs` says how many each has."""
        for path in sorted(self.folder.glob("predictions*.jsonl")):
            self.rows |= {(row["run"], row["index"]): row for row in _read_lines(path)}
        found = {run: [self.rows[run, index] for index in range(count)] for run, count in runs.items()}
        others = [row for (run, _), row in sorted(self.rows.items()) if run not in runs]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for rows in (*found.values(), others) for row in rows]
        unfinished = self.folder / "predictions.unfinished"
        unfinished.write_text("".join(lines), encoding="utf-8")
        unfinished.replace(self.folder / PREDICTIONS)
        for path in self.folder.glob("predictions.*.jsonl"):
            path.unlink()
        return found


def _read_lines(path: Path) -> list[dict]:
    """Return a journal's rows; the last line of a killed process may be half a row, and counts as not written."""
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


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
