"""Checkpoints that are complete or do not count: sealing, verifying, choosing and rotating them."""

import hashlib
import json
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

from common.files import ADAPTER_WEIGHTS, LOADING_SETTINGS, atomic_write, digest_of_file, fsync

MANIFEST = "COMPLETE.json"
NAME = re.compile(r"checkpoint-(\d+)")
# Files of a run that may as well be a project's, a data set's or a model's.
REPLACED = ("README.md", "tokenizer.json", "processor_config.json", "metrics.jsonl", "training_metrics.png")
# torch raises RuntimeError for what it cannot write, and for everything else as well.
TORCH_WRITE_ERRORS = ("inline_container.cc", "PytorchStreamWriter", "iostream error")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints in `output_dir`, the newest step first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(folders, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, which its name has."""
    return int(NAME.fullmatch(path.name).group(1))


def seal(path: Path, identity: dict) -> None:
    """Write the manifest of a checkpoint whose files are all there; without it, the checkpoint does not count.

    It is written last, when everything else is on the disk and not only in its cache, by one rename.

    Args:
        path: the checkpoint's folder.
        identity: what a run that resumes from it must have in common; JSON.
    """
    files = {}
    for file in sorted(file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST):
        files[file.relative_to(path).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest_of_file(file)}
        fsync(file)
    for folder in filter(Path.is_dir, path.rglob("*")):
        fsync(folder)
    content = {"step": step_of(path), "files": files, "run": identity}
    content["sha256"] = _digest_of(content)
    atomic_write(path / MANIFEST, json.dumps(content, indent=1), durable=True)
    fsync(path.parent)


def is_write_error(error: Exception) -> bool:
    """Return whether an error says that a file could not be written, as on a full disk."""
    if isinstance(error, RuntimeError):
        return any(text in str(error) for text in TORCH_WRITE_ERRORS)
    return isinstance(error, OSError | SafetensorError)


def describe_write_error(error: Exception) -> str:
    """Return a write error in one line; torch's own tells of a position in its archive and not of the disk."""
    text = " ".join(str(error).split())
    return f"the disk is full or fails ({text})" if isinstance(error, RuntimeError) else text


def describe_restart(output_dir: Path, resume: str | None, step: int) -> str:
    """Return a phrase that says which command will go on, and where.

    Args:
        output_dir: the run's folder.
        resume: as in `choose_checkpoint`.
        step: at which the run ended: newer checkpoints are those that it skipped as damaged.
    """
    checkpoints = [path for path in list_checkpoints(output_dir) if step_of(path) <= step]
    complete = [path.name for path in checkpoints if (path / MANIFEST).is_file()]
    if complete:
        command = "the same command" if resume == "auto" else "--resume_from_checkpoint auto"
        return f"{command} resumes from {complete[0]}"
    return f"the same command starts from {'the beginning' if resume in (None, 'auto') else f'{resume} again'}"


def read_manifest(path: Path) -> dict:
    """Verify every file of a checkpoint and return its manifest.

    Raises:
        ValueError: it is not sealed, or a file is missing or has changed; the message names the file.
    """
    if not path.is_dir():
        raise ValueError(f"checkpoint {path}: no such folder")
    if not (path / MANIFEST).is_file():
        raise ValueError(f"checkpoint {path}: no {MANIFEST}; its save was not completed")
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        intact = content["sha256"] == _digest_of({key: content[key] for key in ("step", "files", "run")})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path}: {MANIFEST} is damaged: {error!r}") from error
    if not intact or path.name != f"checkpoint-{content['step']}":
        raise ValueError(f"checkpoint {path}: {MANIFEST} is damaged, or of another checkpoint")
    for name, sealed in content["files"].items():
        _check_file(path, name, sealed)
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
    """Return the checkpoint to resume from, and the reason for each one that was skipped.

    Args:
        output_dir: the run's folder.
        resume: "auto" takes the newest complete checkpoint, or none; a path takes that one; None starts a new run.

    Raises:
        ValueError: the named checkpoint is not complete, or the run would mix its checkpoints with those of another.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume is None and checkpoints:
        rule = "choose another output_dir, or resume with --resume_from_checkpoint auto"
        raise ValueError(f"output_dir: {output_dir} holds a run already ({checkpoints[0].name}); {rule}")
    if resume in (None, "auto") and not checkpoints and (output_dir / ADAPTER_WEIGHTS).exists():
        raise ValueError(f"output_dir: {output_dir} holds a finished adapter and no checkpoint; choose another one")
    _check_foreign(output_dir)
    if resume is None:
        return None, []
    if resume != "auto":
        read_manifest(Path(resume))
        _check_newest(output_dir, Path(resume))
        return Path(resume), []
    skipped = []
    for path in checkpoints:
        try:
            read_manifest(path)
            return path, skipped
        except ValueError as error:
            skipped.append(str(error))
    return None, skipped


def _check_newest(output_dir: Path, chosen: Path) -> None:
    """Raise ValueError for newer checkpoints, which `auto` would take instead of those that the run will save."""
    for path in list_checkpoints(output_dir):
        if step_of(path) > step_of(chosen) and (path / MANIFEST).is_file():
            raise ValueError(
                f"resume_from_checkpoint: {output_dir} holds {path.name}, which is newer than {chosen.name}; resume "
                "with auto, move the newer ones away, or choose another output_dir"
            )


def _check_foreign(output_dir: Path) -> None:
    """Raise ValueError for a file that the run would replace and no run has written: one writes `run.json` first."""
    if (output_dir / LOADING_SETTINGS).is_file() or list_checkpoints(output_dir):
        return
    for name in REPLACED:
        if (output_dir / name).exists():
            rule = "which the run would replace; choose another one"
            raise ValueError(f"output_dir: {output_dir} holds a {name} that no run wrote, {rule}")


def rotate(newest: Path, limit: int | None, best: Path | None = None) -> None:
    """Delete the checkpoints before `newest`, which is complete, but for the last complete ones.

    What is newer stays: `auto` skipped it as damaged. So does the best one.

    Args:
        newest: the checkpoint that was just saved.
        limit: how many stay, at least `newest`; None for all.
        best: None without one.
    """
    if limit is None:
        return
    checkpoints = [path for path in list_checkpoints(newest.parent) if step_of(path) <= step_of(newest)]
    complete = [path for path in checkpoints if (path / MANIFEST).is_file()]
    kept = {*complete[: max(limit, 1)], best}
    for path in checkpoints:
        if path not in kept:
            delete(path)


def delete(path: Path) -> None:
    """Delete a checkpoint, if it is there; of a link to one of another run the link alone."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        (path / MANIFEST).unlink(missing_ok=True)  # first: half a folder must not count
        shutil.rmtree(path)
