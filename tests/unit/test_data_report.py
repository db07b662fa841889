"""One page about a data set: right numbers, nothing from outside, nothing executed."""

import base64
import io
import json
import re

import pytest
from datasets import DatasetDict
from PIL import Image

from data_prep.__main__ import main as data_prep


@pytest.fixture
def report(write_records, tmp_path):
    """A report on twelve samples, with a copy, a missing image and a label that is markup."""
    labels = ["nevus", "acne", "<script>alert(1)</script>"]
    records = [
        {"id": f"r{n}", "image": f"{n}.png", "question": "What?", "answer": "It is this.", "label": labels[n % 3]}
        for n in range(12)
    ]
    path, images = write_records([*records, {**records[0], "id": "gone", "image": "gone.jpg"}])
    for n in range(12):
        noise = Image.effect_noise((n * 60 + 100, 300), 90).convert("RGB")
        noise.save(images / f"{n}.png")
    (images / "11.png").write_bytes((images / "2.png").read_bytes())
    source = ["--annotations", str(path), "--images", str(images), "--on-error", "drop"]
    data_prep(["convert", *source, "--out", str(tmp_path / "set")])
    data_prep(["inspect", str(tmp_path / "set"), "--max-pixels", str(256 * 784)])
    return tmp_path / "set"


def test_the_numbers_are_those_of_the_data(report):
    facts = json.loads((report / "report.json").read_text())
    assert sum(facts["samples"].values()) == facts["images"] == 12
    counts = [split.get("nevus", 0) for split in facts["labels"].values()]
    assert sum(counts) == 4
    assert facts["findings"]["unusable"] == facts["findings"]["exact copy"] == 1
    row = next(row for row in facts["budget"] if row["most"] == 256)
    # sizes are 100 + 60 n by 300 px for n = 0..10, and once more n = 2; 200,704 px hold those up to 669 px wide
    assert row["shrunk"] == pytest.approx(100 * 1 / 12)
    assert facts["suggested_max_pixels"] == 384 * 784
    assert facts["max_pixels"] == 256 * 784


def test_images_under_min_pixels_cost_what_the_recipe_makes_of_them(report):
    limits = ["--min-pixels", str(400 * 784), "--max-pixels", str(400 * 784)]
    data_prep(["inspect", str(report), *limits])
    page, facts = (report / "report.html").read_text(), json.loads((report / "report.json").read_text())
    assert facts["min_pixels"] == facts["max_pixels"] == 400 * 784
    assert [row["most"] for row in facts["budget"]] == [512, 768, 1024, 1280]  # lower limits than min_pixels are none
    assert all(row["mean"] >= 380 for row in facts["budget"])
    assert "Tokens an image, max_pixels 313,600" in page
    with pytest.raises(ValueError, match="min_pixels 50176 is above max_pixels 784"):
        data_prep(["inspect", str(report), "--max-pixels", "784"])


def test_the_page_is_whole_and_runs_nothing(report):
    page = (report / "report.html").read_text()
    assert page.count("<script") == 1 and '<script>"use strict"' in page and "&lt;script&gt;alert(1)" in page
    assert " style=" not in page
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert page.count("data:image/jpeg;base64,") >= 11  # ten samples and the copies' thumbnails
    assert ("gone.jpg" in page and "same as 2.png" in page) or "same as 11.png" in page


def test_inspect_wants_a_prepared_folder(tmp_path):
    with pytest.raises(ValueError, match="is not a data set that `python -m data_prep convert` wrote"):
        data_prep(["inspect", str(tmp_path)])


def test_a_small_image_is_shown_at_the_size_that_the_model_gets(write_records, tmp_path):
    path, images = write_records([{"id": "small", "image": "s.png", "question": "What?", "answer": "It is this."}])
    Image.new("RGB", (60, 40), "red").save(images / "s.png")
    data_prep(["convert", "--annotations", str(path), "--images", str(images), "--out", str(tmp_path / "set")])
    data_prep(["inspect", str(tmp_path / "set")])
    (shown,) = re.findall(r"data:image/jpeg;base64,([\w+/=]+)", (tmp_path / "set" / "report.html").read_text())
    assert Image.open(io.BytesIO(base64.b64decode(shown))).size == (10 * 28, 7 * 28)
    assert json.loads((tmp_path / "set" / "report.json").read_text())["budget"][0]["mean"] == 10 * 7


