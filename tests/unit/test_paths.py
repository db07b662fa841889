"""Names of images that are not where the record says: found, or named with the nearest; links only when asked for."""

import json
import os
import unicodedata

import pytest
from PIL import Image

from common.files import suggest_file
from common.yaml_files import read_yaml
from data_prep import convert
from data_prep.__main__ import main as data_prep
from data_prep.convert import prepare
from data_prep.inspection import usable_cores
from data_prep.load import load_splits
from data_prep.paths import resolve_image
from data_prep.sources import Source
from evaluation.examples import example_of_line, find_images


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((60, 50), 60).convert("RGB").save(path)
    return path


@pytest.fixture
def run(tmp_path):
    """Prepare records that name images, and return the first error, or None."""

    def prepare_names(*names, folder=tmp_path / "images", **options):
        rows = [{"id": f"r{n}", "image": name, "question": "q", "answer": "a b"} for n, name in enumerate(names)]
        (tmp_path / "a.json").write_text(json.dumps(rows))
        try:
            prepare([Source(tmp_path / "a.json", folder)], show_progress=False, num_workers=1, **options)
        except ValueError as error:
            return str(error)
        return None

    return prepare_names


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("name", ["Läsion.jpg", "Haut/Größe é.jpg", "皮膚/がん.jpg", "한국/점.jpg", "cilt/İçerik.jpg"])
def test_a_name_finds_its_file_in_either_form_of_unicode(tmp_path, run, name, stored):
    other = {"NFC": "NFD", "NFD": "NFC"}[stored]
    save(tmp_path / "images" / unicodedata.normalize(stored, name))
    assert run(unicodedata.normalize(other, name)) is None
    row = {"image": unicodedata.normalize(other, name), "question": "q"}
    example = example_of_line(row, "line 1", tmp_path / "images")
    assert example["images"] == [str(tmp_path / "images" / unicodedata.normalize(stored, name))]


def test_a_table_finds_its_files_in_subfolders_in_either_form(tmp_path):
    save(tmp_path / "images" / "part 1" / unicodedata.normalize("NFD", "Läsion.jpg"))
    (tmp_path / "t.csv").write_text("name,dx\nLäsion.jpg,nevus\n", encoding="utf-8")
    (tmp_path / "m.yaml").write_text(
        "images: ['{name}']\nlabel: {columns: [dx]}\nquestions: [What?]\nanswer: '{label}'\n"
    )
    source = Source(tmp_path / "t.csv", tmp_path / "images", str(tmp_path / "m.yaml"))
    prepared = prepare([source], show_progress=False, num_workers=1, split=(1, 0, 0))
    assert prepared.splits["train"]["image_sizes"] == [[[60, 50]]]


def test_where_both_forms_exist_each_name_finds_its_own(tmp_path):
    composed, decomposed = ("Läsion.jpg", unicodedata.normalize("NFD", "Läsion.jpg"))
    for name in (composed, decomposed):
        save(tmp_path / name)
        assert resolve_image(name, tmp_path) == tmp_path / name


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("LESION_1.JPG", "lesion_1.jpg"),
        ("Lesion_1.jpg", "lesion_1.jpg"),
        ("lesion_1.png", "lesion_1.jpg"),
        ("leson_1.jpg", "lesion_1.jpg"),
        ("images/lesion_1.jpg", "lesion_1.jpg"),
        ("data/images/lesion_1.jpg", "lesion_1.jpg"),
        ("images\\lesion_1.jpg", "lesion_1.jpg"),
        ("part\\deep.jpg", "part/deep.jpg"),
        ("C:\\data\\part\\deep.jpg", "part/deep.jpg"),
        ("deep.jpg", "part/deep.jpg"),
        ("lesion_2.jpg", None),  # another number is another image
        ("something.jpg", None),
    ],
)
def test_a_missing_image_is_named_with_its_path_and_the_nearest(tmp_path, run, name, nearest):
    save(tmp_path / "images" / "lesion_1.jpg")
    save(tmp_path / "images" / "part" / "deep.jpg")
    error = run("lesion_1.jpg", name)
    hint = f"; did you mean {nearest!r}?" if nearest else ""
    path = tmp_path / "images" / name
    assert error == f"a.json: record 1 (id 'r1'), image {name!r}: no such file {path}{hint}"
    with_row = example_of_line({"image": name, "question": "q"}, "line 3", tmp_path / "images")
    assert with_row["error"] == f"--questions, line 3: {name!r}: no such file {path}{hint}"


