"""Names of the files of an output folder, and writing files so that they are whole or absent."""

import hashlib
import os
from pathlib import Path

RUN_FACTS = "run.json"  # how the base model is loaded
FACTS = "facts.json"  # what training knows about itself: base, data, settings, progress; no path and no file name
METRICS = "eval/metrics.json"
SETTINGS = "eval/settings.json"  # of the evaluation; names the adapter that was measured
PLOTS = tuple(f"eval/{name}.png" for name in ("abstention", "confusion", "reliability", "subgroups"))  # and no others
WEIGHTS = "adapter_model.safetensors"


def digest_of_file(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have a file's bytes, or a folder's names, written to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
