"""The files that `convert` writes into a folder, told apart from those of its user, which stay there."""

import re
from pathlib import Path

from .storage import IMAGE_FOLDER

DATASET_FILE, FINDINGS, REJECTED = "dataset_dict.json", "findings.jsonl", "rejected.jsonl"
# Paths in the folder. Versions before this one left copies in the splits' folders, `cache-*.arrow`.
OWN = re.compile(
    rf"dataset_dict\.json|findings\.jsonl|rejected\.jsonl|report\.(html|json)|{IMAGE_FOLDER}/[0-9a-f]{{32}}(\.\w*)?"
    r"|(train|validation|test|fold_\d+)/(state\.json|dataset_info\.json|(data|cache)-[\w-]+\.arrow)"
)


def is_data_set(folder: Path) -> bool:
    """Whether a folder was written by `convert`, or is being replaced by it."""
    return (folder / DATASET_FILE).is_file() or (folder / FINDINGS).is_file()


def replace_data_set(new: Path, folder: Path) -> None:
    """Move the files of a complete data set into a folder, in place of an earlier data set; other files stay.

    After an interruption the folder is none that can be opened, but one that can be replaced again.
    """
    if not folder.exists():
        new.replace(folder)
        return
    (folder / DATASET_FILE).unlink(missing_ok=True)
    written = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    for path in [path for path in folder.rglob("*") if OWN.fullmatch(path.relative_to(folder).as_posix())]:
        if path.name != FINDINGS:
            path.unlink()
    for path in sorted(written, key=lambda path: path.name == DATASET_FILE):
        (folder / path).parent.mkdir(exist_ok=True)
        (new / path).replace(folder / path)
    for path in filter(_is_own_folder, list(folder.iterdir())):
        if not any(path.iterdir()):
            path.rmdir()


def _is_own_folder(path: Path) -> bool:
    return path.is_dir() and (path.name == IMAGE_FOLDER or OWN.fullmatch(f"{path.name}/state.json") is not None)
