"""The demo's data is the same everywhere, and no question contains its answer."""

import hashlib
import json

from demo.draw import DRAW, write_demo


def test_the_drawn_set_is_the_same_every_time(tmp_path):
    digests = []
    for name in ("a", "b"):
        path = write_demo(tmp_path / name, count=12)
        files = [path, *sorted((tmp_path / name / "images").iterdir())]
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 13


def test_no_question_and_no_earlier_answer_contains_the_label(demo_raw):
    records = json.loads((demo_raw / "annotations.json").read_text())
    for record in records:
        *before, last = [turn["value"] for turn in record["conversations"]]
        assert record["label"] in last
        assert not any(condition in text for condition in DRAW for text in before)
    assert {len(record["conversations"]) for record in records} == {2, 4}
