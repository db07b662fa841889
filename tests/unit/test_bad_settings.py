"""Every kind of odd or bad YAML file, and what becomes of it: settings, mappings of tables, lists of sources."""

import os
import time
from pathlib import Path

import pytest

from common.yaml_files import read_yaml
from data_prep.__main__ import main as data_prep
from data_prep.mapping import load_mapping

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

# (name, what the file holds, the settings)
READABLE = [
    ("a number as people write it", "lr: 2e-4", {"lr": 0.0002}),
    ("numbers with exponents", "a: 1E5\nb: -3.e+2\nc: 0.5e1", {"a": 100000.0, "b": -300.0, "c": 5.0}),
    ("almost numbers", "a: 2e-4x\nb: 1e\nc: e5\nd: v1e3", {"a": "2e-4x", "b": "1e", "c": "e5", "d": "v1e3"}),
    ("numbers in quotes", "a: '2e-4'\nb: \"5\"", {"a": "2e-4", "b": "5"}),
    ("words that YAML 1.1 reads as truth values", "a: no\nb: on\nc: y", {"a": "no", "b": "on", "c": "y"}),
    ("truth values", "a: true\nb: False", {"a": True, "b": False}),
    ("a date", "run_name: 2026-01-31", {"run_name": "2026-01-31"}),
    ("a date that does not exist", "run_name: 2026-99-99", {"run_name": "2026-99-99"}),
    ("a version", "a: 1.2.3", {"a": "1.2.3"}),
    ("base 8, 16 and 60", "a: 010\nb: 0x1f\nc: 1:30", {"a": 10, "b": 31, "c": "1:30"}),
    ("byte order mark", "\ufeffa: 1", {"a": 1}),
    ("other letters", "ü: 🩺", {"ü": "🩺"}),
    ("an anchor that nobody uses", "a: &x 1", {"a": 1}),
    ("a text of a million characters", "a: " + "x" * 1_000_000, {"a": "x" * 1_000_000}),
]

# (name, what the file holds, the reason, after the file's path)
BAD = [
    ("nothing", "", "expected lines of the form 'key: value'"),
    ("a list", "- a", "expected lines of the form 'key: value'"),
    ("a word", "hello", "expected lines of the form 'key: value'"),
    ("no value's end", "a: [b", "line 1, column 6: not YAML: expected ',' or ']'"),
    ("tab", "\ta: 1", "not YAML: found character '\\t'"),
    ("NUL", "a: \0", "not YAML: unacceptable character #x0000"),
    ("Latin-1", "a: ü".encode("latin-1"), "not YAML: 'utf-8' codec can't decode byte 0xfc in position 3"),
    ("UTF-16", "a: 1".encode("utf-16"), "not YAML: 'utf-8' codec can't decode byte 0xff in position 0"),
    ("two documents", "a: 1\n---\na: 2", "line 2, column 1: not YAML: but found another document"),
    ("a key twice", "a: 1\na: 2", 'not YAML: found duplicate key "a"'),
    ("a key twice inside", "a: {b: 1, b: 2}", 'not YAML: found duplicate key "b"'),
    ("a key twice, quoted once", "a: 1\n'a': 2", 'not YAML: found duplicate key "a"'),
    ("a list as key", "? [a]\n: 1", "expected lines of the form 'key: value'"),
    ("an alias", "a: &x 1\nb: *x", "not YAML: alias of &x: write the value out"),
    ("an alias bomb", LAUGHS, "not YAML: alias of &a: write the value out"),
    ("a mapping inside itself", "a: &a {b: *a}", "not YAML: alias of &a: write the value out"),
    ("an alias to nothing", "a: *x", "not YAML: found undefined alias 'x'"),
    ("a merge", "a: &x {b: 1}\nc:\n  <<: *x", "not YAML: alias of &x: write the value out"),
    ("Python call", "a: !!python/object/apply:os.system ['touch RAN']", "not YAML: could not determine a constructor"),
    ("Python name", "a: !!python/name:os.system", "not YAML: could not determine a constructor"),
    ("Python object", "a: !!python/object:pathlib.Path {}", "not YAML: could not determine a constructor"),
    ("Python module", "!!python/module:os", "not YAML: could not determine a constructor"),
    ("a tag of one's own", "a: !secret x", "not YAML: could not determine a constructor for the tag '!secret'"),
    ("a tag that does not fit", "a: !!int x", "not YAML: invalid literal for int() with base 10: 'x'"),
    ("another that does not fit", "a: !!float x", "not YAML: could not convert string to float: 'x'"),
    ("NaN", "lr: .nan", "not YAML: .nan is not a finite number"),
    ("infinity", "lr: -.inf", "not YAML: -.inf is not a finite number"),
    ("a number too large", "lr: 1e999", "not YAML: 1e999 is not a finite number"),
    ("a version of YAML that does not exist", "%YAML 1.9\n---\na: 1", "not YAML: "),
    ("deep nesting", "a: " + "[" * 5000, "not YAML: maximum depth of data structure exceeded"),
]