@pytest.mark.parametrize("below", ["images", "raw/photos/2024"])
def test_a_wrong_image_folder_is_named_with_the_right_one(tmp_path, run, below):
    for name in ("a.jpg", "set/b.jpg"):
        save(tmp_path / "data" / below / name)
    error = run("a.jpg", "set/b.jpg", "c.jpg", folder=tmp_path / "data", on_error="drop")
    searched = f"{tmp_path / 'data'} was searched and has none of the 3 images that are named"
    assert error == f"image_dir: {searched}; 2 are in the folder below it: use {tmp_path / 'data' / below}"


def test_a_missing_folder_and_file_are_named_with_the_nearest(tmp_path):
    save(tmp_path / "Images" / "a.jpg")
    (tmp_path / "annotations.json").write_text('[{"image": "a.jpg", "question": "q", "answer": "a"}]')
    with pytest.raises(FileNotFoundError, match=r"image_dir: no folder .*/images; did you mean 'Images'\?"):
        prepare([Source(tmp_path / "annotations.json", tmp_path / "images")], show_progress=False)
    with pytest.raises(FileNotFoundError, match=r"no file .*/anotations.json; did you mean 'annotations.json'\?"):
        prepare([Source(tmp_path / "anotations.json", tmp_path / "Images")], show_progress=False)
    with pytest.raises(FileNotFoundError, match=r"no file there; did you mean 'a.jpg'\?"):
        find_images([str(tmp_path / "Images" / "A.png")])
    (tmp_path / "skin").mkdir()
    (tmp_path / "skin.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"no data at .*/skim': no file, .*; did you mean 'skin'\?"):
        load_splits(str(tmp_path / "skim"))
    with pytest.raises(FileNotFoundError, match=r"no folder .*/Skin; did you mean 'skin'\?"):
        data_prep(["inspect", str(tmp_path / "Skin")])
    with pytest.raises(FileNotFoundError, match=r"--config: no file .*/skin.yml; did you mean 'skin.yaml'\?"):
        read_yaml(tmp_path / "skin.yml", "--config")
    assert suggest_file(tmp_path / "nowhere" / "x") == ""


def outside(tmp_path):
    """Link a file and a folder into the image folder, as Hugging Face's cache and DVC do."""
    save(tmp_path / "blobs" / "0a1b.jpg")
    save(tmp_path / "cache" / "deep" / "b.jpg")
    save(tmp_path / "secret.jpg")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").symlink_to("../blobs/0a1b.jpg")
    (tmp_path / "images" / "deep").symlink_to(tmp_path / "cache" / "deep")
    (tmp_path / "images" / "gone.jpg").symlink_to("../blobs/gone")


@pytest.mark.parametrize("name", ["a.jpg", "deep/b.jpg"])
def test_a_link_out_of_the_folder_is_followed_only_when_asked_for(tmp_path, run, name):
    outside(tmp_path)
    rule = "is a link that leads out of the image folder; `python -m data_prep convert --follow-links` reads such"
    assert f"image {name!r} {rule}" in run(name)
    assert run(name, follow_links=True) is None


@pytest.mark.parametrize("name", ["../secret.jpg", "deep/../../secret.jpg", "deep/../secret.jpg", "gone.jpg"])
def test_a_name_does_not_lead_out_even_where_links_are_followed(tmp_path, run, name):
    outside(tmp_path)
    (tmp_path / "cache" / "secret.jpg").symlink_to(tmp_path / "secret.jpg")
    error = run(name, follow_links=True)
    assert "is outside the image folder" in error or f"{name!r}: no such file" in error


def test_the_command_follows_links(tmp_path):
    outside(tmp_path)
    (tmp_path / "a.json").write_text('[{"image": "a.jpg", "question": "q", "answer": "a"}]')
    source = ["--annotations", str(tmp_path / "a.json"), "--images", str(tmp_path / "images")]
    data_prep(["convert", *source, "--out", str(tmp_path / "out"), "--follow-links"])
    assert (tmp_path / "out" / "dataset_dict.json").is_file()


def test_cores_are_counted_where_the_system_does_not_tell_which_may_be_used(monkeypatch):
    monkeypatch.delattr(convert.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    assert usable_cores() == 61


def test_predict_finds_images_by_name_and_by_content(tmp_path):
    for name in ("a.jpg", "b.HEIC", "c.avif", "d", ".hidden.jpg"):
        kind = {"b.HEIC": "HEIF", "c.avif": "AVIF"}.get(name, "JPEG")
        Image.new("RGB", (30, 30)).save(tmp_path / name, kind)
    (tmp_path / "e.jxl").write_bytes(b"\xff\x0a" + bytes(50))
    (tmp_path / "f").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "notes.txt").write_text("about a.jpg")
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" + bytes(600))
    (tmp_path / "sub").mkdir()
    found = ["a.jpg", "b.HEIC", "c.avif", "d", "e.jxl", "f"]
    assert [path.name for path in find_images([str(tmp_path)])] == found
