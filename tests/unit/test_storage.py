"""The folder of a data set: each image once, opened anywhere without writing, replaced without a loss."""

import io
import json
import shutil
from pathlib import Path

import pytest
from datasets import DatasetDict, load_from_disk
from PIL import Image

from data_prep import fingerprint, load_splits, prepare_dataset
from data_prep import publish as publishing
from data_prep.__main__ import main as data_prep
from data_prep.folders import replace_data_set
from data_prep.images import load_image
from data_prep.storage import IMAGE_FOLDER


def ask(number, *images):
    return {"id": f"r{number}", "images": list(images), "question": f"What {number}?", "answer": "A nevus."}


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def photos(tmp_path):
    """Five pictures of noise, one of them twice; and how to convert records about them into `out`."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        Image.effect_noise((300, 240), 40 + 9 * number).convert("RGB").save(folder / f"{number}.jpg", quality=95)
    shutil.copy(folder / "3.jpg", folder / "copy.JP EG")

    def convert(records, *options, out=tmp_path / "out"):
        (tmp_path / "a.json").write_text(json.dumps(records))
        command = ["convert", "--annotations", str(tmp_path / "a.json"), "--images", str(folder), "--out", str(out)]
        data_prep([*command, "--workers", "1", *options])
        return out

    return folder, convert


TEN_EACH = [ask(n, f"{n % 4}.jpg") for n in range(40)]
PAIRS = [ask(n, f"{n % 3}.jpg", "3.jpg") for n in range(12)]
COPIES = [ask(n, "3.jpg" if n % 2 else "copy.JP EG") for n in range(6)]


@pytest.mark.parametrize("records", [TEN_EACH, PAIRS, COPIES], ids=["ten questions each", "pairs", "copies"])
def test_shared_images_are_stored_once_and_load_as_before(photos, records, tmp_path):
    folder, convert = photos
    out = convert(records)
    unique = {path.read_bytes() for path in folder.iterdir() if any(path.name in row["images"] for row in records)}
    assert len(files(out / IMAGE_FOLDER)) == len(unique)
    assert size(out / IMAGE_FOLDER) == sum(map(len, unique))
    splits = load_splits(str(out))
    prepare_dataset(tmp_path / "a.json", folder, show_progress=False).save_to_disk(str(tmp_path / "embedded"))
    before = load_splits(str(tmp_path / "embedded"))
    assert {name: fingerprint(split) for name, split in splits.items()} == {
        n: fingerprint(s) for n, s in before.items()
    }
    for row, old in zip(splits["train"], before["train"], strict=True):
        pixels = [[load_image(image).tobytes() for image in sample["images"]] for sample in (row, old)]
        assert pixels[0] == pixels[1] and row["image_sizes"] == old["image_sizes"]
    stock = load_from_disk(str(out))["train"]
    assert [image.size for image in stock[0]["images"]] == [tuple(pair) for pair in stock[0]["image_sizes"]]


def test_a_folder_of_ten_questions_an_image_is_no_larger_than_the_images(photos):
    folder, convert = photos
    for number in range(4):
        Image.effect_noise((1200, 900), 60).convert("RGB").save(folder / f"{number}.jpg", quality=97)
    out = convert(TEN_EACH)
    assert size(out) <= 1.1 * sum((folder / f"{number}.jpg").stat().st_size for number in range(4))


def test_images_of_one_sample_each_are_embedded_as_before(photos):
    _, convert = photos
    out = convert([ask(n, f"{n}.jpg") for n in range(4)])
    assert not (out / IMAGE_FOLDER).exists()
    assert all(row["images"][0]["bytes"] for split in load_splits(str(out)).values() for row in split)


@pytest.mark.parametrize("records", [TEN_EACH, [ask(n, f"{n}.jpg") for n in range(4)]], ids=["files", "embedded"])
def test_reading_writes_nothing_beside_the_data(photos, records):
    _, convert = photos
    out = convert(records)
    before = files(out)
    splits = load_splits(str(out))
    fingerprint(splits["train"])
    load_image(splits["train"].select([0])[0]["images"][0])
    assert files(out) == before
    data_prep(["inspect", str(out)])
    assert set(files(out)) - set(before) == {"report.html", "report.json"}


def test_a_moved_folder_opens_and_a_part_of_one_is_named(photos, tmp_path):
    _, convert = photos
    out = convert(TEN_EACH)
    moved = out.rename(tmp_path / "moved ü")
    sample = load_splits(str(moved))["train"][0]
    assert sample["images"][0]["path"].startswith(str(moved / IMAGE_FOLDER))
    assert load_image(sample["images"][0]).size == (300, 240)
    next((moved / IMAGE_FOLDER).iterdir()).unlink()
    with pytest.raises(
        ValueError, match=rf"of [1-4] images are not in .*moved ü/{IMAGE_FOLDER}, such as \w+\.jpg; copy"
    ):
        load_splits(str(moved))


def test_a_push_embeds_images_that_are_files(photos, tmp_path, monkeypatch):
    _, convert = photos
    sent = {}
    monkeypatch.setattr(publishing, "open_repository", lambda name, **options: name)
    monkeypatch.setattr(publishing.DatasetCard, "push_to_hub", lambda self, name: None)

    def push(self, name, **options):
        sent.update(self)
        return publishing.DatasetCardData(repo_url=publishing.DatasetCardData(repo_id=name))

    monkeypatch.setattr(DatasetDict, "push_to_hub", push)
    out = convert(TEN_EACH)
    data_prep(["push", str(out), "me/skin"])
    sent["train"].save_to_disk(str(tmp_path / "pushed"))  # embeds as the push does
    images = [image for row in load_from_disk(str(tmp_path / "pushed")).data["images"].to_pylist() for image in row]
    assert len(images) == len(sent["train"]) and all(image["bytes"] for image in images)
    assert {Image.open(io.BytesIO(image["bytes"])).size for image in images} == {(300, 240)}
    assert not any("/" in image["path"] or image["path"][:-4] in ("0", "1", "2", "3") for image in images)


def test_overwriting_leaves_what_is_not_the_data_sets(photos):
    _, convert = photos
    out = convert(TEN_EACH, "--folds", "2")
    (out / "images").mkdir()
    (out / "images" / "0.jpg").write_bytes(b"mine")
    for name in ("notes.txt", "train.csv", "fold_0/notes.txt", f"{IMAGE_FOLDER}/me.jpg"):
        (out / name).write_text("mine")
    (out / "fold_1" / "cache-123.arrow").write_bytes(b"a copy that an earlier version left")
    (out / "report.html").write_text("of the old data")
    convert([ask(n, f"{n}.jpg") for n in range(4)], "--overwrite")
    kept = {name for name in files(out) if not name.endswith((".arrow", "state.json", "dataset_info.json"))}
    own = {"dataset_dict.json", "findings.jsonl"}
    assert kept == own | {"images/0.jpg", "notes.txt", "train.csv", "fold_0/notes.txt", f"{IMAGE_FOLDER}/me.jpg"}
    assert not (out / "fold_1").exists()
    assert sum(len(split) for split in load_splits(str(out)).values()) == 4


def test_an_interrupted_replacement_cannot_be_opened_but_repeated(photos, monkeypatch):
    _, convert = photos
    out = convert(TEN_EACH)
    (out / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(type(out), "replace", lambda self, target: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            convert(TEN_EACH, "--overwrite")
    with pytest.raises(ValueError, match="is not a prepared data set"):
        load_splits(str(out))
    convert(TEN_EACH, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine" and len(load_splits(str(out))["train"]) > 0


@pytest.mark.parametrize("name", ["s3://bucket/x", "zip::x"])
def test_an_address_is_no_folder_to_write_to(photos, monkeypatch, tmp_path, name):
    _, convert = photos
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="reads as an address"):
        convert(TEN_EACH, out=Path(name))
    assert not list(tmp_path.glob("*:*"))


def test_a_folder_of_others_is_refused(photos, tmp_path):
    folder, convert = photos
    with pytest.raises(ValueError, match="exists and is not a prepared data set"):
        convert(TEN_EACH, "--overwrite", out=folder)
    (tmp_path / "empty").mkdir()
    convert(TEN_EACH, out=tmp_path / "empty")
    replace_data_set(tmp_path / "empty", tmp_path / "new")
    assert (tmp_path / "new" / "dataset_dict.json").is_file()
