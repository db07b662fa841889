"""Annotation files and image folders become a checked, split `DatasetDict` of chat samples."""

import difflib
import logging
import os
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from tqdm import tqdm

from . import check
from .balance import effective_counts, sampling_weights
from .download import fetch_links
from .duplicates import near_pairs
from .images import ImageFacts, clean_copy, inspect_image, is_link, perceptual_hash
from .records import FACTS, READ_KEYS, DataError
from .sources import Collected, Source, merge, mixing_shares, read_source
from .split import SPLITS, assign_splits, check_fractions, join_groups

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
STRATA = (*(fact for fact in FACTS if fact not in ("group", "split")), "source")
MAX_LISTED = 20
GIVEN_SPLITS = {name: name for name in SPLITS} | {"val": "validation", "valid": "validation", "dev": "validation"}

logger = logging.getLogger(__name__)


class InvalidRecordsError(ValueError):
    """All the records that cannot be used, in the order of their sources."""

    def __init__(self, errors: list[DataError], num_records: int):
        self.errors = errors
        lines = [f"{error.source}: {error}" for error in errors[:MAX_LISTED]]
        if len(errors) > 1:
            lines.insert(0, f"{len(errors)} of {num_records} records cannot be used")
        if len(errors) > MAX_LISTED:
            lines.append(f"... and {len(errors) - MAX_LISTED} more")
        super().__init__("\n  ".join(lines))


@dataclass
class Prepared:
    """What `prepare` made.

    Attributes:
        splits: the data set.
        findings: everything that the checks found.
        errors: the records that were kept out, as bad or by their mapping.
        effective: how many samples of each label an epoch draws from the training split on average.
        groups: group of each sample by its id; samples of one group stay in one split.
    """

    splits: DatasetDict
    findings: list[check.Finding]
    errors: list[DataError]
    effective: dict[str | None, float]
    groups: dict[str, int]


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


def prepare(
    sources: list[Source],
    *,
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 42,
    folds: int = 0,
    group_by: str | None = None,
    stratify_by: str = "label",
    on_error: str = "fail",
    balance: str = "none",
    num_workers: int | None = None,
    show_progress: bool = True,
    clean_dir: Path | None = None,
    hub_dir: Path | None = None,
    links_dir: Path | None = None,
) -> Prepared:
    """Read annotations and images, check them, and split them without leaks.

    Samples that share a group, an image, or copies of an image stay in one split. A split that no sample falls into is
    left out.

    Args:
        sources: one or several; several mix by their weights.
        split: shares of train, validation and test, for the samples that name no split of their own.
        folds: number of equal parts, for cross-validation, that everything but test is dealt into: `fold_0` and on
            instead of train and validation.
        seed: of the split; the same ids and seed give the same split in any order of the records.
        group_by: key of the records, or column of the table, to group by instead of `group`.
        stratify_by: fact whose values keep their share in each split, one of `STRATA`.
        on_error: "fail" raises with every problem found, "drop" keeps those records out.
        balance: how training samples are weighted, see `balance.sampling_weights`.
        num_workers: processes that decode images; all cores when None.
        show_progress: show a progress bar.
        clean_dir: folder for copies of the images that carry private metadata, without it; the data set names those
            copies. None leaves all images as they are, which is right as long as they are not embedded anywhere.
        hub_dir: folder for the images of Hub data sets; None reads no source from the Hub.
        links_dir: folder that linked images are downloaded to, and looked for; None refuses links.

    Raises:
        InvalidRecordsError: on_error is "fail" and a record cannot be used.
        ValueError, FileNotFoundError: the file or the folder cannot be used, or no record can.
    """
    if on_error not in ("fail", "drop"):
        raise ValueError(f"on_error: expected 'fail' or 'drop', found {on_error!r}")
    if stratify_by not in STRATA:
        raise ValueError(f"stratify_by: expected one of {', '.join(STRATA)}, found {stratify_by!r}")
    check_fractions(split)
    shares = mixing_shares(sources)
    found = Collected()
    for number, source in enumerate(sources):
        own = None if hub_dir is None else hub_dir / f"hub-{number}"
        merge(found, read_source(source, group_by=group_by, hub_dir=own, links_dir=links_dir))
    if links_dir is not None:
        _fetch(found, show_progress)
    facts = inspect_images(found, num_workers=num_workers, show_progress=show_progress)
    found.num_renamed = _make_ids_unique(found.samples)
    if found.errors and on_error == "fail":
        raise InvalidRecordsError(found.errors, found.num_records)
    if not found.samples:
        raise InvalidRecordsError([*found.errors, *found.left_out], found.num_records)
    _mention(found)
    picture_of, copies = find_copies(facts)
    groups = _groups(found.samples, picture_of)
    strata = [sample[stratify_by] for sample in found.samples]
    splits = _splits(found.samples, groups, strata, split, seed)
    if folds:
        splits = _folds(found.samples, groups, strata, splits, folds, seed)
    findings = [
        *check.check_records(found.errors),
        *check.check_texts(found.samples),
        *check.check_images(found.samples, facts),
        *check.check_copies(found.samples, *copies),
        *check.check_labels(found.samples, picture_of),
        *check.check_splits(found.samples, groups, splits),
    ]
    effective = _set_weights(found.samples, splits, balance, shares)
    if clean_dir is not None:
        _clean_images(found.samples, facts, clean_dir)
    built = {name: _build(found.samples, splits, name) for name in sorted(set(splits), key=_rank)}
    group_of = {sample["id"]: group for sample, group in zip(found.samples, groups, strict=True)}
    return Prepared(DatasetDict(built), findings, [*found.errors, *found.left_out], effective, group_of)


