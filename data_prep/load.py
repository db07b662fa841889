"""One way to open training data, whether it is an annotation file, a prepared folder or a Hub data set."""

import hashlib
import json
import logging
import math
from collections.abc import Iterable
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Image, List, concatenate_datasets

from common.files import suggest_file

from .attributes import SPELLED, attribute_key
from .convert import FEATURES, prepare_dataset, unique_ids
from .download import HUB_ID, check_origin, class_name, load_hub
from .groups import is_no_group
from .images import load_image
from .labels import label_key, merge_spellings
from .reading import describe
from .records import ATTRIBUTES, DataError, FieldError, attributes_of, normalise_messages
from .storage import load_folder, undecoded

logger = logging.getLogger(__name__)

FINGERPRINTED = ("id", "messages", "label", "image_sizes")


def load_splits(dataset_path: str, image_dir: str | None = None, *, show_progress: bool = True) -> DatasetDict:
    """Return a `DatasetDict` in the project's schema, images undecoded (`{"bytes", "path"}`).

    Args:
        dataset_path: an annotation file, a folder written by `python -m data_prep convert`, or a Hub data set id. An
            annotation file always gets the same split (seed 42), so that test samples are never trained on.
        image_dir: the annotation file's image folder; an error with anything else.
        show_progress: show a progress bar.

    Raises:
        FileNotFoundError, ValueError: there is no such data, or it has another form; the message says which.
    """
    path = Path(dataset_path)
    if image_dir is not None and not path.is_file():
        raise ValueError(f"image_dir: goes with an annotation file, and {dataset_path!r} is not a file")
    if path.is_file():
        splits = prepare_dataset(path, image_dir, show_progress=show_progress)
    elif path.is_dir():
        splits = _load_folder(path)
    elif HUB_ID.fullmatch(dataset_path) and path.suffix not in (".json", ".jsonl"):
        splits = load_hub(dataset_path)
        splits = _with_unique_ids({name: standardise(dataset, name) for name, dataset in splits.items()})
    else:
        rule = f"no file, no folder and no Hub data set id{suggest_file(path)}"
        raise FileNotFoundError(f"no data at {dataset_path!r}: {rule}")
    splits = DatasetDict({name: undecoded(dataset) for name, dataset in splits.items()})
    return _merge_spellings(splits)


def _merge_spellings(splits: DatasetDict) -> DatasetDict:
    """Return the splits with one spelling for each label and attribute, as `convert` does."""
    for column in ("label", *SPELLED):
        key = label_key if column == "label" else partial(attribute_key, column)
        spelling_of = merge_spellings((value for split in splits.values() for value in split[column]), key)
        if spelling_of:
            logger.warning(
                "values of %s that are one, spelled in several ways: %s", column, ", ".join(sorted(spelling_of))
            )
            values = {name: [spelling_of.get(x, x) for x in split[column]] for name, split in splits.items()}
            splits = DatasetDict({name: _with_column(split, column, values[name]) for name, split in splits.items()})
    return splits


def _with_column(split: Dataset, name: str, values: list) -> Dataset:
    return split.remove_columns(name).add_column(name, values, feature=FEATURES[name])


def _with_unique_ids(splits: dict[str, Dataset]) -> DatasetDict:
    """Return the splits with repeated ids numbered, as `convert` does."""
    ids = [name for split in splits.values() for name in split["id"]]
    unique = unique_ids(ids)
    if renamed := [new for old, new in zip(ids, unique, strict=True) if old != new]:
        logger.warning("%d samples repeat an id and were renamed; the first is %.80r now", len(renamed), renamed[0])
    else:
        return DatasetDict(splits)
    names = iter(unique)
    return DatasetDict(
        {name: _with_column(split, "id", list(islice(names, len(split)))) for name, split in splits.items()}
    )


