"""Every kind of table file, as Excel, pandas and people write them, reads alike; a broken one is refused in words."""

import gzip
import json
import zipfile

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from openpyxl import Workbook, load_workbook

from data_prep import excel
from data_prep.reading import Flaw
from data_prep.tables import join_tables, read_table

FRAME = pd.DataFrame({"DDI_ID": [1, 2], "DDI_file": ["a.png", "b.png"], "skin_tone": [12, 56], "disease": ["x-y", ""]})
ROWS = [
    {"DDI_ID": "1", "DDI_file": "a.png", "skin_tone": "12", "disease": "x-y"},
    {"DDI_ID": "2", "DDI_file": "b.png", "skin_tone": "56", "disease": ""},
]


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "name", ["t.csv", "T.CSV", "t.tsv", "t.tab", "t.txt", "t", "t.parquet", "t.jsonl", "t.json", "t.xlsx", "T.XLSX"]
)
def test_every_kind_of_table_reads_alike(tmp_path, name):
    path = tmp_path / name
    kind = path.suffix.lower()
    if kind == ".parquet":
        FRAME.to_parquet(path)
    elif kind in (".json", ".jsonl"):
        FRAME.to_json(path, orient="records", lines=kind == ".jsonl")
    elif kind == ".xlsx":
        with path.open("wb") as file:
            FRAME.to_excel(file, index=False, engine="openpyxl")
    else:
        FRAME.to_csv(path, sep="\t" if kind in (".tsv", ".tab") else ",", index=False)
    assert read_table(path) == ROWS


READABLE = {
    "a trailing comma on each row": "dx,site,image\nnv,arm,1.jpg,\nmel,leg,2.jpg,\n",
    "trailing commas everywhere": "dx,site,image,,\nnv,arm,1.jpg,,\nmel,leg,2.jpg,,\n",
    "semicolons": "dx;site;image\r\nnv;arm;1.jpg\r\nmel;leg;2.jpg\r\n",
    "Excel says the separator": "sep=;\r\ndx;site;image\r\nnv;arm;1.jpg\r\nmel;leg;2.jpg\r\n",
    "tabs under .csv": "dx\tsite\timage\nnv\tarm\t1.jpg\nmel\tleg\t2.jpg\n",
    "bars": "dx|site|image\nnv|arm|1.jpg\nmel|leg|2.jpg\n",
    "byte order mark": "\ufeffdx,site,image\nnv,arm,1.jpg\nmel,leg,2.jpg\n",
    "UTF-16, as Excel's Unicode text": "dx\tsite\timage\r\nnv\tarm\t1.jpg\r\nmel\tleg\t2.jpg\r\n".encode("utf-16"),
    "line ends of an old Mac": "dx,site,image\rnv,arm,1.jpg\rmel,leg,2.jpg\r",
    "blank lines, empty rows": "\ndx,site,image\n\nnv,arm,1.jpg\n,,\nmel,leg,2.jpg\n\n",
    "white space": " dx , site,image \nnv, arm ,1.jpg\n mel,leg, 2.jpg\n",
    "all quoted": '"dx","site","image"\n"nv","arm","1.jpg"\n"mel", "leg", "2.jpg"\n',
    "an index without a name": "dx,,site,image\nnv,0,arm,1.jpg\nmel,1,leg,2.jpg\n",
}


@pytest.mark.parametrize("content", READABLE.values(), ids=READABLE)
def test_a_csv_is_read_however_it_was_written(tmp_path, content):
    rows = read_table(written(tmp_path, "t.csv", content))
    assert rows == [
        {"dx": "nv", "site": "arm", "image": "1.jpg"},
        {"dx": "mel", "site": "leg", "image": "2.jpg"},
    ]


