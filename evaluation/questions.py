"""The questions of an evaluation: samples of a split, their reference answers, and the answers to score."""

import argparse
import hashlib
import json
import random
import re
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from datasets import Dataset, DatasetDict

from common.yaml_files import read_yaml
from data_prep import load_splits
from data_prep.labels import LabelMap, build_label_map, references_of
from data_prep.records import IMAGE_MARKER
from evaluation.clusters import image_keys
from evaluation.label_matching import LABEL_PLACEHOLDER, answer_templates, asks_for_label, label_forms

SAMPLE_COLUMNS = ("id", "label", "group", "skin_type", "age", "sex", "site", "source")  # written with each answer


@dataclass
class Questions:
    """What one run asks.

    Attributes:
        rows: `SAMPLE_COLUMNS`, `question` and `reference` of each sample.
        messages: each sample's turns up to the question.
        images: data set with the `images` of each sample, decoded on access.
        image_rows: for each sample, the row of `images` to show.
        candidates: for each sample, the answers to score by label; empty for samples that do not ask for the label.
        adapter: whether the adapter is enabled.
        generate: whether to generate answers, besides scoring candidates.
    """

    rows: list[dict]
    messages: list[list[dict]]
    images: Dataset
    image_rows: list[int]
    candidates: list[dict[str, str]] = field(default_factory=list)
    adapter: bool = True
    generate: bool = True

    def content_digest(self) -> str:
        """Return a digest of what the generated answers depend on: neither labels nor references nor candidates."""
        content = [[row["id"] for row in self.rows], self.messages, self.images["image_sizes"][:]]
        return _digest(content)

    def columns(self, index: int) -> dict:
        """Return the columns of a sample, with a digest of the answers to score as `candidates` if there are any."""
        scored = self.candidates[index] if self.candidates else {}
        return {**self.rows[index], **({"candidates": _digest(scored)[:16]} if len(scored) > 1 else {})}

    def example(self, index: int) -> dict:
        images = self.images[self.image_rows[index]]["images"]
        return {"id": self.rows[index]["id"], "images": images, "messages": self.messages[index]}


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_split(args: argparse.Namespace) -> tuple[DatasetDict, Dataset]:
    """Return all splits of `--dataset`, and the one that `--split` names.

    Raises:
        ValueError: no such split, or an empty one.
    """
    splits = load_splits(args.dataset, args.image_dir)
    if args.split not in splits:
        raise ValueError(f"--split: {args.dataset} has no split {args.split!r}, only {sorted(splits)}")
    if len(splits[args.split]) == 0:
        raise ValueError(f"--split: split {args.split!r} of {args.dataset} is empty")
    return splits, splits[args.split]


def labels_of(splits: DatasetDict) -> list[str]:
    return sorted({label for split in splits.values() for label in split["label"] if label is not None})


def make_label_map(splits: DatasetDict, file: Path | None) -> LabelMap:
    """Return the label map of a data set, with the names in a `--labels` file; empty without labels."""
    labels, names = labels_of(splits), file and read_yaml(file, "--labels")
    samples = (row for split in splits.values() for row in split.select_columns(["label", "messages"]))
    return build_label_map(labels, names, references_of(samples)) if labels else {}


def question_text(messages: list[dict]) -> str:
    """Return the last turn as people read it: an image within the text is "[image 2]", counted through the chat."""
    *turns, question = [message["content"] for message in messages]
    texts = [text.strip() for text in question.split(IMAGE_MARKER) if text.strip()]
    if len(texts) < 2:
        return "".join(texts)
    numbers = count(1 + sum(text.count(IMAGE_MARKER) for text in turns))
    return re.sub(IMAGE_MARKER, lambda marker: f"[image {next(numbers)}]", question).strip()


def load_runs(args: argparse.Namespace) -> tuple[dict[str, Questions], dict]:
    """Return the questions of each run, and the label map.

    The runs are "adapter", "validation" (only scored, to fit the temperature), and "base" and "shuffled" of
    `--baseline`.
    """
    splits, split = load_split(args)
    questions = read_questions(split)
    runs, label_map = {"adapter": questions}, make_label_map(splits, args.labels)
    if label_map and not args.no_probabilities:
        wording = set_candidates(questions, label_map)
        if "validation" in splits and args.split != "validation" and len(label_map) > 1:
            runs["validation"] = read_questions(splits["validation"], generate=False)
            set_candidates(runs["validation"], label_map, wording)
    if args.baseline:
        shared = (questions.rows, questions.messages, questions.images)
        runs["base"] = Questions(*shared, questions.image_rows, questions.candidates, adapter=False)
        if (shuffled := shuffle_images(questions)) != questions.image_rows:
            runs["shuffled"] = Questions(*shared, shuffled)
    return runs, label_map


def read_questions(split: Dataset, *, generate: bool = True) -> Questions:
    """Return each sample's last question and its reference answer."""
    rows, messages = [], []
    for sample in split.remove_columns("images"):
        *turns, reference = sample["messages"]
        columns = {name: sample[name] for name in SAMPLE_COLUMNS}
        rows.append({**columns, "question": question_text(turns), "reference": reference["content"]})
        messages.append(turns)
    images = split.select_columns(["images", "image_sizes"])
    return Questions(rows, messages, images, image_rows=list(range(len(rows))), generate=generate)


def set_candidates(
    questions: Questions, label_map: dict, wording: tuple[dict, dict] | None = None
) -> tuple[dict, dict]:
    """Set the candidates of each sample that asks for its label; return the templates and forms they are made of."""
    diagnosed = [asks_for_label(row, label_map) for row in questions.rows]
    if wording is None:
        samples = [row for row, asks in zip(questions.rows, diagnosed, strict=True) if asks]
        wording = answer_templates(samples, label_map), label_forms(samples, label_map)
    templates, forms = wording
    for row, asks in zip(questions.rows, diagnosed, strict=True):
        question, template = row["question"], templates.get(row["question"], templates[""])
        names = {label: forms.get((question, label)) or forms.get((None, label), label) for label in label_map}
        answers = {label: template.replace(LABEL_PLACEHOLDER, name) for label, name in names.items()}
        questions.candidates.append(answers if asks else {})
    return wording


def shuffle_images(questions: Questions, *, seed: int = 0) -> list[int]:
    """Return `image_rows` in which samples have the images of others, as many as they had themselves.

    A sample keeps its own when it has none, and when too few others have as many and show other images.
    """
    keys = image_keys(questions.images)
    by_count = {}
    for index, row in enumerate(questions.image_rows):
        by_count.setdefault(len(keys[row]), []).append(index)
    by_count.pop(0, None)
    image_rows = list(questions.image_rows)
    for indices in by_count.values():
        alike = {}  # samples that show the same images stand together; a shift by the most of them parts all
        for index in random.Random(seed).sample(indices, len(indices)):
            alike.setdefault(keys[questions.image_rows[index]], []).append(index)
        ordered = [index for members in alike.values() for index in members]
        shift = max(map(len, alike.values()))
        for place, target in enumerate(ordered):
            source = questions.image_rows[ordered[place - shift]]
            if keys[source] != keys[image_rows[target]]:
                image_rows[target] = source
    return image_rows
