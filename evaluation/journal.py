"""The answers of an evaluation as they come, so that a killed one resumes where it stopped."""

import json
from pathlib import Path

from common.files import atomic_write

PREDICTIONS = "predictions.jsonl"
SETTINGS = "settings.json"


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
        atomic_write(self.folder / PREDICTIONS, "".join(lines))
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
