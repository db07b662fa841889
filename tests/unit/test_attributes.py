"""Skin types, sexes and sites that are written in several ways are one subgroup, and that is said."""

import pytest

from data_prep.attributes import attribute_key
from data_prep.check import KINDS
from data_prep.convert import prepare
from data_prep.sources import Source


@pytest.mark.parametrize(
    ("name", "alike", "other"),
    [
        (
            "skin_type",
            ["IV", "4", "4.0", "iv", "Type IV", "Fitzpatrick type 4", "FST IV", "phototype-IV", "skin_type_4"],
            "V",
        ),
        ("skin_type", ["VI", "6", "vi"], "V"),
        ("skin_type", ["brown", "Brown "], "black"),
        ("sex", ["m", "M", "male", "Male", "man"], "female"),
        ("sex", ["F", "female", "Woman"], "m"),
        ("site", ["Lower leg", "lower_leg"], "leg"),
    ],
)
def test_spellings_share_a_key(name, alike, other):
    assert len({attribute_key(name, text) for text in alike}) == 1
    assert attribute_key(name, other) != attribute_key(name, alike[0])


def test_samples_get_the_most_frequent_spelling_and_a_finding_says_so(write_records):
    kinds, sexes = ["IV", "4.0", "IV", "type iv", "II"], ["m", "male", "male", None, "female"]
    records = [
        {"question": f"What is number {n}?", "answer": "A nevus.", "skin_type": kind, "sex": sex}
        for n, (kind, sex) in enumerate(zip(kinds, sexes, strict=True))
    ]
    path, _ = write_records(records)
    prepared = prepare([Source(path)], split=(1, 0, 0), show_progress=False)
    train = prepared.splits["train"]
    assert sorted(train["skin_type"]) == ["II", "IV", "IV", "IV", "IV"]
    assert sorted(map(str, train["sex"])) == ["None", "female", "male", "male", "male"]
    found = sorted(finding.detail for finding in prepared.findings if finding.kind == "attribute spelling")
    assert found == [
        "'sex male': 'm' 1 times, 'male' 2 times",
        "'skin_type IV': 'IV' 2 times, '4.0' 1 times, 'type iv' 1 times",
    ]
    assert "taken as one" in KINDS["attribute spelling"]
