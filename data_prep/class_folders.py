"""A folder of class folders becomes rows; folders called train, validation or test above them are given splits."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from .split import GIVEN_SPLITS

# Names that operating systems, network storage and archives give to files of their own
SYSTEM_NAMES = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "#recycle", "$recycle.bin"),
    *("system volume information", "lost+found", "__pycache__"),
}
ZONE = ":Zone.Identifier"  # of a file that says where Windows has another one from; copies to Linux leave it
# Endings of files that stand beside images and are none
OTHER_ENDINGS = {
    *(".txt", ".md", ".rst", ".csv", ".tsv", ".tab", ".xls", ".xlsx", ".json", ".jsonl", ".xml", ".yaml", ".yml"),
    *(".html", ".htm", ".pdf", ".doc", ".docx", ".ini", ".db", ".log", ".py", ".ipynb", ".npy", ".mat", ".zip"),
    *(".parquet", ".arrow", ".aae", ".xmp", ".lnk", ".url"),
}
DATA_ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".tab", ".xlsx", ".parquet")
LAYOUT = "CLASS/FILE, or SPLIT/CLASS/FILE where every SPLIT is called train, validation or test"
MAX_NAMED = 5  # files in a warning

logger = logging.getLogger(__name__)


def is_system_name(name: str) -> bool:
    """Whether a file or folder is hidden, or an operating system's or an archive's own."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES or name.endswith(ZONE)


def read_folders(root: Path) -> list[dict[str, str]]:
    """Return a row for each image file: its `path` from `root`, its class as `folder`, and `split` ("" if not given).

    Hidden and system files are passed over. So are files that are no images by their ending, with a warning.

    Raises:
        ValueError: no images, images at another depth, one class beside an annotation file, a name that is not UTF-8,
            a link to a folder, or an unreadable one.
    """
    images, others, empty = [], [], []
    for folder, files, is_leaf in _walk(root):
        kinds = {name: Path(name).suffix.lower() in OTHER_ENDINGS for name in files}
        images += [folder / name for name, other in kinds.items() if not other]
        others += [folder / name for name, other in kinds.items() if other]
        empty += [folder] if is_leaf and all(kinds.values()) else []
    _warn("%d files are no images by their names, and are left out: %s", others)
    _warn("%d folders have no images: %s", empty)
    if not images:
        raise ValueError(f"{root}: expected a folder for each class, with images in it")
    for path in images:
        _check_encodable(path)
    depth = _depth(root, images)
    rows = [_row(path, depth) for path in sorted(images)]
    if len(classes := {row["folder"] for row in rows}) == 1 and not empty and depth == 1:
        _refuse_annotations(root, others, classes.pop())
    return rows


def _refuse_annotations(root: Path, others: list[Path], name: str) -> None:
    """Raise ValueError for a folder with an annotation file and its images, which are no class of that name."""
    for path in sorted(others):
        if len(path.parts) == 1 and path.suffix.lower() in DATA_ENDINGS:
            rule = f"did you mean {root / path}? A folder of class folders has several"
            raise ValueError(f"{root}: one class alone, {name!r}, beside {path.name}; {rule}")
    logger.warning("%s has one class alone: %r", root, name)


def _check_encodable(path: Path) -> None:
    """Raise ValueError for bytes in a name that are no UTF-8, as older systems and archives leave them."""
    try:
        path.as_posix().encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path.as_posix()!a}: the name is not UTF-8; rename the file or folder") from error


def _walk(root: Path) -> Iterator[tuple[Path, list[str], bool]]:
    """Yield each folder below `root`, the files in it, and whether it has no folders."""
    for name, folders, files in os.walk(root, onerror=_refuse):
        folders[:] = sorted(folder for folder in folders if not is_system_name(folder))
        for folder in folders:
            if (Path(name) / folder).is_symlink():
                raise ValueError(f"{Path(name) / folder} is a link to a folder, and such links are not followed")
        yield Path(name).relative_to(root), [file for file in files if not is_system_name(file)], not folders


def _refuse(error: OSError) -> None:
    """Raise ValueError for a folder that cannot be listed; `os.walk` would pass over it, and its class be lost."""
    raise ValueError(f"{error.filename}: the folder cannot be read: {error.strerror}") from error


def _warn(message: str, paths: list[Path]) -> None:
    if paths:
        named = ", ".join(path.as_posix() for path in sorted(paths)[:MAX_NAMED])
        logger.warning(message, len(paths), named + (", ..." if len(paths) > MAX_NAMED else ""))


def _depth(root: Path, images: list[Path]) -> int:
    """Return how many folders are above each image, 1 or 2; raise ValueError unless it is the same for all."""
    tops = {path.parts[0] for path in images}
    depth = 2 if all(top.lower() in GIVEN_SPLITS for top in tops) else 1
    if wrong := next((path for path in sorted(images) if len(path.parts) - 1 != depth), None):
        found = f"{wrong.as_posix()!r} has {len(wrong.parts) - 1} folder(s) above it"
        hint = f"; did you mean {root / wrong.parts[0]}?" if len(tops) == 1 and len(wrong.parts) > 2 else ""
        raise ValueError(f"{root}: {found}, expected {LAYOUT}{hint}")
    return depth


def _row(path: Path, depth: int) -> dict[str, str]:
    split = GIVEN_SPLITS[path.parts[0].lower()] if depth == 2 else ""
    return {"path": path.as_posix(), "folder": path.parts[-2], "split": split}
