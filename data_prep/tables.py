"""Table files become rows of text: CSV, TSV, Excel, Parquet, JSON and JSON Lines."""

import codecs
import csv
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from common.files import suggest_file

from .reading import Flaw, check_not_packed, describe, iter_json, suggest

EXCEL_ENDINGS = (".xlsx", ".xlsm")
# Of spreadsheets, of programs for statistics, and of pandas; refused
OTHER_ENDINGS = (
    *(".xls", ".xlsb", ".xltx", ".xltm", ".ods", ".fods", ".numbers"),
    *(".sav", ".dta", ".sas7bdat", ".rds", ".rdata", ".feather", ".pkl", ".pickle"),
)
TABLE_ENDINGS = (".csv", ".tsv", ".tab", ".parquet", *EXCEL_ENDINGS, *OTHER_ENDINGS)  # JSON may also be a table
MAX_CELL = 1_000_000  # characters; a quotation mark without its partner would swallow the rest of a file
# Cells that pandas reads as missing, and writes for missing values
NOT_A_VALUE = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null", "NaT"),
}
# What a spreadsheet writes into a CSV file for a formula without a result, in its language, or for a narrow column:
# #NAME?, #WERT!, #DIV/0!, #NV, ######
SPREADSHEET_ERROR = re.compile(r"#(?:[^\W\d_]{2,}(?:/0)?[!?]|N/?[AVD]|#{2,})")
WHOLE_NUMBER, MIDNIGHT = re.compile(r"(-?\d+)\.0+"), re.compile(r"(\d{4}-\d\d-\d\d) 00:00:00")

csv.field_size_limit(MAX_CELL)
logger = logging.getLogger(__name__)
Rows = list[dict[str, str] | Flaw]


def read_table(path: Path) -> Rows:
    """Return a table's rows, every cell as text without white space around it: see `cell_text`.

    A `Flaw` takes the place of a row with fewer or more cells than the header, and of a broken line of JSON Lines.

    Raises:
        FileNotFoundError, ValueError: no such file, not a table, two columns of one name, no rows, or none that fits
            the header.
    """
    if not path.is_file():
        raise FileNotFoundError(f"table: no file {path}{suggest_file(path)}")
    ending = path.suffix.lower()
    if ending in OTHER_ENDINGS:
        raise ValueError(f"{path}: {ending} is not read; save the table as .xlsx, or as .csv in UTF-8")
    if ending in (".json", ".jsonl"):
        rows = text_rows(iter_json(path))
    elif ending == ".parquet":
        rows = text_rows(_read_parquet(path))
    else:
        rows = _rows_below_header(_read_excel(path) if ending in EXCEL_ENDINGS else _read_csv(path), path)
    if not rows:
        raise ValueError(f"{path}: has no rows")
    return rows


def cell_text(value) -> str:
    """Return a cell as text: 5.0 and "5.0" as "5", a date without its midnight.

    What pandas calls missing, and errors of a spreadsheet's formulas, become "".
    """
    text = str(value).strip()
    if text in NOT_A_VALUE or (text.startswith("#") and SPREADSHEET_ERROR.fullmatch(text)):
        return ""
    if text.endswith("0") and (match := WHOLE_NUMBER.fullmatch(text) or MIDNIGHT.fullmatch(text)):
        return match[1]
    return text


