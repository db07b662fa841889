"""Class folders: the label is the folder's name, and nothing else in them becomes one."""

import errno
import os
from pathlib import Path

import pytest
from PIL import Image

from data_prep.class_folders import read_folders
from data_prep.convert import prepare
from data_prep.sources import Source


def draw(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), colour).save(path)


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def rows(root):
    return [(row["path"], row["folder"], row["split"]) for row in read_folders(root)]


def test_class_folders_are_a_source(tmp_path):
    draw(tmp_path / "nevus" / "1.jpg", "brown")
    (tmp_path / "nevus" / ".DS_Store").write_text("not an image")
    draw(tmp_path / "basal_cell_carcinoma" / "3.png", "red")
    train = prepare([Source(tmp_path)], split=(1, 0, 0), show_progress=False).splits["train"]
    assert sorted(train["label"]) == ["basal cell carcinoma", "nevus"]
    assert {m[1]["content"] for m in train["messages"]} == {"This is nevus.", "This is basal cell carcinoma."}


def test_the_question_does_not_tell_the_label(tmp_path):
    for number in range(12):
        path = tmp_path / ("nevus" if number % 2 else "melanoma") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((60, 40), 90).save(path)
    train = prepare([Source(tmp_path)], split=(1, 0, 0), show_progress=False).splits["train"]
    assert {m[0]["content"] for m in train["messages"]} == {"<image>What skin condition is shown?"}


def test_a_class_name_loses_the_blanks_that_stand_for_its_underscores(tmp_path):
    for folder, colour in (("nevus_", "brown"), ("_", "red")):
        draw(tmp_path / folder / "1.jpg", colour)
    result = prepare([Source(tmp_path)], split=(1, 0, 0), show_progress=False)
    train = result.splits["train"]
    assert [(row["label"], row["messages"][1]["content"]) for row in train] == [("nevus", "This is nevus.")]


def test_hidden_and_system_files_are_no_classes_and_no_images(tmp_path):
    touch(tmp_path, "seborrheic keratosis/a b.JPG", "nevus/1.jpg")
    touch(
        tmp_path, ".ipynb_checkpoints/1-checkpoint.jpg", "nevus/.ipynb_checkpoints/1-checkpoint.jpg", "nevus/._1.jpg"
    )
    touch(
        tmp_path,
        "__MACOSX/nevus/._1.jpg",
        "nevus/@eaDir/1.jpg/SYNOFILE_THUMB_M.jpg",
        "nevus/Thumbs.db",
        "Desktop.ini",
        "nevus/1.jpg:Zone.Identifier",
    )
    touch(tmp_path, "$RECYCLE.BIN/x.jpg", "lost+found/y.png", ".git/objects/z.png")
    assert rows(tmp_path) == [
        ("nevus/1.jpg", "nevus", ""),
        ("seborrheic keratosis/a b.JPG", "seborrheic keratosis", ""),
    ]


def test_files_beside_images_and_empty_classes_are_named(tmp_path, caplog):
    touch(tmp_path, "README.txt", "labels.csv", "nevus/1.jpg", "nevus/notes.PDF", "melanoma/.keep")
    assert rows(tmp_path) == [("nevus/1.jpg", "nevus", "")]
    assert (
        "3 files are no images by their names, and are left out: README.txt, labels.csv, nevus/notes.PDF"
        in caplog.text
    )
    assert "1 folders have no images: melanoma" in caplog.text


def test_a_file_that_should_be_an_image_is_not_passed_over(tmp_path):
    touch(tmp_path, "nevus/1.jpg", "nevus/IM0001", "nevus/2.dcm")
    assert [path for path, _, _ in rows(tmp_path)] == ["nevus/1.jpg", "nevus/2.dcm", "nevus/IM0001"]


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "Validation", "Testing"), ("TRAIN", "valid", "Test")]
)
def test_folders_of_splits_are_given_splits(tmp_path, names):
    for number, (split, label) in enumerate((split, label) for split in names for label in ("nevus", "melanoma")):
        draw(tmp_path / split / label / f"{number}.png", (40 * number, 255 - 40 * number, 90))
    splits = prepare([Source(tmp_path)], show_progress=False).splits
    assert {name: sorted(split["label"]) for name, split in splits.items()} == {
        "train": ["melanoma", "nevus"], "validation": ["melanoma", "nevus"], "test": ["melanoma", "nevus"]
    }  # fmt: skip
    assert sorted(splits["test"]["id"]) == [f"{names[2]}/melanoma/5.png", f"{names[2]}/nevus/4.png"]


