"""Which label an answer names, and the wording of answers that name a label."""

import random
from time import process_time

import pytest

from data_prep.inflection import find_changes
from data_prep.labels import (
    NONE,
    SEVERAL,
    build_label_map,
    describe_unread,
    merge_spellings,
    named_labels,
    read_label,
    references_of,
    unknown_labels,
)
from evaluation.label_matching import answer_templates, asks_for_label, label_forms

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
        (["nevus"], {"nevus": ["re:(?R)"]}, r"'nevus': 're:\(\?R\)' calls itself without an end"),
        (["nevus"], {"nevus": [" "]}, "labels: ' ', a name of 'nevus', has no letter or digit and would be found in"),
        (["nevus", "-"], None, "labels: '-', a label, has no letter or digit"),
        (["nevus"], ["nevus"], "expected lines of the form"),
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


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("黑色素瘤", "这是黑色素瘤。"),
        ("痣", "图中是痣。"),
        ("悪性黒色腫", "これは悪性黒色腫です。"),
        ("メラノーマ", "これはﾒﾗﾉｰﾏです。"),
        ("มะเร็งผิวหนัง", "นี่คือมะเร็งผิวหนัง"),
        ("melanoma", "这是ＭＥＬＡＮＯＭＡ。"),
        ("melanoma", "이것은 melanoma입니다."),
        ("melanoma", "**_Mela\u200bnoma_**"),
        ("Bowen's disease", "It is Bowen’s disease."),
        ("eczéma", "C’est de l’ecze\u0301ma."),
        ("ميلانوما", "هذه هي المِيلانوما."),
        ("ميلانوما", "مصاب بالميـــلانوما"),
        ("Kızıl", "KIZIL"),
        ("σπίλος", "ΕΙΝΑΙ ΣΠΙΛΟΣ."),
        ("melanoma.", "Melanoma is likely."),
        ("basal cell carcinoma", "basal\u2028cell—carcinoma"),
    ],
)
def test_a_label_is_found_in_any_script(label, text):
    assert read_label(text, build_label_map([label, "other"])) == label


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("no", "a nodule"),
        ("no", "a nodule, nonetheless"),
        ("nevus", "epinevus"),
        ("是", "不是。"),
        ("ใช่", "ไม่ใช่"),
        ("アク", "アクネ"),
        ("type 1", "type 12"),
        ("1型", "11型"),
        ("melanoma", "melanomas"),
        ("меланома", "меланомы"),
        ("점", "점도"),
    ],
)
def test_a_label_is_not_found_inside_another_word(label, text):
    assert read_label(text, build_label_map([label, "other"])) == NONE


INFLECTED = [
    # label, a reference of it, another reference, a text to read
    ("melanom", "Bu bir melanomdur.", "Bu bir sedef.", "Melanomdur."),
    ("Melanom", "Es besteht Melanomverdacht.", "Das ist Psoriasis.", "Melanomverdacht"),
    ("Krebs", "Es ist Hautkrebs.", "Das ist Psoriasis.", "Hautkrebs"),
    ("nevus", "There are two nevi.", "This is acne.", "Several nevi."),
    ("melanocytic nevus", "Melanocytic nevi.", "Acne.", "melanocytic\nnevi"),
    ("меланома", "Признаки меланомы.", "Это акне.", "Вижу признаки меланомы."),
    ("себорейный кератоз", "Признаки себорейного кератоза.", "Это акне.", "себорейного кератоза"),
    ("luomi", "Kuvassa on luomen raja.", "Tämä on akne.", "luomen"),
    ("흑색종", "이것은 흑색종입니다.", "여드름", "흑색종입니다"),
    ("מלנומה", "זו המלנומה.", "זה אקנה", "המלנומה"),
]


@pytest.mark.parametrize(("label", "reference", "other", "text"), INFLECTED)
def test_endings_and_compounds_are_learned_from_the_references(label, reference, other, text):
    references = [(label, (reference,)), ("other", (other,))]
    assert read_label(text, build_label_map([label, "other"])) == NONE
    assert read_label(text, build_label_map([label, "other"], None, references)) == label


def test_each_word_with_a_names_stem_is_compared_once():
    found = list(find_changes("xmelanomamelanoma, melanomas melanoma melanomes", ["melanoma"]))
    assert found == [("melanoma", change) for change in [("x", "", "melanoma"), ("", "", "s"), ("", "a", "es")]]
    assert not list(find_changes(f"melanoma{'x' * 41} {'x' * 41}melanoma", ["melanoma"]))


