"""Sources of samples: JSON files, tables, class folders, the Hub; records are parsed, image paths resolved."""

import filecmp
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common.files import suggest_file

from .class_folders import is_system_name, read_folders
from .download import HUB_ID, link_path, read_hub
from .groups import is_no_group, question_key
from .mapping import Mapping, load_mapping
from .paths import check_exists, composed, folders_below, is_link, resolve_image
from .reading import Flaw, suggest
from .records import READ_KEYS, DataError, iter_annotations, parse_record, turn_keys
from .rows import make_record, read_rows, rows_of
from .split import GIVEN_SPLITS
from .tables import TABLE_ENDINGS, text_rows
from .unread import find_group_key, inner_keys, iter_texts, named_in

MAX_NAMED = 12  # keys in an error message

logger = logging.getLogger(__name__)

MAX_SUGGESTED = 5  # missing images whose nearest name is looked for


@dataclass
class Source:
    """A source of samples.

    Attributes:
        data: a JSON or JSON Lines file, a table (with `mapping`), a folder of class folders, or a Hub data set id.
        images: folder that image paths start from; the class folders' or the Hub data set's own when None.
        mapping: name or path of a mapping for a table, see `mapping.load_mapping`.
        format: of a JSON file, one of `records.FORMATS`; recognised record by record when None.
        weight: share of this source among several; by its size when None.
        name: of the source; that of the mapping's data set, or of the file without its ending, when None.
    """

    data: Path
    images: Path | None = None
    mapping: str | None = None
    format: str | None = None
    weight: float | None = None
    name: str | None = None


@dataclass
class Collected:
    """Content of one or several sources.

    Attributes:
        samples: usable samples.
        errors: records that cannot be used.
        num_records: records in all.
        renamed: new ids of samples whose id was taken.
        unused_keys: how many records have each key that is not read.
        skipped: rows that the mapping says to skip.
    """

    samples: list[dict] = field(default_factory=list)
    errors: list[DataError] = field(default_factory=list)
    num_records: int = 0
    renamed: list[str] = field(default_factory=list)
    unused_keys: Counter = field(default_factory=Counter)
    skipped: list[DataError] = field(default_factory=list)

    def add(self, other: "Collected") -> None:
        """Add another source's content."""
        self.samples += other.samples
        self.errors += other.errors
        self.skipped += other.skipped
        self.num_records += other.num_records
        self.unused_keys += other.unused_keys


