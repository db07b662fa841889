"""What `predict.py` asks about: images, lines of a questions file, or samples of a data set."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from data_prep.images import load_image
from data_prep.paths import resolve_image
from data_prep.records import FieldError, normalise_messages, read_annotations
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
        return (example_of_line(row, number, folder) for number, row in enumerate(rows, 1)), len(rows), args.labels
    files = find_images(args.image)
    examples = [make_example(paths, args.question) for paths in ([files] if args.together else [[f] for f in files])]
    if len(examples) == 1 and "error" in (checked := decode(examples[0])):  # before the model is loaded
        raise ValueError(f"--image: {checked['error']}")
    return iter(examples), len(examples), args.labels


def example_of_sample(sample: dict) -> dict:
    *messages, reference = sample["messages"]
    columns = {name: sample[name] for name in ("id", "label", "group", "skin_type")}
    return {**columns, "images": sample["images"], "messages": messages, "reference": reference["content"]}


def example_of_line(row, number: int, folder: Path) -> dict:
    """Return the example of a line of a questions file, or one with an `error`."""
    try:
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise ValueError('expected {"image": ..., "question": ...}')
        names = row.get("images", row.get("image")) or []
        images = [resolve_image(name, folder) for name in ([names] if isinstance(names, str) else names)]
        return {**make_example(images, row["question"]), "id": str(row.get("id", f"line-{number}"))}
    except (ValueError, TypeError) as error:
        return {"id": f"line-{number}", "error": f"--questions, line {number}: {error}"}


def make_example(paths: list[Path], question: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "?"}]
    try:
        messages = normalise_messages(turns, list(paths), field="--question", names=["--question", "answer"])[:-1]
    except FieldError as error:
        raise ValueError(str(error)) from error
    names, images = ", ".join(path.name for path in paths), [str(path) for path in paths]
    return {"id": names, "images": images, "messages": messages}


def find_images(names: list[str]) -> list[Path]:
    """Return the named files, the images in named folders, and the files that match a pattern, in order."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = []
    for name in names:
        path, rule = Path(name), "there"
        if path.is_dir():
            rule = "named like an image"
            matches = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
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