def test_an_ending_serves_all_labels_but_short_ones_only_where_it_was_seen():
    references = [("melanoma", ("Two melanomas.",)), ("wart", ("A wart.",)), ("no", ("No.",))]
    label_map = build_label_map(["melanoma", "wart", "no"], None, references)
    assert (read_label("warts", label_map), read_label("nos", label_map)) == ("wart", NONE)
    references = [("흑색종", ("흑색종입니다.",)), ("점", ("점입니다.",)), ("사마귀", ("사마귀",))]
    label_map = build_label_map(["흑색종", "점", "사마귀"], None, references)
    assert [read_label(text, label_map) for text in ("점입니다.", "사마귀입니다.", "점도")] == ["점", "사마귀", NONE]


def test_what_stands_at_other_labels_as_often_is_no_ending():
    references = [
        ("nevus", ("It was never treated.",)),
        ("acne", ("Acne that was never treated.",)),
        ("no", ("Only a nodule.",)),
        ("yes", ("Yes.",)),
    ]
    label_map = build_label_map(["nevus", "acne", "no", "yes"], None, references)
    assert named_labels("A nodule, never treated, with noduledule.", label_map) == []
    # an inflected form never takes another label's name
    references = [("dermatit", ("dermatitis", "Eine Dermatitis")), ("dermatitis", ("dermatitis",))]
    label_map = build_label_map(["dermatit", "dermatitis"], None, references)
    assert read_label("dermatitis", label_map) == "dermatitis"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("<think>melanoma?</think>A nevus.", "nevus"),
        ("melanoma or nevus?</think>\n\nA nevus.", "nevus"),
        ("<think>A nevus, I", NONE),
        ("<think>a</think><think>melanoma</think>nevus", "nevus"),
        ("<THINK>melanoma</Think>nevus", "nevus"),
        ("I think nevus", "nevus"),
        ("A nevus. <thinking>or melanoma", "nevus"),
    ],
)
def test_thoughts_are_no_diagnosis(text, label):
    assert read_label(text, build_label_map(LABELS)) == label


def test_labels_that_are_spelled_in_several_ways_are_one():
    labels = ["melanoma"] * 3 + [
        "Melanoma",
        "basal  cell",
        "basal cell",
        "basal cell",
        "ecze\u0301ma",
        "eczéma",
        None,
        "melanoma.",
    ]
    assert merge_spellings(labels) == {
        "melanoma": "melanoma",
        "Melanoma": "melanoma",
        "melanoma.": "melanoma",
        "basal  cell": "basal cell",
        "basal cell": "basal cell",
        "ecze\u0301ma": "ecze\u0301ma",
        "eczéma": "ecze\u0301ma",
    }
    assert merge_spellings(["nevus", "nevüs", "acne 1", "acne 2", "+", "-"]) == {}


def test_a_label_map_may_spell_labels_in_another_way():
    label_map = build_label_map(["Basal-cell", "是"], {"basal cell": ["BCC"], "是": ["有"]})
    assert list(label_map) == ["Basal-cell", "是"]
    assert (read_label("A bcc", label_map), read_label("有。", label_map), read_label("没有", label_map)) == (
        "Basal-cell", "是", NONE,
    )  # fmt: skip
    with pytest.raises(ValueError, match="the label map has 'bcc' more than once"):
        build_label_map(["BCC"], {"bcc": [], "Bcc": []})


def test_templates_keep_the_wording_of_the_reference():
    label_map = build_label_map(["melanoma", "黑色素瘤"])
    samples = [
        {"question": "a", "reference": "诊断：Ｍｅｌａｎｏｍａ！", "label": "melanoma"},
        {"question": "b", "reference": "<think>黑色素瘤?</think>这是黑色素瘤。", "label": "黑色素瘤"},
    ]
    templates = answer_templates(samples, label_map)
    assert (templates["a"], templates["b"]) == ("诊断：{label}！", "这是{label}。")


def test_a_warning_shows_the_first_references_that_name_no_label():
    turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes"}]
    samples = [{"label": "melanoma", "messages": turns}] * 3 + [{"label": None, "messages": turns}]
    references = [*references_of(samples), ("nevus", ("The skin is light.", "A nevus."))]
    warning = describe_unread(references, build_label_map(["melanoma", "nevus"]))
    assert "only 1 of 4 labelled samples" in warning and "'Yes', 'Yes', 'Yes'" in warning and "--labels" in warning
    assert describe_unread(references[2:], build_label_map(["melanoma", "nevus"])) is None  # half
    with_names = build_label_map(["melanoma", "nevus"], {"melanoma": ["yes"], "nevus": []})
    assert describe_unread(references, with_names) is None


