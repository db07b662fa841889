"""The folder that `convert` writes: one process at a time, checked before the work, complete or none that opens."""

import errno
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from datasets import DatasetDict

from common.files import locked, unfinished_path

from .convert import Prepared
from .folders import FINDINGS, REJECTED, is_data_set, replace_data_set
from .inspection import file_stamp
from .storage import bytes_needed, save_splits

# As `Path` has it: s3://bucket is s3:/bucket. One letter is a drive of Windows.
ADDRESS = re.compile(r"\w[\w+.-]+:/")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger(__name__)


def resolve_out(out: Path) -> Path:
    """Return the absolute path; ValueError for an address, which would become a folder here, or lose the shards."""
    if ADDRESS.match(str(out)) or "::" in str(out.resolve()):
        raise ValueError(
            f"--out: '{out}' reads as an address; expected a folder of this machine, without '::' or 'name:/'"
        )
    return out.resolve()


@contextmanager
def claim(out: Path, *, overwrite: bool, links_dir: Path | None) -> Iterator[Path]:
    """Keep other processes out of an output folder while the block runs; yield a hidden folder beside it.

    That folder is for intermediate files, and is deleted at the end.

    Args:
        out: the output folder, an absolute path; made by `save`.
        overwrite: accept a data set in it.
        links_dir: folder of downloads, which may be in it.

    Raises:
        ValueError: another process writes it, it cannot be written, it has something else in it, or the disk is full.
    """
    work, unfinished = _beside(out, "work"), unfinished_path(out)
    with ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            problem = stack.enter_context(locked(_beside(out, "lock"), f"--out: {out}"))
            for folder in (work, unfinished):  # left by a process that was killed
                shutil.rmtree(folder, ignore_errors=True)
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
            work.mkdir()
        except OSError as error:
            raise ValueError(f"--out: cannot write to {out}: {error.strerror}") from error
        if problem:
            logger.warning("--out: the storage of %s has no file locks (%s): start no second convert", out, problem)
        _check_out(out, overwrite=overwrite, links_dir=links_dir)
        try:
            yield work
        except OSError as error:
            place = Path(error.filename) if error.filename else out
            if error.errno == errno.EFBIG:
                rule = "a file cannot become larger there; `ulimit -f` or the file system limits it"
                raise ValueError(f"--out: {place}: {rule}") from error
            if error.errno not in DISK_FULL:
                raise
            written, free = sum(map(_size, (work, unfinished))), shutil.disk_usage(out.parent).free
            sizes = f"{written:,} bytes are written, {free:,} are free"
            raise ValueError(f"--out: the disk is full, or its quota used up, at {place}: {sizes}") from error


def _beside(out: Path, purpose: str) -> Path:
    return out.with_name(f".{out.name}.{purpose}")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _check_out(out: Path, *, overwrite: bool, links_dir: Path | None) -> None:
    """Raise if there is something else in `out` than downloads of an earlier try, or a data set to be replaced."""
    if not out.exists():
        return
    if out.is_dir() and out.stat().st_dev != out.parent.stat().st_dev:
        raise ValueError(f"--out: {out} is a mount point, which no complete folder can replace; choose a folder in it")
    found = out.is_file() or any(not links_dir or path not in _and_parents(links_dir) for path in out.iterdir())
    if found and not is_data_set(out):
        raise ValueError(f"--out: {out} exists and is not a prepared data set; choose another folder")
    if found and not overwrite:
        raise ValueError(f"--out: {out} already contains a data set; choose another folder or add --overwrite")


def _and_parents(path: Path) -> list[Path]:
    return [path.resolve(), *path.resolve().parents]


def save(prepared: Prepared, out: Path) -> None:
    """Write the data set folder, so that it is complete or, after an interruption, none that can be opened."""
    _check_space(prepared.splits, out.parent)
    unfinished = unfinished_path(out)
    save_splits(prepared.splits, unfinished, final=out)
    _check_unchanged(prepared.stamps)
    _write_json_lines(unfinished / FINDINGS, [finding.to_dict() for finding in prepared.findings])
    if prepared.errors:
        rejected = [
            {"source": error.source, "record": error.record, "id": error.sample_id, "reason": error.reason}
            for error in prepared.errors
        ]
        _write_json_lines(unfinished / REJECTED, rejected)
    replace_data_set(unfinished, out)


def _check_unchanged(stamps: dict[str, tuple[int, int]]) -> None:
    """Raise ValueError if an image file is no longer as it was checked; what was written may be of the new one."""
    for path, stamp in stamps.items():
        try:
            found = file_stamp(path)
        except OSError:
            found = None
        if found != stamp:
            raise ValueError(
                f"image {path}: the file was changed or removed while the data set was written; start again"
            )


def _write_json_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _check_space(splits: DatasetDict, folder: Path) -> None:
    """Raise if the disk is too full."""
    if (needed := bytes_needed(splits)) > (free := shutil.disk_usage(folder).free):
        raise ValueError(f"--out: the images take {needed:,} bytes, and {folder} has {free:,} left")
