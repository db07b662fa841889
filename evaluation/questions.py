"""What an evaluation asks: questions of a split, reference answers, and the answers to score for each label."""

import argparse
import random
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from common.yaml_files import read_yaml
from data_prep import load_splits
from data_prep.records import IMAGE_MARKER
from evaluation.label_matching import PLACE, answer_templates, asks_for_label, build_label_map

FACTS = ("id", "label", "group", "skin_type", "age", "sex", "site", "source")


@dataclass
class Questions:
    """What one run asks: facts and messages of each sample, and where its images come from.

    Attributes:
        rows: `FACTS`, `question` and `reference` of each sample.
        messages: each sample's turns up to the question.
        images: data set with the `images` of each sample, read when needed.
        order: which row of `images` belongs to which sample.
        candidates: for each sample the answers to score, by label; none for samples that do not ask for the label.
        adapter: whether the adapter is on.
        generate: whether answers are written, besides scored.
    """

    rows: list[dict]
    messages: list[list[dict]]
    images: Dataset
    order: list[int]
    candidates: list[dict[str, str]] = field(default_factory=list)
    adapter: bool = True
    generate: bool = True

    def example(self, index: int) -> dict:
        images = self.images[self.order[index]]["images"]
        return {"id": self.rows[index]["id"], "images": images, "messages": self.messages[index]}


def load_runs(args: argparse.Namespace) -> tuple[dict[str, Questions], dict]:
    """Return what is asked of whom, and the label map.

    The runs are "adapter", "validation" (scored alone, for the temperature), and the two of `--baseline`.
    """
    splits = load_splits(args.dataset, args.image_dir)
    if args.split not in splits:
        raise ValueError(f"--split: {args.dataset} has no split {args.split!r}, only {sorted(splits)}")
    asked = read_questions(splits[args.split])
    if not asked.rows:
        raise ValueError(f"--split: split {args.split!r} of {args.dataset} is empty")
    runs = {"adapter": asked}
    names = {label for split in splits.values() for label in split["label"] if label is not None}
    label_map = build_label_map(names, read_synonyms(args.labels)) if names else {}
    if names and not args.no_probabilities:
        templates = set_candidates(asked, label_map)
        if "validation" in splits and args.split != "validation" and len(label_map) > 1:
            runs["validation"] = read_questions(splits["validation"], generate=False)
            set_candidates(runs["validation"], label_map, templates)
    if args.baseline:
        plain = {"rows": asked.rows, "messages": asked.messages, "images": asked.images}
        runs["base"] = Questions(**plain, order=asked.order, candidates=asked.candidates, adapter=False)
        runs["shuffled"] = Questions(**plain, order=deal_images(asked))
    return runs, label_map


def read_synonyms(path: Path | None) -> dict | None:
    return None if path is None else read_yaml(path, "--labels")


def read_questions(split: Dataset, *, generate: bool = True) -> Questions:
    """Return each sample's last question and the answer that the data give."""
    rows, messages = [], []
    for sample in split.remove_columns("images"):
        *turns, reference = sample["messages"]
        question = turns[-1]["content"].replace(IMAGE_MARKER, "").strip()
        facts = {key: sample[key] for key in FACTS}
        rows.append({**facts, "question": question, "reference": reference["content"]})
        messages.append(turns)
    images = split.select_columns(["images", "image_sizes"])
    return Questions(rows, messages, images, order=list(range(len(rows))), generate=generate)


def set_candidates(asked: Questions, label_map: dict, templates: dict[str, str] | None = None) -> dict[str, str]:
    """Give each sample that asks for its label the answers that would name each label; return their wordings."""
    diagnosed = [asks_for_label(row, label_map) for row in asked.rows]
    templates = templates or answer_templates(
        [row for row, asks in zip(asked.rows, diagnosed, strict=True) if asks], label_map
    )
    for row, asks in zip(asked.rows, diagnosed, strict=True):
        template = templates.get(row["question"], templates[""])
        asked.candidates.append({label: template.replace(PLACE, label) for label in label_map} if asks else {})
    return templates


def deal_images(asked: Questions, *, seed: int = 0) -> list[int]:
    """Return an order in which no sample keeps its images, and each gets as many as it had."""
    alike = {}
    for index, sizes in enumerate(asked.images["image_sizes"]):
        alike.setdefault(len(sizes), []).append(index)
    order = list(asked.order)
    for indices in alike.values():
        dealt = random.Random(seed).sample(indices, len(indices))
        for giver, taker in zip(dealt, [*dealt[1:], dealt[0]], strict=True):
            order[taker] = giver
    return order
