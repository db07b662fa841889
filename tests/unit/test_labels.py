"""Which label an answer names, and the wording of answers that name a label."""

import pytest

from data_prep.labels import NONE, SEVERAL, build_label_map, named_labels, read_label
from evaluation.label_matching import answer_templates, asks_for_label

LABELS = ["nevus", "melanocytic nevus", "basal cell carcinoma", "melanoma"]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("This is a melanoma.", "melanoma"),
        ("MELANOMA", "melanoma"),
        ("A melanocytic nevus, I think.", "melanocytic nevus"),
        ("A nevus.", "nevus"),
        ("Basal-cell\ncarcinoma (BCC)", "basal cell carcinoma"),
        ("Nothing to see.", NONE),
        ("Micromelanomas", NONE),
        ("", NONE),
        ("Nevus or melanoma.", SEVERAL),
        ("melanocytic nevus, nevus", SEVERAL),
    ],
)
def test_an_answer_names_one_label_none_or_several(text, label):
    assert read_label(text, build_label_map(LABELS)) == label


def test_synonyms_and_regular_expressions_name_their_label():
    label_map = build_label_map(["nevus", "melanoma"], {"nevus": ["mole", "re:nev(us|i)"], "melanoma": [], "acne": []})
    assert read_label("Several moles? No: a Mole.", label_map) == "nevus"
    assert read_label("two nevi", label_map) == "nevus"
    assert named_labels("a mole near acne", label_map) == ["acne", "nevus"]


@pytest.mark.parametrize(
    ("labels", "synonyms", "message"),
    [
        ([], None, "no sample has a label"),
        (["nevus", "acne"], {"nevus": []}, "the data have the label 'acne', and the label map does not"),
        (["nevus"], {"nevus": ["re:("]}, r"'nevus': 're:\(' is not a regular expression"),
        (["nevus"], {"nevus": [" "]}, "an empty name"),
        (["nevus"], ["nevus"], "expected lines of the form"),
        (["nevus"], {"nevus": "mole"}, "expected lines of the form"),
    ],
)
def test_an_invalid_label_map_is_refused(labels, synonyms, message):
    with pytest.raises(ValueError, match=message):
        build_label_map(labels, synonyms)


def test_only_samples_whose_reference_names_their_label_are_diagnosed():
    label_map = build_label_map(LABELS)
    assert asks_for_label({"label": "nevus", "reference": "A nevus."}, label_map)
    assert not asks_for_label({"label": "nevus", "reference": "The skin is dark."}, label_map)
    assert not asks_for_label({"label": "nevus", "reference": "A nevus or a melanoma."}, label_map)
    assert not asks_for_label({"label": None, "reference": "A nevus."}, label_map)


def test_templates_are_the_most_frequent_wording_of_each_question():
    label_map = build_label_map(["eczema", "nevus"])
    samples = [
        {"question": "What?", "reference": "This is a nevus.", "label": "nevus"},
        {"question": "What?", "reference": "This is a nevus.", "label": "nevus"},
        {"question": "What?", "reference": "This is an eczema.", "label": "eczema"},
        {"question": "Name it.", "reference": "Eczema", "label": "eczema"},
    ]
    assert answer_templates(samples, label_map) == {
        "": "This is a {label}.",
        "What?": "This is a {label}.",
        "Name it.": "{label}",
    }
    assert answer_templates([], label_map) == {"": "{label}"}