@contextmanager
def naming_source(number: int, sources: list[Source]) -> Iterator[None]:
    """Put the number of a source before the errors of the block, if there are several."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if len(sources) == 1:
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"source {number} ({sources[number].data}): {error}") from error


def mixing_shares(sources: list[Source]) -> dict[str, float] | None:
    """Return the weight of each source by its name, None when none has one."""
    names = []
    for number, source in enumerate(sources):
        with naming_source(number, sources):
            names.append(_name(source, load_mapping(source.mapping) if source.mapping else None))
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        places = [f"source {n} ({source.data})" for n, source in enumerate(sources) if names[n] == twice]
        raise ValueError(f"sources: {' and '.join(places)} have the name {twice!r}; give each a `name` of its own")
    weights = [source.weight for source in sources]
    if all(weight is None for weight in weights):
        return None
    if any(weight is None or weight <= 0 for weight in weights):
        raise ValueError("sources: give every source a weight above 0, or none of them")
    return dict(zip(names, weights, strict=True))


def _name(source: Source, mapping: Mapping | None) -> str:
    return source.name or (mapping and mapping.source) or source.data.stem


def read_source(
    source: Source,
    *,
    group_by: str | None = None,
    hub_dir: Path | None = None,
    links_dir: Path | None = None,
    follow_links: bool = False,
) -> Collected:
    """Parse every record and resolve its image paths: `images` are absolute, `files` as the record names them.

    Args:
        source: what to read.
        group_by: key of the records, or column of the table, with each sample's group; `group` when None.
        hub_dir: folder for the images of a Hub data set; such a source is refused when None.
        links_dir: folder for linked images, which are refused when None.
        follow_links: accept links of the file system that lead out of the image folder.

    Raises:
        ValueError, FileNotFoundError: the source, its mapping or its image folder is not what it should be.
    """
    raw_records, mapping = _read_raw(source, hub_dir)
    finder = _make_finder(source, mapping, hub_dir, links_dir, follow_links)
    collected, keys, read = Collected(), Counter(), {*READ_KEYS, group_by}
    for number, raw in enumerate(raw_records):
        keys.update([*raw, *inner_keys(raw), *turn_keys(raw)] if isinstance(raw, dict) else ())
        try:
            sample = _make_sample(raw, number, source, mapping, group_by)
            sample["images"] = [finder(sample, file) for file in sample["files"]]
            if mapping is None:
                finder.check_others(raw, sample, read)
            collected.samples.append(sample)
        except DataError as error:
            error.source = source.name or source.data.name
            (collected.skipped if isinstance(error, SkippedRowError) else collected.errors).append(error)
        collected.num_records += 1
    finder.check_folder()
    if group_by is not None and group_by not in keys:
        raise ValueError(f"group_by: no record of {source.data} has {group_by!r}{suggest(group_by, keys)}")
    if mapping is None:
        collected.unused_keys = Counter({key: count for key, count in keys.items() if key not in read})
    _check_images_are_named(collected, source, keys, was_asked=bool(finder.num_found or finder.missing))
    return collected


def _check_images_are_named(collected: Collected, source: Source, keys: Iterable[str], was_asked: bool) -> None:
    """Raise ValueError if an image folder is given and no record names an image; warn if some do not."""
    without = sum(not sample["images"] for sample in collected.samples)
    if source.images is not None and collected.samples and not was_asked:
        found = f"none of the {without} records of {source.data} names an image"
        rule = f"the key is 'image' or 'images', and theirs are {', '.join(map(repr, list(keys)[:MAX_NAMED]))}"
        raise ValueError(f"image_dir: {source.images} is given, and {found}; {rule}")
    if 0 < without < len(collected.samples):
        logger.warning("%d of %d records of %s have no image", without, len(collected.samples), source.data.name)


class SkippedRowError(DataError):
    """A row that the mapping says to skip."""


def _make_sample(raw, number: int, source: Source, mapping: Mapping | None, group_by: str | None) -> dict:
    row = raw if isinstance(raw, dict) else {}
    if mapping is not None and not isinstance(raw, Flaw):
        raw = _map_row(raw, mapping, number)
    if group_by is not None and isinstance(raw, dict):
        raw = {**raw, "group": row.get(group_by)}
    sample = parse_record(raw, number, format="flat" if mapping else source.format)
    sample["split"] = _given_split(sample)
    sample["group"] = None if is_no_group(sample["group"]) else sample["group"]
    others = mapping.columns() if mapping else READ_KEYS - ({"group"} if group_by is not None else set())
    sample["unread_group"] = find_group_key(row, {*others, group_by})
    # A mapping's wordings all ask for the row's label.
    asks = None if mapping else question_key(sample["messages"])
    names = {"source": _name(source, mapping), "origin": source.name or source.data.name}
    return {**sample, **names, "files": sample["images"], "asks": asks}


def _given_split(sample: dict) -> str | None:
    """Return the split that a record names, under its own name; DataError for another text."""
    if sample["split"] is None:
        return None
    if (split := GIVEN_SPLITS.get(sample["split"].lower())) is None:
        found = f"found {sample['split']!r:.80}{suggest(sample['split'], GIVEN_SPLITS)}"
        reason = f"field 'split': expected train, validation or test, {found}"
        raise DataError(reason, record=sample["record"], sample_id=sample["id"])
    return split


def _map_row(row: dict, mapping: Mapping, number: int) -> dict:
    try:
        record, reason = make_record(row, mapping)
    except ValueError as error:
        raise DataError(str(error), record=number, sample_id=row.get(mapping.id) or None) from error
    if reason is not None:
        raise SkippedRowError(reason, record=number, sample_id=record["id"])
    return record


def is_hub(source: Source) -> bool:
    """Whether a source is a Hub data set: no local path, and of the form `owner/name`."""
    return not source.data.exists() and source.data.suffix == "" and bool(HUB_ID.fullmatch(str(source.data)))


def _read_raw(source: Source, hub_dir: Path | None) -> tuple[Iterable, Mapping | None]:
    """Return a source's records (of a JSON file one by one) or rows, and the mapping of the rows."""
    if hub_dir is not None and is_hub(source):
        records = read_hub(str(source.data), hub_dir)
        if source.mapping is None:
            _check_columns_are_read(source.data, _embedded_columns(records, hub_dir))
            return records, None
        mapping = _with_given_split(load_mapping(source.mapping), records)
        mapping = _with_embedded_images(mapping, records, hub_dir)
        return rows_of(text_rows(records), mapping, source.data), mapping
    if source.data.is_dir():
        rows = read_folders(source.data)
        mapping = _with_given_split(load_mapping(source.mapping or "folder"), rows)
        return rows_of(rows, mapping, source.data), mapping
    if source.mapping is not None:
        mapping = load_mapping(source.mapping)
        return read_rows(source.data, mapping), mapping
    if source.data.suffix.lower() in TABLE_ENDINGS:
        rule = "`python -m data_prep convert --mapping NAME` says what its columns are"
        raise ValueError(f"{source.data} is a table: {rule}, see docs/data.md")
    return iter_annotations(source.data), None


