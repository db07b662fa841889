"""Annotation files and image folders become a checked, split `DatasetDict` of chat samples."""

import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Image, List, Value

from . import check
from .attributes import unify_attributes
from .balance import effective_counts, sampling_weights
from .boxes import CONVENTIONS, MAX_PIXELS, MIN_PIXELS, scale_coordinates
from .download import fetch_links
from .duplicates import find_copies
from .groups import group_samples, unify_groups
from .inspection import ImageInfo, inspect_all, usable_cores
from .labels import LabelMap, Reference, build_label_map, merge_spellings, references_of, unknown_labels
from .metadata import clean_copy
from .notices import log_empty_splits, log_skipped, log_ungrouped
from .paths import is_link
from .records import ATTRIBUTES, DataError
from .sources import Collected, Source, mixing_shares, naming_source, read_source
from .split import SPLITS, assign_all, check_fractions

FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        **{name: Value("string") for name in ("label", "group", "skin_type", "age", "sex", "site", "source")},
        "image_sizes": List(List(Value("int32"), length=2)),
        "weight": Value("float32"),
    }
)
STRATA = (*(name for name in ATTRIBUTES if name not in ("group", "split")), "source")
MAX_LISTED = 20  # errors
MAX_WORKERS_PER_CORE = 8  # each takes 100 MB

logger = logging.getLogger(__name__)


