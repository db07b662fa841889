"""A mapping is checked against its schema: each problem has its line and the nearest name."""

import re

import pytest

from common.yaml_files import line_of, read_nodes
from data_prep.mapping import load_mapping
from data_prep.reading import Flaw
from data_prep.rows import make_record, rows_of

GOOD = "images: ['{file}']\nlabel:\n  columns: [dx]\nquestions: [What?]\nanswer: This is {label}.\n"


def load(tmp_path, text):
    (tmp_path / "m.yaml").write_text(text)
    return load_mapping(tmp_path / "m.yaml")


WRONG = {
    "a misspelt key": ("agee: [age]\n", "line 6, unknown key 'agee'; did you mean 'age'?"),
    "a key in capitals": ("GROUP: [lesion]\n", "line 6, unknown key 'GROUP'; did you mean 'group'?"),
    "a misspelt key inside": (
        "skip:\n  colum: x\n  matching: y\n",
        "line 7, unknown key 'colum'; did you mean 'column'?",
    ),
    "skip without matching": ("skip: {column: qc}\n", "line 6, skip: lacks matching"),
    "skip is a text": ("skip: qc\n", "line 6, skip: expected keys and their values, found a text 'qc'"),
    "a wrong expression": (
        "skip: {column: qc, matching: '(a'}\n",
        "line 6, skip.matching: '(a' is no regular expression",
    ),
    "no parentheses": (
        "group_pattern: {column: file, matching: abc}\n",
        "line 6, group_pattern: matching: 'abc' has no (parentheses) around the group",
    ),
    "a list of lists": ("missing:\n  - unknown\n  - [a]\n", "line 8, missing.1: expected a text, found a list"),
    "names of nothing": (
        "skin_type:\n  columns: [t]\n  names: {1: }\n",
        "line 8, skin_type.names.1: expected a text, found null",
    ),
    "a list of names": (
        "skin_type: {columns: [t], names: [I, II]}\n",
        "line 6, skin_type.names: expected names and their values",
    ),
    "a truth value": ("source: true\n", "line 6, source: expected a text, found a truth value True"),
    "no text": ("missing: [x]\nsource: ''\n", "line 7, source: expected something that is not empty, found a text ''"),
    "two ways to group": (
        "group: [a]\ngroup_pattern: {column: file, matching: (a)}\n",
        "group: has no effect beside `group_pattern`",
    ),
    "a column that nothing uses": (
        "optional: [fiel]\n",
        "optional: nothing uses the column 'fiel'; did you mean 'file'?",
    ),
    "a number as key": ("0: x\n", "line 6, 0: expected a text as key, found a number 0"),
    "join without by": ("join: {file: b.csv}\n", "line 6, join: lacks by"),
}


@pytest.mark.parametrize(("more", "reason"), WRONG.values(), ids=WRONG)
def test_a_problem_is_told_with_its_line(tmp_path, more, reason):
    with pytest.raises(ValueError) as error:
        load(tmp_path, GOOD + more)
    assert str(error.value).startswith(f"mapping {tmp_path / 'm.yaml'}: ") and reason in str(error.value)
    assert "\n" not in str(error.value)


LABELS = {
    "a column alone": ("dx", "line 2, label: expected {columns: [...]}, found a text 'dx'"),
    "a list": ("[dx]", "line 2, label: expected {columns: [...]}, found a list"),
    "a misspelt key": ("{colums: [dx]}", "line 2, unknown key 'colums'; did you mean 'columns'?"),
    "a name that shows nothing": (
        "{columns: [dx], names: {a: ' '}}",
        "expected a name, found ' ', which shows nothing",
    ),
    "an invisible name": ("{one_hot: true, names: {a: \u2800}}", "label.names.a: expected a name, found"),
    "names alone": ("{names: {a: b}}", "line 2, label: expected `columns`"),
    "one_hot with columns": (
        "{one_hot: true, columns: [a]}",
        "line 2, label: one_hot: expected `names`, column by column",
    ),
    "one_hot is no truth value": (
        "{one_hot: yes, names: {a: b}}",
        "label.one_hot: expected true or false, found a text 'yes'",
    ),
    "an unknown choice": ("{columns: [dx], pick: first}", "label.pick: expected heaviest, found a text 'first'"),
}


