"""JSON files become records: an array from the text of the file, JSON Lines line by line."""

import difflib
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import TextIO

MAX_BYTES_IN_MEMORY = 500_000_000  # of a file that is not read line by line
PACKED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")  # first bytes
UTF_16 = (b"\xff\xfe", b"\xfe\xff", b"[\0", b"\0[", b"{\0", b"\0{")  # first bytes: its mark, or a bracket
SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Flaw:
    """Takes the place of a record that is ambiguous, or of a broken line, and says why."""

    reason: str


def iter_json(path: Path) -> Iterator:
    """Yield the records of a JSON array or a JSON Lines file, in UTF-8 with or without a byte order mark.

    The first character tells the two apart. A `Flaw` takes the place of a record with a duplicate key, NaN or a number
    that is too large, and in JSON Lines also of a broken line.

    Raises:
        ValueError: not UTF-8, not JSON (with record, line and column), no records, one value that is not a list, or a
            file of over `MAX_BYTES_IN_MEMORY` that is not JSON Lines under a name in .jsonl.
    """
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        check_not_packed(path, file.buffer.peek(4))
        if file.buffer.peek(2)[:2] in UTF_16:
            raise ValueError(f"{path}: not UTF-8, most likely UTF-16; save the file as UTF-8")
        try:
            yield from _read(file, path)
        except UnicodeDecodeError as error:
            place = file.buffer.tell() - len(error.object) + error.start
            raise ValueError(f"{path}: not UTF-8 at byte {place}; save the file as UTF-8") from error


def check_not_packed(path: Path, start: bytes) -> None:
    """Raise ValueError for a file whose first bytes are those of an archive or of a compressed file."""
    if start.startswith(PACKED):
        raise ValueError(f"{path}: is compressed, or an archive; unpack it first")


def _read(file: TextIO, path: Path) -> Iterator:
    while (first := file.read(1)).isspace():
        pass
    if not first:
        raise ValueError(f"{path}: the file is empty")
    file.seek(0)
    if path.suffix.lower() == ".jsonl" and first != "[":
        yield from _read_lines(file)
        return
    if (size := path.stat().st_size) > MAX_BYTES_IN_MEMORY:
        rule = f"at most {MAX_BYTES_IN_MEMORY:,}; save it as JSON Lines, one record a line, under a name in .jsonl"
        raise ValueError(f"{path}: {size:,} bytes, {rule}")
    text = file.read()
    if first == "[":
        yield from _read_array(text, path)
    else:
        _check_first_line(text, path)
        yield from _read_lines(io.StringIO(text, newline="\n"))


def _read_array(text: str, path: Path) -> Iterator:
    decoder, number, line, counted = _Decoder(), 0, 1, 0
    sign, at = ",", _skip_space(text, text.index("[") + 1)
    if text[at : at + 1] == "]":
        raise ValueError(f"{path}: contains no records")
    try:
        while sign == ",":
            value, end = decoder.decode_at(text, at)
            line, counted = line + text.count("\n", counted, end), end
            yield Flaw(f"line {line}: {decoder.flaws[0]}") if decoder.flaws else value
            number, at = number + 1, _skip_space(text, end)
            if (sign := text[at : at + 1]) not in (",", "]") or not sign:
                raise JSONDecodeError("Expecting ',' delimiter", text, at)
            at = _skip_space(text, at + 1)
        if at < len(text):
            raise JSONDecodeError("Extra data", text, at)
    except JSONDecodeError as error:
        raise ValueError(f"{path}, record {number}, {_describe_error(error, error.lineno)}") from error


def _check_first_line(text: str, path: Path) -> None:
    """Raise ValueError for the text of a .json file that is neither an array nor JSON Lines."""
    try:
        value, end = _Decoder().decode_at(text, _skip_space(text, 0))
        if (following := _skip_space(text, end)) == len(text):
            raise ValueError(f"{path}: expected a list of records, found {describe(value)}")
        if "\n" not in text[end:following]:
            raise JSONDecodeError("Extra data", text, following)
    except JSONDecodeError as error:
        raise ValueError(f"{path}, {_describe_error(error, error.lineno)}") from error


def _read_lines(file: TextIO) -> Iterator:
    decoder = _Decoder()
    for number, line in enumerate(file, start=1):
        if (start := _skip_space(line, 0)) == len(line):
            continue
        try:
            value, end = decoder.decode_at(line, start)
            if (end := _skip_space(line, end)) < len(line):
                raise JSONDecodeError("Extra data", line, end)
            yield Flaw(f"line {number}: {decoder.flaws[0]}") if decoder.flaws else value
        except JSONDecodeError as error:
            yield Flaw(_describe_error(error, number))


def _skip_space(text: str, at: int) -> int:
    return SPACE.match(text, at).end()


def _describe_error(error: JSONDecodeError, line: int) -> str:
    return f"line {line}, column {error.colno}: not JSON: {error.msg}"


class _Decoder(json.JSONDecoder):
    """Decodes values and keeps in `flaws` why the last one is ambiguous."""

    def __init__(self):
        self.flaws = []
        super().__init__(
            object_pairs_hook=self._make_object,
            parse_float=self._parse_float,
            parse_constant=lambda name: self.flaws.append(f"{name} is not a JSON value"),
        )

    def decode_at(self, text: str, at: int) -> tuple:
        """Return the value that starts at `at`, and where it ends; raise JSONDecodeError."""
        self.flaws.clear()
        try:
            return self.raw_decode(text, at)
        except RecursionError as error:
            raise JSONDecodeError("nested too deeply", text, at) from error
        except JSONDecodeError:
            raise
        except ValueError as error:  # a whole number of thousands of digits
            raise JSONDecodeError(f"a number of over {sys.get_int_max_str_digits():,} digits", text, at) from error

    def _make_object(self, pairs: list[tuple]) -> dict:
        value = dict(pairs)
        if len(value) < len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            self.flaws.append(f"duplicate key {key!r:.60}")
        return value

    def _parse_float(self, digits: str) -> float:
        if math.isinf(value := float(digits)):
            self.flaws.append(f"the number {digits:.60} is too large")
        return value


def describe(value) -> str:
    """Return a JSON value's type, and a short value itself, for an error message."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    name = names.get(type(value), "a number")
    if isinstance(value, dict):
        return f"{name} with the keys {[key[:40] for key in sorted(value)[:5]]}"
    return f"{name} {value!r}" if isinstance(value, str | int | float) and len(str(value)) <= 60 else name


def shorten(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + "..."


def suggest(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message that names the nearest of the known names, whatever its case, or ""."""
    folded = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word.casefold(), folded, n=1)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""
