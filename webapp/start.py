"""What the page needs to know before it is built: the data's examples, how labels are read, the adapter's facts."""

import argparse
import dataclasses
from collections import Counter
from pathlib import Path

from datasets import DatasetDict

from common.files import EVALUATION_SETTINGS, read_json
from data_prep.images import load_image
from evaluation.questions import load_split, question_text
from models.adapters import base_of, loading_settings
from publishing.run_facts import read_metrics
from webapp.labels import LabelReader, read_labels

MAX_EXAMPLES = 12
MAX_QUESTIONS = 4
OPTIONS = {
    name: f"--{name.replace('_', '-')}" for name in ("max_pixels", "base", "quantization", "dtype")
}  # of the app
# Splits of an evaluation in which the training has seen photos
SEEN_SPLITS = {"train": "the training photos themselves", "all": "all splits, the training photos among them"}


def load_data(args: argparse.Namespace) -> tuple[DatasetDict | None, list[dict]]:
    """Return the splits of `--dataset`, and up to `MAX_EXAMPLES` samples of one with images, evenly spaced.

    Raises:
        ValueError: `--split` or `--image-dir` without `--dataset`, no such data or split.
    """
    if not args.dataset:
        if args.image_dir:
            raise ValueError("--image-dir: goes with --dataset")
        return None, []
    splits, split = load_split(args)
    shown = [number for number, sizes in enumerate(split["image_sizes"]) if sizes]
    chosen = shown[:: max(1, -(-len(shown) // MAX_EXAMPLES))]
    return splits, [{**split[number], "image": load_image(split[number]["images"][0])} for number in chosen]


def read_reader(args: argparse.Namespace, splits: DatasetDict | None) -> LabelReader | None:
    """Return how to read the labels, see `read_labels`, not calibrated where the evaluation had other settings."""
    reader = read_labels(args.adapter, splits, args.split)
    if reader is None or reader.uncalibrated:
        return reader
    return dataclasses.replace(reader, uncalibrated=_other_setting(args))


def _other_setting(args: argparse.Namespace) -> str:
    """Return a phrase that names a setting which is not the evaluation's; "" without one."""
    before = read_json(Path(args.adapter) / EVALUATION_SETTINGS) or {}
    now = {"max_pixels": args.max_pixels, "min_pixels": None, "base": args.base and Path(args.base).name}
    now |= loading_settings(args.adapter, base=args.base, quantization=args.quantization, dtype=args.dtype)
    changed = (name for name, value in now.items() if value != before.get(name, value))
    return next((f"{OPTIONS.get(name, name)} may differ from the evaluation's" for name in changed), "")


def suggest_questions(reader: LabelReader | None, examples: list[dict]) -> list[str]:
    """Return some questions that the evaluation or the data ask, those for the label first."""
    if reader is not None and reader.asks:
        ordered = sorted(reader.asks, key=lambda question: not reader.asks[question])
    else:
        asked = Counter(question_text(sample["messages"][:-1]) for sample in examples)
        ordered = [question for question, _ in asked.most_common()]
    return ordered[:MAX_QUESTIONS]


def describe_adapter(args: argparse.Namespace) -> dict[str, str]:
    """Return `adapter` and `base` by name, how the base is loaded, and what an evaluation measured."""
    options = {"base": args.base, "quantization": args.quantization, "dtype": args.dtype}
    settings = loading_settings(args.adapter, **options)
    base = args.base or base_of(args.adapter)[0]
    folder = Path(args.adapter)
    metrics = read_metrics(folder) if folder.is_dir() else None
    return {
        "adapter": folder.resolve().name if folder.is_dir() else args.adapter,
        "base": Path(base).resolve().name if Path(base).exists() else base,
        "loading": ", ".join(str(value) for value in (settings["quantization"], settings["dtype"]) if value),
        "measured": describe_accuracy(metrics) if metrics else "",
    }


def describe_accuracy(metrics: dict) -> str:
    """Return the accuracy of an evaluation in a sentence, with the split; empty for data without labels."""
    accuracy = metrics["runs"]["adapter"].get("diagnosis", {}).get("accuracy")
    if not accuracy:
        return ""
    spread = f" ({accuracy['low']:.3f} to {accuracy['high']:.3f})" if accuracy["low"] is not None else ""
    place = SEEN_SPLITS.get(metrics["split"], f"split {metrics['split']}")
    return f"Evaluated on {place}: accuracy {accuracy['value']:.3f}{spread}, {metrics['diagnosed']:,} questions."
