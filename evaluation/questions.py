"""The questions of an evaluation: each turn of a split's samples, its reference answer, and the answers to score."""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets

from common.files import TRAINING_FACTS, digest_of_file, read_json
from common.yaml_files import read_yaml
from data_prep import fingerprint, join_folds, load_splits
from data_prep.labels import LabelMap, build_label_map, named_labels, references_of
from data_prep.records import IMAGE_MARKER
from evaluation.clusters import image_keys
from evaluation.label_matching import LABEL_PLACEHOLDER, answer_templates, asks_for_label, label_forms
from models.adapters import find_file

ALL = "all"  # as `--split`: every sample
SAMPLE_COLUMNS = ("id", "label", "group", "skin_type", "age", "sex", "site", "source")  # written with each answer


@dataclass
class Questions:
    """What one run asks.

    Attributes:
        rows: `SAMPLE_COLUMNS`, `turn`, `question` and `reference` of each question, and `label_known` where an
            earlier turn names the label.
        messages: for each question, the turns up to it, answers of earlier turns as in the reference.
        images: data set with the `id` and `images` of each sample, read on access.
        samples: for each question, the row of its sample in `images`.
        image_rows: for each question, the row of `images` to show.
        candidates: for each question, the answers to score by label; empty for one that does not ask for the label.
        adapter: whether the adapter is enabled.
        generate: whether to generate answers, besides scoring candidates.
    """

    rows: list[dict]
    messages: list[list[dict]]
    images: Dataset
    samples: list[int]
    image_rows: list[int]
    candidates: list[dict[str, str]] = field(default_factory=list)
    adapter: bool = True
    generate: bool = True

    def content_digest(self) -> str:
        """Return a digest of what the generated answers depend on: neither labels nor references nor candidates."""
        ids = [(row["id"], row["turn"]) for row in self.rows]
        return _digest([ids, self.messages, self.images["image_sizes"][:]])

    def image_digest(self) -> str:
        """Return a digest of the samples' images, whose files are read for it."""
        return _digest([[_digest_of(image) for image in images] for images in self.images["images"]])

    def columns(self, index: int) -> dict:
        """Return the columns of a sample, with a digest of the answers to score as `candidates` if there are any."""
        scored = self.candidates[index] if self.candidates else {}
        return {**self.rows[index], **({"candidates": _digest(scored)[:16]} if len(scored) > 1 else {})}

    def __getitem__(self, index: int) -> dict:
        """Return a question's id, messages, the images that they have markers for, and the sample these are from."""
        shown, messages = self.images[self.image_rows[index]], self.messages[index]
        markers = sum(message["content"].count(IMAGE_MARKER) for message in messages)
        images = shown["images"][:markers]
        return {"id": self.rows[index]["id"], "images": images, "messages": messages, "image_of": shown["id"]}


def _digest_of(image: dict) -> str:
    data = image["bytes"]
    return digest_of_file(Path(image["path"])) if data is None else hashlib.sha256(data).hexdigest()


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_split(args: argparse.Namespace) -> tuple[DatasetDict, Dataset]:
    """Return all splits of `--dataset`, and the one that `--split` names; all in one for "all".

    Raises:
        ValueError: no such split, or an empty one.
    """
    splits = load_splits(args.dataset, args.image_dir)
    if args.split == ALL and ALL not in splits:
        return splits, concatenate_datasets(list(splits.values()))
    if args.split not in splits:
        raise ValueError(f"--split: {args.dataset} has no split {args.split!r}, only {sorted(splits)} (or {ALL!r})")
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


def load_runs(args: argparse.Namespace) -> tuple[dict[str, Questions], dict, dict]:
    """Return the questions of each run, the label map, and how many of how many samples are evaluated, and trained on.

    The runs are "adapter" (with `--model` that model), "validation" (only scored, to fit the temperature), and "base"
    and "shuffled", which `--baseline` asks for. "base" needs an adapter, and "shuffled" two samples with images.
    """
    splits, split = load_split(args)
    questions = read_questions(split)
    label_map = make_label_map(splits, args.labels)
    mark_known_labels(questions, label_map)
    runs = {"adapter": questions}
    if label_map and not args.no_probabilities:
        wording = set_candidates(questions, label_map)
        if "validation" in splits and args.split not in ("validation", ALL) and len(label_map) > 1:
            runs["validation"] = read_questions(splits["validation"], generate=False)
            mark_known_labels(runs["validation"], label_map)
            set_candidates(runs["validation"], label_map, wording)
    shared = (questions.rows, questions.messages, questions.images, questions.samples)
    if args.adapter:
        runs["base"] = Questions(*shared, questions.image_rows, questions.candidates, adapter=False)
    if (image_rows := shuffle_images(questions)) != questions.image_rows:
        runs["shuffled"] = Questions(*shared, image_rows)
    counts = {"samples": len(split), "of": sum(map(len, splits.values())), "questions": len(questions.rows)}
    if trained := count_trained(args.adapter, splits, split) if args.adapter else 0:
        counts["trained"] = trained
    return runs, label_map, counts


