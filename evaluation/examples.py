"""What `predict.py` asks about: images, lines of a questions file, or samples of a data set."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from common.files import suggest_file
from data_prep.images import is_image, load_image
from data_prep.paths import check_exists, resolve_image
from data_prep.records import FieldError, normalise_messages, parse_record, read_annotations
from evaluation.questions import labels_of, load_split


def load_examples(args: argparse.Namespace) -> tuple[Iterator[dict], int, list[str]]:
    """Return the examples, their number, and the labels of `--top-k`.

    The messages of an example end with the user's turn; `reference` is the known answer, if there is one. An example
    that cannot be answered has the reason as `error`.
    """
    if args.dataset:
        splits, split = load_split(args)
        return map(example_of_sample, split), len(split), args.labels or labels_of(splits)
    if args.questions:
        rows = read_annotations(args.questions)
        folder = Path(args.image_dir).resolve() if args.image_dir else args.questions.resolve().parent
        examples = (example_of_line(row, number, folder, args.system) for number, row in enumerate(rows, 1))
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


def example_of_line(row, number: int, folder: Path, system: str | None = None) -> dict:
    """Return the example of a line of a questions file, read like a training record, or one with an `error`."""
    example = {"id": f"line-{number}"}
    try:
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise ValueError('expected {"image": ..., "question": ...}')
        sample = parse_record({"system": system, **row, "answer": "?"}, number, format="flat")
        example |= {"id": sample["id"]} if row.get("id") is not None else {}
        example |= _given(sample["images"])
        images = [str(find_image(name, folder)) for name in sample["images"]]
        return {**example, "images": images, "messages": sample["messages"][:-1]}
    except ValueError as error:
        return {**example, "error": f"--questions, line {number}: {getattr(error, 'reason', error)}"}


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
    return {"id": ", ".join(names), **_given(names), "images": names, "messages": messages}


def _given(names: list[str]) -> dict:
    """Return the key of a row that names its images as they were given, in the form that `--questions` reads."""
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
            matches = sorted(file for file in path.iterdir() if not file.name.startswith(".") and is_image(file))
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
            return {**example, "error": f"{name}: {error}"}
    return {**example, "images": images}
