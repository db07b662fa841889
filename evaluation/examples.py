"""What `predict.py` asks about: images, lines of a questions file, or samples of a data set."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from common.files import suggest_file
from data_prep.images import is_image, load_image
from data_prep.paths import check_exists, resolve_image
from data_prep.reading import suggest
from data_prep.records import READ_KEYS, FieldError, normalise_messages, parse_record, read_annotations
from evaluation.questions import labels_of, load_split

IMAGE_KEYS = {"image", "images"}
ASKED_KEYS = {*IMAGE_KEYS, "question", "system"}  # of a row of `--questions`
# Those, and what else such rows have where they are records or answers of an earlier call.
ROW_KEYS = READ_KEYS | {"prediction", "error", "reference", "adapter", "likeliest", "cut"}


def load_examples(args: argparse.Namespace) -> tuple[Iterator[dict], int, list[str]]:
    """Return the examples, their number, and the labels of `--top-k`.

    The messages of an example end with the user's turn; `reference` is the known answer, if there is one. An example
    that cannot be answered has the reason as `error`.
    """
    if args.dataset:
        splits, split = load_split(args)
        return map(example_of_sample, split), len(split), args.labels or labels_of(splits)
    if args.questions:
        if not args.questions.is_file():
            raise FileNotFoundError(f"--questions: no file {args.questions}{suggest_file(args.questions)}")
        rows = read_annotations(args.questions)
        folder = Path(args.image_dir).resolve() if args.image_dir else args.questions.resolve().parent
        numbered = zip(rows, places_of_rows(args.questions), strict=True)
        check_keys(rows)
        examples = (example_of_line(row, place, folder, args.system) for row, place in numbered)
        return examples, len(rows), args.labels
    files = find_images(args.image)
    together = [files] if args.together else [[file] for file in files]
    examples = [make_example(paths, args.question, args.system) for paths in together]
    if len(examples) == 1 and "error" in (checked := decode(examples[0])):  # before the model is loaded
        raise ValueError(f"--image: {checked['error']}")
    return iter(examples), len(examples), args.labels


def example_of_sample(sample: dict) -> dict:
    *messages, reference = sample["messages"]
    columns = {name: sample[name] for name in ("id", "label", "group", "skin_type")}
    return {**columns, "images": sample["images"], "messages": messages, "reference": reference["content"]}


def places_of_rows(path: Path) -> list[str]:
    """Return where each row of a questions file stands: "line 3" of JSON Lines, "record 2" of an array."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    if next(line for line in lines if line.strip()).lstrip().startswith("["):
        return [f"record {number}" for number in range(len(read_annotations(path)))]
    return [f"line {number}" for number, line in enumerate(lines, 1) if line.strip(" \t\r")]


def check_keys(rows: list) -> None:
    """Print the keys of a questions file that are not read, each once."""
    keys = {key for row in rows if isinstance(row, dict) for key in row}
    if unread := sorted(keys - ROW_KEYS):
        print(f"not read in --questions: {', '.join(map(repr, unread[:10]))}", file=sys.stderr)


def check_spelling(row: dict) -> None:
    """Raise ValueError for a key that is near to one of `ASKED_KEYS`, which the row does not have."""
    absent = ASKED_KEYS - set(row) - (IMAGE_KEYS if IMAGE_KEYS & set(row) else set())
    for key in row:
        if key not in ROW_KEYS and (nearest := suggest(key, absent)):
            raise ValueError(f"unknown key {key!r:.60}{nearest}")


def example_of_line(row, place: str, folder: Path, system: str | None = None) -> dict:
    """Return the example of a row of a questions file, read like a training record, or one with an `error`.

    Args:
        row: decoded JSON.
        place: see `places_of_rows`.
        folder: of the images.
        system: turn for rows without one.
    """
    example = {"id": place.replace(" ", "-")}
    try:
        keys = row if isinstance(row, dict) else {}
        check_spelling(keys)
        if not isinstance(keys.get("question"), str):
            raise ValueError('expected {"image": ..., "question": ...}')
        sample = parse_record({"system": system, **row, "answer": "?"}, 0, format="flat")
        example |= {"id": sample["id"]} if row.get("id") is not None else {}
        example |= _given(sample["images"])
        images = [str(find_image(name, folder)) for name in sample["images"]]
        return {**example, "images": images, "messages": sample["messages"][:-1]}
    except ValueError as error:
        return {**example, "error": f"--questions, {place}: {getattr(error, 'reason', error)}"}


def find_image(name: str, folder: Path) -> Path:
    path = resolve_image(name, folder)
    check_exists(name, path, folder)
    return path


def make_example(paths: list[Path], question: str, system: str | None = None) -> dict:
    turns, names = (
        [{"role": "user", "content": question}, {"role": "assistant", "content": "?"}],
        list(map(str, paths)),
    )
    options = {"system": system, "field": "--question", "names": ["--question", "answer"]}
    try:
        messages = normalise_messages(turns, list(paths), **options)[:-1]
    except FieldError as error:
        raise ValueError(str(error)) from error
    return {"id": printable(", ".join(names)), **_given(names), "images": names, "messages": messages}


def printable(name: str) -> str:
    r"""Return a path whose bytes that are not UTF-8 are written `\udcff`; no encoding has characters for them."""
    return name.encode("utf-8", "backslashreplace").decode()


def _given(names: list[str]) -> dict:
    """Return the key of a row that names its images as they were given, in the form that `--questions` reads."""
    names = list(map(printable, names))
    return {"image": names[0] if len(names) == 1 else names} if names else {}


def find_images(names: list[str]) -> list[Path]:
    """Return the named files, the images in named folders, and the files that match a pattern, in order.

    An image in a folder is a file that is named like one, or that contains one, even if it cannot be used.
    """
    files = []
    for name in names:
        path, rule = Path(name), f"there{suggest_file(Path(name))}"
        if path.is_dir():
            rule = "that is an image"
            files_in = [file for file in path.iterdir() if not file.name.startswith(".")]
            matches = sorted(filter(is_image, files_in))
            if matches and (folders := sum(file.is_dir() for file in files_in)):
                print(f"--image: {folders} folders in {name} are not searched", file=sys.stderr)
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(Path(path.anchor or ".").glob(name.removeprefix(path.anchor)))
        if not matches:
            raise FileNotFoundError(f"--image: {name}: no file {rule}")
        files += matches
    return files


def decode(example: dict, *, fit: Callable | None = None) -> dict:
    """Return an example with its images decoded as in training, or with the `error` of the first unusable one."""
    images = []
    for number, source in enumerate(example.get("images", [])):
        try:
            images.append(load_image(source, fit=fit))
        except (ValueError, OSError) as error:
            name = Path(source).name if isinstance(source, str) else f"image {number}"
            return {**example, "error": f"{printable(name)}: {error}"}
    return {**example, "images": images, "fitted": fit is not None}