def _with_given_split(mapping: Mapping, rows: list[dict | Flaw]) -> Mapping:
    """Return the mapping with the splits that folders or the Hub give, unless it names a column of its own."""
    given = {(row.get("split") or "").lower() for row in rows if isinstance(row, dict)}
    if mapping.split or not given - {""} or not given <= {"", *GIVEN_SPLITS}:
        return mapping
    return mapping.model_copy(update={"split": ["split"]})


def _with_embedded_images(mapping: Mapping, records: list[dict | Flaw], hub_dir: Path) -> Mapping:
    """Return the mapping with a Hub data set's image columns in place of names of files that are not there."""
    columns = _embedded_columns(records, hub_dir)
    if not columns or set(columns) & set(mapping.image_columns()):
        return mapping
    return mapping.model_copy(update={"images": [f"{{{column}}}" for column in columns]})


def _check_columns_are_read(name: Path, columns: list[str]) -> None:
    if columns and not {"image", "images"} & set(columns):
        raise ValueError(
            f"{name}: the images are in the column {columns[0]!r}; expected 'image' or 'images', or a mapping"
        )


def _embedded_columns(records: list[dict | Flaw], hub_dir: Path) -> list[str]:
    """Return the columns of a Hub data set whose images became files in `hub_dir`."""
    files, columns = {path.name for path in hub_dir.iterdir()}, set()
    for row in records:
        for name, value in row.items() if isinstance(row, dict) else ():
            if {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)} & files:
                columns.add(name)
    return sorted(columns)


def _make_finder(
    source: Source, mapping: Mapping | None, hub_dir: Path | None, links_dir: Path | None, follow_links: bool
) -> "FileFinder":
    default = hub_dir if is_hub(source) else source.data if source.data.is_dir() else None
    root = source.images or default
    if root is not None and Path(root).is_file():
        raise ValueError(f"image_dir: {root} is a file, expected a folder; unpack an archive first")
    if root is not None and not Path(root).is_dir():
        raise FileNotFoundError(f"image_dir: no folder {root}{suggest_file(Path(root))}")
    options = {"search": mapping is not None, "links_dir": links_dir, "follow_links": follow_links}
    return FileFinder(root and Path(root).resolve(), source.data, **options)


