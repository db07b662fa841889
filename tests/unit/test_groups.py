"""One patient is one group, however and wherever the number is written; a text-only question is in one split."""

import json

import pytest

from data_prep.convert import prepare
from data_prep.groups import group_key, group_samples, is_no_group
from data_prep.sources import Source


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("5", "5.0", True),
        ("5", "005", True),
        ("5", "5.00", True),
        ("P 1", "p  1 ", True),
        ("Pe\u0301rez", "P\u00e9rez", True),
        ("\uff15", "5", True),
        ("12", "\u0661\u0662", True),  # Arabic
        ("P012", "p\u0966\u0967\u0968", True),  # Devanagari
        ("\u0661\u0662", "\u0661\u0663", False),
        ("x\u00b2", "x2", True),
        ("5", "5.1", False),
        ("5", "-5", False),
        ("0", "00", True),
        ("1.0.0", "1", False),
        ("P1", "P10", False),
        ("P\u200b1", "P1", True),
        ("P\u00ad1\ufeff", "p1", True),
        ("P\u20131", "P-1", True),
        ("P\u20111", "P-1", True),
        ("\u22125", "-5", True),
        ("P-1", "P1", False),
    ],
)
def test_spellings_of_one_group(one, other, same):
    assert (group_key(one) == group_key(other)) is same


def write(folder, name, groups, **more):
    rows = [{"question": f"{name} {n}?", "answer": "a b", "group": group, **more} for n, group in enumerate(groups)]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(rows))
    return Source(path)


def splits_by_group(prepared):
    found = {}
    for name, split in prepared.splits.items():
        for group in split["group"]:
            found.setdefault(group, set()).add(name)
    return found


def test_a_number_and_its_float_are_one_group_with_a_note(tmp_path):
    prepared = prepare(
        [write(tmp_path, "a", [n % 20 if n % 3 else float(n % 20) for n in range(80)])], show_progress=False
    )
    found = splits_by_group(prepared)
    assert len(found) == 20 and all(len(names) == 1 for names in found.values())
    notes = [finding.detail for finding in prepared.findings if finding.kind == "group spelling"]
    assert len(notes) == 20 and "written '5', '5.0', taken as '5'" in notes


def test_a_patient_of_two_sources_is_in_one_split(tmp_path):
    sources = [write(tmp_path, name, [f"P{n}" for n in range(30)]) for name in ("one", "two")]
    prepared = prepare(sources, show_progress=False)
    assert all(len(names) == 1 for names in splits_by_group(prepared).values())
    shared = [finding for finding in prepared.findings if finding.kind == "shared group"]
    assert len(shared) == 30
    assert shared[0].detail == "group 'P0' is in one.json and two.json, taken as one patient or lesion"


def test_a_repeated_text_only_question_is_in_one_split(tmp_path):
    path = tmp_path / "a.jsonl"
    questions = [f"{'What  is' if copy else 'what is'} condition {n}?" for n in range(30) for copy in range(3)]
    path.write_text("".join(json.dumps({"question": q, "answer": f"a {n}"}) + "\n" for n, q in enumerate(questions)))
    splits = prepare([Source(path)], show_progress=False).splits
    asked = [{m[0]["content"].split()[-1] for m in split["messages"]} for split in splits.values()]
    assert sum(map(len, asked)) == len(set.union(*asked)) == 30


def test_the_same_question_about_other_pictures_is_not_a_group():
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a"}]
    samples = [{"group": None, "images": [f"{n}.jpg"], "messages": messages} for n in range(3)]
    assert group_samples(samples, {f"{n}.jpg": f"{n}.jpg" for n in range(3)}) == [0, 1, 2]


def test_a_split_that_stays_empty_is_said(tmp_path, caplog):
    prepared = prepare([write(tmp_path, "a", [1] * 12)], show_progress=False)
    assert list(prepared.splits) == ["train"]
    assert "no sample is in validation and test: the samples are of 1 independent group(s)" in caplog.text


def test_a_share_must_be_a_number(tmp_path):
    with pytest.raises(ValueError, match="expected shares of train, validation and test that add up to 1"):
        prepare([write(tmp_path, "a", range(9))], split=(float("nan"), 0.5, 0.5), show_progress=False)


@pytest.mark.parametrize(
    "name", ["n.a.", "Not applicable", "ANONYMOUS", "Unbekannt", "<NA>", "unknown\u200b", "\u2013"]
)
def test_a_word_for_an_unknown_patient_is_no_group(name):
    assert is_no_group(name)


@pytest.mark.parametrize("name", ["1.23457E+11", "1,23E+05", "1.2345678901234567e+19"])
def test_a_number_that_lost_its_digits_is_reported(tmp_path, name):
    prepared = prepare(
        [write(tmp_path, "a", [name, name, "P2", "1e3", "5.5", "1E5"])], split=(1, 0, 0), show_progress=False
    )
    found = [(finding.detail, finding.others) for finding in prepared.findings if finding.kind == "rounded group"]
    detail = f"group {name!r} is a number that has lost its last digits, and may be of several patients"
    assert [text for text, _ in found] == [detail] and len(found[0][1]) == 1


def test_the_groups_that_are_too_few_are_those_without_a_given_split(tmp_path, caplog):
    given, free = write(tmp_path, "a", list("abcdef"), split="train"), write(tmp_path, "b", list("uvw"))
    prepare([given, free], show_progress=False)
    reason = "of 3 independent group(s), never divided, at most 3 of a label, and too few for such shares"
    assert f"no sample is in validation and test: the samples without a given split are {reason}" in caplog.text
