"""A patient, an image or a split under a key that is not read is an error or a finding, never passed over."""

import json

import pytest

from data_prep import load_splits
from data_prep.__main__ import main as data_prep
from data_prep.convert import InvalidRecordsError, prepare
from data_prep.sources import Source
from data_prep.unread import find_group_key, meant_key


def text_rows(count, start=0, **more):
    return [{"id": f"r{n}", "question": f"{n}?", "answer": "a b", **more} for n in range(start, start + count)]


def write(folder, rows, name="a.json"):
    (folder / name).write_text(json.dumps(rows))
    return Source(folder / name)


def reasons(source, **options):
    with pytest.raises(InvalidRecordsError) as error:
        prepare([source] if isinstance(source, Source) else source, show_progress=False, **options)
    return [(found.record, found.reason) for found in error.value.errors]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        *(
            (key, "group")
            for key in ("patient", "patient_id", "Lesion ID", "case", "subject-id", "PatientID", "patients")
        ),
        *((key, "label") for key in ("dx", "diagnosis", "Disease", "class_name")),
        *(("gender", "sex"), ("localization", "site"), ("fold", "split"), ("fitzpatrick_skin_type", "skin_type")),
        *((key, None) for key in ("note", "patient_age", "lesion_size", "caseload", "casein")),
    ],
)
def test_what_other_keys_mean(key, meant):
    assert meant_key(key) == meant
    assert find_group_key({"a": 1, key: "x"}, {"a"}) == (key if meant == "group" else None)


@pytest.mark.parametrize("key", ["patient", "lesion_id", "Subject"])
def test_a_group_under_another_key_in_some_records_is_an_error(tmp_path, key):
    rows = [*text_rows(3, group="p1"), *text_rows(2, start=3, **{key: "p1"}), *text_rows(1, start=5)]
    found = reasons(write(tmp_path, rows))
    assert [record for record, _ in found] == [3, 4]
    assert found[0][1] == (
        f"field '{key}': names a patient or lesion and is not read, while other records have a group: use 'group' in "
        "all records, or --group-by with one key that all have"
    )


def test_a_group_under_another_key_than_that_of_group_by_is_an_error_too(tmp_path):
    rows = [*text_rows(3, patient_id="p1"), *text_rows(1, start=3, group="p1"), *text_rows(1, start=4, patient="p1")]
    found = reasons(write(tmp_path, rows), group_by="patient_id")
    assert [reason.split(":")[0] for _, reason in found] == ["field 'group'", "field 'patient'"]


def test_one_source_with_groups_and_one_with_other_keys_do_not_mix(tmp_path):
    first = write(tmp_path, text_rows(3, group="p1"))
    second = write(tmp_path, text_rows(2, start=3, patient_id="p1"), "b.json")
    assert [record for record, _ in reasons([first, second])] == [0, 1]


def test_samples_without_a_group_beside_others_are_counted_and_shown(tmp_path, capsys):
    rows = [*text_rows(40, group="p"), *text_rows(8, start=40, group="q"), *text_rows(20, start=48)]
    source = write(tmp_path, rows)
    (found,) = [one for one in prepare([source], show_progress=False).findings if one.kind == "ungrouped"]
    line = "20 of 68 samples have no group, and may be of patients in other splits"
    assert (found.sample_id, found.detail, len(found.others)) == ("r48", line, 19)
    data_prep(["convert", "--annotations", str(source.data), "--out", str(tmp_path / "out")])
    shown = f"WARNING    a.json, record 48 (id 'r48'): {line} (also r49, r50, r51, r52, r53, ...)"
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("rows", [text_rows(9), text_rows(9, group="p1")], ids=["no groups", "all groups"])
def test_nothing_is_said_where_all_samples_are_alike(tmp_path, rows):
    found = prepare([write(tmp_path, rows)], show_progress=False, split=(1, 0, 0)).findings
    assert not [one for one in found if one.kind == "ungrouped"]


def test_a_table_with_a_patient_that_its_mapping_does_not_read_is_refused_beside_groups(tmp_path):
    (tmp_path / "m.yaml").write_text("images: ['{file}']\nquestions: What?\nanswer: A b.\ngroup: lesion\n")
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "t.csv").write_text("file,lesion,patient_id\n1.png,l1,p1\n1.png,,p1\n1.png,,\n")
    with pytest.raises(InvalidRecordsError) as error:
        prepare([Source(tmp_path / "t.csv", tmp_path, str(tmp_path / "m.yaml"))], show_progress=False)
    found = [one.reason for one in error.value.errors if one.record == 1]
    assert found[0].startswith("field 'patient_id': names a patient or lesion and is not read")


def test_keys_that_mean_another_are_named_first(tmp_path, caplog):
    more = dict.fromkeys((f"k{n}" for n in range(9)), "x") | {"patient": "p1", "dx": "nevus"}
    prepare([write(tmp_path, text_rows(9, **more))], show_progress=False)
    assert "the key 'patient' of 9 records is not read; use 'group'" in caplog.text
    assert "the key 'dx' of 9 records is not read; use 'label'" in caplog.text


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"followup": "green"}, "'followup' names the image file 'green', which is not read; name it under 'images'"),
        ({"pair": {"second": "./green"}}, "'pair' names the image file './green'"),
        ({"original": "green.png"}, "'original' names the image file 'green.png'"),
        ({"question": "Is it as in green.png?"}, "\"the user's text\" names the image file 'green.png'"),
    ],
)
def test_a_file_of_the_image_folder_that_is_named_anywhere_is_not_lost(write_records, more, reason):
    path, images = write_records([{"image": "red.jpg", "question": "a", "answer": "b", **more}])
    (images / "green").write_bytes((images / "green.png").read_bytes())
    ((record, found),) = reasons(Source(path, images))
    assert record == 0 and reason in found


