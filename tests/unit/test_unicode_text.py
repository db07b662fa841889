"""Text of any script: one form for what looks alike, words, and where a normalised name stands in the text."""

import pytest

from common.files import read_json_lines
from common.unicode_text import normalise, original_span, space_characters, split_words


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Bowen’s", "Bowen's"),
        ("ECZE\u0301MA", "eczéma"),
        ("ｍｅｌａｎｏｍａ", "melanoma"),
        ("mela\u200bno\u00adma", "melanoma"),
        ("Groß", "GROSS"),
        ("KIZIL", "Kızıl"),
        ("İLTİHAP", "iltihap"),
        ("ميلانوما", "مِيلَانُومَا"),
        ("أكزيمة", "اكـزيمه"),
        ("שַׁחֶמֶת", "שחמת"),
        ("ﾒﾗﾉｰﾏ", "メラノーマ"),
        ("чёрный", "ЧЕРНЫЙ"),
        ("μελάνωμα", "ΜΕΛΑΝΩΜΑ"),
        ("σπίλος", "ΣΠΙΛΟΣ"),
        ("\u0390", "\u03aa"),
        ("Ⅱ", "ii"),
    ],
)
def test_what_looks_alike_has_one_form(left, right):
    assert normalise(left) == normalise(right)


@pytest.mark.parametrize(
    ("left", "right"), [("nevus", "nevüs"), ("痣", "痔"), ("eczéma", "eczema"), ("점", "종"), ("mole", "moles")]
)
def test_other_words_stay_apart(left, right):
    assert normalise(left) != normalise(right)


def test_words_are_characters_where_a_script_has_no_spaces():
    assert split_words("This isn't Acne_2.") == ["this", "isn", "t", "acne", "2"]
    assert split_words("这是melanoma。") == ["这", "是", "melanoma"]
    assert split_words("이것은 점입니다") == ["이것은", "점입니다"]
    assert space_characters("It’s melanoma.") == "It’s melanoma."
    assert space_characters("痣。").split() == ["痣", "。"]


@pytest.mark.parametrize("name", ["ｍｅｌａｎｏｍａ", "Straße", "e\u0301", "ﾒﾗﾉｰﾏ", "ميـلانوما"])
def test_a_span_of_the_normalised_text_is_found_in_the_text(name):
    text = f"诊断：{name}！"
    start = normalise(text).index(normalise(name))
    assert text[slice(*original_span(text, start, start + len(normalise(name))))] == name


def test_lines_end_at_newlines_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x\u2028y\u0085z\x0c"}\n{"a": 1}\n'.replace("\x0c", "\\f"), encoding="utf-8")
    assert read_json_lines(path) == [{"a": "x\u2028y\u0085z\x0c"}, {"a": 1}]