def count_trained(adapter: str, splits: DatasetDict, split: Dataset) -> int:
    """Return how many samples of a split are of the adapter's training split, by the fingerprint in its facts."""
    path = find_file(adapter, TRAINING_FACTS, f"../{TRAINING_FACTS}")  # a checkpoint's are in the run's folder
    data = ((read_json(path) if path else None) or {}).get("data") or {}
    known = {data.get("prepared_fingerprint"), data.get("fingerprint")}  # the second without what was too long
    for train in _training_splits(splits):
        if fingerprint(train) in known:
            ids = set(train["id"])
            return sum(name in ids for name in split["id"])
    return 0


def _training_splits(splits: DatasetDict) -> Iterator[Dataset]:
    """Yield what a run may have been trained on: the training split, or all folds but one."""
    if "train" in splits:
        yield splits["train"]
    for name in splits:
        if name.startswith("fold_"):
            yield join_folds(splits, int(name.removeprefix("fold_")))["train"]


def read_questions(split: Dataset, *, generate: bool = True) -> Questions:
    """Return each question of each sample and its reference answer."""
    rows, messages, samples = [], [], []
    for number, sample in enumerate(split.remove_columns("images")):
        columns = {name: sample[name] for name in SAMPLE_COLUMNS}
        positions = [n for n, message in enumerate(sample["messages"]) if message["role"] == "assistant"]
        for turn, position in enumerate(positions, 1):
            turns, reference = sample["messages"][:position], sample["messages"][position]["content"]
            rows.append({**columns, "turn": turn, "question": question_text(turns), "reference": reference})
            messages.append(turns)
            samples.append(number)
    images = split.select_columns(["id", "images", "image_sizes"])
    return Questions(rows, messages, images, samples, image_rows=list(samples), generate=generate)


def mark_known_labels(questions: Questions, label_map: dict) -> None:
    """Set `label_known` in the rows of questions that name the sample's label, or before which a turn does.

    A question that names other labels too is a choice, and gives nothing away.
    """
    for row, messages in zip(questions.rows, questions.messages, strict=True):
        for message in messages if row["label"] is not None else []:
            named = named_labels(message["content"], label_map) if message["role"] != "system" else []
            if row["label"] in named and (message["role"] == "assistant" or len(named) == 1):
                row["label_known"] = True


def set_candidates(
    questions: Questions, label_map: dict, wording: tuple[dict, dict] | None = None
) -> tuple[dict, dict]:
    """Set the candidates of each sample that asks for its label; return the templates and forms they are made of."""
    diagnosed = [asks_for_label(row, label_map) for row in questions.rows]
    if wording is None:
        samples = [row for row, asks in zip(questions.rows, diagnosed, strict=True) if asks]
        wording = answer_templates(samples, label_map), label_forms(samples, label_map)
    for row, asks in zip(questions.rows, diagnosed, strict=True):
        questions.candidates.append(candidate_answers(row["question"], label_map, wording) if asks else {})
    return wording


def candidate_answers(question: str, label_map: dict, wording: tuple[dict, dict]) -> dict[str, str]:
    """Return the answer that names each label, in the wording of the answers to this question, or of all."""
    templates, forms = wording
    template = templates.get(question, templates[""])
    names = {label: forms.get((question, label)) or forms.get((None, label), label) for label in label_map}
    return {label: template.replace(LABEL_PLACEHOLDER, name) for label, name in names.items()}


def shuffle_images(questions: Questions, *, seed: int = 0) -> list[int]:
    """Return `image_rows` in which samples have the images of others, as many as they had themselves.

    A sample keeps its own when it has none, and when too few others have as many and show other images.
    """
    keys = image_keys(questions.images)
    by_count = {}
    for sample, key in enumerate(keys):
        by_count.setdefault(len(key), []).append(sample)
    by_count.pop(0, None)
    source_of = list(range(len(keys)))
    for samples in by_count.values():
        alike = {}  # samples that show the same images stand together; a shift by the most of them parts all
        for sample in random.Random(seed).sample(samples, len(samples)):
            alike.setdefault(keys[sample], []).append(sample)
        ordered = [sample for members in alike.values() for sample in members]
        shift = max(map(len, alike.values()))
        for place, sample in enumerate(ordered):
            if keys[source := ordered[place - shift]] != keys[sample]:
                source_of[sample] = source
    return [source_of[sample] for sample in questions.samples]
