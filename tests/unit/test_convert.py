"""From files on disk to a `DatasetDict`: what goes in comes out, and what does not is said."""

import json
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image

from data_prep import DataError, InvalidRecordsError, join_folds, load_splits, prepare_dataset
from data_prep.__main__ import main as data_prep
from data_prep.convert import prepare
from data_prep.images import load_image
from data_prep.load import standardise
from data_prep.sources import Source
from data_prep.split import assign_splits, check_fractions

ALL_TRAIN = {"split": (1, 0, 0), "show_progress": False}


def flat(image, **more):
    return {"image": image, "question": "What is it?", "answer": "A nevus.", **more}


def test_prepare_dataset_gives_the_schema_that_trl_reads(write_records):
    path, images = write_records([flat("red.jpg", id="a", label="nevus"), {"question": "Hi?", "answer": "Yes."}])
    train = prepare_dataset(path, images, **ALL_TRAIN)["train"]
    facts = ["label", "group", "skin_type", "age", "sex", "site", "source"]
    assert train.column_names == ["id", "images", "messages", *facts, "image_sizes", "weight"]
    first, second = train
    assert first["images"][0].size == (60, 40)
    assert first["image_sizes"] == [[60, 40]]
    assert first["messages"][0] == {"role": "user", "content": "<image>What is it?"}
    assert (second["images"], second["image_sizes"], second["label"]) == ([], [], None)


def test_all_problems_are_collected_and_raised_once(write_records):
    (path, images) = write_records(
        [
            flat("red.jpg"),
            flat("gone.jpg", id="b"),
            flat("../a.json"),
            flat("http://x/y.jpg"),
            {"question": "q"},
            flat("empty.jpg"),
            flat("text.jpg"),
            flat("cut.jpg"),
        ]
    )
    (images / "empty.jpg").touch()
    (images / "text.jpg").write_text("hello")
    Image.effect_noise((200, 200), 60).save(images / "whole.jpg")
    (images / "cut.jpg").write_bytes((images / "whole.jpg").read_bytes()[:2000])
    with pytest.raises(InvalidRecordsError) as error:
        prepare_dataset(path, images, **ALL_TRAIN)
    reasons = {e.record: e.reason for e in error.value.errors}
    first, second, *_ = str(error.value).split("\n")
    assert first == "7 of 8 records have an error; `python -m data_prep convert --on-error drop` leaves them out"
    assert second.startswith("  a.json: record 1 (id 'b'), image 'gone.jpg'")
    assert reasons[1] == f"image 'gone.jpg': no such file {images / 'gone.jpg'}"
    assert "'../a.json' is outside the image folder" in reasons[2]
    assert "'http://x/y.jpg' is an address" in reasons[3]
    assert reasons[4] == "field 'answer': expected some text, found null"
    assert reasons[5] == "image 'empty.jpg': the file is empty (zero bytes)"
    assert reasons[6] == "image 'text.jpg': not an image"
    assert "'cut.jpg': broken image: image file is truncated" in reasons[7]


def test_records_with_the_same_problem_are_one_line_and_no_remedy_leaves_all_out(write_records):
    path, images = write_records([{"img": "red.jpg", "Question": "What?"}] * 30)
    with pytest.raises(InvalidRecordsError) as error:
        prepare_dataset(path, images, **ALL_TRAIN)
    first, second = str(error.value).split("\n")
    assert first == "30 of 30 records have an error" and len(error.value.errors) == 30
    assert second.startswith("  a.json: record 0, field 'conversations': the record has none of")
    assert second.endswith("its keys are 'img', 'Question'; so have 29 more")


def test_of_many_problems_twenty_are_listed(write_records):
    path, images = write_records([flat(f"gone{n}.jpg") for n in range(30)] + [flat("red.jpg")])
    with pytest.raises(InvalidRecordsError) as error:
        prepare_dataset(path, images, **ALL_TRAIN)
    first, *listed, last = str(error.value).split("\n")
    assert first.startswith("30 of 31 records have an error; `python")
    assert len(listed) == 20 and last == "  ... and 10 more"


def test_one_problem_is_one_line(write_records):
    path, images = write_records([flat("gone.jpg", id="ham_0031")])
    with pytest.raises(InvalidRecordsError) as error:
        prepare_dataset(path, images, **ALL_TRAIN)
    reason = f"image 'gone.jpg': no such file {images / 'gone.jpg'}"
    assert str(error.value) == f"a.json: record 0 (id 'ham_0031'), {reason}"


