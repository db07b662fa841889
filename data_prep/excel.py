"""Excel sheets become rows of cells: merged blocks filled, formulas without a value refused."""

import logging
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from openpyxl import load_workbook
from openpyxl.cell.cell import TYPE_ERROR, TYPE_FORMULA, TYPE_NUMERIC
from openpyxl.utils import get_column_letter
from openpyxl.workbook import Workbook
from openpyxl.worksheet.worksheet import Worksheet

from .reading import MAX_BYTES_IN_MEMORY

# Excel writes a tab or an end of line inside a text as _x000D_, and an underscore before such a sign as _x005F_
ESCAPED = re.compile(r"_x(0009|000[AaDd]|005[Ff])_")
MAX_CELLS = 10_000_000  # between a sheet's first and last one, with the empty ones

logger = logging.getLogger(__name__)


def read_excel(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the place and the cells, as text, of each row of the only sheet that has any.

    Every cell of a block of merged rows has the block's value, which the file has in the first one alone.

    Raises:
        ValueError: not an Excel file, several sheets with rows, a block of merged columns, or a formula without a
            value.
    """
    workbook = _open(path, values=True)
    _check_extent(path, workbook)
    filled = [sheet for sheet in workbook.worksheets if any(cell is not None for row in sheet.values for cell in row)]
    if len(filled) > 1:
        names = ", ".join(repr(sheet.title) for sheet in filled)
        raise ValueError(f"{path}: has the sheets {names}; save the right one as a file")
    _check_formulas(path, workbook)
    for sheet in filled:
        _fill_merged(path, sheet)
        if hidden := [number for number, row in sheet.row_dimensions.items() if row.hidden]:
            logger.warning("%s: %d rows are hidden, and are read too", path.name, len(hidden))
        for number, row in enumerate(sheet.rows, 1):
            yield f"row {number}", ["" if _is_empty(cell) else _text(cell) for cell in row]


def _text(cell) -> str:
    return ESCAPED.sub(lambda match: chr(int(match[1], 16)), str(cell.value))


def _is_empty(cell) -> bool:
    return cell.value is None or getattr(cell, "data_type", "") == TYPE_ERROR


def _open(path: Path, *, values: bool) -> Workbook:
    """Return a workbook with its values, or with its formulas."""
    try:
        with zipfile.ZipFile(path) as parts:  # what a few kilobytes unpack to could fill the memory
            size = sum(part.file_size for part in parts.infolist())
        if size > MAX_BYTES_IN_MEMORY:
            raise ValueError(f"unpacked {size:,} bytes, at most {MAX_BYTES_IN_MEMORY:,}; save it as .csv")
        return load_workbook(path, data_only=values)
    except Exception as error:  # for a damaged file openpyxl raises whatever its zip and XML readers do
        raise ValueError(f"{path}: not an Excel file: {' '.join(str(error).split())[:200]}") from error


def _check_extent(path: Path, workbook: Workbook) -> None:
    """Raise ValueError for a cell so far from the others that reading all between would fill the memory."""
    for sheet in workbook.worksheets:
        if sheet.max_row * sheet.max_column > MAX_CELLS:
            last = f"{get_column_letter(sheet.max_column)}{sheet.max_row}"
            rule = f"at most {MAX_CELLS:,} cells are read; delete what stands beside the table, or save it as .csv"
            raise ValueError(f"{path}: the sheet {sheet.title!r} extends to {last}, and {rule}")


def _check_formulas(path: Path, values: Workbook) -> None:
    """Raise ValueError for a formula without a value: other programs than Excel save formulas alone.

    One whose value is an empty text has that text's type.
    """
    for sheet in _open(path, values=False).worksheets:
        for cell in (cell for row in sheet.rows for cell in row if getattr(cell, "data_type", "") == TYPE_FORMULA):
            found = values[sheet.title][cell.coordinate]
            if found.value is None and found.data_type == TYPE_NUMERIC:
                rule = "a formula without a value; open and save the file in Excel or LibreOffice, or save it as .csv"
                raise ValueError(f"{path}, cell {cell.coordinate}: {rule}")


def _fill_merged(path: Path, sheet: Worksheet) -> None:
    """Give the cells of each block of merged rows the block's value."""
    for block in list(sheet.merged_cells.ranges):
        value = sheet.cell(block.min_row, block.min_col).value
        if value is not None and block.max_col > block.min_col:
            rule = "merged over several columns; unmerge them, and remove a title above the header"
            raise ValueError(f"{path}: the cells {block.coord} are {rule}")
        sheet.unmerge_cells(block.coord)
        for row in range(block.min_row, block.max_row + 1):
            sheet.cell(row, block.min_col).value = value
