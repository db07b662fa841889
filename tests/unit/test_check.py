"""Every planted fault is found, clean images are left in peace, and no planted group crosses splits."""

import json
import struct
import zlib
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main as data_prep
from data_prep.check import (
    ERRORS,
    WARNINGS,
    Finding,
    check_answers,
    check_copies,
    check_labels,
    check_leaks,
    check_texts,
    count_findings,
    flawed_samples,
    has_errors,
)
from data_prep.convert import InvalidRecordsError, prepare
from data_prep.labels import build_label_map
from data_prep.sources import Source
from data_prep.split import assign_splits
from helpers.planted import PlantedSet


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return PlantedSet(tmp_path_factory.mktemp("planted"), count=3000, each=10)


@pytest.fixture(scope="module")
def prepared(planted):
    source = Source(planted.folder / "a.json", planted.images)
    return prepare([source], on_error="drop", show_progress=False)


def found_ids(findings, kind):
    return {name for f in findings if f.kind == kind for name in (f.sample_id, *f.others)}


@pytest.mark.parametrize(
    "kind",
    [
        "exact copy",
        "near copy",
        "turned",
        "private",
        "contradiction",
        "giveaway",
        "tiny",
        "short answer",
        "long answer",
    ],
)
def test_every_planted_fault_is_found_and_nothing_else(planted, prepared, kind):
    found = found_ids(prepared.findings, kind)
    assert planted.planted[kind] <= found
    touched = set().union(*planted.planted.values())
    assert len((found & set(planted.clean)) - touched) <= 0.01 * len(planted.clean)


def test_every_unusable_record_is_refused_with_its_reason(planted, prepared):
    assert found_ids(prepared.findings, "unusable") == planted.bad
    dropped = planted.bad.union(*(found_ids(prepared.findings, kind) for kind in ERRORS))
    assert {error.sample_id for error in prepared.errors} == dropped
    kept = {name for split in prepared.splits.values() for name in split["id"]}
    assert kept == {record["id"] for record in planted.records} - dropped


def test_an_error_is_the_same_for_convert_check_and_drop(planted, prepared):
    source = Source(planted.folder / "a.json", planted.images)
    with pytest.raises(InvalidRecordsError) as failure:
        prepare([source], show_progress=False)
    assert [error.sample_id for error in failure.value.errors] == [error.sample_id for error in prepared.errors]
    first = f"{len(prepared.errors)} of {len(planted.records)} records have an error; `python -m data_prep convert"
    assert str(failure.value).startswith(first)


def links(planted, kept):
    """Return what must stay together: the ids of each lesion, and of each picture with its copies."""
    together = defaultdict(set)
    for record in planted.records:
        if record["id"] not in kept:
            continue
        if "group" in record:
            together[record["group"]].add(record["id"])
        picture = record["image"].rsplit("-", 1)[-1][:5]
        together["picture", "tiny" in record["image"], picture].add(record["id"])
    return list(together.values())


@pytest.mark.parametrize("seed", range(20))
def test_no_planted_group_crosses_splits(planted, prepared, seed):
    ids, groups = list(prepared.groups), list(prepared.groups.values())
    labels = {record["id"]: record["label"] for record in planted.records}
    splits = assign_splits(ids, (0.8, 0.1, 0.1), seed=seed, groups=groups, labels=[labels[name] for name in ids])
    split_of = dict(zip(ids, splits, strict=True))
    for together in links(planted, split_of):
        assert len({split_of[name] for name in together}) == 1


def sample(question, answer, label):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"record": 0, "id": "x", "origin": "a.json", "label": label, "messages": messages}


def test_a_question_may_offer_labels_but_not_name_the_right_one_alone():
    other = sample("What?", "Acne.", "acne")
    choice = sample("Is it acne or melanoma?", "It is melanoma.", "melanoma")
    given = sample("Is it melanoma?", "Yes, melanoma.", "melanoma")
    part = sample("Nodular melanoma?", "Nodular melanoma it is.", "nodular melanoma")
    denied = sample("Is it melanoma?", "No, acne.", "acne")
    label_map = build_label_map(["acne", "melanoma", "nodular melanoma"])
    kinds = [[f.kind for f in check_texts([s, other], label_map)] for s in (choice, given, part, denied)]
    assert [("giveaway" in kind) for kind in kinds] == [False, True, True, False]


