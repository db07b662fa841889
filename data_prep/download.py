"""Downloads on request: linked images, and data sets of the Hub."""

import hashlib
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit

from datasets import ClassLabel, DatasetDict, Features, Image, List, config, load_dataset
from huggingface_hub.constants import HF_HUB_CACHE

from common.files import atomic_write, suggest_file
from common.progress import progress

from .images import check_file
from .reading import Flaw

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MAX_BYTES = 50_000_000  # of one linked image
TIMEOUT = 20  # seconds without an answer
CONNECTIONS = 16
# Where files of a Hub data set are
DOWNLOADS = (
    HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH,
)  # fmt: skip


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
            data, promised = answer.read(MAX_BYTES + 1), answer.headers.get("Content-Length") or "0"
    except (OSError, ValueError, HTTPException) as error:
        return f"cannot be downloaded: {error!s:.200}"
    if promised.isdecimal() and len(data) < min(int(promised), MAX_BYTES):
        return f"cannot be downloaded: it ended after {len(data):,} of {int(promised):,} bytes"
    if len(data) > MAX_BYTES:
        return f"cannot be downloaded: over {MAX_BYTES:,} bytes"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, data)
    return None


def read_hub(dataset_id: str, folder: Path) -> list[dict | Flaw]:
    """Return the records of a Hub data set, see `load_hub`; its images become files in `folder`."""
    return records_of(load_hub(dataset_id), folder)


def load_hub(dataset_id: str) -> DatasetDict:
    """Return a data set of the Hub; FileNotFoundError if there is none, or the Hub cannot be reached."""
    try:
        return load_dataset(dataset_id)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        near = suggest_file(Path(dataset_id))
        raise FileNotFoundError(f"{dataset_id!r} is no local path, and the Hub says: {error}{near}") from error


def records_of(splits: DatasetDict, folder: Path) -> list[dict | Flaw]:
    """Return a data set's rows as records: images as file names, classes as names, `split` if there are several.

    A `Flaw` takes the place of a row with an image that is none.
    """
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
            records.append(_record(row, dataset.features, folder, {"id": f"{name}-{number:06d}", **given}))
    return records


def _record(row: dict, features: Features, folder: Path, given: dict) -> dict | Flaw:
    try:
        values = {key: _value(value, features[key], folder, f"{given['id']}-{key}") for key, value in row.items()}
    except (ValueError, OSError) as error:
        return Flaw(str(error))
    return {**given, **values}


def _value(value, feature, folder: Path, name: str):
    if value is None:
        return None
    if isinstance(feature, ClassLabel):
        return class_name(feature, value)
    if isinstance(feature, Image):
        return _to_file(value, folder / name)
    if isinstance(feature, List) and isinstance(feature.feature, Image):
        return [_to_file(image, folder / f"{name}-{number}") for number, image in enumerate(value)]
    return value


def class_name(feature: ClassLabel, value: int | None) -> str | None:
    """Return the name of a class; None for -1, which the Hub's data sets have where it is not known."""
    return None if value is None or value < 0 else feature.int2str(value)


def _to_file(image: dict, path: Path) -> str:
    """Write an undecoded image and return its file's name, without a suffix: its content tells the format."""
    check_origin(image)
    path.write_bytes(image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes())
    return path.name


def check_origin(image: dict | str | None) -> None:
    """Raise ValueError unless an undecoded image of a Hub data set has its bytes, or is a file that came with it.

    A row may name any file of this machine, which would be learnt from, and uploaded with what is made of the data.
    """
    if isinstance(image, str):  # of a block within a message
        image = {"bytes": None, "path": image}
    if image is None or (image["bytes"] is None and not image["path"]):
        raise ValueError("an image is empty")
    if image["bytes"] is not None:
        return
    path = Path(image["path"])
    if not any(path.resolve().is_relative_to(Path(folder).resolve()) for folder in DOWNLOADS):
        raise ValueError(f"image {image['path']!r:.200} is a path, and no file that came with the data set")
    check_file(path)
