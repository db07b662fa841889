"""Tables become records by a mapping: which columns are the attributes, and the wording of question and answer."""

import ast
import difflib
import hashlib
import re
from pathlib import Path

import pandas as pd

from common.yaml_files import read_yaml

MAPPINGS = Path(__file__).parent / "mappings"
TABLE_ENDINGS = (".csv", ".tsv", ".tab", ".parquet", ".jsonl")
MAPPING_KEYS = {
    *("source", "join", "id", "images", "group", "group_pattern", "label", "skin_type", "age", "sex", "site", "split"),
    *("texts", "missing", "skip", "optional", "questions", "answer"),
}
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


def shipped() -> list[str]:
    """Return the names of the mappings that come with the project."""
    return sorted(file.stem for file in MAPPINGS.glob("*.yaml"))


def load_mapping(name: str | Path) -> dict:
    """Return a mapping by the name of a shipped one ("ham10000") or the path of a YAML file.

    Raises:
        ValueError: no such mapping, not YAML, an unknown key, or a key that is missing.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else MAPPINGS / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"mapping: no file {name}; shipped are {', '.join(shipped())}")
    try:
        mapping = read_yaml(path, "mapping")
    except ValueError as error:
        raise ValueError(f"mapping {error}") from error
    for key in mapping:
        if key not in MAPPING_KEYS:
            raise ValueError(f"mapping {path}: unknown key {key!r}{suggest(str(key), MAPPING_KEYS)}")
    if missing := {"images", "questions", "answer"} - set(mapping):
        raise ValueError(f"mapping {path}: lacks {', '.join(sorted(missing))}")
    return mapping


def suggest(word: str, known) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def read_table(path: Path) -> pd.DataFrame:
    """Return a table with every cell as stripped text, "" where it is empty; `5.0` reads as `5`.

    Raises:
        FileNotFoundError, ValueError: no such file, an unknown ending, not a table, or empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"table: no file {path}")
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path).astype(object).fillna("").map(str)
        elif path.suffix == ".jsonl":
            table = pd.read_json(path, lines=True, dtype=False).astype(object).fillna("").map(str)
        else:
            separator = "\t" if path.suffix == ".tsv" else None  # None: detected, comma or tab
            options = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
            table = pd.read_csv(path, sep=separator, engine="python", **options)
    except (ValueError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a table: {' '.join(str(error).split())}") from error
    if table.empty:
        raise ValueError(f"{path}: has no rows")
    table.columns = [str(column).strip() for column in table.columns]
    return table.map(lambda cell: re.sub(r"^(-?\d+)\.0+$", r"\1", cell.strip()))


def read_rows(path: Path, mapping: dict) -> list[dict]:
    """Return a table's rows, joined by the mapping, with its markers of missing values as "".

    Raises:
        ValueError: a column that the mapping names is not there; the message suggests the nearest.
    """
    table = read_table(path)
    if "join" in mapping:
        table = _join(table, path.parent / mapping["join"]["file"], mapping["join"]["by"])
    return rows_of(table, mapping, path)


def rows_of(table: pd.DataFrame, mapping: dict, path: Path) -> list[dict]:
    """Return the rows of a table of texts that was read from `path`; see `read_rows`."""
    _check_columns(path, table, mapping)
    missing = {"", *map(str, mapping.get("missing", ()))}
    return [{c: "" if cell in missing else cell for c, cell in row.items()} for row in table.to_dict("records")]


def read_folders(root: Path) -> list[dict]:
    """Return a row for each file in a folder of class folders: its `path` from there and its `folder`."""
    files = sorted(path.relative_to(root) for path in root.rglob("[!.]*") if path.is_file())
    rows = [{"path": str(path), "folder": path.parts[-2]} for path in files if len(path.parts) > 1]
    if not rows:
        raise ValueError(f"{root}: expected a folder for each class, with images in it")
    return rows


def _join(table: pd.DataFrame, path: Path, key: str) -> pd.DataFrame:
    other = read_table(path)
    for name, side in (("table", table), (path.name, other)):
        if key not in side.columns:
            raise ValueError(f"{name}: no column {key!r} to join by{suggest(key, side.columns)}")
    added = [key, *(column for column in other.columns if column not in table.columns)]
    return table.merge(other[added], on=key, how="left", validate="many_to_one").fillna("")


def _columns_of(mapping: dict) -> list[str]:
    """Return the columns that a mapping names."""
    names = [name for template in mapping["images"] for name in PLACEHOLDER.findall(template)]
    label = mapping.get("label", {})
    lists = [mapping.get(name, []) for name in ("group", "age", "sex", "site", "split")]
    lists += [label.get("names", {}) if label.get("one_hot") else label.get("columns", [])]
    lists += [mapping.get("skin_type", {}).get("columns", []), mapping.get("skin_type", {}).get("scales", {})]
    single = [mapping.get("id"), mapping.get("skip", {}).get("column"), mapping.get("group_pattern", {}).get("column")]
    return [*names, *(column for columns in lists for column in columns), *(column for column in single if column)]


def _check_columns(path: Path, table: pd.DataFrame, mapping: dict) -> None:
    optional = set(mapping.get("optional", ()))
    for column in _columns_of(mapping):
        if column in table.columns:
            continue
        if column not in optional:
            near = suggest(column, table.columns)
            raise ValueError(f"{path}: no column {column!r}{near or f'; there are {list(table.columns)[:12]}'}")
        table[column] = ""
    for text, columns in mapping.get("texts", {}).items():
        if not set(columns) & set(table.columns):
            raise ValueError(f"{path}: none of the columns {columns} for {text!r}{suggest(columns[0], table.columns)}")


def make_record(row: dict, mapping: dict) -> tuple[dict, str | None]:
    """Return a row as the input of `records.parse_record`, and the reason why the mapping skips it, or None.

    Raises:
        ValueError: a code that the mapping does not know, or several diagnoses at once.
    """
    label = _label(row, mapping.get("label", {}))
    texts = {name: _first(row, columns) for name, columns in mapping.get("texts", {}).items()}
    values = {**row, **texts, "label": label}
    images = [name for name in (_fill(template, row) for template in mapping["images"]) if name]
    sample_id = row[mapping["id"]] if "id" in mapping else ", ".join(images)
    record = {
        "id": sample_id,
        "images": images,
        "label": label or None,
        "group": _group(row, mapping) or None,
        "skin_type": _skin_type(row, mapping.get("skin_type", {})) or None,
        **{name: _first(row, mapping.get(name, [])) or None for name in ("age", "sex", "site", "split")},
        "question": _fill(_choose(mapping["questions"], sample_id), values),
        "answer": _fill(mapping["answer"], values),
    }
    return record, _reason_to_skip(row, mapping, values)


def _reason_to_skip(row: dict, mapping: dict, values: dict) -> str | None:
    skip = mapping.get("skip")
    if skip and re.search(skip["matching"], row[skip["column"]]):
        return f"{skip['column']} is {row[skip['column']]!r}"
    empty = [name for name in PLACEHOLDER.findall(mapping["answer"]) if not values.get(name)]
    return f"no {empty[0]} to answer with" if empty else None


def _fill(template: str, values: dict) -> str:
    """Replace the `{placeholders}`; "" when the value of one is empty."""
    if any(not values.get(name) for name in PLACEHOLDER.findall(template)):
        return ""
    return PLACEHOLDER.sub(lambda match: values[match.group(1)], template)


def _first(row: dict, columns: list[str]) -> str:
    return next((row[column] for column in columns if row.get(column)), "")


def _label(row: dict, spec: dict) -> str:
    if spec.get("one_hot"):
        positive = [column for column in spec["names"] if row[column] == "1"]
        if len(positive) > 1:
            raise ValueError(f"the columns {', '.join(positive)} are 1 at once")
        return spec["names"][positive[0]] if positive else ""
    text = _first(row, spec.get("columns", []))
    if spec.get("pick") == "heaviest" and text:
        text = _heaviest(text)
    for old, new in spec.get("replace", {}).items():
        text = text.replace(old, new)
    return _decode(text, spec, spec.get("columns", []))


def _decode(code: str, spec: dict, columns: list[str]) -> str:
    """Return the name of a code; the code itself when the mapping lists no names."""
    if not code or "names" not in spec:
        return code
    if code not in spec["names"]:
        raise ValueError(f"column {columns[0]!r}: {code!r} is not one of {', '.join(spec['names'])}")
    return spec["names"][code]


def _heaviest(text: str) -> str:
    """Return the name with the largest weight of a dictionary written in Python."""
    try:
        weights = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"expected a dictionary of weights, found {text[:60]!r}") from error
    if not isinstance(weights, dict):
        raise ValueError(f"expected a dictionary of weights, found {text[:60]!r}")
    return max(weights, key=weights.get) if weights else ""


def _group(row: dict, mapping: dict) -> str:
    if pattern := mapping.get("group_pattern"):
        match = re.search(pattern["matching"], row[pattern["column"]])
        return next((part for part in match.groups() if part), "") if match else ""
    return _first(row, mapping.get("group", []))


def _skin_type(row: dict, spec: dict) -> str:
    """Return a Fitzpatrick type by its Roman numeral, or a value of another scale with the scale's name before it."""
    columns = spec.get("columns", [])
    if name := _decode(_first(row, columns), spec, columns):
        return name
    return next((f"{scale} {row[column]}" for column, scale in spec.get("scales", {}).items() if row.get(column)), "")


def _choose(questions: list[str], sample_id: str) -> str:
    """Pick a wording by the sample's id, so that it does not depend on the order of the rows."""
    return questions[int(hashlib.sha256(str(sample_id).encode()).hexdigest(), 16) % len(questions)]