def test_findings_count_in_order_and_errors_are_told_from_notes():
    findings = [Finding("turned", ""), Finding("unusable", ""), Finding("turned", "")]
    assert list(count_findings(findings).items()) == [("unusable", 1), ("turned", 2)]
    assert has_errors(findings) and not has_errors(findings[::2])
    assert "leak" in ERRORS


def test_a_finding_says_where_it_is():
    finding = Finding("near copy", "same as b.jpg", 7, "r7", "a.json", "a.jpg", ("r9",))
    assert str(finding) == "a.json, record 7 (id 'r7'), a.jpg: same as b.jpg (also r9)"
    assert str(Finding("rare label", "'x' has 1 group(s), none in test")) == "'x' has 1 group(s), none in test"


def test_the_check_command_guards_a_pipeline(planted, write_records, capsys):
    source = ["--annotations", str(planted.folder / "a.json"), "--images", str(planted.images)]
    assert data_prep(["check", *source]) == 1
    out = capsys.readouterr().out
    assert "records that cannot be used: 140" in out and "... and 130 more" in out
    assert "the same pictures and question under different labels: 10" in out
    path, images = write_records([{"image": "red.jpg", "question": "What?", "answer": "A nevus."}])
    assert data_prep(["check", "--annotations", str(path), "--images", str(images)]) == 0


def pair(name, images, label, asks="what?", split=None):
    return {"record": 0, "id": name, "origin": "a.json", "images": images, "files": images, "label": label,
            "asks": asks, "split": split}  # fmt: skip


@pytest.mark.parametrize(
    ("second", "contradicting"),
    [
        (pair("b", ["2.jpg", "3.jpg"], "nevus"), []),  # shares one picture of two
        (pair("b", ["1.jpg"], "nevus"), []),
        (pair("b", ["1.jpg", "2.jpg"], "nevus", asks="where?"), []),
        (pair("b", ["1.jpg", "2.jpg"], "acne"), []),
        (pair("b", ["2.jpg", "1.jpg"], "nevus"), [("a", ("b",), "acne and nevus")]),
    ],
)
def test_a_label_belongs_to_all_pictures_and_the_question(second, contradicting):
    findings = check_labels(
        [pair("a", ["1.jpg", "2.jpg"], "acne"), second], {f"{n}.jpg": f"{n}.jpg" for n in (1, 2, 3)}
    )
    assert [(f.sample_id, f.others, f.detail) for f in findings] == contradicting


def test_of_a_leak_the_last_split_keeps_its_samples():
    splits = ["train", "test", "train", "validation", "train", None]
    samples = [pair(name, [], None) for name in "abcdef"]
    findings = check_leaks(samples, [0, 0, 0, 0, 1, 0], splits)
    assert [(f.sample_id, f.others) for f in findings] == [("a", ("c",)), ("d", ())]
    assert findings[0].detail == "is in train, and its group or picture in test (id 'b')"
    assert set(flawed_samples(findings)) == {"a", "c", "d"}


def test_a_copy_is_reported_with_its_position_in_a_record_of_several_images():
    samples = [pair("a", ["1.jpg", "2.jpg"], "acne"), pair("b", ["3.jpg"], "acne")]
    [finding] = check_copies(samples, [["2.jpg", "3.jpg"]], [])
    assert (finding.file, finding.detail) == ("2.jpg", "same as 3.jpg")
    assert (finding.sample_id, finding.others, finding.images) == ("a", ("b",), (1, 0))