def fingerprint(rows: Iterable[dict]) -> str:
    """Return a SHA-256 over a split's content that is the same on every machine, whatever the order of the samples.

    It covers ids, messages, labels and image sizes (`FINGERPRINTED`). It does not cover paths, nor the
    pixels, which would take minutes to read: an edited image of the same size gives the same fingerprint.
    """
    rows = rows.select_columns(list(FINGERPRINTED)) if isinstance(rows, Dataset) else rows
    digests = set()
    for row in rows:
        content = json.dumps([row[name] for name in FINGERPRINTED], sort_keys=True)
        digests.add(hashlib.sha256(content.encode()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def join_folds(splits: DatasetDict, fold: int | None) -> DatasetDict:
    """Return `train` (all folds but one) and `validation` (that one) of a data set in folds; others as they are.

    Raises:
        ValueError: the data set has folds and none is named, or it has no such fold.
    """
    folds = sorted((name for name in splits if name.startswith("fold_")), key=lambda name: int(name[5:]))
    if not folds and fold is None:
        return splits
    if fold is None or f"fold_{fold}" not in folds:
        available = f"has the folds {', '.join(folds)}" if folds else "has no folds"
        raise ValueError(f"fold: the data set {available}, and the requested one is {fold}")
    train = concatenate_datasets([splits[name] for name in folds if name != f"fold_{fold}"])
    others = {name: split for name, split in splits.items() if name not in folds}
    return DatasetDict({"train": train, "validation": splits[f"fold_{fold}"], **others})


def _load_folder(path: Path) -> DatasetDict:
    if not (path / "dataset_dict.json").is_file():
        hint = "pass the annotation file, or prepare it with `python -m data_prep convert`"
        raise ValueError(f"{path} is not a prepared data set (no dataset_dict.json): {hint}")
    splits = load_folder(path)
    for name, dataset in splits.items():
        if missing := set(FEATURES) - set(dataset.column_names):
            raise ValueError(f"split {name!r} of {path} lacks the columns {sorted(missing)}")
    return splits


def standardise(dataset: Dataset, name: str) -> Dataset:
    """Bring any data set with `messages` (and `images`) into the project's schema, checking every row.

    Raises:
        DataError: names the first row that breaks a rule.
        ValueError: no `messages` column, or both `image` and `images`.
    """
    columns = dataset.column_names
    if "messages" not in columns:
        raise ValueError(f"split {name!r} has the columns {columns}, and none is 'messages'")
    if "image" in columns and "images" in columns:
        raise ValueError(f"split {name!r} has both an 'image' and an 'images' column")
    others = [column for column, feature in dataset.features.items() if isinstance(feature, Image)]
    if others and not {"image", "images"} & set(columns):
        raise ValueError(f"split {name!r} has images in the column {others[0]!r}, expected 'image' or 'images'")
    if "images" in columns:
        dataset = dataset.cast_column("images", List(Image(decode=False)))
    if "image" in columns:
        dataset = dataset.cast_column("image", Image(decode=False))
    classes = {column: feature for column, feature in dataset.features.items() if isinstance(feature, ClassLabel)}
    return dataset.map(
        _standard_row, with_indices=True, fn_kwargs={"split": name, "classes": classes}, features=FEATURES,
        remove_columns=[column for column in columns if column not in FEATURES],
    )  # fmt: skip


def _standard_row(row: dict, index: int, split: str, classes: dict[str, ClassLabel]) -> dict:
    row |= {column: class_name(feature, row[column]) for column, feature in classes.items()}
    row |= {name: str(row[name]) for name in ATTRIBUTES if isinstance(row.get(name), bool | date)}
    images = list(row.get("images") or ([row["image"]] if row.get("image") else []))
    sample_id = f"{split}-{index:06d}" if row.get("id") in (None, "") else str(row["id"])
    try:
        messages = normalise_messages(row["messages"], images)
        for image in images:
            check_origin(image)
        sizes = [list(load_image(image).size) for image in images]
        texts, weight = attributes_of(row), _weight(row)
    except (FieldError, ValueError, OSError) as error:
        raise DataError(str(error), record=index, sample_id=sample_id) from error
    texts["group"] = None if is_no_group(texts["group"]) else texts["group"]
    source = None if row.get("source") is None else str(row["source"])
    texts = {key: value for key, value in texts.items() if key in FEATURES} | {"source": source}
    return {"id": sample_id, "images": images, "messages": messages, **texts, "image_sizes": sizes, "weight": weight}


def _weight(row: dict) -> float:
    """Return a row's sampling weight, 1 without one."""
    if (weight := row.get("weight")) is None or weight != weight:  # NaN: where pandas wrote a table, it is missing
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise FieldError("weight", f"expected a number above 0, found {describe(weight)}")
    return float(weight)