def inspect_images(found: Collected, *, num_workers: int | None, show_progress: bool) -> dict[str, ImageFacts]:
    """Decode each different image once, in a process pool; move samples with a bad one to the errors.

    Adds `image_sizes`, upright `[width, height]` in px, to each sample and returns the facts by path.
    """
    paths = sorted({path for sample in found.samples for path in sample["images"]})
    facts = dict(zip(paths, _inspect(paths, num_workers, show_progress), strict=True))
    _set_aside(found, {path: fact for path, fact in facts.items() if isinstance(fact, str)})
    for sample in found.samples:
        sample["image_sizes"] = [list(facts[path].size) for path in sample["images"]]
    return {path: fact for path, fact in facts.items() if not isinstance(fact, str)}


def _set_aside(found: Collected, reasons: dict[str, str]) -> None:
    """Move the samples with an image that cannot be used, for the reason by its path, to the errors."""
    parsed, found.samples = found.samples, []
    for sample in parsed:
        bad = next((n for n, path in enumerate(sample["images"]) if path in reasons), None)
        if bad is None:
            found.samples.append(sample)
        else:
            reason = f"image {sample['files'][bad]!r}: {reasons[sample['images'][bad]]}"
            about = {"record": sample["record"], "sample_id": sample["id"], "source": sample["origin"]}
            found.errors.append(DataError(reason, **about))
    found.errors.sort(key=lambda error: (error.source, error.record))


def _fetch(found: Collected, show_progress: bool) -> None:
    """Download the linked images; samples whose image cannot be had become errors."""
    links = {
        file: Path(path)
        for sample in found.samples
        for file, path in zip(sample["files"], sample["images"], strict=True)
        if is_link(file)
    }
    _set_aside(found, fetch_links(links, show_progress=show_progress))


def _inspect(paths: list[str], num_workers: int | None, show_progress: bool) -> list[ImageFacts | str]:
    if not paths:
        return []
    perceptual_hash(PILImage.new("L", (32, 32)))  # loads what it needs once, here, and not in each worker
    try:
        with ProcessPoolExecutor(num_workers or len(os.sched_getaffinity(0))) as pool:
            results = pool.map(inspect_image, paths, chunksize=16)
            return list(tqdm(results, total=len(paths), desc="images", unit="img", disable=not show_progress))
    except BrokenProcessPool as error:
        reason = "a decoding process was killed, most likely out of memory; use fewer workers"
        raise ValueError(f"images: {reason}") from error


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