def write_deep_png(path, value):
    """Write a colour image of 16 bits, which Pillow cannot."""
    rows = (b"\0" + value.to_bytes(2, "big") * 3 * 60) * 60
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", 60, 60, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    chunks = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def test_shallow_and_dark_images_are_found(tmp_path):
    write_deep_png(tmp_path / "colour.png", 4095)
    deep = np.linspace(0, 4000, 3600, dtype=np.uint16).reshape(60, 60)
    Image.fromarray(deep).save(tmp_path / "twelve.png")
    Image.effect_noise((60, 60), 3).point(lambda value: value // 16).save(tmp_path / "black.png")
    Image.effect_noise((60, 60), 60).save(tmp_path / "fine.png")
    names = ("twelve.png", "black.png", "fine.png", "colour.png")
    records = [{"image": name, "question": "q", "answer": "a b"} for name in names]
    (tmp_path / "a.json").write_text(json.dumps(records))
    prepared = prepare([Source(tmp_path / "a.json", tmp_path)], show_progress=False, num_workers=1)
    found = {(finding.kind, finding.file, finding.detail) for finding in prepared.findings if finding.kind in WARNINGS}
    assert found == {
        ("bit depth", "twelve.png", "values of 12 bits"),
        ("dark", "black.png", "brightest value 8 of 255"),
        ("dark", "colour.png", "brightest value 15 of 255"),
    }


@pytest.mark.parametrize(
    ("answers", "detail"),
    [
        (["This is melanoma."], "label 'nevus', and the answer is 'This is melanoma.'"),
        (["It is round.", "Most likely MELANOMA"], "label 'nevus', and the answer is 'Most likely MELANOMA'"),
        (["This is nevus."], None),
        (["Not melanoma but nevus."], None),
        (["It is melanoma.", "No, it is nevus."], None),
        (["Melanoma or acne."], None),
        (["It is round."], None),
    ],
)
def test_an_answer_that_names_another_label_than_the_samples_is_reported(answers, detail):
    sample = {"record": 4, "id": "x", "origin": "a.json", "label": "nevus"}
    label_map = build_label_map(["nevus", "melanoma", "acne"])
    found = check_answers([sample], [("nevus", tuple(answers))], label_map)
    assert [(one.kind, one.sample_id, one.detail) for one in found] == (
        [("other label", "x", detail)] if detail else []
    )


def test_contradicted_labels_are_counted_and_the_first_are_shown(tmp_path, capsys):
    rows = [{"id": f"r{n}", "question": f"{n}?", "answer": "It is melanoma.", "label": "melanoma"} for n in range(20)]
    for row in rows[:5]:
        row["label"] = "nevus"
    (tmp_path / "a.json").write_text(json.dumps(rows))
    data_prep(["convert", "--annotations", str(tmp_path / "a.json"), "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "found            5 samples whose answers name another label and not their own" in shown
    lines = [line for line in shown.splitlines() if "label 'nevus', and the answer is" in line]
    assert lines[0] == (
        "WARNING    a.json, record 0 (id 'r0'): label 'nevus', and the answer is 'It is melanoma.' (1 of 5 such)"
    )
    assert len(lines) == 3


def test_samples_that_repeat_others_are_reported_once(tmp_path):
    rows = [{"id": f"r{n}", "question": f"{n % 3}?", "answer": f"It is {n % 6}."} for n in range(15)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = prepare([Source(tmp_path / "a.json")], show_progress=False, split=(1, 0, 0)).findings
    repeats = [(one.sample_id, one.detail, one.others) for one in found if one.kind == "repeated"]
    assert repeats[0] == ("r0", "3 times", ("r6", "r12")) and len(repeats) == 6


def test_given_splits_are_the_reason_when_another_is_empty(tmp_path, caplog):
    rows = [{"id": f"r{n}", "question": f"{n}?", "answer": "It is.", "split": "test"} for n in range(9)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    prepare([Source(tmp_path / "a.json")], show_progress=False)
    assert (
        "no sample is in train and validation: every record names its split, and such splits are kept" in caplog.text
    )


@pytest.mark.parametrize(
    "text", ["nan", "NaN", "<NA>", "NULL", "undefined", "[object Object]", "\\N", "#NAME?", "nan."]
)
def test_a_programs_word_for_a_missing_value_is_reported(write_records, text):
    sound = {"question": "What?", "answer": "No nanometre, None.", "label": "None"}
    path, _ = write_records([{**sound, "answer": text}, {**sound, "label": text}, sound, {**sound, "answer": "None."}])
    findings = prepare([Source(path)], split=(1, 0, 0), show_progress=False).findings
    found = [(finding.record, finding.detail) for finding in findings if finding.kind == "placeholder"]
    assert found == [(0, repr(text)), (1, repr(text))]


@pytest.mark.parametrize(
    ("age", "odd"),
    [
        *((0, False), (120, False), ("54,5", False), ("40-50", False), ("85+", False), ("60s", False)),
        *((-3, True), (121, True), ("500", True), ("nan", True), ("1956-03-12", True), ("12.3.1956", True)),
        ("04:00:00", True),
    ],
)
def test_an_age_that_is_none_is_reported(write_records, age, odd):
    path, _ = write_records([{"question": "What?", "answer": "A mole.", "age": age}])
    findings = prepare([Source(path)], split=(1, 0, 0), show_progress=False).findings
    assert [finding.detail for finding in findings if finding.kind == "odd age"] == [f"age '{age}'"] * odd