@pytest.mark.parametrize(("label", "reason"), LABELS.values(), ids=LABELS)
def test_a_wrong_label_is_told(tmp_path, label, reason):
    with pytest.raises(ValueError) as error:
        load(tmp_path, f"images: ['{{file}}']\nlabel: {label}\nquestions: [What?]\nanswer: '{{label}}'\n")
    assert reason in str(error.value)


@pytest.mark.parametrize("wording", ["It is {label", "It is label}.", "It is {}.", "It is {{label}}."])
def test_a_wording_with_a_stray_brace_is_refused(tmp_path, wording):
    reason = f"answer: '{wording}' has a brace without its partner"
    with pytest.raises(ValueError, match=re.escape(f"line 5, {reason}")):
        load(tmp_path, GOOD.replace("This is {label}.", f'"{wording}"'))
    with pytest.raises(ValueError, match=r"line 4, questions\.0: .* has a brace without its partner"):
        load(tmp_path, GOOD.replace("[What?]", f'"{wording}"'))


def test_images_are_made_from_a_column(tmp_path):
    with pytest.raises(ValueError, match=r"images: expected the name of a column in braces, as in {file}\.jpg"):
        load(tmp_path, GOOD.replace("{file}", "file"))


def test_all_problems_are_told_at_once(tmp_path):
    with pytest.raises(ValueError) as error:
        load(tmp_path, "images: []\nlabel: dx\nquestion: [What?]\n")
    assert str(error.value).split(".yaml: ")[1].split("; ") == [
        "line 1, images: expected something that is not empty, found a list",
        "line 2, label: expected {columns: [...]}, found a text 'dx'",
        "line 3, unknown key 'question'",
        "did you mean 'questions'?",
        "lacks answer, questions",
    ]


def test_one_text_stands_for_a_list_and_a_number_for_its_text(tmp_path):
    mapping = load(
        tmp_path,
        "images: '{file}'\nlabel: {columns: y, names: {0: benign, 1.0: malignant}}\nage: years\ngroup:\n"
        "missing: [-1, 999.0]\nquestions: What is shown here?\nanswer: '{label}'\n",
    )
    assert mapping.questions == ["What is shown here?"] and mapping.group == []
    rows = rows_of([{"file": "a.jpg", "y": "1", "years": "-1"}, {"file": "b", "y": "0", "years": "999"}], mapping, "t")
    records = [make_record(row, mapping)[0] for row in rows]
    assert [(record["label"], record["age"], record["question"]) for record in records] == [
        ("malignant", None, "What is shown here?"), ("benign", None, "What is shown here?")
    ]  # fmt: skip


def test_an_unknown_mapping_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"mapping: no file HAM1000; did you mean 'ham10000'\?; shipped are ddi, "):
        load_mapping("HAM1000")


def test_a_line_is_that_of_the_innermost_key_that_is_there(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1\n# comment\nb:\n  - x\n  - c: {d: 5,\n       e: 6}\n0: z\n")
    places = [["a"], ["b"], ["b", 0], ["b", 1, "c", "e"], ["b", 1, "nothing"], ["b", 9], [0], ["nothing"], []]
    assert [line_of(read_nodes(path), keys) for keys in places] == [1, 3, 4, 6, 5, 3, 7, 1, 1]


def records_of(mapping, *rows):
    """What becomes of rows: labels, or the reason for skipping, or the error."""
    found = []
    for row in rows_of(list(rows), mapping, "t.csv"):
        try:
            record, reason = make_record(row, mapping)
            found.append(reason or record)
        except ValueError as error:
            found.append(str(error))
    return found


def test_columns_are_found_whatever_their_case_and_spaces(tmp_path):
    mapping = load(tmp_path, GOOD + "group: [lesion_id]\nage: [Age]\ntexts: {caption: [Caption Text]}\n")
    row = {
        "File ": "a.jpg",
        "DX": "nevus",
        "Lesion ID": "L1",
        "age": "5",
        "Age": "6",
        "caption_text": "c",
        "more": "m",
    }
    [record] = records_of(mapping, {key.strip(): value for key, value in row.items()})
    assert (record["images"], record["label"], record["group"], record["age"]) == (["a.jpg"], "nevus", "L1", "6")


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (["file", "diagnosis", "z"], "t.csv: no column 'dx'; there are 'file', 'diagnosis', 'z'"),
        (["FILES", "dx"], "t.csv: no column 'file'; did you mean 'FILES'?"),
        (["file", "Dx", "DX"], "t.csv: no column 'dx'; did you mean 'DX'?"),
        (["Table 1"], "t.csv: no column 'file'; there are 'Table 1'"),
    ],
)
def test_a_column_that_is_not_there_is_told_with_the_nearest(tmp_path, columns, reason):
    with pytest.raises(ValueError) as error:
        rows_of([Flaw("line 2: x"), dict.fromkeys(columns, "x")], load(tmp_path, GOOD), "t.csv")
    assert str(error.value) == reason


