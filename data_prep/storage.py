"""The folder of a prepared data set: written with each image once, opened without writing anything.

Images are embedded in the Arrow files. Where samples share images, so that embedding would repeat them, they are files
in `image_files` instead, and the Arrow files have their paths: stock `datasets.load_from_disk` decodes both. A folder
that was moved is opened by `load_folder`, which looks for the files inside it.
"""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset, DatasetDict, Image, List, load_from_disk

IMAGE_FOLDER = "image_files"
MAX_REPEATED = 1.05  # of the bytes of different images; embedding more than that is a waste


def undecoded(dataset: Dataset) -> Dataset:
    """Return a data set whose images are `{"bytes", "path"}`. `cast_column` would write a copy of all of them.

    Args:
        dataset: as it was loaded or made, not one that `select` or `shuffle` returned.
    """
    info = dataset.info.copy()
    info.features["images"] = List(Image(decode=False))
    return Dataset(dataset.data, info=info, split=dataset.split)


def load_folder(folder: Path) -> DatasetDict:
    """Return the splits of a folder, images undecoded; of other data sets without `images`, what is there.

    Raises:
        ValueError: a file is damaged or missing.
    """
    try:
        splits = load_from_disk(str(folder))
        for split in splits.values():
            split.data.validate()
    except Exception as error:  # for damaged files datasets raises whatever its JSON and Arrow readers do
        raise ValueError(f"{_damaged_file(folder)}: {' '.join(str(error).split())[:200]}; prepare it again") from error
    return DatasetDict({name: _find_files(split, folder) for name, split in splits.items()})


def _damaged_file(folder: Path) -> str:
    """Return the first file of a data set that cannot be read, and that it is damaged, or an empty split."""
    for path in sorted(folder.rglob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return f"{path} is damaged"
    for path in sorted(folder.glob("*/state.json")):
        if json.loads(path.read_text(encoding="utf-8")).get("_data_files") == []:
            return f"{path.parent} has no sample"
    for path in sorted(folder.glob("*/*.arrow")):
        try:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
                reader.read_all().validate()
        except (pa.ArrowException, OSError):
            return f"{path} is damaged"
    return f"{folder} cannot be opened"


def _find_files(dataset: Dataset, folder: Path) -> Dataset:
    """Let the paths of images that are not embedded lead to the files in the folder, wherever it is now."""
    if "images" not in dataset.column_names:
        return dataset
    dataset = undecoded(dataset)
    table = dataset.with_format("arrow")[:]
    names = {Path(path).name for path in stored_paths(table)}
    if not names:
        return dataset
    files = folder.resolve() / IMAGE_FOLDER
    if missing := sorted(names - {path.name for path in files.glob("*")}):
        where = f"{len(missing)} of {len(names)} images are not in {files}, such as {missing[0]}"
        raise ValueError(f"{where}; copy the whole folder of a data set, or prepare it again")
    table = replace_images(table, partial(_refer_to_files, folder=files))
    return Dataset(table, info=dataset.info, split=dataset.split)


def _refer_to_files(images: pa.StructArray, folder: Path) -> pa.StructArray:
    """Return images without bytes, in files of a folder that have the names at the end of their paths."""
    paths = [path and str(folder / Path(path).name) for path in images.field("path").to_pylist()]
    return make_images(pa.nulls(len(images), pa.binary()), pa.array(paths, pa.string()))


def make_images(content: pa.Array, paths: pa.Array) -> pa.StructArray:
    return pa.StructArray.from_arrays([content, paths], ["bytes", "path"])


def stored_paths(table: pa.Table) -> Iterable[str]:
    """Yield the path of each image of a table that is not embedded."""
    for chunk in table["images"].chunks:
        images = chunk.flatten()
        if images.field("bytes").null_count:
            yield from images.filter(pc.is_null(images.field("bytes"))).field("path").drop_null().to_pylist()


def replace_images(table: pa.Table, change: Callable[[pa.StructArray], pa.StructArray]) -> pa.Table:
    """Return a table with other `{"bytes", "path"}` in place of its images; bytes that stay are not copied."""
    chunks = []
    for chunk in filter(len, table["images"].chunks):
        offsets = pc.subtract(chunk.offsets, chunk.offsets[0])
        chunks.append(pa.ListArray.from_arrays(offsets, change(chunk.flatten())))
    column = pa.chunked_array(chunks, table["images"].type)
    return table.set_column(table.column_names.index("images"), table.field("images"), column)


def bytes_needed(splits: DatasetDict) -> int:
    """Return how many bytes the images of splits take in a folder."""
    embedded, different = _measure(splits)
    return embedded if embedded <= MAX_REPEATED * different else different


def _measure(splits: DatasetDict) -> tuple[int, int]:
    """Return the bytes of all images as often as they are used, and of the different ones."""
    uses, by_size = Counter(_paths(splits)), defaultdict(set)
    for path in uses:
        by_size[Path(path).stat().st_size].add(path)
    embedded = sum(size * uses[path] for size, paths in by_size.items() for path in paths)
    different = sum(size * (len(set(map(_digest, paths))) if len(paths) > 1 else 1) for size, paths in by_size.items())
    return embedded, different


def _paths(splits: DatasetDict) -> Iterable[str]:
    return (path for split in splits.values() for path in stored_paths(split.with_format("arrow")[:]))


def _digest(path: str) -> str:
    return xxhash.xxh3_128_hexdigest(Path(path).read_bytes())


def save_splits(splits: DatasetDict, folder: Path, *, final: Path) -> None:
    """Write splits whose images are paths to a folder that is renamed to `final`, or whose content is moved there."""
    embedded, different = _measure(splits)
    if embedded <= MAX_REPEATED * different:
        splits.save_to_disk(str(folder), max_shard_size="500MB")
        return
    names = _copy_images(set(_paths(splits)), folder / IMAGE_FOLDER)
    named = {split: _name_files(dataset, names) for split, dataset in splits.items()}
    DatasetDict(named).save_to_disk(str(folder))
    for path in folder.glob("*/*.arrow"):
        with pa.OSFile(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
        table = replace_images(table, partial(_refer_to_files, folder=final / IMAGE_FOLDER))
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)


def _name_files(dataset: Dataset, names: dict[str, str]) -> Dataset:
    """Give images the names of their files, and no bytes instead of null: `save_to_disk` embeds those."""

    def change(images: pa.StructArray) -> pa.StructArray:
        files = [names[path] for path in images.field("path").to_pylist()]
        return make_images(pa.array([b""] * len(files), pa.binary()), pa.array(files, pa.string()))

    return Dataset(replace_images(dataset.with_format("arrow")[:], change), info=dataset.info, split=dataset.split)


def _copy_images(paths: Iterable[str], folder: Path) -> dict[str, str]:
    """Copy files, those of the same content once, and return their names in the folder by path."""
    folder.mkdir(parents=True)
    names, files = {}, {}
    for path in sorted(paths):
        digest, ending = _digest(path), Path(path).suffix[1:6].lower()
        if digest not in files:
            files[digest] = f"{digest}.{ending}" if ending.isalnum() else digest
            shutil.copyfile(path, folder / files[digest])
        names[path] = files[digest]
    return names
