"""The answers of an evaluation: what a kill leaves is repaired, what else is damaged is named with its line."""

import json

import pytest

from evaluation.journal import Journal

GOOD = {"run": "adapter", "index": 0, "prediction": "A nevus.", "scores": {"nevus": -1.5}}


def write_lines(folder, *lines):
    (folder / "settings.json").write_text('{"a": 1}')
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    (folder / "predictions.jsonl").write_text(text)


@pytest.mark.parametrize("name", ["predictions.jsonl", "metrics.json", "report.html"])
def test_a_file_that_no_evaluation_claims_is_neither_replaced_nor_read(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"--out: {tmp_path} holds a {name} and no settings.json of an evaluation"):
        Journal.check_foreign(tmp_path)
    (tmp_path / "settings.json").write_text('{"a": 1}')
    Journal.check_foreign(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(("name", "words"), [("adapter", "of other weights"), ("questions", "to other questions")])
def test_answers_by_another_adapter_or_to_other_questions_are_told_without_a_hash(tmp_path, name, words):
    write_lines(tmp_path, GOOD)
    (tmp_path / "settings.json").write_text(json.dumps({name: "0f"}))
    with pytest.raises(ValueError, match=f"--out: {tmp_path} holds answers {words}; add --overwrite to delete them"):
        Journal(tmp_path, {name: "1e"}, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**GOOD, "prediction": None}, "'prediction' is None"),
        ({"run": "adapter", "index": 0}, "'prediction' is None"),
        ({**GOOD, "index": "0"}, "'index' is '0'"),
        ({**GOOD, "index": True}, "'index' is True"),
        ({**GOOD, "run": 1}, "'run' is 1"),
        ({**GOOD, "scores": {"nevus": None}}, "'scores' is {'nevus': None}"),
        ({**GOOD, "scores": {"nevus": float("nan")}}, "'scores' is {'nevus': nan}"),
        ({**GOOD, "image_of": 3}, "'image_of' is 3"),
        ('{"run": "adapter", "ind', "Unterminated string"),
        ("[1]", "expected an object"),
        ("[" * 100_000, "maximum recursion depth"),
    ],
)
def test_a_damaged_line_is_named_with_the_remedy(tmp_path, line, message):
    write_lines(tmp_path, GOOD, "", {**GOOD, "index": 1}, line, {**GOOD, "index": 2})
    with pytest.raises(ValueError) as caught:
        Journal(tmp_path, {"a": 1}, 0)
    assert str(caught.value).startswith(f"{tmp_path / 'predictions.jsonl'}, line 4: damaged, {message}")
    assert str(caught.value).endswith("; add --overwrite to answer all questions again")


def test_rows_that_are_only_scored_have_no_answer(tmp_path):
    write_lines(tmp_path, {"run": "validation", "index": 0, "scores": {"nevus": -1.5}})
    assert Journal(tmp_path, {"a": 1}, 0).has("validation", range(1))


@pytest.mark.parametrize("text", ['{"a": ', "[]", "null", ""])
def test_damaged_settings_are_named(tmp_path, text):
    write_lines(tmp_path, GOOD)
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"settings\.json is damaged: .*; add --overwrite"):
        Journal(tmp_path, {"a": 1}, 0)


def test_other_settings_are_refused_only_where_there_are_answers(tmp_path):
    (tmp_path / "settings.json").write_text('{"batch_size": 8}')
    Journal(tmp_path, {"batch_size": 4}, 0).add([GOOD])  # the run before it was out of memory
    with pytest.raises(ValueError, match="batch_size was 4 and is 2; add --overwrite"):
        Journal(tmp_path, {"batch_size": 2}, 0)


@pytest.mark.parametrize(("name", "what"), [("images", "about other images"), ("validation", "the validation split")])
def test_answers_about_other_pictures_are_refused_where_it_is_known(tmp_path, name, what):
    Journal(tmp_path, {"a": 1}, 0).add([GOOD])  # an earlier version wrote neither
    Journal(tmp_path, {"a": 1, name: "0f"}, 0)
    Journal(tmp_path, {"a": 1, name: None}, 0)
    Journal(tmp_path, {"a": 1, name: "0f"}, 0)
    with pytest.raises(ValueError, match=f"holds answers .*{what}; add --overwrite"):
        Journal(tmp_path, {"a": 1, name: "1e"}, 0)


def test_overwriting_leaves_no_figures_of_earlier_answers(tmp_path):
    Journal(tmp_path, {"a": 1}, 0).add([GOOD])
    for name in ("metrics.json", "report.html", "confusion.png", "notes.txt"):
        (tmp_path / name).touch()
    Journal.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