@pytest.mark.parametrize("wording", ["questions: ['What is on the {sight}?']\n", "answer: 'It is on the {sight}.'\n"])
def test_a_placeholder_that_is_no_column_is_an_error(tmp_path, wording):
    key = wording.split(":")[0]
    lines = [line for line in GOOD.splitlines(keepends=True) if not line.startswith(key)]
    with pytest.raises(ValueError, match=r"t\.csv: no column 'sight'; did you mean 'site'\?"):
        rows_of([{"file": "a", "dx": "b", "site": "c"}], load(tmp_path, "".join(lines) + wording), "t.csv")


def test_the_label_placeholder_may_be_a_column(tmp_path):
    mapping = load(tmp_path, "images: '{file}'\nquestions: What?\nanswer: It is {label}.\n")
    [record] = records_of(mapping, {"file": "a.jpg", "label": "nevus"})
    assert (record["answer"], record["label"]) == ("It is nevus.", None)


def test_a_question_that_cannot_be_filled_is_not_asked(tmp_path):
    mapping = load(tmp_path, GOOD.replace("[What?]", "['On the {site}, what?', 'At {age}, what?', What?]"))
    rows = [{"file": f"{n}.jpg", "dx": "nevus", "site": "", "age": ""} for n in range(9)]
    assert {record["question"] for record in records_of(mapping, *rows)} == {"What?"}


def test_a_row_without_its_image_is_an_error_and_not_a_text(tmp_path):
    rows = [{"file": "", "dx": "nevus"}, {"file": "", "dx": ""}, {"file": "nothing", "dx": "nevus"}]
    assert records_of(load(tmp_path, GOOD + "missing: [nothing]\n"), *rows) == [
        "column 'file': empty, and the mapping makes an image's name from it",
        "no label to answer with",
        "column 'file': empty, and the mapping makes an image's name from it",
    ]
    pair = GOOD.replace("['{file}']", "['{before}', '{after}.jpg']")
    rows = [{"before": "a", "after": "", "dx": "x"}, {"before": "", "after": "b", "dx": "x"}]
    assert records_of(load(tmp_path, pair), rows[0]) == [
        "column 'after': empty, and the mapping makes an image's name from it"
    ]
    found = records_of(
        load(tmp_path, pair + "optional: [before, after]\n"), *rows, {"dx": "x"} | rows[0] | {"before": ""}
    )
    assert [record["images"] for record in found[:2]] == [["a"], ["b.jpg"]]
    assert found[2] == "the columns before, after are empty, and the mapping takes the images from them"


HAM_COPIES = {
    "actinic keratosis or Bowen's disease": [
        *("akiec", "AKIEC", "actinic_keratoses", "Actinic keratoses", "Actinic Keratosis", "Bowen's disease"),
        "Actinic keratoses and intraepithelial carcinoma / Bowen's disease",
    ],
    "basal cell carcinoma": ["bcc", "basal_cell_carcinoma", "Basal cell carcinoma"],
    "benign keratosis": ["bkl", "benign_keratosis-like_lesions", "Benign keratosis-like lesions ", "benign keratosis"],
    "dermatofibroma": ["df", "dermatofibroma", "Dermatofibroma"],
    "melanoma": ["mel", "melanoma", "Melanoma"],
    "melanocytic nevus": ["nv", "melanocytic_Nevi", "Melanocytic nevi", "melanocytic nevus", "Nevus"],
    "vascular lesion": ["vasc", "vascular_lesions", "Vascular lesions", "vascular lesion"],
}


