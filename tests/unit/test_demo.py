"""The demo's data is the same everywhere, and no question contains its answer."""

import hashlib
import json

import pytest

from demo.draw import DRAW, write_demo
from demo.languages import CONDITIONS, LANGUAGES
from demo.tiny_model import build_tokenizer, training_texts


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


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_label_is_the_same_token_in_all_answers(language, tmp_path):
    """Also in compounds, after an article, and without spaces."""
    records = json.loads(write_demo(tmp_path, count=60, language=language).read_text(encoding="utf-8"))
    tokenizer = build_tokenizer([text for record in records for text in training_texts(record)])
    texts = LANGUAGES[language]
    for condition in CONDITIONS:
        for question in texts.questions:
            tokens = [tokenizer.decode([n]) for n in tokenizer(texts.answer(question, condition))["input_ids"]]
            assert tokens.count(texts.name(condition)) == 1
