"""Checkpoints that are whole or do not count: sealing, verifying, choosing and rotating them."""

import hashlib
import json
import re
import shutil
from pathlib import Path

from common.files import WEIGHTS, _flush, digest_of_file

MANIFEST = "COMPLETE.json"
NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints in `output_dir`, the newest step first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(NAME.fullmatch(path.name).group(1)), reverse=True)


def seal(path: Path, run: dict) -> None:
    """Write the manifest of a checkpoint whose files are all there; without it, the checkpoint does not count.

    It comes last, when everything else is on the disk and not only in its cache, and appears in one go.

    Args:
        path: the checkpoint's folder.
        run: what a run that goes on from it must have in common; JSON.
    """
    files = {}
    for file in sorted(file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST):
        files[file.relative_to(path).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest_of_file(file)}
        _flush(file)
    for folder in filter(Path.is_dir, path.rglob("*")):
        _flush(folder)
    content = {"step": int(NAME.fullmatch(path.name).group(1)), "files": files, "run": run}
    content["sha256"] = _digest_of(content)
    unfinished = path / f"{MANIFEST}.unfinished"
    unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    _flush(unfinished)
    unfinished.replace(path / MANIFEST)
    _flush(path)
    _flush(path.parent)


def read_manifest(path: Path) -> dict:
    """Verify every file of a checkpoint and return its manifest.

    Raises:
        ValueError: it is not sealed, or a file is missing or other than it was; the message names the file.
    """
    if not path.is_dir():
        raise ValueError(f"checkpoint {path}: no such folder")
    if not (path / MANIFEST).is_file():
        raise ValueError(f"checkpoint {path}: no {MANIFEST}; it was not written to its end")
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        whole = content["sha256"] == _digest_of({key: content[key] for key in ("step", "files", "run")})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path}: {MANIFEST} is damaged: {error!r}") from error
    if not whole or path.name != f"checkpoint-{content['step']}":
        raise ValueError(f"checkpoint {path}: {MANIFEST} is damaged, or of another checkpoint")
    for name, found in content["files"].items():
        _check_file(path, name, found)
    return content


def read_identity(path: Path) -> dict:
    """Return what a checkpoint's run had to have in common with one that resumes from it."""
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))["run"]


def _check_file(path: Path, name: str, sealed: dict) -> None:
    file = path / name
    if not file.is_file():
        raise ValueError(f"checkpoint {path}: {name} is missing")
    if (size := file.stat().st_size) != sealed["bytes"]:
        raise ValueError(f"checkpoint {path}: {name} has {size:,} bytes instead of {sealed['bytes']:,}")
    if digest_of_file(file) != sealed["sha256"]:
        raise ValueError(f"checkpoint {path}: {name} has changed since it was saved")


def _digest_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def choose_checkpoint(output_dir: Path, resume: str | None) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to go on from, and a line for each one that was passed over.

    Args:
        output_dir: the run's folder.
        resume: "auto" takes the newest whole checkpoint, or none; a path takes that one; None starts afresh.

    Raises:
        ValueError: the named checkpoint is not whole, or a fresh start would write into an earlier run.
    """
    found = list_checkpoints(output_dir)
    if resume is None and found:
        rule = "choose another output_dir, or go on with --resume_from_checkpoint auto"
        raise ValueError(f"output_dir: {output_dir} holds a run already ({found[0].name}); {rule}")
    if resume in (None, "auto") and not found and (output_dir / WEIGHTS).exists():
        raise ValueError(f"output_dir: {output_dir} holds a finished adapter and no checkpoint; choose another one")
    if resume is None:
        return None, []
    if resume != "auto":
        read_manifest(Path(resume))
        return Path(resume), []
    passed_over = []
    for path in found:
        try:
            read_manifest(path)
            return path, passed_over
        except ValueError as error:
            passed_over.append(str(error))
    return None, passed_over


def rotate(output_dir: Path, limit: int | None, best: Path | None = None) -> None:
    """Delete all but the newest `limit` whole checkpoints, and the leftovers of saves that were cut off before them.

    The newest whole checkpoint and what is newer than it stay, and so does the best one.
    """
    found = list_checkpoints(output_dir)
    whole = [path for path in found if (path / MANIFEST).is_file()]
    if limit is None or not whole:
        return
    kept = {*whole[: max(limit, 1)], *found[: found.index(whole[0])], best}
    for path in found:
        if path not in kept:
            (path / MANIFEST).unlink(missing_ok=True)  # first: half a folder must not count
            shutil.rmtree(path)