def text_rows(rows: Iterable) -> Rows:
    """Return records as rows of text that all have the same columns, in the order of their first appearance."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
    return [_text_row(row, columns) for row in rows]


def join_tables(rows: Rows, path: Path, key: str) -> Rows:
    """Add the columns of the table in `path` to the rows that have the same value of the column `key`.

    Raises:
        ValueError: a table lacks the column, the added one has a flaw or a value twice, or no value is in both.
    """
    other = read_table(path)
    if flaw := next((row for row in other if isinstance(row, Flaw)), None):
        raise ValueError(f"{path}, {flaw.reason}")
    sound = [row for row in rows if not isinstance(row, Flaw)]
    for name, side in (("table", sound), (path.name, other)):
        if side and key not in side[0]:
            raise ValueError(f"{name}: no column {key!r} to join by{suggest(key, side[0])}")
    found = {row[key]: row for row in other}
    if len(found) < len(other):
        twice = next(row[key] for row in other if found[row[key]] is not row)
        raise ValueError(f"{path}: two rows have {twice!r} in the column {key!r} to join by")
    if lost := sum(row[key] not in found for row in sound):
        if lost == len(sound):
            raise ValueError(f"{path}: none of its values of {key!r} is in the table that it is joined to")
        logger.warning("%d of %d rows have no partner in %s", lost, len(sound), path.name)
    empty = dict.fromkeys(other[0], "")
    return [row if isinstance(row, Flaw) else {**found.get(row[key], empty), **row} for row in rows]


def _text_row(row, columns: list[str]) -> dict[str, str] | Flaw:
    if isinstance(row, Flaw):
        return row
    if not isinstance(row, dict):
        return Flaw(f"expected an object, found {describe(row)}")
    return {column: cell_text(row.get(column, "")) for column in columns}


def _read_parquet(path: Path) -> list[dict]:
    try:
        # whole numbers stay whole beside missing ones: as floats, those of long ids would be rounded
        table, names = pq.read_table(path).to_pandas(integer_object_nulls=True), _class_names(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not a table: {' '.join(str(error).split())[:200]}") from error
    table.columns = [str(column).strip() for column in table.columns]
    for column in table.select_dtypes("object"):
        if any(_has_bytes(value) for value in table[column]):
            rule = "has bytes, as of images; write them into files, and the files' names into the column"
            raise ValueError(f"{path}: the column {column!r} {rule}")
        if found := next((value for value in table[column] if isinstance(value, dict)), None):
            raise ValueError(f"{path}: the column {column!r} has {describe(found)}, expected a text or a number")
    for column in table.columns.intersection(list(names)):
        table[column] = [_class_name(code, names[column], column, path) for code in table[column]]
    return table.astype(object).where(table.notna(), None).to_dict("records")


def _class_names(path: Path) -> dict[str, list[str]]:
    """Return, by column, the names that `datasets` keeps in a Parquet file for numbers of classes."""
    try:
        features = json.loads((pq.read_schema(path).metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {column: kind for column, kind in features.items() if isinstance(kind, dict)}
    except (KeyError, TypeError, AttributeError, ValueError):  # another program's file, or another version's
        return {}
    return {str(column).strip(): kind["names"] for column, kind in kinds.items() if kind.get("_type") == "ClassLabel"}


def _class_name(code, names: list[str], column: str, path: Path) -> str | None:
    """Return the name of a class; None for -1 and for a missing one, which `datasets` writes where there is none."""
    if pd.isna(code) or code == -1:
        return None
    if not 0 <= code < len(names):
        raise ValueError(f"{path}: the column {column!r} has {code}, and the file names {len(names)} classes")
    return names[int(code)]


def _has_bytes(value) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | np.ndarray) else [value]
    return any(isinstance(part, bytes) or (isinstance(part, dict) and _has_bytes(part)) for part in inner)


def _read_excel(path: Path) -> Iterator[tuple[str, list[str]]]:
    from .excel import read_excel  # openpyxl takes 10 MB and a quarter of a second, which other files do not need

    return read_excel(path)


def _read_csv(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the place and the cells of each row; the header tells what separates them."""
    lines = io.StringIO(_read_text(path), newline="")
    first = next((line for line in lines if line.strip()), "")
    lines.seek(0)
    separator, width, start = _separator(path, first), 0, 1
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    single = re.escape(separator) + ("" if f"{separator} " in first else "(?! )")  # in sentences a space follows
    try:
        for row in reader:
            end, width = reader.line_num, width or len(row)
            if end > start and _has_swallowed_rows(row, single, width):
                rule = "a cell has rows of the table in it, most likely between two stray quotation marks"
                raise ValueError(f"{path}, lines {start} to {end}: {rule} in lines {start} and {end}")
            if row[:1] != ["sep="]:
                yield f"line {end}" if start == end else f"lines {start} to {end}", row
            start = end + 1
    except csv.Error as error:
        rule = "a quotation mark lacks its partner, or stands inside a quoted cell without being doubled"
        raise ValueError(f"{path}, line {reader.line_num}: not a table: {error}; {rule}") from error


def _has_swallowed_rows(row: list[str], separator: str, width: int) -> bool:
    """Whether a cell's lines have the separators of the rest of one row, of whole rows, and of the start of another.

    Two lines of a table of two columns may look like that by chance.

    Args:
        row: cells.
        separator: regular expression of one.
        width: cells of the header.
    """
    for column, cell in enumerate(row):
        counts = [len(re.findall(separator, line)) for line in cell.splitlines()]
        if len(counts) > 1 and len(counts) + width > 4:
            first, *whole, last = counts
            if [first, *set(whole), last] == [width - 1 - column, *({width - 1} if whole else ()), column]:
                return True
    return False


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    check_not_packed(path, data)
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if not marked and b"\0" in data[:1000]:
        raise ValueError(f"{path}: not text, or UTF-16 without its mark; save the table as .csv in UTF-8, or as .xlsx")
    try:
        return data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        line, found = data.count(b"\n", 0, error.start) + 1, data[error.start : error.start + 1]
        guess = "" if marked else ", but most likely Windows-1252 or another code page"
        raise ValueError(f"{path}, line {line}: {found!r} is not UTF-8{guess}; save the file as UTF-8") from error


def _separator(path: Path, first: str) -> str:
    """Return what separates cells: what Excel's line `sep=;` says, or what makes the most cells of the first line."""
    if match := re.fullmatch(r"sep=(.)", first.strip("\r\n")):
        return match[1]
    if path.suffix.lower() in (".tsv", ".tab"):
        return "\t"
    return max(",;\t|", key=lambda sign: sum(1 for _ in next(csv.reader([first], delimiter=sign), ())))


def _rows_below_header(lines: Iterable[tuple[str, list[str]]], path: Path) -> Rows:
    """Return the rows below the first; empty rows are passed over, as are empty cells behind the last column."""
    lines = [(place, cells) for place, row in lines if any(cells := [cell.strip() for cell in row])]
    if not lines:
        return []
    header = _without_empty_end(lines[0][1])
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise ValueError(f"{path}: two columns have the name {twice[0]!r}")
    rows = [_row(header, place, cells) for place, cells in lines[1:]]
    if rows and all(isinstance(row, Flaw) for row in rows):
        raise ValueError(f"{path}: {rows[0].reason}, {header!r:.200}; is there a title above the header?")
    return rows


def _row(header: list[str], place: str, cells: list[str]) -> dict[str, str] | Flaw:
    cells = cells[: len(header)] + _without_empty_end(cells[len(header) :])
    if len(cells) != len(header):
        return Flaw(f"{place}: {len(cells)} cells, and the header has {len(header)}")
    return {name: cell_text(cell) for name, cell in zip(header, cells, strict=True) if name}


def _without_empty_end(cells: list[str]) -> list[str]:
    while cells and not cells[-1]:
        cells = cells[:-1]
    return cells