def _mention(found: Collected) -> None:
    """Nothing is kept out, renamed or passed over in silence."""
    if found.errors:
        logger.warning("%d of %d records kept out", len(found.errors), found.num_records)
    for reason, count in Counter(error.reason for error in found.left_out).most_common(5):
        logger.warning("%d rows left out by the mapping: %s", count, reason)
    if found.num_renamed:
        logger.warning("%d records repeat an id and were renamed, 'x' to 'x#2'", found.num_renamed)
    for key, count in found.unread.most_common(5):
        near = difflib.get_close_matches(key.lower(), READ_KEYS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        logger.warning("the key %.80r of %d records is not read%s", key, count, hint)


def find_copies(facts: dict[str, ImageFacts]) -> tuple[dict[str, str], tuple[list[list[str]], list[list[str]]]]:
    """Return one path for each path's picture, and the sets of paths that are exact and near copies."""
    by_digest = defaultdict(list)
    for path in sorted(facts):
        by_digest[facts[path].digest].append(path)
    firsts = [paths[0] for paths in by_digest.values()]
    hashes = np.array([facts[path].hashes for path in firsts], dtype=np.uint64).reshape(-1, 2)
    thumbnails = np.frombuffer(b"".join(facts[path].thumbnail for path in firsts), np.uint8).reshape(-1, 8, 8, 3)
    pairs = near_pairs(hashes[:, 0], hashes[:, 1], thumbnails)
    roots = join_groups(len(firsts), [list(pair) for pair in pairs])
    alike = defaultdict(list)
    for path, root in zip(firsts, roots, strict=True):
        alike[root].append(path)
    picture_of = {path: firsts[roots[n]] for n, paths in enumerate(by_digest.values()) for path in paths}
    exact = [paths for paths in by_digest.values() if len(paths) > 1]
    return picture_of, (exact, [paths for paths in alike.values() if len(paths) > 1])


def _groups(samples: list[dict], picture_of: dict[str, str]) -> list[int]:
    """Return each sample's group: samples with one `group`, or with copies of one picture, belong together."""
    together = defaultdict(list)
    for index, sample in enumerate(samples):
        if sample["group"] is not None:
            together["group", sample["source"], sample["group"]].append(index)
        for path in sample["images"]:
            together["picture", picture_of[path]].append(index)
    return join_groups(len(samples), list(together.values()))


def _splits(
    samples: list[dict], groups: list[int], strata: list, fractions: tuple[float, float, float], seed: int
) -> list[str]:
    """Return each sample's split: the given one, else that of its group, else dealt by group and stratum.

    Given train and test splits are kept as they are; a validation split, when none is given, comes out of train.
    """
    splits = [_given_split(sample) for sample in samples]
    given = {group: split for group, split in zip(groups, splits, strict=True) if split is not None}
    splits = [split or given.get(group) for group, split in zip(groups, splits, strict=True)]

    if None in splits:
        splits = _deal(samples, groups, strata, splits, {None}, fractions, SPLITS, seed)
    elif "validation" not in splits and fractions[1] > 0 and "train" in splits:
        share = fractions[1] / (fractions[0] + fractions[1])
        splits = _deal(samples, groups, strata, splits, {"train"}, (1 - share, share), SPLITS[:2], seed)
    return splits


def _folds(
    samples: list[dict], groups: list[int], strata: list, splits: list[str], folds: int, seed: int
) -> list[str]:
    """Deal everything but the test split into parts of one size, by group and stratum."""
    if folds < 2:
        raise ValueError(f"folds: expected at least 2, found {folds}")
    names = tuple(f"fold_{number}" for number in range(folds))
    return _deal(samples, groups, strata, splits, {"train", "validation"}, (1 / folds,) * folds, names, seed)


def _deal(samples, groups, strata, splits, where: set, shares: tuple, names: tuple[str, ...], seed: int) -> list:
    """Return the splits with those in `where` dealt anew, by group and stratum, into `names` by their shares."""
    indices = [index for index, split in enumerate(splits) if split in where]
    ids = [samples[index]["id"] for index in indices]
    own, kinds = [groups[index] for index in indices], [strata[index] for index in indices]
    dealt = assign_splits(ids, shares, seed=seed, groups=own, labels=kinds, names=names)
    new = dict(zip(indices, dealt, strict=True))
    return [new.get(index, split) for index, split in enumerate(splits)]


def _rank(name: str) -> tuple[int, str]:
    return (SPLITS.index(name) if name in SPLITS else -1), name


def _given_split(sample: dict) -> str | None:
    if sample["split"] is None:
        return None
    if (split := GIVEN_SPLITS.get(sample["split"].lower())) is None:
        where = f"record {sample['record']} (id {sample['id']!r}), field 'split'"
        raise ValueError(f"{where}: expected train, validation or test, found {sample['split']!r}")
    return split


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


def _clean_images(samples: list[dict], facts: dict[str, ImageFacts], folder: Path) -> None:
    """Replace each image that carries private metadata by a copy in `folder` that does not."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = {}
    for path in sorted(path for path, fact in facts.items() if fact.private):
        data, ending = clean_copy(path)
        copy = folder / f"{Path(path).stem}-{facts[path].digest[:8]}{ending}"
        copy.write_bytes(data)
        copies[path] = str(copy)
    for sample in samples:
        sample["images"] = [copies.get(path, path) for path in sample["images"]]


def _build(samples: list[dict], splits: list[str], name: str) -> Dataset:
    rows = [
        {key: sample[key] for key in FEATURES} for sample, split in zip(samples, splits, strict=True) if split == name
    ]
    return Dataset.from_list(rows, features=FEATURES)