def test_the_image_itself_may_be_named_in_a_question_and_under_other_keys(write_records):
    more = {"file": "images/red.jpg", "note": "\0" + "x" * 5000, "question": "Is red.jpg like gone.png?"}
    path, images = write_records([{"image": "red.jpg", "answer": "b", **more}])
    assert len(prepare([Source(path, images)], show_progress=False, num_workers=1).splits["train"]) == 1


def test_every_unknown_split_is_reported_before_images_are_decoded(write_records, tmp_path):
    rows = [{"id": f"r{n}", "image": "gone.png", "question": "a", "answer": "b"} for n in range(1)]
    rows += text_rows(1, start=1, split="trian") + text_rows(1, start=2, split="holdout") + text_rows(1, start=3)
    path, images = write_records(rows)
    found = dict(reasons(Source(path, images)))
    expected = "field 'split': expected train, validation or test, found"
    assert found[1] == f"{expected} 'trian'; did you mean 'train'?"
    assert found[2] == f"{expected} 'holdout'" and "gone.png" in found[0]
    kept = prepare([Source(path, images)], on_error="drop", show_progress=False, split=(1, 0, 0)).splits
    assert kept["train"]["id"] == ["r3"]


@pytest.mark.parametrize(
    ("written", "split"),
    [("Val", "validation"), (" dev ", "validation"), ("VALID", "validation"), ("testing", "test")],
)
def test_usual_names_of_splits_are_known(tmp_path, written, split):
    rows = [*text_rows(3, split="training"), *text_rows(1, start=3, split=written)]
    assert prepare([write(tmp_path, rows)], show_progress=False).splits[split]["id"] == ["r3"]


def test_the_sources_of_one_name_are_named_with_the_remedy(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    sources = [write(tmp_path / "one", text_rows(9)), write(tmp_path, [{}], "b.json")]
    sources += [write(tmp_path / "two", text_rows(9, start=9))]
    places = f"source 0 ({sources[0].data}) and source 2 ({sources[2].data})"
    with pytest.raises(ValueError) as error:
        prepare(sources, show_progress=False)
    assert str(error.value) == f"sources: {places} have the name 'a'; give each a `name` of its own"
    (tmp_path / "s.yaml").write_text("- {data: one/a.json, name: first}\n- {data: two/a.json, name: second}\n")
    data_prep(["convert", "--sources", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out")])
    names = [name for split in load_splits(str(tmp_path / "out")).values() for name in split["source"]]
    assert sorted(names) == ["first"] * 9 + ["second"] * 9


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"data": "gone.json"}, "annotations: no file"),
        ({"data": "a.json", "mapping": "hamm"}, "mapping: no file hamm"),
    ],
)
def test_an_error_of_one_of_several_sources_has_its_number(tmp_path, second, reason):
    sources = [write(tmp_path, text_rows(3), "b.json"), Source(tmp_path / second.pop("data"), **second)]
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^source 1 \({sources[1].data}\): {reason}"):
        prepare(sources, show_progress=False)


def test_a_label_file_is_named_when_it_is_wrong_and_typing_errors_in_it_are_shown(tmp_path, caplog):
    rows = [{**row, "label": "nevus", "answer": "A mole."} for row in text_rows(9)]
    source, labels = write(tmp_path, rows), tmp_path / "labels.yaml"
    words = ["check", "--annotations", str(source.data), "--labels", str(labels)]
    labels.write_text("nevus: mole\nnevuss: mole 2\n")
    assert data_prep(words) == 0
    assert "labels of the label map that no sample has: 'nevuss'; did you mean 'nevus'?" in caplog.text
    labels.write_text("nevus: {a: mole}\n")
    with pytest.raises(ValueError, match=rf"^--labels: {labels}: 'nevus': expected a list of names, found an object"):
        data_prep(words)


def test_groups_of_unknown_patients_are_none(tmp_path):
    rows = [*text_rows(30, group="p"), *text_rows(9, start=30, group="Unknown"), *text_rows(1, start=39, group="N/A")]
    found = prepare([write(tmp_path, rows)], show_progress=False).findings
    (one,) = [one for one in found if one.kind == "ungrouped"]
    assert one.detail.startswith("10 of 40 samples have no group")


def test_a_patient_inside_another_object_is_found(tmp_path, caplog):
    hidden = text_rows(3, start=3, metadata={"patient_id": "p1", "note": "x", "gender": ""})
    prepare([write(tmp_path, hidden)], show_progress=False)
    assert "the key 'metadata.patient_id' of 3 records is not read; use 'group'" in caplog.text
    found = reasons(write(tmp_path, [*text_rows(3, group="p1"), *hidden]))
    assert [(record, reason[:32]) for record, reason in found] == [
        (n, "field 'metadata.patient_id': nam") for n in (3, 4, 5)
    ]
