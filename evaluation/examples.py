"""What `predict.py` asks about: images, rows of a questions file, or samples of a data set."""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from PIL import Image

from data_prep import load_splits
from data_prep.images import load_image, resolve_image
from data_prep.records import FieldError, normalise_messages, read_annotations

FACTS = ("id", "label", "group", "skin_type")


def load_examples(args: argparse.Namespace) -> tuple[Iterator[dict], int, list[str]]:
    """Return the samples to answer, how many there are, and the labels to choose from.

    A sample's messages end with the user's turn; `reference` is the known answer, if there is one. A sample that
    cannot be asked carries its reason as `error`.
    """
    if args.dataset:
        return examples_of_split(args)
    if args.questions:
        rows = read_annotations(args.questions)
        root = Path(args.image_dir).resolve() if args.image_dir else args.questions.resolve().parent
        return (example_of_row(row, number, root) for number, row in enumerate(rows)), len(rows), args.labels
    files = find_images(args.image)
    asked = [files] if args.together else [[path] for path in files]
    examples = [question_about(paths, args.question) for paths in asked]
    if len(examples) == 1:  # no need to load a model to say that its only image is none
        checked = decode(examples[0])
        if "error" in checked:
            raise ValueError(f"--image: {checked['error']}")
    return iter(examples), len(examples), args.labels


def examples_of_split(args: argparse.Namespace) -> tuple[Iterator[dict], int, list[str]]:
    splits = load_splits(args.dataset, args.image_dir)
    if args.split not in splits:
        raise ValueError(f"--split: {args.dataset} has no split {args.split!r}, only {sorted(splits)}")
    if len(split := splits[args.split]) == 0:
        raise ValueError(f"--split: split {args.split!r} of {args.dataset} is empty")
    labels = args.labels or sorted({label for own in splits.values() for label in own["label"] if label is not None})

    def example(sample: dict) -> dict:
        *messages, reference = sample["messages"]
        facts = {key: sample[key] for key in FACTS}
        return {**facts, "images": sample["images"], "messages": messages, "reference": reference["content"]}

    return map(example, split), len(split), labels


def example_of_row(row, number: int, root: Path) -> dict:
    """Return the sample of one line of a questions file, or one with an `error`."""
    try:
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise ValueError('expected {"image": ..., "question": ...}')
        names = row.get("images", row.get("image")) or []
        images = [resolve_image(name, root) for name in ([names] if isinstance(names, str) else names)]
        return {**question_about(images, row["question"]), "id": str(row.get("id", f"line-{number + 1}"))}
    except (ValueError, TypeError) as error:
        return {"id": f"line-{number + 1}", "error": f"--questions, line {number + 1}: {error}"}


def find_images(names: list[str]) -> list[Path]:
    """Return the files that are named, those in named folders, and those that fit a pattern, in order."""
    files = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = in_folder(path)
        elif path.exists():
            found = [path]
        else:
            found = sorted(Path(path.anchor or ".").glob(name.removeprefix(path.anchor)))
        if not found:
            what = "named like an image" if path.is_dir() else "there"
            raise FileNotFoundError(f"--image: {name}: no file {what}")
        files += found
    return files


def in_folder(folder: Path) -> list[Path]:
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)


def question_about(paths: list[Path], question: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "?"}]
    try:
        messages = normalise_messages(turns, list(paths), field="--question", names=["--question", "answer"])[:-1]
    except FieldError as error:
        raise ValueError(str(error)) from error
    return {
        "id": ", ".join(path.name for path in paths),
        "images": [str(path) for path in paths],
        "messages": messages,
    }


def batches(examples: Iterable[dict], size: int) -> Iterator[list[dict]]:
    batch = []
    for example in examples:
        batch.append(example)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def decode(example: dict, *, fit: Callable | None = None) -> dict:
    """Return an example with its images decoded as in training, or with why one of them cannot be used as `error`."""
    images = []
    for number, source in enumerate(example.get("images", [])):
        try:
            images.append(load_image(source, fit=fit))
        except (ValueError, OSError) as error:
            name = Path(source).name if isinstance(source, str) else f"image {number}"
            return {**example, "error": f"{name}: {error}"}
    return {**example, "images": images}