def test_a_mapping_of_ones_own_keeps_the_splits_of_folders(tmp_path):
    mapping = tmp_path / "m.yaml"
    mapping.write_text("images: '{path}'\nlabel: {columns: [folder]}\nquestions: What?\nanswer: It is {label}.\n")
    for number, name in enumerate(("train/nevus/0.png", "test/nevus/1.png")):
        draw(tmp_path / "photos" / name, (200 * number, 90, 90))
    splits = prepare([Source(tmp_path / "photos", mapping=str(mapping))], split=(1, 0, 0), show_progress=False).splits
    assert {name: split["id"] for name, split in splits.items()} == {
        "train": ["train/nevus/0.png"], "test": ["test/nevus/1.png"]
    }  # fmt: skip


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    touch(tmp_path, "test/1.jpg", "control/2.jpg")
    assert rows(tmp_path) == [("control/2.jpg", "control", ""), ("test/1.jpg", "test", "")]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (
            ["melanoma/P01/1.jpg", "nevus/P02/1.jpg"],
            "'melanoma/P01/1.jpg' has 2 folder(s) above it, expected CLASS/FILE",
        ),
        (["nevus/1.jpg", "nevus/deep/2.jpg"], "'nevus/deep/2.jpg' has 2 folder(s) above it"),
        (["1.jpg", "nevus/2.jpg"], "'1.jpg' has 0 folder(s) above it"),
        (["1.jpg", "2.jpg"], "'1.jpg' has 0 folder(s) above it"),
        (["train/1.jpg", "test/2.jpg"], "'test/2.jpg' has 1 folder(s) above it"),
        (["train/nevus/1.jpg", "nevus/2.jpg"], "'train/nevus/1.jpg' has 2 folder(s) above it"),
        (["train/nevus/1.jpg", "test/nevus/P1/2.jpg"], "'test/nevus/P1/2.jpg' has 3 folder(s) above it"),
        (["HAM/nevus/1.jpg", "HAM/melanoma/2.jpg"], "expected CLASS/FILE, or SPLIT/CLASS/FILE"),
        (["README.txt"], "expected a folder for each class, with images in it"),
    ],
)
def test_another_depth_is_refused_in_words(tmp_path, names, reason):
    touch(tmp_path, *names)
    with pytest.raises(ValueError) as error:
        read_folders(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ") and reason in str(error.value)


def test_the_folder_inside_the_one_named_is_suggested(tmp_path):
    touch(tmp_path, "HAM/nevus/1.jpg", "HAM/melanoma/2.jpg")
    with pytest.raises(ValueError, match=r"did you mean .*HAM\?"):
        read_folders(tmp_path)


def test_an_unreadable_class_is_not_lost_in_silence(tmp_path, monkeypatch):
    def scandir(path, scan=os.scandir):
        if Path(path).name == "nevus":  # permissions do not bind root, who may run the tests
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    touch(tmp_path, "nevus/1.jpg", "melanoma/2.jpg")
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match="nevus: the folder cannot be read: Permission denied"):
        read_folders(tmp_path)


def test_a_linked_class_is_not_lost_in_silence(tmp_path):
    touch(tmp_path, "data/nevus/1.jpg", "other/2.jpg")
    (tmp_path / "data" / "melanoma").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match=r"melanoma is a link to a folder"):
        read_folders(tmp_path / "data")


def test_a_mapping_for_other_columns_is_refused(tmp_path):
    touch(tmp_path, "nevus/1.jpg")
    with pytest.raises(ValueError, match=r"no column 'image_id'; there are 'path', 'folder', 'split'"):
        prepare([Source(tmp_path, mapping="ham10000")], show_progress=False)


def test_a_name_that_is_not_utf_8_is_refused_in_words(tmp_path):
    folder = os.fsencode(tmp_path) + b"/mela\xffnoma"
    Path(os.fsdecode(folder)).mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "1.png")
    (tmp_path / "1.png").rename(os.fsdecode(folder + b"/1.png"))
    with pytest.raises(ValueError, match=r"'mela\\udcffnoma/1\.png': the name is not UTF-8; rename the file"):
        read_folders(tmp_path)


def test_an_archive_is_no_image_folder(write_records, tmp_path):
    path, _ = write_records([{"image": "red.jpg", "question": "a", "answer": "b"}])
    with pytest.raises(ValueError, match=r"image_dir: .*a\.json is a file, expected a folder; unpack an"):
        prepare([Source(path, path)], show_progress=False)


@pytest.mark.parametrize("name", ["annotations.json", "labels.CSV", "data.parquet"])
def test_the_folder_of_an_annotation_file_is_no_folder_of_classes(tmp_path, name, caplog):
    touch(tmp_path, "images/1.jpg", "images/2.jpg", name)
    with pytest.raises(
        ValueError, match=rf"one class alone, 'images', beside {name}; did you mean {tmp_path}/{name}\?"
    ):
        read_folders(tmp_path)
    (tmp_path / name).rename(tmp_path / "notes.txt")
    assert len(read_folders(tmp_path)) == 2  # one of several sources, perhaps
    assert "has one class alone: 'images'" in caplog.text
    touch(tmp_path, name, "nevus/3.jpg")
    assert len(read_folders(tmp_path)) == 3
