"""Texts, labels and file names of any script on their way through `convert` and what reads its folder."""

import unicodedata

import pytest
from datasets import DatasetDict, load_from_disk
from PIL import Image

from common.files import read_json_lines
from data_prep import load_splits, prepare_dataset
from data_prep.__main__ import main as data_prep
from data_prep.check import read_findings
from data_prep.paths import resolve_image
from data_prep.publish import make_card
from data_prep.sources import FileFinder


def flat(image, **more):
    return {"image": image, "question": "What is it?", "answer": "It is a nevus.", **more}


def convert(path, images, out, *options):
    data_prep(["convert", "--annotations", str(path), "--images", str(images), "--out", str(out), *options])


def test_labels_in_several_spellings_are_one_with_a_finding(write_records, tmp_path, capsys):
    spelled = ["melanoma", "melanoma", "Melanoma", "e\u0301cza  ma", "\u00e9cza ma", "\u00e9cza ma"]
    files = ["red.jpg"] * 3 + ["green.png"] * 3
    records = [
        flat(file, label=label, answer=f"It is {label}.", id=n)
        for n, (file, label) in enumerate(zip(files, spelled, strict=True))
    ]
    path, images = write_records(records)
    convert(path, images, tmp_path / "out", "--split", "1", "0", "0")
    assert "melanoma 3, \u00e9cza ma 3" in capsys.readouterr().out
    found = {
        row["detail"] for row in read_json_lines(tmp_path / "out" / "findings.jsonl") if row["kind"] == "spelling"
    }
    assert found == {
        "'melanoma': 'Melanoma' 1 times, 'melanoma' 2 times",
        "'\u00e9cza ma': 'e\u0301cza  ma' 1 times, '\u00e9cza ma' 2 times",
    }


def test_a_data_set_of_several_spellings_is_loaded_with_one(write_records, tmp_path):
    path, images = write_records([flat(name, label="nevus") for name in ("red.jpg", "green.png", "blue.jpg")])
    splits = prepare_dataset(path, images, split=(1, 0, 0), show_progress=False)
    rows = splits["train"].remove_columns("label").add_column("label", ["Nevus", "nevus ", "Nevus"])
    DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "old"))
    assert load_splits(str(tmp_path / "old"))["train"]["label"] == ["Nevus"] * 3


def test_answers_that_do_not_name_their_label_are_said_and_a_label_map_helps(write_records, tmp_path, capsys):
    answers = [("red.jpg", "melanoma", "Yes"), ("green.png", "nevus", "No"), ("blue.jpg", "melanoma", "Yes.")]
    path, images = write_records([flat(image, label=label, answer=text, id=image) for image, label, text in answers])
    convert(path, images, tmp_path / "out", "--split", "1", "0", "0")
    [warning] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert "only 0 of 3 labelled samples" in warning and "'Yes', 'No', 'Yes.'" in warning and "--labels" in warning
    kinds = [row["kind"] for row in read_json_lines(tmp_path / "out" / "findings.jsonl")]
    assert kinds.count("unread label") == 1
    labels = tmp_path / "labels.yaml"
    labels.write_text("melanoma: [yes]\nnevus: ['no']\n")
    convert(path, images, tmp_path / "mapped", "--split", "1", "0", "0", "--labels", str(labels))
    assert "WARNING" not in capsys.readouterr().out


def test_unusual_line_ends_in_a_text_do_not_break_findings(write_records, tmp_path):
    question = "Is it a\u2028mole\x85or\x0bnot?"
    path, images = write_records([flat("red.jpg", question=question, answer="nevus", label="nevus", id="a\x85b")])
    convert(path, images, tmp_path / "out", "--split", "1", "0", "0")
    data_prep(["inspect", str(tmp_path / "out")])
    assert "a\u2028mole\x85or" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    card = make_card(
        "you/skin", read_findings(tmp_path / "out" / "findings.jsonl"), load_from_disk(str(tmp_path / "out"))
    )
    assert "1 x short answer" in card


@pytest.mark.parametrize(("stored", "named"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_files_are_found_in_the_other_unicode_form(tmp_path, stored, named):
    folder, name = (unicodedata.normalize(stored, text) for text in ("Läsionen", "Nävus é.png"))
    (tmp_path / folder).mkdir()
    Image.new("RGB", (60, 40), "red").save(tmp_path / folder / name)
    path = resolve_image(unicodedata.normalize(named, "Läsionen/Nävus é.png"), tmp_path)
    assert path == tmp_path / folder / name
    mixed = f"{folder}/{unicodedata.normalize(named, name)}"
    assert resolve_image(mixed, tmp_path) == path
    finder = FileFinder(tmp_path, tmp_path, search=True)
    assert finder({"record": 0, "id": "a"}, unicodedata.normalize(named, name)) == str(path)
    assert resolve_image("größer.png", tmp_path) == tmp_path / "größer.png"  # not there: named as it is