def test_rows_with_other_numbers_of_cells_are_flaws_with_their_lines(tmp_path):
    path = written(tmp_path, "t.csv", 'a,b,c\n1,2,3\n4,5\n6,7,8,9\n"x\ny",10,11\n12\n')
    assert read_table(path) == [
        {"a": "1", "b": "2", "c": "3"},
        Flaw("line 3: 2 cells, and the header has 3"),
        Flaw("line 4: 4 cells, and the header has 3"),
        {"a": "x\ny", "b": "10", "c": "11"},
        Flaw("line 7: 1 cells, and the header has 3"),
    ]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ('i,dx,site\n1.jpg,"nv,arm\n2.jpg,mel,leg\n3.jpg,bcc",arm\n', "2 to 4"),
        ('i,dx,site\n1.jpg,"nv,arm\n2.jpg,mel",leg\n3.jpg,bcc,arm\n', "2 to 3"),
        ('i;dx\n0.jpg;nv\n1.jpg;"nv\n2.jpg;mel\n3.jpg;bcc"\n4.jpg;nv\n', "3 to 5"),
        ('i, dx, site\n1.jpg, "nv, arm\n2.jpg, mel", leg\n', "2 to 3"),
        ('i\tdx\tsite\n"1.jpg\tnv\tarm\n2.jpg"\tmel\tleg\n', "2 to 3"),
        ('i,dx,site\r\n1.jpg,nv,"arm\r\n2.jpg,mel,leg\r\n3.jpg,bcc,arm"\r\n', "2 to 4"),
    ],
)
def test_stray_quotes_that_swallow_rows_are_reported_with_their_lines(tmp_path, content, lines):
    path = written(tmp_path, "t.csv", content)
    with pytest.raises(ValueError, match=f"t.csv, lines {lines}: a cell has rows of the table in it, most likely"):
        read_table(path)


@pytest.mark.parametrize(
    "cell",
    ["Brown, 3 mm,\nstable, round", "One.\nTwo.\nThree.", "a,b\nc", "1. Nevus\n2. Melanoma, in situ\n3. None", "\n"],
)
@pytest.mark.parametrize("column", [0, 1, 2])
def test_texts_of_several_lines_are_kept(tmp_path, cell, column):
    row = ["x", "y", "z"]
    row[column] = f'"{cell}"'
    (found,) = read_table(written(tmp_path, "t.csv", "a,b,c\n" + ",".join(row) + "\n"))
    assert found == {name: text.strip('"').strip() for name, text in zip("abc", row, strict=True)}


def test_commas_quotes_and_line_separators_inside_cells_are_kept(tmp_path):
    path = written(tmp_path, "t.csv", 'a,b\n"x, ""y""",5" long\n"two\u2028parts",z\n')
    assert read_table(path) == [{"a": 'x, "y"', "b": '5" long'}, {"a": "two\u2028parts", "b": "z"}]


def test_numbers_dates_and_missing_cells_become_text(tmp_path):
    path = tmp_path / "t.xlsx"
    day = pd.Timestamp("2020-01-02")
    frame = {"id": [7.0, 8.0], "age": [80.0, None], "size": [0.5, 10.0], "seen": [day, None], "dx": ["nan", "N/A"]}
    pd.DataFrame(frame).to_excel(path, index=False)
    first = {"id": "7", "age": "80", "size": "0.5", "seen": "2020-01-02", "dx": ""}
    assert read_table(path) == [first, {"id": "8", "age": "", "size": "10", "seen": "", "dx": ""}]
    path = written(tmp_path, "t.csv", "id,a,b\n007,nan,-5.00\n1.50,NULL,NaN\n")
    assert read_table(path) == [{"id": "007", "a": "", "b": "-5"}, {"id": "1.50", "a": "", "b": ""}]


def test_objects_without_some_keys_have_empty_cells(tmp_path):
    path = written(tmp_path, "t.jsonl", '[{"a": 1, "b": null}, {"c": true}, 5, {"a": 2, "a": 3}]')
    empty = {"a": "", "b": "", "c": ""}
    first, second, *flaws = read_table(path)
    assert (first, second) == ({**empty, "a": "1"}, {**empty, "c": "True"})
    assert flaws == [Flaw("expected an object, found a number 5"), Flaw("line 1: duplicate key 'a'")]


