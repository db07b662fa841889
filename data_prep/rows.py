"""A row of a table becomes a record by its mapping."""

import ast
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from .mapping import PLACEHOLDER, Label, Mapping, SkinType
from .reading import Flaw, suggest
from .tables import Rows, join_tables, read_table

MAX_NAMED = 12  # columns in an error message


def read_rows(path: Path, mapping: Mapping) -> Rows:
    """Return a table's rows, joined by the mapping; see `rows_of`."""
    rows = read_table(path)
    if mapping.join is not None:
        rows = join_tables(rows, path.parent / mapping.join.file, mapping.join.by)
    return rows_of(rows, mapping, path)


def rows_of(rows: Rows, mapping: Mapping, path: Path) -> Rows:
    """Return rows that were read from `path` under the mapping's names of columns, its markers of missing cells as "".

    A column is also found under a name that differs in case, white space, `_` or `-` alone.

    Raises:
        ValueError: a column that the mapping names is not there; the message suggests the nearest.
    """
    columns = next((list(row) for row in rows if not isinstance(row, Flaw)), None)
    if columns is None:
        return rows
    names = _match_columns(columns, mapping, path)
    added = {column: "" for column in mapping.optional if column not in names.values()}
    rows = [row if isinstance(row, Flaw) else {**added, **_rename(row, names, mapping)} for row in rows]
    _link_groups([row for row in rows if not isinstance(row, Flaw)], mapping.group)
    return rows


def _link_groups(rows: list[dict], columns: list[str]) -> None:
    """Give a row without a patient, in the first column, that of another row with the same lesion, in a later one."""
    for position, column in enumerate(columns[1:], start=1):
        known = {}
        for row in rows:
            if row[column] and (group := _first(row, columns[:position])):
                known.setdefault(row[column], group)
        for row in rows:
            if row[column] in known and not _first(row, columns[:position]):
                row[columns[0]] = known[row[column]]


def _rename(row: dict, names: dict[str, str], mapping: Mapping) -> dict[str, str]:
    return {name: "" if row[column] in mapping.missing else row[column] for column, name in names.items()}


def _match_columns(columns: list[str], mapping: Mapping, path: Path) -> dict[str, str]:
    """Return the mapping's name of each column that it names; all others keep theirs."""
    names = {column: column for column in columns}
    needed = [*mapping.columns(), *mapping.placeholders()]
    for wanted in [*needed, *(name for choice in mapping.texts.values() for name in choice)]:
        if wanted not in columns:
            alike = [column for column in columns if names[column] == column and _fold(column) == _fold(wanted)]
            names.update({column: wanted for column in alike if len(alike) == 1})
    there = {*names.values(), *mapping.optional}
    for wanted in needed:
        if wanted not in there:
            also = f"; there are {', '.join(map(repr, columns[:MAX_NAMED]))}"
            raise ValueError(f"{path}: no column {wanted!r}{suggest(wanted, columns) or also}")
    for text, wanted in mapping.texts.items():
        if not there.intersection(wanted):
            raise ValueError(f"{path}: none of the columns {wanted} for {text!r}{suggest(wanted[0], columns)}")
    return names


