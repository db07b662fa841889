"""An annotation file and an image folder become a `DatasetDict` of chat samples."""

import difflib
import logging
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Image, List, Value
from tqdm import tqdm

from .images import probe_image, resolve_image
from .records import READ_KEYS, DataError, parse_record, read_annotations, unread_keys
from .split import SPLITS, assign_splits, check_fractions

FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "label": Value("string"),
        "group": Value("string"),
        "skin_type": Value("string"),
        "image_sizes": List(List(Value("int32"), length=2)),
    }
)
MAX_LISTED = 20

logger = logging.getLogger(__name__)


class InvalidRecordsError(ValueError):
    """All the records of one file that cannot be used, in the order of the file."""

    def __init__(self, source: str | Path, errors: list[DataError], num_records: int):
        self.errors = errors
        if len(errors) == 1:
            super().__init__(f"{source}: {errors[0]}")
            return
        lines = [f"{source}: {len(errors)} of {num_records} records cannot be used", *map(str, errors[:MAX_LISTED])]
        if len(errors) > MAX_LISTED:
            lines.append(f"... and {len(errors) - MAX_LISTED} more")
        super().__init__("\n  ".join(lines))


@dataclass
class Collected:
    """What one annotation file holds: usable samples, errors, and what was renamed or not looked at."""

    samples: list[dict] = field(default_factory=list)
    errors: list[DataError] = field(default_factory=list)
    num_records: int = 0
    num_renamed: int = 0
    unread: Counter = field(default_factory=Counter)


def prepare_dataset(
    annotations: str | os.PathLike,
    image_dir: str | os.PathLike | None,
    *,
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 42,
    on_error: str = "fail",
    format: str | None = None,
    num_workers: int | None = None,
    show_progress: bool = True,
    on_rejected: Callable[[list[DataError]], None] | None = None,
) -> DatasetDict:
    """Read an annotation file and its images into a `DatasetDict` of `train`, `validation` and `test`.

    A split that no sample falls into is left out.

    Args:
        annotations: JSON array or JSON Lines file.
        image_dir: folder that the records' image paths start from; None when no record has an image.
        split: shares of train, validation and test.
        seed: of the split; the same ids and seed give the same split in any order of the records.
        on_error: "fail" raises with every problem found, "drop" keeps those records out.
        format: one of `records.FORMATS`; recognised record by record when None.
        num_workers: processes that decode images; all cores when None.
        show_progress: show a progress bar.
        on_rejected: with "drop", called once with the errors of the records that were kept out.

    Raises:
        InvalidRecordsError: on_error is "fail" and a record cannot be used.
        ValueError, FileNotFoundError: the file or the folder cannot be used, or no record can.
    """
    if on_error not in ("fail", "drop"):
        raise ValueError(f"on_error: expected 'fail' or 'drop', found {on_error!r}")
    check_fractions(split)
    found = collect_samples(
        annotations, image_dir, format=format, num_workers=num_workers, show_progress=show_progress
    )
    if found.errors and (on_error == "fail" or not found.samples):
        raise InvalidRecordsError(annotations, found.errors, found.num_records)
    _mention(found, annotations)
    if on_rejected is not None:
        on_rejected(found.errors)
    splits = assign_splits([sample["id"] for sample in found.samples], split, seed=seed)
    return DatasetDict({name: _build(found.samples, splits, name) for name in SPLITS if name in splits})


def _mention(found: Collected, annotations) -> None:
    """Nothing is kept out, renamed or passed over in silence."""
    if found.errors:
        logger.warning("%s: %d of %d records kept out", annotations, len(found.errors), found.num_records)
    if found.num_renamed:
        logger.warning("%s: %d records repeat an id and were renamed, 'x' to 'x#2'", annotations, found.num_renamed)
    for key, count in found.unread.most_common(5):
        near = difflib.get_close_matches(key.lower(), READ_KEYS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        logger.warning("%s: the key %r of %d records is not read%s", annotations, key, count, hint)


def _build(samples: list[dict], splits: list[str], name: str) -> Dataset:
    rows = [
        {key: sample[key] for key in FEATURES} for sample, split in zip(samples, splits, strict=True) if split == name
    ]
    return Dataset.from_list(rows, features=FEATURES)


def collect_samples(
    annotations, image_dir, *, format: str | None = None, num_workers: int | None = None, show_progress: bool = True
) -> Collected:
    """Parse every record and decode every image once; arguments as in `prepare_dataset`."""
    raw_records = read_annotations(annotations)
    root = _image_root(image_dir)
    found = Collected(num_records=len(raw_records))
    parsed = []
    for number, raw in enumerate(raw_records):
        try:
            sample = parse_record(raw, number, format=format)
            if sample["images"] and root is None:
                raise ValueError(f"image_dir: {annotations} names images, and no image folder was given")
            sample["images"] = _resolve_images(sample, root)
            parsed.append(sample)
        except DataError as error:
            found.errors.append(error)
    found.unread = Counter(key for raw in raw_records if isinstance(raw, dict) for key in unread_keys(raw))
    sizes = _probe_images(parsed, num_workers, show_progress)
    for sample in parsed:
        try:
            _attach_sizes(sample, sizes, root)
            found.samples.append(sample)
        except DataError as error:
            found.errors.append(error)
    found.errors.sort(key=lambda error: error.record)
    found.num_renamed = _make_ids_unique(found.samples)
    return found


def _image_root(image_dir) -> Path | None:
    if image_dir is None:
        return None
    root = Path(image_dir).resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"image_dir: no folder {image_dir}")
    return root


def _resolve_images(sample: dict, root: Path | None) -> list[Path]:
    try:
        return [resolve_image(name, root) for name in sample["images"]]
    except ValueError as error:
        raise _image_error(sample, str(error)) from error


def _image_error(sample: dict, reason: str) -> DataError:
    return DataError(f"image {reason}", record=sample["record"], sample_id=sample["id"])


def _probe_images(samples: list[dict], num_workers: int | None, show_progress: bool) -> dict[Path, tuple | str]:
    """Decode each different image once, in a process pool; return its size, or the reason why it cannot be used."""
    paths = sorted({path for sample in samples for path in sample["images"]})
    if not paths:
        return {}
    try:
        with ProcessPoolExecutor(num_workers or len(os.sched_getaffinity(0))) as pool:
            results = pool.map(probe_image, paths, chunksize=16)
            bar = tqdm(results, total=len(paths), desc="images", unit="img", disable=not show_progress)
            return dict(zip(paths, bar, strict=True))
    except BrokenProcessPool as error:
        raise ValueError(
            "images: a decoding process was killed, most likely out of memory; use fewer workers"
        ) from error


def _attach_sizes(sample: dict, sizes: dict, root: Path | None) -> None:
    """Add `image_sizes`, upright `[width, height]` in px; raise DataError for an image that cannot be used."""
    for path in sample["images"]:
        if isinstance(sizes[path], str):
            raise _image_error(sample, f"{str(path.relative_to(root))!r}: {sizes[path]}")
    sample["image_sizes"] = [list(sizes[path]) for path in sample["images"]]
    sample["images"] = [str(path) for path in sample["images"]]


def _make_ids_unique(samples: list[dict]) -> int:
    """Number the second and later samples of one id (`x`, `x#2`); return how many were renamed."""
    taken = {sample["id"] for sample in samples}
    seen, renamed = Counter(), 0
    for sample in samples:
        base = sample["id"]
        seen[base] += 1
        if seen[base] == 1:
            continue
        while (name := f"{base}#{seen[base]}") in taken:
            seen[base] += 1
        taken.add(name)
        sample["id"] = name
        renamed += 1
    return renamed