def test_candidates_name_each_label_in_the_form_of_its_answers():
    references = {"melanom": "Bu bir Melanomdur.", "sedef": "Bu bir sedeftir.", "akne": "Bu bir akne."}
    label_map = build_label_map(references, None, [(label, (text,)) for label, text in references.items()])
    samples = [{"question": "?", "reference": text, "label": label} for label, text in references.items()]
    forms = label_forms(samples, label_map)
    assert [forms["?", label] for label in references] == ["Melanomdur", "sedeftir", "akne"]
    assert answer_templates(samples, label_map) == {"": "Bu bir {label}.", "?": "Bu bir {label}."}
    yes = build_label_map(["melanoma", "nevus"], {"melanoma": ["yes"], "nevus": ["no"]})
    samples = [{"question": "Malignant?", "reference": "Yes.", "label": "melanoma"}]
    assert label_forms(samples, yes) == {("Malignant?", "melanoma"): "Yes", (None, "melanoma"): "Yes"}


def test_a_label_map_takes_one_name_without_brackets():
    label_map = build_label_map(["nevus", "acne"], {"nevus": "mole", "acne": ["re:spots?", 5]})
    assert [read_label(text, label_map) for text in ("a mole", "spots", "a 5", "nevus")] == [
        *("nevus", "acne", "acne", "nevus")
    ]


@pytest.mark.parametrize(
    ("synonyms", "reason"),
    [
        (["nevus"], "expected lines of the form 'label: [name, another name]', found a list"),
        ({"nevus": {"a": "b"}}, "'nevus': expected a list of names, found an object with the keys ['a']"),
        ({"nevus": ["a", None]}, "'nevus': expected a list of names, found null"),
        ({"nevus": ["re:"]}, "'nevus': expected a list of names, found a text 're:'"),
        ({"nevus": True}, "'nevus': expected a list of names, found a truth value True"),
        ({"nevus": ["mole"], "acne": ["pimple", " Mole"]}, "' Mole' is a name of 'nevus' and of 'acne'"),
        ({"nevus": ["re:m.+"], "acne": ["re:m.+"]}, "'re:m.+' is a name of 'nevus' and of 'acne'"),
        ({"nevus": ["acne"], "acne": []}, "'acne' is a name of 'nevus' and of 'acne'"),
        ({"nevsu": ["a"]}, "the data have the label 'nevus', and the label map does not; did you mean 'nevsu'?"),
    ],
)
def test_a_wrong_label_map_is_refused_with_its_label(synonyms, reason):
    with pytest.raises(ValueError) as error:
        build_label_map(["nevus"], synonyms)
    assert str(error.value) == f"labels: {reason}"


def test_labels_of_a_map_that_no_sample_has_are_listed():
    found = unknown_labels({"Nevus": [], "melonoma": [], "zzz": []}, ["nevus", "melanoma"])
    assert found == ["'melonoma'; did you mean 'melanoma'?", "'zzz'"]


def test_names_inside_longer_ones_do_not_count_wherever_they_stand():
    rng, labels = random.Random(0), ["a", "b", "a b", "b a", "a b a", "b b"]
    label_map = build_label_map(labels)
    for _ in range(300):
        text = " ".join(rng.choices("abc", k=rng.randint(1, 9)))
        spans = [(*m.span(), label) for label in labels for m in label_map[label][0].finditer(text)]
        inside = {one for one in spans for a, b, _ in spans if a <= one[0] and one[1] <= b and b - a > one[1] - one[0]}
        assert set(named_labels(text, label_map)) == {label for *_, label in {*spans} - inside}


@pytest.mark.scale
@pytest.mark.parametrize("name", ["melanoma", "黑色素瘤", "ميلانوما"])
@pytest.mark.parametrize("form", ["{} ", "{}x ", "{}x"])
def test_reading_takes_time_in_proportion_to_the_answers_length(name, form):
    """Answers that repeat a name, as those of a model that has learnt little, as names, as words and as one word."""

    def seconds(count):
        answers = [form.format(name) * count + str(number) for number in range(4)]
        start = process_time()
        label_map = build_label_map([name, "acne"], references=[(name, (text,)) for text in answers])
        assert {read_label(text, label_map) for text in answers} <= {name, NONE}
        label_forms([{"label": name, "question": "", "reference": f"{name} {answers[0]}"}], label_map)
        return process_time() - start

    short, long = (min(seconds(count) for _ in range(3)) for count in (250, 4000))
    assert long < 64 * short  # 16 times the length; in proportion to its square it would be 256
