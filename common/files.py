"""Names of the files of an output folder, and writing files so that they are complete or absent; JSON Lines."""

import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

# Files of an output folder.
LOADING_SETTINGS = "run.json"  # how the base model is loaded
TRAINING_FACTS = "facts.json"  # base, data, settings, progress; no path and no file name
EVALUATION_METRICS = "eval/metrics.json"
EVALUATION_SETTINGS = "eval/settings.json"  # names the adapter that was measured
EVALUATION_PLOTS = ("eval/abstention.png", "eval/confusion.png", "eval/reliability.png", "eval/subgroups.png")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_COMPARED = 5000  # names of a folder, when one is missing


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


def suggest_file(path: Path) -> str:
    """Return "; did you mean 'x'?" with the nearest name beside a missing file or folder, "" when there is none.

    Near are names in another case, with another ending or a typing error; those with other digits are other files.
    """
    if not path.parent.is_dir():
        return ""
    beside = [other.name for other in islice(path.parent.iterdir(), MAX_COMPARED) if not other.name.startswith(".")]
    beside = [name for name in beside if _digits(Path(name).stem) == _digits(path.stem)]
    same = [name for name in beside if Path(name).stem.casefold() == path.stem.casefold()]
    alike = difflib.get_close_matches(path.stem, {Path(name).stem for name in beside}, n=1, cutoff=0.75)
    candidates = same or [name for name in beside if Path(name).stem in alike]
    near = difflib.get_close_matches(path.name, candidates, n=1, cutoff=0)
    return f"; did you mean {near[0]!r}?" if near else ""


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))