def _fold(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def make_record(row: dict, mapping: Mapping) -> tuple[dict, str | None]:
    """Return a row as the input of `records.parse_record`, and the reason why the mapping skips it, or None.

    Raises:
        ValueError: a code that the mapping does not know, several diagnoses at once, or an image column is empty.
    """
    label = _label(row, mapping.label) if mapping.label else ""
    values = {**row, **{name: _first(row, columns) for name, columns in mapping.texts.items()}}
    values |= {"label": label} if mapping.label else {}
    images = [name for name in (_fill(template, row) for template in mapping.images) if name]
    sample_id = row[mapping.id] if mapping.id else ", ".join(images)
    reason = _reason_to_skip(row, mapping, values)
    record = {
        "id": sample_id,
        "images": images,
        "label": label or None,
        "group": _group(row, mapping) or None,
        "skin_type": _skin_type(row, mapping.skin_type) or None,
        **{name: _first(row, getattr(mapping, name)) or None for name in ("age", "sex", "site", "split")},
        "question": "" if reason else _fill(_choose(mapping.questions, sample_id, values), values),
        "answer": _fill(mapping.answer, values),
    }
    if reason is None and len(images) < len(mapping.images):
        _check_images(row, mapping, images)
    return record, reason


def _check_images(row: dict, mapping: Mapping, images: list[str]) -> None:
    empty = [column for column in mapping.image_columns() if not row[column]]
    if lacking := [column for column in empty if column not in mapping.optional]:
        raise ValueError(f"column {lacking[0]!r}: empty, and the mapping makes an image's name from it")
    if not images:
        raise ValueError(f"the columns {', '.join(empty)} are empty, and the mapping takes the images from them")


def _reason_to_skip(row: dict, mapping: Mapping, values: dict) -> str | None:
    skip = mapping.skip
    if skip and re.search(skip.matching, row[skip.column]):
        return f"{skip.column} is {row[skip.column]!r}"
    empty = [name for name in PLACEHOLDER.findall(mapping.answer) if not values.get(name)]
    return f"no {empty[0]} to answer with" if empty else None


def _fill(template: str, values: dict) -> str:
    """Replace the `{placeholders}`; "" when the value of one is empty."""
    if "{" not in template:
        return template
    if any(not values.get(name) for name in PLACEHOLDER.findall(template)):
        return ""
    return PLACEHOLDER.sub(lambda match: values[match.group(1)], template)


def _first(row: dict, columns: Iterable[str]) -> str:
    return next((row[column] for column in columns if row.get(column)), "")


def _label(row: dict, spec: Label) -> str:
    if spec.one_hot:
        return _one_hot(row, spec.names)
    text = _first(row, spec.columns)
    if spec.pick == "heaviest" and text:
        text = _heaviest(text)
    for old, new in spec.replace.items():
        text = text.replace(old, new)
    return _decode(text.strip(), spec.names, spec.columns)


def _one_hot(row: dict, names: dict[str, str]) -> str:
    cells = {column: row[column].lower() for column in names}
    for column, cell in cells.items():
        if cell not in ("", "0", "1", "false", "true"):
            raise ValueError(f"column {column!r}: expected 0 or 1, found {row[column]!r:.60}")
    positive = [column for column, cell in cells.items() if cell in ("1", "true")]
    if len(positive) > 1:
        raise ValueError(f"the columns {', '.join(positive)} are 1 at once")
    return names[positive[0]] if positive else ""


def _decode(code: str, names: dict[str, str], columns: list[str]) -> str:
    """Return the name of a code, or a name itself, whatever their case; the code when the mapping lists no names."""
    if not code or not names:
        return code
    if code in names:
        return names[code]
    folded = {_fold(name): name for name in names.values()} | {_fold(key): name for key, name in names.items()}
    if _fold(code) not in folded:
        raise ValueError(f"column {columns[0]!r}: {code!r:.60} is not one of {', '.join(names)}")
    return folded[_fold(code)]


def _heaviest(text: str) -> str:
    """Return the name with the largest weight of a dictionary written in Python."""
    try:
        weights = ast.literal_eval(text)
        return max(weights, key=weights.get) if weights else ""
    except (ValueError, SyntaxError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise ValueError(f"expected a dictionary of weights, found {text[:60]!r}") from error


def _group(row: dict, mapping: Mapping) -> str:
    if pattern := mapping.group_pattern:
        match = re.search(pattern.matching, row[pattern.column])
        return next((part for part in match.groups() if part), "") if match else ""
    return _first(row, mapping.group)


def _skin_type(row: dict, spec: SkinType) -> str:
    """Return a Fitzpatrick type by its Roman numeral, or a value of another scale with the scale's name before it."""
    if name := _decode(_first(row, spec.columns), spec.names, spec.columns):
        return name
    return next((f"{scale} {row[column]}" for column, scale in spec.scales.items() if row.get(column)), "")


def _choose(questions: list[str], sample_id: str, values: dict) -> str:
    """Pick a wording by the sample's id, so that it does not depend on the order of the rows.

    Wordings with a placeholder that the row has nothing for are passed over.
    """
    filled = [question for question in questions if _fill(question, values)]
    if not filled:
        name = next(name for name in PLACEHOLDER.findall(questions[0]) if not values.get(name))
        raise ValueError(f"column {name!r}: empty, and no question can be asked without it")
    return filled[int(hashlib.sha256(str(sample_id).encode()).hexdigest(), 16) % len(filled)]