def test_a_finding_shows_the_image_that_it_names_as_the_model_sees_it(write_records, tmp_path):
    records = [
        {"id": "a", "images": ["blue.png", "red.png"], "question": "What?", "answer": "It is this."},
        {"id": "b", "image": "again.png", "question": "What?", "answer": "It is that."},
    ]
    path, images = write_records(records)
    Image.effect_noise((300, 300), 90).convert("RGB").save(images / "blue.png")
    Image.new("RGB", (32, 32), "red").save(images / "red.png")
    (images / "again.png").write_bytes((images / "red.png").read_bytes())
    data_prep(["convert", "--annotations", str(path), "--images", str(images), "--out", str(tmp_path / "set")])
    data_prep(["inspect", str(tmp_path / "set")])
    page = (tmp_path / "set" / "report.html").read_text()
    findings = page[page.index("<h2>Findings</h2>") : page.index("samples as the model gets them")]
    shown = [
        Image.open(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r"data:image/jpeg;base64,([\w+/=]+)", findings)
    ]
    assert [image.size for image in shown] == [(144, 144)] * 2
    assert all(image.getpixel((72, 72))[0] > 240 and image.getpixel((72, 72))[2] < 20 for image in shown)


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def overwrite_start(path):
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train/data-00000-of-00001.arrow", truncate),
        ("train/data-00000-of-00001.arrow", overwrite_start),
        ("train/data-00000-of-00001.arrow", lambda path: path.write_bytes(b"")),
        ("train/state.json", truncate),
        ("dataset_dict.json", lambda path: path.write_text("{")),
        ("findings.jsonl", lambda path: path.write_text('{"kind": "private", "detail": "x"}\n{"kind"')),
        ("findings.jsonl", lambda path: path.write_bytes(b"\xff\xfe\n")),
        ("findings.jsonl", lambda path: path.write_text('{"kind": "private", "what": "x"}\n')),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "push"])
def test_a_damaged_file_of_a_data_set_is_named(write_records, tmp_path, monkeypatch, file, damage, command):
    monkeypatch.setattr("data_prep.publish.open_repository", lambda repo_id, **_: repo_id)
    monkeypatch.setattr(DatasetDict, "push_to_hub", lambda *_, **__: pytest.fail("pushed"))
    path, images = write_records([{"image": "red.jpg", "question": "What?", "answer": "It is this."}])
    data_prep(["convert", "--annotations", str(path), "--images", str(images), "--out", str(tmp_path / "set")])
    damage(tmp_path / "set" / file)
    with pytest.raises(ValueError) as error:
        data_prep([command, str(tmp_path / "set"), *(["you/skin"] if command == "push" else [])])
    assert str(error.value).startswith(str(tmp_path / "set" / file)) and "\n" not in str(error.value)


def test_a_damaged_image_of_the_data_set_is_named(write_records, tmp_path):
    records = [
        {"id": f"r{n}", "image": "red.jpg", "question": f"q{n}", "answer": "a b", "group": "p"} for n in range(3)
    ]
    path, images = write_records(records)
    data_prep(["convert", "--annotations", str(path), "--images", str(images), "--out", str(tmp_path / "set")])
    [image] = (tmp_path / "set" / "image_files").iterdir()
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(
        ValueError, match=rf"sample 'r\d', .*{image.name}: broken image: .*; prepare the data set again"
    ):
        data_prep(["inspect", str(tmp_path / "set")])


def test_an_image_that_a_limit_makes_too_narrow_is_named(write_records, tmp_path):
    path, images = write_records([{"id": "slim", "image": "slim.png", "question": "What?", "answer": "It is this."}])
    Image.new("RGB", (30, 3000)).save(images / "slim.png")
    source = ["--annotations", str(path), "--images", str(images), "--split", "1", "0", "0"]
    data_prep(["convert", *source, "--out", str(tmp_path / "set")])
    with pytest.raises(ValueError, match=r"sample 'slim': too narrow: 30 x 3000 px under max_pixels 12544"):
        data_prep(["inspect", str(tmp_path / "set"), "--min-pixels", "12544", "--max-pixels", "12544"])