class InvalidRecordsError(ValueError):
    """All the records with an error, in the order of their sources.

    Attributes:
        errors: of each record.
        lines: the message: how many there are, if several, and the first ones, alike ones once.
    """

    def __init__(self, errors: list[DataError], num_records: int):
        self.errors = errors
        alike = {}
        for error in errors:
            alike.setdefault((error.source, error.reason), []).append(error)
        lines = []
        for first, *others in islice(alike.values(), MAX_LISTED):
            more = f"; so have {len(others)} more" if others else ""
            lines.append(f"{first.source}: {first}{more}")
        if len(errors) > 1:
            some = len(errors) < num_records
            remedy = "; `python -m data_prep convert --on-error drop` leaves them out" if some else ""
            lines.insert(0, f"{len(errors)} of {num_records} records have an error{remedy}")
        if unlisted := sum(map(len, islice(alike.values(), MAX_LISTED, None))):
            lines.append(f"... and {unlisted} more")
        super().__init__("\n  ".join(lines))
        self.lines = lines


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `prepare`.

    Attributes:
        split: shares of train, validation and test, for the samples without a given split.
        seed: of the split; the same ids and seed give the same split in any order of the records.
        folds: number of equal parts for cross-validation: `fold_0` and so on in place of train and validation.
        group_by: key of the records, or column of the table, to group by in place of `group`.
        stratify_by: attribute whose values keep their share in each split, one of `STRATA`.
        labels: label map, label -> list of names, see `labels.build_label_map`; only the labels' own names when None.
        on_error: "fail" raises with every error, "drop" skips the records that have one.
        balance: how training samples are weighted, see `balance.sampling_weights`.
        num_workers: processes that decode images; all cores when None.
        show_progress: show a progress bar.
        clean_dir: folder for copies, without metadata, of the images with private metadata; the data set then has the
            paths of the copies. None keeps all images as they are, which is safe unless they are embedded somewhere.
        hub_dir: folder for the images of Hub data sets; None reads no source from the Hub.
        links_dir: folder for downloads of linked images; None refuses links.
        follow_links: accept links of the file system that lead out of the image folder.
        scale_boxes: convention to write coordinates in, one of `boxes.CONVENTIONS`; None leaves them as they are.
        min_pixels: smallest area of an image in training, px^2; coordinates depend on it.
        max_pixels: largest area of an image in training, px^2.

    Raises:
        ValueError: an unknown value, one fold, too many workers, or shares that do not add up to 1.
    """

    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 42
    folds: int = 0
    group_by: str | None = None
    stratify_by: str = "label"
    labels: dict | None = None
    on_error: str = "fail"
    balance: str = "none"
    num_workers: int | None = None
    show_progress: bool = True
    clean_dir: Path | None = None
    hub_dir: Path | None = None
    links_dir: Path | None = None
    follow_links: bool = False
    scale_boxes: str | None = None
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS

    def __post_init__(self):
        if self.on_error not in ("fail", "drop"):
            raise ValueError(f"on_error: expected 'fail' or 'drop', found {self.on_error!r}")
        if self.stratify_by not in STRATA:
            raise ValueError(f"stratify_by: expected one of {', '.join(STRATA)}, found {self.stratify_by!r}")
        if self.scale_boxes not in (None, *CONVENTIONS):
            raise ValueError(f"scale_boxes: expected {' or '.join(CONVENTIONS)}, found {self.scale_boxes!r}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels: {self.min_pixels} is above max_pixels, {self.max_pixels}")
        if self.folds and self.folds < 2:
            raise ValueError(f"folds: expected at least 2, found {self.folds}")
        if (self.num_workers or 0) > (most := MAX_WORKERS_PER_CORE * usable_cores()):
            raise ValueError(f"num_workers: {self.num_workers} processes, at most {most} on this computer")
        check_fractions(self.split)


@dataclass
class Prepared:
    """Result of `prepare`.

    Attributes:
        splits: the data set.
        findings: of all checks.
        errors: the records that were skipped, as unusable or by their mapping.
        effective: how many samples of each label an epoch draws from the training split on average.
        groups: group of each sample by its id; samples of one group are in one split.
        stamps: see `inspection.ImageInfo`, of each image file by its path, as it was checked.
    """

    splits: DatasetDict
    findings: list[check.Finding]
    errors: list[DataError]
    effective: dict[str | None, float]
    groups: dict[str, int]
    stamps: dict[str, tuple[int, int]]


def prepare_dataset(
    annotations: str | os.PathLike,
    image_dir: str | os.PathLike | None,
    *,
    mapping: str | None = None,
    recipe: str | None = None,
    format: str | None = None,
    **options,
) -> DatasetDict:
    """Return the splits that `prepare` makes of one source, with its options; `recipe` is an alias of `mapping`."""
    source = Source(Path(annotations), Path(image_dir) if image_dir is not None else None, mapping or recipe, format)
    return prepare([source], **options).splits


def prepare(sources: list[Source], **options) -> Prepared:
    """Read annotations and images, check them, and split them without leaks.

    Samples that share a group, an image, or copies of an image get the same split. Empty splits are left out.

    Args:
        sources: one or several; several mix by their weights.
        options: see `Options`.

    Raises:
        InvalidRecordsError: on_error is "fail" and a record cannot be used, or no record can.
        ValueError, FileNotFoundError: an option, the file or the folder cannot be used.
    """
    options = Options(**options)
    shares = mixing_shares(sources)
    collected = _collect(sources, options)
    infos = inspect_images(collected, num_workers=options.num_workers, show_progress=options.show_progress)
    limits = {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels}
    if options.scale_boxes is not None:
        _reject(collected, partial(scale_coordinates, convention=options.scale_boxes, **limits))
    collected.renamed = _make_ids_unique(collected.samples)
    picture_of, copies = find_copies(infos)
    findings = _check_samples(collected.samples, infos, picture_of, copies, options.labels)
    findings = [*check.check_records(collected.errors), *findings]
    reasons = check.flawed_samples(findings)
    _reject(collected, lambda sample: reasons.get(sample["id"]))
    _require_usable(collected, options.on_error)
    log_skipped(collected)
    log_ungrouped(collected.samples)
    samples = collected.samples
    groups = group_samples(samples, picture_of)
    strata = [sample[options.stratify_by] for sample in samples]
    if options.stratify_by != "label" and not any(strata):
        raise ValueError(f"stratify_by: no sample has {options.stratify_by!r}, so that its shares cannot be kept")
    splits = assign_all(samples, groups, strata, fractions=options.split, seed=options.seed, folds=options.folds)
    if options.scale_boxes is None:
        findings += check.check_coordinates(samples, **limits)
    wanted = [name for name, share in zip(SPLITS, options.split, strict=True) if share > 0 and not options.folds]
    log_empty_splits(splits, wanted, samples, groups)
    findings += check.check_rare_labels(samples, groups, splits)
    effective = _set_weights(samples, splits, options.balance, shares)
    used = {path for sample in samples for path in sample["images"]}
    if options.clean_dir is not None:
        _clean_images(samples, infos, options.clean_dir)
    group_of = {sample["id"]: group for sample, group in zip(samples, groups, strict=True)}
    errors = [*collected.errors, *collected.skipped]
    stamps = {path: infos[path].stamp for path in used}
    return Prepared(_build_splits(samples, splits), findings, errors, effective, group_of, stamps)


def _check_samples(
    samples: list[dict], infos: dict[str, ImageInfo], picture_of: dict, copies: tuple, names: dict | None
) -> list[check.Finding]:
    """Return the findings that do not depend on the split; give labels, groups and attributes one spelling."""
    spellings, shared = merge_label_spellings(samples), unify_groups(samples)
    attributes = unify_attributes(samples)
    label_map, references = _label_map(samples, names)
    return [
        *check.check_texts(samples, label_map),
        *check.check_ages(samples),
        *check.check_answers([sample for sample in samples if sample["label"] is not None], references, label_map),
        *check.check_grouped(samples),
        *check.check_spellings(spellings, "spelling"),
        *check.check_spellings(attributes, "attribute spelling"),
        *check.check_readable(references, label_map),
        *check.check_images(samples, infos),
        *check.check_copies(samples, *copies),
        *check.check_repeats(samples, picture_of),
        *check.check_labels(samples, picture_of),
        *check.check_leaks(samples, group_samples(samples, picture_of), [sample["split"] for sample in samples]),
        *shared,
    ]


def _collect(sources: list[Source], options: Options) -> Collected:
    """Read all sources and download their linked images."""
    collected = Collected()
    for number, source in enumerate(sources):
        hub_dir = options.hub_dir / f"hub-{number}" if options.hub_dir else None
        folders = {"hub_dir": hub_dir, "links_dir": options.links_dir}
        with naming_source(number, sources):
            collected.add(read_source(source, group_by=options.group_by, follow_links=options.follow_links, **folders))
    if any(sample["group"] for sample in collected.samples):
        _reject(collected, _other_group)
    if options.links_dir is not None:
        _download_links(collected, options.show_progress)
    return collected


def _other_group(sample: dict) -> str | None:
    """Return why a sample without a group cannot stand beside others that have one, if another key looks like it."""
    if sample["group"] or not sample["unread_group"]:
        return None
    key = sample["unread_group"]
    rule = "names a patient or lesion and is not read, while other records have a group"
    return f"field {key!r:.80}: {rule}: use 'group' in all records, or --group-by with one key that all have"


def _require_usable(collected: Collected, on_error: str) -> None:
    if collected.errors and on_error == "fail":
        raise InvalidRecordsError(collected.errors, collected.num_records)
    if not collected.samples:
        raise InvalidRecordsError([*collected.errors, *collected.skipped], collected.num_records)


def inspect_images(collected: Collected, *, num_workers: int | None, show_progress: bool) -> dict[str, ImageInfo]:
    """Decode each image once, in a process pool; move samples with an unusable one to the errors.

    Adds `image_sizes`, upright `[width, height]` in px, to each sample; returns the infos by path.
    """
    paths = sorted({path for sample in collected.samples for path in sample["images"]})
    results = dict(zip(paths, inspect_all(paths, num_workers, show_progress), strict=True))
    _reject_images(collected, {path: result for path, result in results.items() if isinstance(result, str)})
    for sample in collected.samples:
        sample["image_sizes"] = [list(results[path].size) for path in sample["images"]]
    return {path: result for path, result in results.items() if not isinstance(result, str)}


def _reject_images(collected: Collected, reasons: dict[str, str]) -> None:
    """Move the samples with an image that is in `reasons`, by path, to the errors."""

    def reason_of(sample: dict) -> str | None:
        bad = next((n for n, path in enumerate(sample["images"]) if path in reasons), None)
        return None if bad is None else f"image {sample['files'][bad]!r}: {reasons[sample['images'][bad]]}"

    _reject(collected, reason_of)


def _reject(collected: Collected, reason_of: Callable[[dict], str | None]) -> None:
    """Move the samples with a reason to the errors."""
    samples, collected.samples = collected.samples, []
    for sample in samples:
        if (reason := reason_of(sample)) is None:
            collected.samples.append(sample)
        else:
            about = {"record": sample["record"], "sample_id": sample["id"], "source": sample["origin"]}
            collected.errors.append(DataError(reason, **about))
    collected.errors.sort(key=lambda error: (error.source, error.record))


def _download_links(collected: Collected, show_progress: bool) -> None:
    """Download the linked images; samples whose image cannot be downloaded become errors."""
    links = {
        file: Path(path)
        for sample in collected.samples
        for file, path in zip(sample["files"], sample["images"], strict=True)
        if is_link(file)
    }
    _reject_images(collected, fetch_links(links, show_progress=show_progress))


def _make_ids_unique(samples: list[dict]) -> list[str]:
    """Give the second and later samples of one id another; return the new ids."""
    renamed = []
    for sample, name in zip(samples, unique_ids([sample["id"] for sample in samples]), strict=True):
        if sample["id"] != name:
            renamed.append(name)
        sample["id"] = name
    return renamed


def unique_ids(ids: list[str]) -> list[str]:
    """Return the ids, the second and later ones of one name numbered: `x`, `x#2`."""
    taken, seen, unique = set(ids), Counter(), []
    for name in ids:
        seen[name] += 1
        new = name
        while seen[name] > 1 and (new := f"{name}#{seen[name]}") in taken:
            seen[name] += 1
        taken.add(new)
        unique.append(new)
    return unique


def merge_label_spellings(samples: list[dict]) -> dict[str, Counter]:
    """Give labels that are spelled in several ways one spelling; return how often each spelling was there, by it."""
    counts = Counter(sample["label"] for sample in samples)
    spelling_of, found = merge_spellings(sample["label"] for sample in samples), {}
    for label, spelling in spelling_of.items():
        found.setdefault(spelling, Counter())[label] = counts[label]
    for sample in samples:
        sample["label"] = spelling_of.get(sample["label"], sample["label"])
    return found


def _label_map(samples: list[dict], names: dict | None) -> tuple[LabelMap, list[Reference]]:
    """Return the label map of the samples, empty without labels, and the references that it reads."""
    references = references_of(samples)
    labels = {label for label, _ in references}
    if names and (unknown := unknown_labels(names, labels)):
        logger.warning("labels of the label map that no sample has: %s", "; ".join(unknown))
    return build_label_map(labels, names, references) if labels else {}, references


def _set_weights(samples: list[dict], splits: list[str], balance: str, shares) -> dict[str | None, float]:
    """Give each training sample its sampling weight, all others 1; return the training split's effective counts."""
    train = [s for s, split in zip(samples, splits, strict=True) if split == "train" or split.startswith("fold_")]
    labels = [sample["label"] for sample in train]
    weights = sampling_weights(labels, [sample["source"] for sample in train], balance=balance, shares=shares)
    for sample in samples:
        sample["weight"] = 1.0
    for sample, weight in zip(train, weights, strict=True):
        sample["weight"] = weight
    return effective_counts(labels, weights)


def _clean_images(samples: list[dict], infos: dict[str, ImageInfo], folder: Path) -> None:
    """Replace each image that carries private metadata by a copy in `folder` that does not."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = {}
    for path in sorted(path for path, info in infos.items() if info.private):
        data, ending = clean_copy(path)
        copy = folder / f"{Path(path).stem}-{infos[path].digest[:8]}{ending}"
        copy.write_bytes(data)
        copies[path] = str(copy)
    for sample in samples:
        sample["images"] = [copies.get(path, path) for path in sample["images"]]


def _build_splits(samples: list[dict], splits: list[str]) -> DatasetDict:
    """Return a data set with folds first, then train, validation and test."""
    names = sorted(set(splits), key=lambda name: (SPLITS.index(name) if name in SPLITS else -1, name))
    rows = {name: [] for name in names}
    for sample, split in zip(samples, splits, strict=True):
        rows[split].append({key: sample[key] for key in FEATURES})
    return DatasetDict({name: Dataset.from_list(rows[name], features=FEATURES) for name in names})
