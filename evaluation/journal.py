"""The answers of an evaluation, written batch by batch, so that a killed evaluation resumes."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from common.files import EVALUATION_PLOTS, atomic_write, error_names, read_json

PREDICTIONS_FILE = "predictions.jsonl"
SETTINGS_FILE = "settings.json"
RESULTS = ("metrics.json", "report.html")
DIGESTS = {  # settings whose values say nothing
    "adapter": "of other weights",
    "base_weights": "of other weights of the base model",
    "questions": "to other questions",
    "images": "about other images",
    "validation": "to other questions of the validation split",
}
# Files of earlier versions have none of these; not each data set has a second split, and not each base is a folder.
OPTIONAL = ("images", "validation", "base_weights")
UNANSWERED = ("validation",)  # runs whose candidates are only scored
REMEDY = "add --overwrite to answer all questions again"


class Journal:
    """The answers so far, in `predictions.jsonl`; process 1 and higher append to `predictions.RANK.jsonl`.

    Args:
        folder: where the files are; made if missing.
        settings: what the answers depend on, written to `settings.json`.
        rank: number of this process.

    Raises:
        ValueError: the folder holds answers made with other settings; the message names the first difference.
    """

    def __init__(self, folder: Path, settings: dict, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rows = folder, {}
        self.path = folder / (PREDICTIONS_FILE if rank == 0 else f"predictions.{rank}.jsonl")
        self._check_settings(settings, write=rank == 0)
        self._read_rows()
        if rank == 0:  # before the others add to theirs: a row that is scored anew then comes after the old one
            self._merge_files(self.rows.values())

    @staticmethod
    def clear(folder: Path) -> None:
        """Delete the answers in a folder, and what was made of them."""
        results = (*RESULTS, *(Path(plot).name for plot in EVALUATION_PLOTS), SETTINGS_FILE)
        for path in (*folder.glob("predictions*.jsonl"), *(folder / name for name in results)):
            path.unlink(missing_ok=True)

    @staticmethod
    def check_foreign(folder: Path) -> None:
        """Raise ValueError for a file that would be replaced, or its answers used, and that no evaluation claims."""
        if (folder / SETTINGS_FILE).exists():
            return
        for name in (PREDICTIONS_FILE, *RESULTS):
            if (folder / name).exists():
                problem = f"--out: {folder} holds a {name} and no {SETTINGS_FILE} of an evaluation"
                raise ValueError(f"{problem}; choose another folder, or add --overwrite to replace it")

    def _check_settings(self, settings: dict, *, write: bool) -> None:
        path = self.folder / SETTINGS_FILE
        if path.is_file():
            try:
                previous = read_json(path)
            except ValueError as error:
                raise ValueError(f"{error}; {REMEDY}") from error
            answered = any(self.folder.glob("predictions*.jsonl"))
            if not answered and write:  # of a run that ended before its first answer
                atomic_write(path, json.dumps(settings, indent=1))
            elif changed := [key for key in settings if _differs(key, settings[key], previous.get(key))]:
                old, new = previous.get(changed[0]), settings[changed[0]]
                values = DIGESTS.get(changed[0], f"made with other settings, {changed[0]} was {old!r} and is {new!r}")
                rule = "add --overwrite to delete them, or choose another folder"
                raise ValueError(f"--out: {self.folder} holds answers {values}; {rule}")
            elif write:
                new = {key: settings[key] for key in OPTIONAL if settings.get(key)}
                atomic_write(path, json.dumps(previous | new, indent=1))
        elif write:
            atomic_write(path, json.dumps(settings, indent=1))

    def _read_rows(self) -> None:
        others = sorted(self.folder.glob("predictions.*.jsonl"))
        for path in [path for path in (self.folder / PREDICTIONS_FILE, *others) if path.is_file()]:
            self.rows |= {(row["run"], row["index"]): row for row in _read_lines(path)}

    def has(self, run: str, indices: Iterable[int]) -> bool:
        """Return whether a batch is complete; an incomplete one is repeated, as answers depend on their batch."""
        return all((run, index) in self.rows for index in indices)

    def read_others(self) -> None:
        """Read what other processes have written since; they may be writing, so that their files stay as they are."""
        for path in sorted(self.folder.glob("predictions.*.jsonl")):
            if path != self.path:
                self.rows |= {(row["run"], row["index"]): row for row in _complete_lines(path)[0]}

    def add(self, rows: list[dict]) -> None:
        """Append the answers of a batch."""
        with error_names(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.rows |= {(row["run"], row["index"]): row for row in rows}

    def finish(self, columns: dict[str, list[dict]]) -> dict[str, list[dict]]:
        """Merge the files of all processes into one, in order, and return the rows by run.

        Args:
            columns: of each run, the samples' columns as they are now: they may have other labels than at an earlier
                evaluation. Scores of candidates that are no longer asked for are left out.
        """
        self._read_rows()
        runs = {
            run: [_with_columns(self.rows[run, index], row) for index, row in enumerate(rows)]
            for run, rows in columns.items()
        }
        others = [row for (run, _), row in sorted(self.rows.items()) if run not in runs]
        self._merge_files([row for rows in (*runs.values(), others) for row in rows])
        return runs

    def _merge_files(self, rows: Iterable[dict]) -> None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        if lines:
            atomic_write(self.folder / PREDICTIONS_FILE, "".join(lines))
        for path in self.folder.glob("predictions.*.jsonl"):
            path.unlink()


def _differs(key: str, value, before) -> bool:
    return value != before and not (key in OPTIONAL and None in (value, before))


def _with_columns(row: dict, columns: dict) -> dict:
    dropped = () if row.get("candidates") == columns.get("candidates") else ("scores", "candidates")
    return {**{key: value for key, value in row.items() if key not in dropped}, **columns}


def _read_lines(path: Path) -> list[dict]:
    """Return the rows of a file; an incomplete last line, left by a killed process, is removed."""
    rows, complete, rest = _complete_lines(path)
    if rest:
        path.write_text(complete, encoding="utf-8")
    return rows


def _complete_lines(path: Path) -> tuple[list[dict], str, str]:
    """Return the rows of a file, the text of its complete lines, and what follows them.

    Raises:
        ValueError: a complete line is damaged; the message names it.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    end, rows = text.rfind("\n") + 1, []
    for number, line in enumerate(text[:end].split("\n"), start=1):
        if line:
            try:
                rows.append(_checked_row(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: damaged, {error}; {REMEDY}") from error
    return rows, text[:end], text[end:]


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _checked_row(row) -> dict:
    """Return a decoded line, or raise ValueError with what is wrong about it."""
    if not isinstance(row, dict):
        raise ValueError("expected an object")
    scores = row.get("scores", {})
    rules = {
        "run": isinstance(row.get("run"), str),
        "index": type(row.get("index")) is int,
        "prediction": isinstance(row.get("prediction", "" if row.get("run") in UNANSWERED else None), str),
        "scores": isinstance(scores, dict) and all(map(_is_finite, scores.values())),
        "image_of": isinstance(row.get("image_of", ""), str),
    }
    if wrong := [name for name, fits in rules.items() if not fits]:
        raise ValueError(f"{wrong[0]!r} is {row.get(wrong[0])!r:.60}")
    return row
