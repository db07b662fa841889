"""Names of the files of an output folder, and writing files so that they are complete or absent; JSON Lines."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Files of an output folder.
LOADING_SETTINGS = "run.json"  # how the base model is loaded
TRAINING_FACTS = "facts.json"  # base, data, settings, progress; no path and no file name
EVALUATION_METRICS = "eval/metrics.json"
EVALUATION_SETTINGS = "eval/settings.json"  # names the adapter that was measured
EVALUATION_PLOTS = ("eval/abstention.png", "eval/confusion.png", "eval/reliability.png", "eval/subgroups.png")
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def read_json_lines(path: Path) -> list[dict]:
    """Return the rows of a JSON Lines file. `splitlines` would also split at U+2028 and U+0085 inside a text."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def digest_of_file(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomic_write(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a file so that readers get either the old or the new content, even if the process is killed.

    Args:
        path: file to write or replace.
        content: bytes, or text to encode as UTF-8.
        durable: wait until the content and the name are on the disk, so that they also survive a power failure.
    """
    unfinished = unfinished_path(path)
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    if durable:
        fsync(unfinished)
    unfinished.replace(path)
    if durable:
        fsync(path.parent)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the path of a file or folder to write, which is renamed to `path` when the block ends without an error.

    After an error a folder is deleted; a file keeps what was written, under its temporary name.
    """
    unfinished = unfinished_path(path)
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def unfinished_path(path: Path) -> Path:
    """Return the temporary name that `path` is written under."""
    return path.with_name(path.name + ".unfinished")


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