def test_a_missing_image_folder_is_named(write_records):
    path, images = write_records([flat("red.jpg", id="x")])
    with pytest.raises(FileNotFoundError, match=r"image_dir: no folder .*nowhere"):
        prepare_dataset(path, images / "nowhere", **ALL_TRAIN)
    with pytest.raises(ValueError, match=r"a\.json names images, and no image folder was given"):
        prepare_dataset(path, None, **ALL_TRAIN)


def test_drop_keeps_the_rest_and_says_so(write_records, caplog):
    path, images = write_records([flat("red.jpg", id="a"), flat("gone.jpg", id="b"), flat("blue.jpg", id="c")])
    prepared = prepare([Source(path, images)], on_error="drop", **ALL_TRAIN)
    assert prepared.splits["train"]["id"] == ["a", "c"]
    assert [(e.record, e.sample_id) for e in prepared.errors] == [(1, "b")]
    assert "1 of 3 records rejected" in caplog.text


def test_repeated_ids_are_made_unique_and_counted(write_records, caplog):
    path, images = write_records([flat("red.jpg", id="a"), flat("blue.jpg", id="a"), flat("red.jpg", id="a#2")])
    assert prepare_dataset(path, images, **ALL_TRAIN)["train"]["id"] == ["a", "a#3", "a#2"]
    assert "1 records repeat an id and were renamed; the first is 'a#3' now" in caplog.text


@pytest.mark.parametrize(
    ("groups", "warned"), [((None, None), True), (("", ""), True), (("p1", None), False), (("p1", "p1"), False)]
)
def test_data_that_name_no_patient_get_one_line(write_records, caplog, groups, warned):
    prepare_dataset(*write_records([flat("red.jpg", group=group) for group in groups]), **ALL_TRAIN)
    assert caplog.text.count("no sample names a patient or lesion (key 'group', or --group-by)") == warned


def test_keys_that_nobody_reads_are_said(write_records, caplog):
    path, images = write_records(
        [{"grop": "P1", "Label": "nevus", "image": "red.jpg", "question": "a", "answer": "b"}]
    )
    prepare_dataset(path, images, **ALL_TRAIN)
    assert "the key 'grop' of 1 records is not read; did you mean 'group'?" in caplog.text
    assert "the key 'Label' of 1 records is not read; did you mean 'label'?" in caplog.text


def test_the_split_depends_on_ids_and_seed_alone():
    ids = [f"s{n}" for n in range(100)]
    first = dict(zip(ids, assign_splits(ids, (0.8, 0.1, 0.1), seed=1), strict=True))
    again = dict(zip(ids[::-1], assign_splits(ids[::-1], (0.8, 0.1, 0.1), seed=1), strict=True))
    other = dict(zip(ids, assign_splits(ids, (0.8, 0.1, 0.1), seed=2), strict=True))
    assert first == again != other
    assert [list(first.values()).count(name) for name in ("train", "validation", "test")] == [80, 10, 10]


@pytest.mark.parametrize("fractions", [(0.8, 0.1), (0.8, 0.3, 0.1), (1.1, -0.1, 0.0)])
def test_shares_that_do_not_add_up_are_refused(fractions):
    with pytest.raises(ValueError, match="split: expected shares"):
        check_fractions(fractions)


def convert(path, images, out, *options):
    data_prep(["convert", "--annotations", str(path), "--images", str(images), "--out", str(out), *options])


def test_convert_writes_a_folder_that_needs_the_image_files_no_more(write_records, tmp_path, capsys):
    path, images = write_records([flat(name, label="nevus") for name in ("red.jpg", "green.png", "blue.jpg")])
    convert(path, images, tmp_path / "out", "--split", "1", "0", "0")
    assert "train            3 samples       3 images   nevus 3" in capsys.readouterr().out
    for image in images.iterdir():
        image.unlink()
    sample = load_splits(str(tmp_path / "out"))["train"][0]
    assert sample["images"][0]["bytes"]
    assert "/" not in sample["images"][0]["path"]
    assert load_from_disk(str(tmp_path / "out"))["train"][0]["images"][0].size == (60, 40)


