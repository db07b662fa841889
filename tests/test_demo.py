"""The demo's data is the same everywhere, and its controls control."""

import hashlib
import json

from datasets import load_from_disk

from demo.draw import DRAW, write_demo
from demo.score import accuracy, shuffle_images


def test_the_drawn_set_is_the_same_every_time(tmp_path):
    digests = []
    for name in ("a", "b"):
        path = write_demo(tmp_path / name, count=12)
        files = [path, *sorted((tmp_path / name / "images").iterdir())]
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 13


def test_no_question_and_no_earlier_answer_gives_the_label_away(demo_raw):
    records = json.loads((demo_raw / "annotations.json").read_text())
    for record in records:
        *before, last = [turn["value"] for turn in record["conversations"]]
        assert record["label"] in last
        assert not any(condition in text for condition in DRAW for text in before)
    assert {len(record["conversations"]) for record in records} == {2, 4}


def test_shuffling_deals_the_images_anew_and_leaves_the_questions(demo_data, tmp_path):
    shuffle_images(demo_data, tmp_path / "shuffled")
    before, after = (load_from_disk(str(path))["test"] for path in (demo_data, tmp_path / "shuffled"))
    for column in ("id", "messages", "label"):
        assert before[column] == after[column]
    pictures = [[sample["images"][0].tobytes() for sample in split] for split in (before, after)]
    assert sorted(pictures[0]) == sorted(pictures[1])
    assert pictures[0] != pictures[1]


def test_accuracy_counts_an_answer_that_names_the_label_and_no_other(tmp_path):
    rows = [("acne", "It is acne."), ("wart", "acne or wart"), ("wart", "A wart."), ("acne", "Nothing.")]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"label": label, "prediction": said}) for label, said in rows))
    assert accuracy(path) == 2 / 4