UNREADABLE = {
    "Windows-1252": (
        "t.csv",
        "a,b\n1,2\nGrün,3\n".encode("cp1252"),
        ", line 3: b'\\xfc' is not UTF-8, but most likely",
    ),
    "a Russian code page": ("t.csv", b"a,b\n\xed\xe5\xe2\xf3\xf1,3\n", "save the file as UTF-8"),
    "UTF-16 without its mark": ("t.csv", "a,b\n1,2\n".encode("utf-16-le"), ": not text, or UTF-16 without its mark"),
    "Excel under .csv": ("t.csv", b"PK\x03\x04\x14\x00\x06\x00", ": is compressed, or an archive; unpack it first"),
    "gzip": ("t.csv.gz", gzip.compress(b"a,b\n1,2\n"), "t.csv.gz: is compressed, or an archive; unpack it first"),
    "CSV under .xlsx": ("t.xlsx", "a,b\n1,2\n", ": not an Excel file"),
    "old Excel": ("t.XLS", b"\xd0\xcf\x11\xe0", ": .xls is not read; save the table as .xlsx, or as .csv in UTF-8"),
    "SPSS": ("t.sav", b"$FL2@(#) SPSS", ": .sav is not read; save the table as .xlsx, or as .csv in UTF-8"),
    "a template of Excel": ("t.xltx", b"PK\x03\x04", ": .xltx is not read; save the table as .xlsx"),
    "not Parquet": ("t.parquet", "a,b\n", ": not a table"),
    "a quote that does not close": ("t.csv", 'a,b\n1,"2\n3,4\n', ", line 3: not a table: unexpected end of data"),
    "a quote inside": ("t.csv", 'a,b\n1,"x "y" z"\n', ", line 2: not a table: ',' expected after"),
    "a cell without end": ("t.csv", 'a,b\n1,"' + "x" * 1_100_000, ": not a table: field larger than field limit"),
    "a name twice": ("t.csv", "dx,image,dx\na,1.jpg,b\n", ": two columns have the name 'dx'"),
    "a title above the header": (
        "t.csv",
        "Table 1: lesions,,\ndx,site,image\nnv,arm,1.jpg\n",
        ": line 2: 3 cells, and the header has 1, ['Table 1: lesions']; is there a title above the header?",
    ),
    "no rows": ("t.csv", "a,b\n", ": has no rows"),
    "nothing": ("t.csv", "", ": has no rows"),
}


