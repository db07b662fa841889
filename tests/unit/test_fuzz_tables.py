"""What hypothesis makes up of tables and mappings: only our own errors come out, and a cell keeps its column.

`FUZZ_EXAMPLES=20000 pytest tests/unit/test_fuzz_tables.py` tries more than the few of every run.
"""

import csv
import io
import tempfile
from contextlib import suppress
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from data_prep.mapping import Mapping, load_mapping
from data_prep.reading import Flaw
from data_prep.records import DataError, parse_record
from data_prep.rows import make_record, read_rows
from data_prep.tables import cell_text, read_table
from helpers.fuzzing import fuzz

COLUMNS = ["dx", "image", "site", "patient"]
letters = st.characters(
    codec="utf-8", exclude_characters="\0\r\n\x85\u2028\u2029", exclude_categories=["Cs", "Zs", "Cc"]
)
signs = st.sampled_from([",", ";", "\t", '"', "'", "|", " ", "\n", "5.0", "nan", "=1+1", "ñ", "黑色素瘤"])
cells = st.lists(letters | signs, max_size=5).map("".join)
rows = st.lists(st.lists(cells, min_size=4, max_size=4), min_size=1, max_size=5)
dialects = st.fixed_dictionaries(
    {"delimiter": st.sampled_from(",;\t|"), "lineterminator": st.sampled_from(["\n", "\r\n"]),
     "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])}
)  # fmt: skip
encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])


def read(data: bytes, name: str):
    """Return a table's rows, or the message of the error that refused it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            return read_table(path)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith(str(path)), str(error)
            return str(error)


@fuzz
@given(rows=rows, dialect=dialects, encoding=encodings)
def test_every_cell_of_a_sound_table_keeps_its_column(rows, dialect, encoding):
    text = io.StringIO(newline="")
    csv.writer(text, **dialect).writerows([COLUMNS, *rows])
    found = read(text.getvalue().encode(encoding), "t.csv")
    filled = [row for row in rows if any(cell.strip() for cell in row)]
    expected = [dict(zip(COLUMNS, map(cell_text, row), strict=True)) for row in filled]
    assert found == expected if expected else "has no rows" in found


@fuzz
@given(rows=rows, at=st.integers(0, 200), cut=st.integers(0, 4), wrong=st.binary(max_size=3), dialect=dialects)
def test_a_damaged_table_is_refused_or_its_rows_have_all_columns(rows, at, cut, wrong, dialect):
    text = io.StringIO(newline="")
    csv.writer(text, **dialect).writerows([COLUMNS, *rows])
    data = text.getvalue().encode()
    found = read(data[:at] + wrong + data[at + cut :], "t.csv")
    if not isinstance(found, str):
        sound = [row for row in found if not isinstance(row, Flaw)]
        assert len({tuple(row) for row in sound}) <= 1
        assert all(isinstance(cell, str) and cell == cell.strip() for row in sound for cell in row.values())


@fuzz
@given(
    data=st.binary(max_size=60), name=st.sampled_from(["t.csv", "t.TSV", "t.xlsx", "t.parquet", "t.jsonl", "t.xls"])
)
def test_no_file_under_a_tables_name_ends_in_anything_but_rows_or_one_line(data, name):
    assert isinstance(read(data, name), str | list)


words = st.sampled_from(
    ["dx", "image", "{image}", "{dx}.jpg", "{label}", "What?", "This is {label}.", "(", "^a", "5", ""]
)
scalars = words | st.none() | st.booleans() | st.integers(-2, 9) | st.floats(allow_nan=False, allow_infinity=False)
names = words | st.sampled_from(
    ["columns", "names", "one_hot", "pick", "replace", "matching", "column", "scales", "file"]
)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(names, v, max_size=3), max_leaves=6)
likely = {"images": st.just(["{image}"]), "questions": st.just(["What?"]), "answer": st.just("This is {label}.")}
mappings = st.fixed_dictionaries(
    {key: value | values for key, value in likely.items()},
    optional={key: values for key in [*Mapping.model_fields, "imags"] if key not in (*likely, "label")}
    | {"label": st.just({"columns": ["dx"]}) | values},
)


@fuzz
@given(settings=mappings, row=st.lists(cells.filter(lambda c: "\n" not in c), min_size=4, max_size=4))
def test_any_mapping_is_refused_in_one_line_or_makes_a_record(settings, row):
    with tempfile.TemporaryDirectory() as folder:
        path, table = Path(folder) / "m.yaml", Path(folder) / "t.csv"
        YAML(typ="safe").dump(settings, path)
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, [cell or "x" for cell in row]])
        try:
            mapping = load_mapping(path)
            rows = read_rows(table, mapping)
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error)
            return
    for number, found in enumerate(row for row in rows if not isinstance(row, Flaw)):
        with suppress(DataError, ValueError):
            record, reason = make_record(found, mapping)
            sample = parse_record(record, number, format="flat") if reason is None else None
            assert sample is None or len(sample["images"]) >= 1
