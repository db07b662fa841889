"""Downloads on request: linked images, and data sets of the Hub."""

import hashlib
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlsplit

from datasets import ClassLabel, DatasetDict, Image, List, load_dataset

from common.files import atomic_write, suggest_file
from common.progress import progress

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MAX_BYTES = 50_000_000  # of one linked image
TIMEOUT = 20  # seconds without an answer
CONNECTIONS = 16


def link_path(link: str, folder: Path) -> Path:
    """Return the path of a linked image: that of a `file://` link, else one in the download folder."""
    parts = urlsplit(link)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{link[:100]!r} is an address, expected http, https or file")
    return folder / (hashlib.sha256(link.encode()).hexdigest()[:24] + Path(parts.path).suffix[:6])


def fetch_links(links: dict[str, Path], *, show_progress: bool) -> dict[str, str]:
    """Download each web address to its path unless the file exists; return the reasons of the failures by path."""
    missing = {path: link for link, path in links.items() if not link.startswith("file:") and not path.exists()}
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        results = pool.map(_download, missing.values(), missing)
        shown = show_progress and bool(missing)
        reasons = list(progress(results, "download", len(missing), "links", shown=shown))
    return {str(path): reason for path, reason in zip(missing, reasons, strict=True) if reason is not None}


def _download(link: str, path: Path) -> str | None:
    """Download one file, completely or not at all; return the reason for a failure, or None."""
    try:
        request = urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0 (data_prep)"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            data = answer.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        return f"cannot be downloaded: {error}"
    if len(data) > MAX_BYTES:
        return f"cannot be downloaded: over {MAX_BYTES:,} bytes"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, data)
    return None


def read_hub(dataset_id: str, folder: Path) -> list[dict]:
    """Return the records of a Hub data set, see `load_hub`; its images become files in `folder`."""
    return records_of(load_hub(dataset_id), folder)


def load_hub(dataset_id: str) -> DatasetDict:
    """Return a data set of the Hub; FileNotFoundError if there is none, or the Hub cannot be reached."""
    try:
        return load_dataset(dataset_id)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        near = suggest_file(Path(dataset_id))
        raise FileNotFoundError(f"{dataset_id!r} is no local path, and the Hub says: {error}{near}") from error


def records_of(splits: DatasetDict, folder: Path) -> list[dict]:
    """Return a data set's rows as records: images as file names, classes as names, `split` if there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for name, dataset in splits.items():
        for column, feature in dataset.features.items():
            if isinstance(feature, Image):
                dataset = dataset.cast_column(column, Image(decode=False))
            elif isinstance(feature, List) and isinstance(feature.feature, Image):
                dataset = dataset.cast_column(column, List(Image(decode=False)))
        given = {"split": name} if len(splits) > 1 else {}
        for number, row in enumerate(dataset):
            row_id = f"{name}-{number:06d}"
            values = {
                key: _value(value, dataset.features[key], folder, f"{row_id}-{key}") for key, value in row.items()
            }
            records.append({"id": row_id, **given, **values})
    return records


def _value(value, feature, folder: Path, name: str):
    if value is None:
        return None
    if isinstance(feature, ClassLabel):
        return feature.int2str(value)
    if isinstance(feature, Image):
        return _to_file(value, folder / name)
    if isinstance(feature, List) and isinstance(feature.feature, Image):
        return [_to_file(image, folder / f"{name}-{number}") for number, image in enumerate(value)]
    return value


def _to_file(image: dict, path: Path) -> str:
    """Write an undecoded image and return its file's name, without a suffix: its content tells the format."""
    path.write_bytes(image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes())
    return path.name