def test_the_spelled_out_diagnoses_of_ham10000_are_its_codes():
    mapping = load_mapping("ham10000")
    row = {"lesion_id": "L", "age": "", "sex": "", "localization": ""}
    for label, spellings in HAM_COPIES.items():
        for number, spelling in enumerate(spellings):
            [record] = records_of(mapping, {**row, "image_id": f"I{number}", "dx": spelling.strip()})
            assert record["label"] == label and record["answer"] == f"This is {label}."
    [error] = records_of(mapping, {**row, "image_id": "I", "dx": "melanosis"})
    assert error.startswith("column 'dx': 'melanosis' is not one of akiec, bcc")


def test_columns_of_zeros_and_ones_hold_nothing_else(tmp_path):
    mapping = load(tmp_path, GOOD.replace("columns: [dx]", "one_hot: true\n  names: {M: melanoma, N: nevus}"))
    cells = [("1", "0"), ("FALSE", "True"), ("0", ""), ("1", "1"), ("0.7", "0.3")]
    found = records_of(mapping, *({"file": "a.jpg", "M": m, "N": n} for m, n in cells))
    assert [record["label"] for record in found[:2]] == ["melanoma", "nevus"]
    assert found[2:] == [
        "no label to answer with", "the columns M, N are 1 at once", "column 'M': expected 0 or 1, found '0.7'"
    ]  # fmt: skip


@pytest.mark.parametrize("cell", ["broken", "['a']", "{'a': 'x', 'b': 1}", "(" * 500, "1"])
def test_weights_that_are_no_dictionary_are_told(tmp_path, cell):
    mapping = load(tmp_path, GOOD.replace("columns: [dx]", "columns: [dx]\n  pick: heaviest"))
    assert records_of(mapping, {"file": "a.jpg", "dx": cell}) == [
        f"expected a dictionary of weights, found {cell[:60]!r}"
    ]


def test_a_lesion_whose_patient_another_row_names_is_that_patients(tmp_path):
    mapping = load(tmp_path, GOOD + "group: [patient, lesion, visit]\n")
    rows = [
        ("P1", "L1", ""),
        ("", "L1", "V1"),
        ("", "", "V1"),
        ("P2", "L2", ""),
        ("", "L9", ""),
        ("", "", ""),
        ("P3", "L1", ""),
    ]
    made = [
        {"file": "a.jpg", "dx": "nevus", **dict(zip(("patient", "lesion", "visit"), row, strict=True))} for row in rows
    ]
    assert [record["group"] for record in records_of(mapping, *made)] == ["P1", "P1", "P1", "P2", "L9", None, "P3"]


def test_a_question_that_lacks_its_column_in_a_row_is_told_with_the_column(tmp_path):
    text = "images: ['{file}']\nquestions: ['Age {age}?', 'Where, {site}?']\nanswer: A mole.\n"
    mapping = load(tmp_path, text)
    found = records_of(mapping, {"file": "a.jpg", "age": "", "site": ""}, {"file": "a.jpg", "age": "", "site": "arm"})
    assert found[0] == "column 'age': empty, and no question can be asked without it"
    assert found[1]["question"] == "Where, arm?"
    mapping = load(tmp_path, text.replace("A mole.", "'{site}.'"))
    assert records_of(mapping, {"file": "a.jpg", "age": "", "site": ""}) == ["no site to answer with"]


def test_a_mapping_under_another_ending_is_not_called_missing(tmp_path):
    (tmp_path / "m.json").write_text("{}")
    with pytest.raises(ValueError, match=r"mapping: .*m\.json: expected a YAML file, with a name in \.yaml or \.yml"):
        load_mapping(tmp_path / "m.json")