@pytest.mark.parametrize(("name", "content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_table_gives_one_clear_line(tmp_path, name, content, reason):
    path = written(tmp_path, name, content)
    with pytest.raises(ValueError) as error:
        read_table(path)
    assert str(error.value).startswith(str(path)) and reason in str(error.value) and "\n" not in str(error.value)


def test_an_excel_file_has_one_sheet_with_rows(tmp_path):
    path = tmp_path / "t.xlsx"
    with pd.ExcelWriter(path) as file:
        FRAME.to_excel(file, sheet_name="Data", index=False)
        pd.DataFrame().to_excel(file, sheet_name="Empty", index=False)
    assert read_table(path) == ROWS
    with pd.ExcelWriter(path) as file:
        FRAME.to_excel(file, sheet_name="Data", index=False)
        FRAME.to_excel(file, sheet_name="Key", index=False)
    with pytest.raises(ValueError, match=r"has the sheets 'Data', 'Key'; save the right one as a file"):
        read_table(path)


def test_an_excel_file_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(excel, "MAX_BYTES_IN_MEMORY", 1000)
    FRAME.to_excel(tmp_path / "t.xlsx", index=False)
    with pytest.raises(ValueError, match=r"t\.xlsx: not an Excel file: unpacked [\d,]+ bytes, at most 1,000"):
        read_table(tmp_path / "t.xlsx")


def test_empty_rows_above_an_excel_header_are_passed_over(tmp_path):
    path = tmp_path / "t.xlsx"
    FRAME.to_excel(path, index=False, startrow=3)
    assert read_table(path) == ROWS


def write_sheet(path, rows, *merged):
    book = Workbook()
    for row in rows:
        book.active.append(row)
    for block in merged:
        book.active.merge_cells(block)
    book.save(path)
    return path


def test_every_row_of_a_merged_block_has_its_value(tmp_path):
    rows = [
        ["patient", "image", "dx"],
        ["p1", "1.jpg", "nv"],
        ["", "2.jpg", ""],
        ["", "3.jpg", "mel"],
        [4, "4.jpg", ""],
    ]
    read = read_table(write_sheet(tmp_path / "t.xlsx", rows, "A2:A4", "C2:C3"))
    assert [list(row.values()) for row in read] == [
        ["p1", "1.jpg", "nv"],
        ["p1", "2.jpg", "nv"],
        ["p1", "3.jpg", "mel"],
        ["4", "4.jpg", ""],
    ]


@pytest.mark.parametrize("block", ["A1:B1", "A2:B3"])
def test_merged_columns_are_refused_as_nobody_knows_whose_the_value_is(tmp_path, block):
    path = write_sheet(tmp_path / "t.xlsx", [["patient", "image"], ["p1", "1.jpg"], ["p2", "2.jpg"]], block)
    with pytest.raises(ValueError, match=rf"t\.xlsx: the cells {block} are merged over several columns; unmerge them"):
        read_table(path)


def test_an_excel_formula_without_its_value_is_refused(tmp_path):
    path = write_sheet(tmp_path / "t.xlsx", [["patient", "image"], ["p1", "1.jpg"], ["p2", '=A3&".jpg"']])
    with pytest.raises(ValueError, match=r"t\.xlsx, cell B3: a formula without a value; open and save the file in"):
        read_table(path)


def test_an_excel_formula_may_have_an_empty_text_as_its_value(tmp_path):
    path = write_sheet(tmp_path / "t.xlsx", [["patient", "image"], ['=""', "1.jpg"]])
    with zipfile.ZipFile(path) as parts:
        content = {name: parts.read(name) for name in parts.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    assert content[sheet].count(b'<c r="A2"><f>') == 1
    content[sheet] = content[sheet].replace(b'<c r="A2"><f>', b'<c r="A2" t="str"><f>')
    with zipfile.ZipFile(path, "w") as parts:
        for name, data in content.items():
            parts.writestr(name, data)
    assert read_table(path) == [{"patient": "", "image": "1.jpg"}]


def test_a_cell_far_from_the_table_is_named_instead_of_filling_the_memory(tmp_path):
    path = write_sheet(tmp_path / "t.xlsx", [["patient", "image"], ["p1", "1.jpg"]])
    book = load_workbook(path)
    book.active["XFD1048576"] = "x"
    book.save(path)
    with pytest.raises(ValueError, match="the sheet 'Sheet' extends to XFD1048576, and at most 10,000,000 cells"):
        read_table(path)


def test_tables_are_joined_by_a_key(tmp_path, caplog):
    rows = [{"id": "1", "a": "x"}, Flaw("line 3: 1 cells, and the header has 2"), {"id": "2", "a": "y"}]
    path = written(tmp_path, "more.csv", "id,a,b\n1,other,p\n3,other,q\n")
    assert join_tables(rows, path, "id") == [{"id": "1", "a": "x", "b": "p"}, rows[1], {"id": "2", "a": "y", "b": ""}]
    assert "1 of 2 rows have no partner in more.csv" in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("id,b\n1,p\n1,q\n", "two rows have '1' in the column 'id' to join by"),
        ("id,b\n8,p\n9,q\n", "none of its values of 'id' is in the table that it is joined to"),
        ("Id,b\n1,p\n", "no column 'id' to join by; did you mean 'Id'?"),
        ("id,b\n1\n", "line 2: 1 cells, and the header has 2"),
    ],
)
def test_a_wrong_join_is_refused(tmp_path, content, reason):
    path = written(tmp_path, "more.csv", content)
    with pytest.raises(ValueError) as error:
        join_tables([{"id": "1"}, {"id": "2"}], path, "id")
    assert "more.csv" in str(error.value) and reason in str(error.value)


@pytest.mark.parametrize(
    "images",
    [[{"bytes": b"x" * 9000, "path": None}] * 2, [b"x" * 9000, None], [[{"bytes": b"x", "path": "a"}]] * 2],
    ids=["as the Hub embeds them", "bytes", "lists"],
)
def test_images_inside_a_parquet_file_are_refused_in_one_line(tmp_path, images):
    path = tmp_path / "t.parquet"
    pd.DataFrame({"dx": ["nv", "mel"], "picture": images}).to_parquet(path)
    with pytest.raises(ValueError) as error:
        read_table(path)
    rule = "has bytes, as of images; write them into files, and the files' names into the column"
    assert str(error.value) == f"{path}: the column 'picture' {rule}"


def test_hidden_rows_of_a_sheet_are_read_and_counted(tmp_path, caplog):
    path = write_sheet(tmp_path / "t.xlsx", [["patient", "image"], ["p1", "1.jpg"], ["p2", "2.jpg"]])
    book = load_workbook(path)
    book.active.row_dimensions[3].hidden = True
    book.save(path)
    assert len(read_table(path)) == 2
    assert "t.xlsx: 1 rows are hidden, and are read too" in caplog.text


def test_classes_of_a_parquet_file_have_the_names_that_it_keeps(tmp_path):
    kinds = {"dx": ClassLabel(names=["nevus", "melanoma"]), "n": Value("int64")}
    path = tmp_path / "t.parquet"
    Dataset.from_dict({"dx": [1, 0, None, -1], "n": [1, 0, 1, 0]}, features=Features(kinds)).to_parquet(path)
    assert [(row["dx"], row["n"]) for row in read_table(path)] == [
        ("melanoma", "1"),
        ("nevus", "0"),
        ("", "1"),
        ("", "0"),
    ]


@pytest.mark.parametrize(
    ("metadata", "cells"),
    [
        ({"info": {"features": {"dx": {"names": ["nevus"], "_type": "ClassLabel"}}}}, None),
        ({"info": {"features": [{"dtype": "int64"}]}}, ["0", "1"]),
        ([], ["0", "1"]),
        ({"info": {"features": {"dx": {"_type": "Value"}, "x": {"_type": "ClassLabel", "names": []}}}}, ["0", "1"]),
    ],
)  # fmt: skip
def test_a_class_without_a_name_is_refused_and_foreign_metadata_are_passed_over(tmp_path, metadata, cells):
    table = pa.table({"dx": [0, 1]}).replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, tmp_path / "t.parquet")
    if cells is None:
        with pytest.raises(ValueError, match=r"t\.parquet: the column 'dx' has 1, and the file names 1 classes"):
            read_table(tmp_path / "t.parquet")
    else:
        assert [row["dx"] for row in read_table(tmp_path / "t.parquet")] == cells