def test_convert_lists_what_it_dropped(write_records, tmp_path, capsys):
    path, images = write_records([flat("red.jpg"), flat("gone.jpg", id="b")])
    convert(path, images, tmp_path / "out", "--on-error", "drop")
    assert "rejected 1 records" in capsys.readouterr().out
    row = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    reason = f"image 'gone.jpg': no such file {images / 'gone.jpg'}"
    assert row == {"source": "a.json", "record": 1, "id": "b", "reason": reason}


def test_convert_never_overwrites_unasked(write_records, tmp_path):
    path, images = write_records([flat("red.jpg")])
    convert(path, images, tmp_path / "out")
    with pytest.raises(ValueError, match="already contains a data set; choose another folder or add --overwrite"):
        convert(path, images, tmp_path / "out")
    convert(path, images, tmp_path / "out", "--overwrite")
    with pytest.raises(ValueError, match="exists and is not a prepared data set"):
        convert(path, images, images, "--overwrite")


def test_the_command_ends_with_one_line_and_exit_code(write_records, tmp_path):
    path, images = write_records("[]")
    command = [sys.executable, "-m", "data_prep", "convert", "--annotations", path, "--out", tmp_path / "o"]
    failed = subprocess.run([*command, "--images", images], capture_output=True, text=True)
    assert (failed.returncode, failed.stderr) == (1, f"error: {path}: contains no records\n")
    wrong = subprocess.run([*command, "--formt", "llava"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1 and "--formt" in wrong.stderr
    unwritable = subprocess.run([*command[:-1], "/proc/x/o", "--images", images], capture_output=True, text=True)
    assert (unwritable.returncode, unwritable.stderr.count("\n")) == (1, 1)
    assert unwritable.stderr.startswith("error: --out: cannot write to /proc/x/o")


def test_data_prep_needs_no_torch():
    code = "import sys, data_prep, data_prep.__main__; print({'torch', 'transformers', 'trl'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_load_splits_says_what_a_path_is_not(write_records, tmp_path):
    _, images = write_records([flat("red.jpg")])
    with pytest.raises(FileNotFoundError, match="no file, no folder and no Hub data set id"):
        load_splits(str(tmp_path / "gone.json"))
    with pytest.raises(ValueError, match="is not a prepared data set"):
        load_splits(str(images))
    with pytest.raises(ValueError, match="image_dir: goes with an annotation file"):
        load_splits(str(tmp_path), str(images))
    with pytest.raises(FileNotFoundError, match=r"'someone/skin-v1\.5' is no local path, and the Hub says"):
        load_splits("someone/skin-v1.5")
    DatasetDict({"train": Dataset.from_dict({"text": ["a"]})}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"split 'train' of .* lacks the columns"):
        load_splits(str(tmp_path / "other"))


def test_load_splits_takes_an_annotation_file_directly(demo_raw):
    splits = load_splits(str(demo_raw / "annotations.json"), str(demo_raw / "images"), show_progress=False)
    assert {name: len(split) for name, split in splits.items()} == {"train": 32, "validation": 4, "test": 4}
    assert splits["train"][0]["images"][0]["bytes"] is None


def test_a_foreign_data_set_is_brought_into_the_schema():
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": " A nevus.\n"}]
    rows = {"messages": [messages], "images": [[Image.new("RGB", (30, 50))]], "source": ["x"]}
    features = Features(
        {
            "messages": List({"role": Value("string"), "content": Value("string")}),
            "images": List(ImageFeature()),
            "source": Value("string"),
        }
    )
    [row] = standardise(Dataset.from_dict(rows, features=features), "train")
    assert row["id"] == "train-000000"
    assert row["image_sizes"] == [[30, 50]]
    assert [m["content"] for m in row["messages"]] == ["<image>What?", "A nevus."]
    single = Dataset.from_dict({"messages": [messages], "image": [Image.new("RGB", (30, 50))]})
    [row] = standardise(single.cast_column("image", ImageFeature()), "test")
    assert (row["id"], row["image_sizes"]) == ("test-000000", [[30, 50]])
    with pytest.raises(ValueError, match="has both an 'image' and an 'images' column"):
        standardise(Dataset.from_dict({"messages": [messages], "image": [None], "images": [[]]}), "train")
    bad = Dataset.from_dict({"messages": [[{"role": "user", "content": "<|im_end|>"}]]})
    with pytest.raises(DataError, match=r"record 0 \(id 'train-000000'\)"):
        standardise(bad, "train")
    with pytest.raises(ValueError, match="none is 'messages'"):
        standardise(Dataset.from_dict({"text": ["a"]}), "train")


def foreign(features=None, **columns):
    """Return a data set of other people's: as many chats as a column has values; `features` of some columns."""
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A nevus."}]
    dataset = Dataset.from_dict({"messages": [turns] * len(next(iter(columns.values()))), **columns})
    for name, feature in (features or {}).items():
        dataset = dataset.cast_column(name, feature)
    return dataset


def test_attributes_of_a_foreign_data_set_are_those_that_convert_would_give_it():
    dataset = foreign(
        {"label": ClassLabel(names=["acne", "nevus"])},
        label=[1, 0, -1],
        group=[" P 1 ", "n/a", "\t"],
        age=[45.5, float("nan"), None],
        weight=[2.0, 1.0, None],
    )
    rows = standardise(dataset, "train")
    assert rows["label"] == ["nevus", "acne", None]
    assert rows["group"] == ["P 1", None, None]
    assert rows["age"] == ["45.5", None, None]
    assert rows["weight"] == [2.0, 1.0, 1.0]


@pytest.mark.parametrize("weight", [0.0, -3.0, float("inf")])
def test_a_weight_that_no_sample_can_have_is_refused(weight):
    with pytest.raises(
        DataError, match=r"record 1 \(id 'train-000001'\), field 'weight': expected a number above 0, f"
    ):
        standardise(foreign(weight=[1.0, weight]), "train")


def test_repeated_ids_of_a_hub_data_set_are_numbered_in_all_splits(monkeypatch, caplog):
    splits = {"train": foreign(id=["a", "b", "a"]), "test": foreign(id=["a", "c", "a#2"])}
    monkeypatch.setattr("data_prep.load.load_hub", lambda name: DatasetDict(splits))
    found = load_splits("someone/skin")
    assert {name: split["id"] for name, split in found.items()} == {
        "train": ["a", "b", "a#3"],
        "test": ["a#4", "c", "a#2"],
    }
    assert "2 samples repeat an id and were renamed; the first is 'a#3' now" in caplog.text


@pytest.mark.parametrize("kind", ["images", "image", "plain text"])
def test_a_foreign_data_set_cannot_name_files_of_this_machine(tmp_path, kind):
    Image.new("RGB", (30, 50)).save(tmp_path / "private.png")
    named = {"bytes": None, "path": str(tmp_path / "private.png")}
    dataset = {
        "images": foreign({"images": List(ImageFeature(decode=False))}, images=[[named]]),
        "image": foreign({"image": ImageFeature(decode=False)}, image=[named]),
        "plain text": foreign(images=[[named["path"]]]),
    }[kind]
    with pytest.raises(DataError, match=r"private.png' is a path, and no file that came with the data set"):
        standardise(dataset, "train")


def test_a_file_that_was_downloaded_with_a_foreign_data_set_is_its_image(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.download.DOWNLOADS", (tmp_path / "hub",))
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    Image.new("RGB", (30, 50)).save(tmp_path / "hub" / "blobs" / "0f", "PNG")
    (tmp_path / "hub" / "a.png").symlink_to(tmp_path / "hub" / "blobs" / "0f")  # as in the Hub's cache
    named = {"bytes": None, "path": str(tmp_path / "hub" / "a.png")}
    dataset = foreign({"image": ImageFeature(decode=False)}, image=[named])
    rows = standardise(dataset, "train")
    assert rows["image_sizes"] == [[[30, 50]]]
    (tmp_path / "hub" / "a.png").unlink()
    (tmp_path / "hub" / "a.png").symlink_to("/etc/hostname")
    with pytest.raises(DataError, match="is a path, and no file that came with the data set"):
        standardise(dataset.select([0]), "test")


def test_folds_hold_everything_but_test_and_join_again(demo_raw):
    source = Source(demo_raw / "annotations.json", demo_raw / "images")
    splits = prepare([source], folds=4, show_progress=False).splits
    assert list(splits) == ["fold_0", "fold_1", "fold_2", "fold_3", "test"]
    assert [len(splits[f"fold_{n}"]) for n in range(4)] == [9, 9, 9, 9]
    joined = join_folds(splits, 2)
    assert sorted(joined["train"]["id"]) == sorted(i for n in (0, 1, 3) for i in splits[f"fold_{n}"]["id"])
    assert joined["validation"]["id"] == splits["fold_2"]["id"]
    assert joined["test"]["id"] == splits["test"]["id"]
    with pytest.raises(ValueError, match="has the folds fold_0, fold_1, fold_2, fold_3, and the requested"):
        join_folds(splits, None)
    with pytest.raises(ValueError, match="has no folds, and the requested one is 1"):
        join_folds(joined, 1)


def test_given_splits_are_kept_and_validation_comes_out_of_train(write_records):
    records = [{"question": f"q{n}", "answer": "a b", "split": "test" if n < 10 else "train"} for n in range(50)]
    path, _ = write_records(records)
    prepared = prepare([Source(path)], show_progress=False)
    assert {name: len(split) for name, split in prepared.splits.items()} == {"train": 36, "validation": 4, "test": 10}
    assert {m[0]["content"] for m in prepared.splits["test"]["messages"]} == {f"q{n}" for n in range(10)}
    assert prepared.findings == []
    path, _ = write_records([{**records[0], "group": "p1"}, {**records[20], "group": "p1"}, *records[21:]])
    prepared = prepare([Source(path)], on_error="drop", show_progress=False)
    [leak] = [f for f in prepared.findings if f.kind == "leak"]
    assert leak.detail.startswith("is in train, and its group or picture in test (id ")
    assert [(error.record, error.sample_id) for error in prepared.errors] == [(1, leak.sample_id)]
    assert prepared.splits["test"]["group"] == ["p1"] and "p1" not in prepared.splits["train"]["group"]
    path, _ = write_records([{**records[0], "split": "tset"}])
    with pytest.raises(ValueError, match=r"field 'split': expected train, validation or test, found 'tset'"):
        prepare([Source(path)], show_progress=False)


def test_any_key_of_the_records_can_be_the_group(write_records):
    records = [{"question": f"q{n}", "answer": "a b", "patient": n % 10, "group": "all"} for n in range(50)]
    path, _ = write_records(records)
    splits = prepare([Source(path)], group_by="patient", show_progress=False).splits
    patients = [set(split["group"]) for split in splits.values()]
    assert [len(found) for found in patients] == [8, 1, 1]
    assert len(set.union(*patients)) == 10
    with pytest.raises(ValueError, match=r"group_by: no record of .*a\.json has 'patinet'; did you mean 'patient'\?"):
        prepare([Source(path)], group_by="patinet", show_progress=False)


def test_any_fact_can_keep_its_share(write_records):
    records = [
        {"question": f"q{n}", "answer": "a b", "label": f"l{n % 2}", "skin_type": "VI" if n < 20 else "I"}
        for n in range(100)
    ]
    path, _ = write_records(records)
    splits = prepare([Source(path)], stratify_by="skin_type", show_progress=False).splits
    assert [split["skin_type"].count("VI") for split in splits.values()] == [16, 2, 2]
    with pytest.raises(ValueError, match=r"stratify_by: expected one of label, skin_type, .*, found 'color'"):
        prepare([Source(path)], stratify_by="color", show_progress=False)
    with pytest.raises(ValueError, match="stratify_by: no sample has 'site', so that its shares cannot be kept"):
        prepare([Source(path)], stratify_by="site", show_progress=False)


@pytest.mark.parametrize(("folds", "filled"), [(7, 6), (100, 6)])
def test_more_folds_than_groups_are_refused(write_records, folds, filled):
    path, _ = write_records([{"question": f"q{n}", "answer": "a b", "group": f"g{n % 6}"} for n in range(60)])
    with pytest.raises(ValueError, match=f"folds: {folds} parts, of which only {filled} would have samples"):
        prepare([Source(path)], folds=folds, split=(0.9, 0.1, 0), show_progress=False)
    assert len(prepare([Source(path)], folds=6, split=(0.9, 0.1, 0), show_progress=False).splits) == 6


def test_an_option_for_one_source_is_refused_beside_a_list_of_them(write_records, tmp_path):
    path, images = write_records([flat("red.jpg")])
    sources = tmp_path / "s.yaml"
    sources.write_text(f"- {{data: {path}, images: {images}}}\n")
    for option, value in (("images", str(images)), ("mapping", "ham10000"), ("format", "flat")):
        with pytest.raises(
            ValueError, match=f"--{option}: has no effect beside --sources; write `{option}` into .*s.yaml"
        ):
            data_prep(["check", "--sources", str(sources), f"--{option}", value])


def test_convert_finds_out_before_it_writes_that_the_disk_is_too_small(write_records, tmp_path, monkeypatch):
    path, images = write_records([flat("red.jpg")])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match=r"--out: the images take [\d,]+ bytes, and .* has 100 left"):
        convert(path, images, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "images"}


def test_a_sample_without_a_split_follows_its_group_into_a_given_one(write_records):
    records = [{"question": f"q{n}", "answer": "a b", "group": f"g{n % 10}"} for n in range(40)]
    records[3]["split"] = "test"
    path, _ = write_records(records)
    splits = prepare([Source(path)], split=(1, 0, 0), show_progress=False).splits
    assert set(splits["test"]["group"]) == {"g3"} and len(splits["test"]) == 4


def test_images_embedded_in_a_data_set_carry_no_private_metadata(write_records, tmp_path):
    path, images = write_records([flat("red.jpg", id="a"), flat("gps.jpg", id="b")])
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "Dr Secret"
    exif.get_ifd(0x8825)[1] = "N"
    Image.effect_noise((64, 32), 60).convert("RGB").save(images / "gps.jpg", exif=exif, comment=b"patient Secret")
    convert(path, images, tmp_path / "out", "--split", "1", "0", "0")
    samples = {row["id"]: row["images"][0]["bytes"] for row in load_splits(str(tmp_path / "out"))["train"]}
    assert samples["a"] == (images / "red.jpg").read_bytes()
    assert b"Secret" not in samples["b"]
    assert load_image({"bytes": samples["b"]}).tobytes() == load_image(images / "gps.jpg").tobytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "images", "out"}


def test_more_workers_than_a_computer_can_start_are_refused(write_records):
    path, images = write_records([flat("red.jpg")])
    with pytest.raises(ValueError, match=r"num_workers: 100000 processes, at most \d+ on this computer"):
        prepare([Source(path, images)], num_workers=100_000)


def test_a_file_of_the_same_name_in_another_folder_is_not_taken(tmp_path):
    for name in (
        "orig/melanoma/0.png",
        "orig/melanoma/1.png",
        "orig/nevus/0.png",
        "crop/melanoma/1.png",
        "crop/nevus/0.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((60, 40), 90).save(tmp_path / name)
    options = {"split": (1, 0, 0), "show_progress": False, "on_error": "drop"}
    prepared = prepare([Source(tmp_path / "orig", tmp_path / "crop")], **options)
    assert len(prepared.splits["train"]) == 2
    [error] = prepared.errors
    assert "melanoma/0.png" in error.reason
    (tmp_path / "crop" / "part_1").mkdir()
    (tmp_path / "crop" / "melanoma" / "1.png").rename(
        tmp_path / "crop" / "part_1" / "1.png"
    )  # deeper or flat is found
    (tmp_path / "crop" / "nevus").rename(tmp_path / "crop" / "part_1" / "nevus")
    prepared = prepare([Source(tmp_path / "orig", tmp_path / "crop")], **options)
    assert sorted(prepared.splits["train"]["label"]) == ["nevus"]


def test_labels_that_a_minus_tells_apart_stay_apart(write_records):
    names = ["-1", "1", "\u22121", "ER-", "ER", "ER\u2013", "basal-cell", "basal cell", "- basal cell", "basal cell -"]
    path, _ = write_records(
        [{"question": f"{n}?", "answer": f"{n}: {label}", "label": label} for n, label in enumerate(names)]
    )
    train = prepare([Source(path)], **ALL_TRAIN).splits["train"]
    assert Counter(train["label"]) == {"-1": 2, "1": 1, "ER": 1, "ER-": 2, "- basal cell": 4}


def test_unread_keys_of_turns_are_named(write_records, caplog):
    turns = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "Acne.", "reasoning_content": "Red."},
    ]
    path, _ = write_records([{"messages": turns}, {"messages": [turns[0], {**turns[1], "reasoning_content": None}]}])
    prepare([Source(path)], **ALL_TRAIN)
    assert "the key 'messages[].reasoning_content' of 1 records is not read" in caplog.text