class FileFinder:
    """Resolves image names inside a folder; for tables in its subfolders as well, where a name's own folders allow it.

    The same bytes in two folders are one image.
    """

    def __init__(
        self, root: Path | None, data: Path, *, search: bool, links_dir: Path | None = None, follow_links: bool = False
    ):
        self.root, self.data, self.search, self.links_dir, self.index = root, data, search, links_dir, None
        self.follow_links, self.num_found, self.missing = follow_links, 0, []

    def __call__(self, sample: dict, name: str) -> str:
        downloaded = self.links_dir is not None and is_link(name)
        if self.root is None and not downloaded:
            raise ValueError(f"image_dir: {self.data} names images, and no image folder was given")
        try:
            if downloaded:
                return str(link_path(name, self.links_dir))
            path = resolve_image(name, self.root, follow_links=self.follow_links)
            if self.search and not path.exists():
                path = self._search(name) or path
            self._check(name, path)
        except ValueError as error:
            raise DataError(f"image {error}", record=sample["record"], sample_id=sample["id"]) from error
        return str(path)

    def _check(self, name: str, path: Path) -> None:
        """Raise ValueError for a missing file; the first ones with the nearest name, which takes time."""
        try:
            check_exists(name, path, self.root, suggest=len(self.missing) < MAX_SUGGESTED)
            self.num_found += 1
        except ValueError:
            self.missing.append(name)
            raise

    def check_others(self, raw: dict, sample: dict, read: Iterable[str]) -> None:
        """Raise DataError for a file of the folder that a question, or a key outside of `read`, names beside images.

        A file of the same name in another folder is no other image, but another spelling of the path.
        """
        if self.root is None:
            return
        texts = [(key, text) for key, value in raw.items() if key not in read for text in iter_texts(value)]
        asked = [turn["content"] for turn in sample["messages"] if turn["role"] == "user"]
        texts += [("the user's text", name) for text in asked for name in named_in(text)]
        known = {Path(path).name for path in sample["images"]}
        for place, text in texts:
            found = os.path.normpath(self.root / text)
            if os.path.isfile(found) and Path(found).name not in known:  # noqa: PTH113  for any text, raises nothing
                reason = f"{place!r:.80} names the image file {text!r:.80}, which is not read; name it under 'images'"
                raise DataError(reason, record=sample["record"], sample_id=sample["id"])

    def check_folder(self) -> None:
        """Raise ValueError when no image was found, and those of the records lie in a folder below this one."""
        below = Counter() if self.num_found or not self.missing else folders_below(self.missing, self.root)
        if below:
            folder, count = below.most_common(1)[0]
            where = f"{self.root} was searched and has none of the {len(self.missing)} images that are named"
            raise ValueError(f"image_dir: {where}; {count} are in the folder below it: use {self.root / folder}")

    def _search(self, name: str) -> Path | None:
        if self.index is None:
            self.index = _index_files(self.root)
        found = self.index.get(composed(Path(name).name), [])
        first, *others = [path for path in found if _folders_agree(name, path.relative_to(self.root))] or [None]
        for other in others:
            if not filecmp.cmp(first, other, shallow=False):
                raise ValueError(f"{name!r} is in {len(others) + 1} folders, {first.parent} and {other.parent}")
        if first is None and found:
            other = found[0].relative_to(self.root)
            raise ValueError(f"{name!r}: no such file; {other} has its name, and lies in another folder")
        if first is None:
            return None
        return resolve_image(str(first.relative_to(self.root)), self.root, follow_links=self.follow_links)


def _folders_agree(name: str, path: Path) -> bool:
    """Return whether a name with folders, or what follows its first ones, is that of a file, or of where it lies."""
    named, found = composed(os.path.normpath(name)).split("/"), composed(path.as_posix()).split("/")
    count = min(len(named), len(found))
    return named[-count:] == found[-count:]


def _index_files(root: Path) -> dict[str, list[Path]]:
    """Return the files in a folder and its subfolders by their names in NFC, without hidden and system ones."""
    index = defaultdict(list)
    for path in sorted(root.rglob("*")):
        if not any(map(is_system_name, path.relative_to(root).parts)) and path.is_file():
            index[composed(path.name)].append(path)
    return index