def written(folder: Path, content: str | bytes, name="x.yaml") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def names(cases):
    return [case[0] for case in cases]


@pytest.mark.parametrize(("name", "content", "settings"), READABLE, ids=names(READABLE))
def test_a_setting_is_read_as_it_is_meant(tmp_path, name, content, settings):
    assert read_yaml(written(tmp_path, content), "--config") == settings


@pytest.mark.parametrize(("name", "content", "reason"), BAD, ids=names(BAD))
def test_a_bad_file_gives_one_line_at_once(tmp_path, monkeypatch, name, content, reason):
    monkeypatch.chdir(tmp_path)
    path, start = written(tmp_path, content), time.monotonic()
    with pytest.raises(ValueError) as error:
        read_yaml(path, "--config")
    assert str(error.value).startswith(str(path)) and reason in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 500 and time.monotonic() - start < 5
    assert not (tmp_path / "RAN").exists()


def test_the_tables_hold_as_many_cases_as_promised():
    assert len(READABLE) + len(BAD) >= 25 and len(set(names(READABLE + BAD))) == len(READABLE) + len(BAD)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_what_is_no_file_is_not_opened(tmp_path, make):
    make(tmp_path / "x.yaml")
    with pytest.raises(FileNotFoundError, match=r"--config: no file .*x\.yaml"):
        read_yaml(tmp_path / "x.yaml", "--config")


MAPPING = "images: ['{file}']\nquestions: ['What?']\nanswer: '{label}'\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (MAPPING + "answer: x\n", 'not YAML: found duplicate key "answer"'),
        (LAUGHS, "not YAML: alias of &a: write the value out"),
        ("a: !!python/name:os.system", "not YAML: could not determine a constructor"),
        (MAPPING.encode("utf-16"), "not YAML: 'utf-8' codec can't decode byte 0xff"),
        ("- a", "expected lines of the form 'key: value'"),
        (MAPPING + "lable: {}\n", "unknown key 'lable'; did you mean 'label'?"),
        ("images: [a]", "lacks answer, questions"),
    ],
)
def test_a_bad_mapping_of_a_table_gives_one_line(tmp_path, content, reason):
    path = written(tmp_path, content)
    with pytest.raises(ValueError) as error:
        load_mapping(path)
    assert str(error.value).startswith(f"mapping {path}") and reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", ": expected a list of sources, each with `data`"),
        ("data: a.json", ": expected a list of sources, each with `data`"),
        ("- {data: a.json, data: b.json}", 'not YAML: found duplicate key "data"'),
        (LAUGHS, "not YAML: alias of &a: write the value out"),
        ("- {data: a.json, weigth: 1}", ", source 0: unknown key 'weigth'; did you mean 'weight'?"),
        ("- {data: a.json, sheet: 1}", ", source 0: unknown key 'sheet'; there are data, format, images,"),
        ("- data: a.json\n- images: x", ", source 1: lacks `data`, a file, a folder or a Hub data set id"),
        ("- data: a.json\n- b.json", ", source 1: expected keys and their values, found a text 'b.json'"),
        ("- {data: a.json, name: clinic, weight: x}", ", source 0 (name 'clinic'): weight: expected a number"),
        ("- {data: a.json, name: 5}", ", source 0 (name 5): name: expected a text, found 5"),
        ("- {data: 5}", ", source 0: data: expected a text, found 5"),
        ("- {data: a.json}\n- {data: b.json, images: [c]}", ", source 1: images: expected a text, found ['c']"),
        ("- {data: a.json, weight: much}", ", source 0: weight: expected a number, found 'much'"),
        ("- {data: a.json, weight: true}", ", source 0: weight: expected a number, found True"),
        ("- {data: a.json, weight: .nan}", "not YAML: .nan is not a finite number"),
        ("- {data: a.json, format: lava}", ", source 0: format: expected one of llava, messages, flat, found"),
    ],
)
def test_a_bad_list_of_sources_gives_one_line(tmp_path, content, reason):
    path = written(tmp_path, content)
    with pytest.raises(ValueError) as error:
        data_prep(["check", "--sources", str(path)])
    assert str(error.value).startswith(f"--sources: {path}") and reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_weight_as_people_write_it_is_a_number(tmp_path, capsys):
    (tmp_path / "a.json").write_text('[{"question": "a", "answer": "b"}]')
    (tmp_path / "b.json").write_text('[{"question": "c", "answer": "d"}]')
    path = written(tmp_path, "- {data: a.json, weight: 5e-1}\n- {data: b.json, weight: 1}")
    assert data_prep(["check", "--sources", str(path), "--split", "1", "0", "0"]) == 0
    assert "train            2 samples" in capsys.readouterr().out