def test_objects_in_a_parquet_file_are_no_cells(tmp_path):
    pd.DataFrame({"dx": ["nv"], "image": [{"bytes": None, "path": "a.jpg"}]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(
        ValueError, match=r"column 'image' has an object with the keys .*'path'.*, expected a text or a nu"
    ):
        read_table(tmp_path / "t.parquet")


ERRORS = ["#NAME?", "#WERT!", "#DIV/0!", "#REF!", "#NV", "#N/A", "#VALEUR!", "#ССЫЛКА!", "########"]


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_a_spreadsheet_is_an_empty_cell(tmp_path, error):
    path = written(tmp_path, "t.csv", f"id,dx\n1,{error}\n2,#2\n3,#nevus\n4,#\n5,{error} x\n")
    assert [row["dx"] for row in read_table(path)] == ["", "#2", "#nevus", "#", f"{error} x"]


@pytest.mark.parametrize(
    ("stored", "read"),
    [("a_x000D_\nb", "a\r\nb"), ("mole_x000d_", "mole"), ("a_x0009_b", "a\tb"), ("_x005F_x000D_", "_x000D_")],
)
def test_ends_of_lines_that_excel_writes_as_signs_are_ends_of_lines(tmp_path, stored, read):
    path = write_sheet(tmp_path / "t.xlsx", [["dx", "file"], [stored, "scan_x0041_1.jpg"]])
    assert read_table(path) == [{"dx": read, "file": "scan_x0041_1.jpg"}]


def test_long_ids_of_a_parquet_file_stay_whole_beside_a_missing_one(tmp_path):
    ids = [9007199254740993, 9007199254740992, None]
    pq.write_table(pa.table({"id": pa.array(ids, pa.int64()), "age": [45.5, 40.0, 1.0]}), tmp_path / "t.parquet")
    assert [row["id"] for row in read_table(tmp_path / "t.parquet")] == ["9007199254740993", "9007199254740992", ""]


def test_a_cell_of_two_lines_between_bars_is_one(tmp_path):
    path = written(tmp_path, "t.csv", 'dx|image|site|patient\n||"\n0"|\nnv|"a\nb"||1\n')
    assert [list(row.values()) for row in read_table(path)] == [["", "", "0", ""], ["nv", "a\nb", "", "1"]]
