"""JSON files read piece by piece: records come one by one, so that a file may be larger than the memory."""

import codecs
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PIECE = 1 << 22  # bytes read at a time
MAX_RECORD = 1 << 26  # characters; no question and answer is longer, and it has to fit into the memory
CUT = 16  # characters; an error so near the end of what was read may be no error: a word or number can go on
SPACE, SPACE_IN_LINE = re.compile(r"[ \t\n\r]*"), re.compile(r"[ \t\r]*")


@dataclass(frozen=True)
class Flaw:
    """Stands in the place of a record that JSON's rules leave unclear, or of a broken line, and says why."""

    reason: str


class _JsonError(ValueError):
    """What breaks JSON's rules, and in which line and column."""


def iter_json(path: Path) -> Iterator:
    """Yield the values of a JSON array, or of a JSON Lines file, in UTF-8 with or without a byte order mark.

    The first character tells the two apart. In the place of a value with a key that stands twice, NaN or a number
    without bounds comes a `Flaw`; in JSON Lines also in the place of a broken line.

    Raises:
        ValueError: not UTF-8, not JSON (with record, line and column), no records, or one value that is no list.
    """
    with path.open("rb") as file:
        text = _Text(path, file)
        if not (first := text.peek()):
            raise ValueError(f"{path}: the file is empty")
        yield from _array(text) if first == "[" else _lines(text)


def _array(text: "_Text") -> Iterator:
    number, sign = 0, ","
    text.at += 1
    if text.peek() == "]":
        raise ValueError(f"{text.path}: holds no records")
    try:
        while sign == ",":
            yield text.value()
            number += 1
            if (sign := text.peek()) not in (",", "]"):
                raise text.error("Expecting ',' delimiter")
            text.at += 1
        if text.peek():
            raise text.error("Extra data")
    except _JsonError as error:
        raise ValueError(f"{text.path}, record {number}, {error}") from error


def _lines(text: "_Text") -> Iterator:
    """Yield a record a line. Under the name .json one value alone is no list, and a broken first one no line."""
    sure = text.path.suffix == ".jsonl"
    while text.peek():
        try:
            value = text.value()
            if text.peek(SPACE_IN_LINE) not in ("", "\n"):
                raise text.error("Extra data")
        except _JsonError as error:
            if not sure:
                raise ValueError(f"{text.path}, {error}") from error
            value = Flaw(str(error))
            text.skip_line()
        if not sure and not text.peek():
            raise ValueError(f"{text.path}: expected a list of records, found {describe(value)}")
        sure = True
        yield value


class _Text:
    """A file's text, of which only the part around the next value is held.

    Attributes:
        path: of the file, for errors.
        at: place in the held text that the next value or sign is expected at.
    """

    def __init__(self, path: Path, file):
        self.path, self.at = path, 0
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8")()
        self._held, self._line, self._column, self._num_bytes = "", 1, 1, 0  # line and column of the held text's start
        self._started, self._flaws = False, []
        self._json = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def peek(self, space: re.Pattern = SPACE) -> str:
        """Go on to the next character that is no space and return it, "" at the end."""
        while True:
            self.at = space.match(self._held, self.at).end()
            if self.at < len(self._held):
                return self._held[self.at]
            if not self._read_on():
                return ""

    def value(self):
        """Return the next value, or a `Flaw`, and go on behind it."""
        self.peek()
        while True:
            self._flaws.clear()
            try:
                value, end = self._json.raw_decode(self._held, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._held) - CUT
                if cut and self._read_on():
                    continue
                raise self.error(error.msg, error.pos) from error
            except RecursionError as error:
                raise self.error("nested too deeply") from error
            except ValueError as error:  # a whole number of thousands of digits
                raise self.error(str(error)) from error
            if end >= len(self._held) - CUT and self._read_on():
                continue
            flaws, self.at = self._flaws, end
            return Flaw(f"line {self._where(end)[0]}: {flaws[0]}") if flaws else value

    def skip_line(self) -> None:
        while (end := self._held.find("\n", self.at)) < 0:
            self.at = len(self._held)
            if not self._read_on():
                return
        self.at = end + 1

    def error(self, reason: str, at: int | None = None) -> _JsonError:
        line, column = self._where(self.at if at is None else at)
        return _JsonError(f"line {line}, column {column}: not JSON: {reason}")

    def _where(self, at: int) -> tuple[int, int]:
        """Return the line and column, from 1, of a place in the held text."""
        newline = self._held.rfind("\n", 0, at)
        if newline < 0:
            return self._line, self._column + at
        return self._line + self._held.count("\n", 0, at), at - newline

    def _read_on(self) -> bool:
        """Let go of what is parsed and read more, twice as much for a long value; return whether there was more."""
        left = len(self._held) - self.at
        if left > MAX_RECORD:
            raise self.error(f"a value of over {MAX_RECORD:,} characters")
        data = self._file.read(max(PIECE, left))
        text = self._decode(data)
        if not data:
            return False
        self._line, self._column = self._where(self.at)
        self._held, self.at = self._held[self.at :] + text, 0
        return True

    def _decode(self, data: bytes) -> str:
        if self._num_bytes == 0 and b"\0" in data[:2]:
            raise ValueError(f"{self.path}: not UTF-8, most likely UTF-16; save the file as UTF-8")
        pending = self._decoder.getstate()[0]  # of a character whose other bytes come now
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            place = self._num_bytes - len(pending) + error.start
            raise ValueError(f"{self.path}: not UTF-8 at byte {place}; save the file as UTF-8") from error
        self._num_bytes += len(data)
        if self._started or not text:
            return text
        self._started = True
        return text.removeprefix("\ufeff")

    def _object(self, pairs: list[tuple]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            self._flaws.append(f"the key {twice!r:.60} stands twice")
        return found

    def _constant(self, name: str) -> None:
        self._flaws.append(f"{name} is not a JSON value")

    def _float(self, digits: str) -> float:
        if math.isinf(value := float(digits)):
            self._flaws.append(f"the number {digits:.60} is too large")
        return value


def describe(value) -> str:
    """Name a JSON value's type, and a short value itself, for an error message."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    name = names.get(type(value), "a number")
    if isinstance(value, dict):
        return f"{name} with the keys {[key[:40] for key in sorted(value)[:5]]}"
    return f"{name} {value!r}" if isinstance(value, str | int | float) and len(str(value)) <= 60 else name
