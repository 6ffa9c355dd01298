"""Rows from files: JSONL, JSON, CSV, TSV. Each row comes with its place, or with what is wrong there.

JSONL and tables are read row by row; a JSON document is read whole. What is wrong with the file as such raises
`InvalidRequest`; what is wrong with a row is that row's fault, and the others are read on.
"""

import codecs
import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, BinaryIO

from ..errors import InvalidRequest
from .forms import FORMS
from .lines import not_json
from .turns import loads

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv"}
FIELD_LIMIT = 2**27  # characters of one field of a table
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class Row:
    """One row as it was found, or the `fault` of what stands at that place."""

    place: str
    value: Any = None
    fault: str = ""


@dataclass
class Source:
    """Rows to be read once. `columns` are a table's; `tags` come with some files; `left_out` are keys beside the rows;
    `remarks` are for people.
    """

    name: str
    kind: str
    rows: Iterator[Row]
    columns: list[str] | None = None
    tags: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    narrow: Callable[[list[str]], Iterator[Row]] | None = None  # the rows with these columns only


def kind_of(name: str) -> str:
    """By the name's ending; JSONL (or JSON) for any other."""
    return KINDS.get(PurePath(name).suffix.lower(), "jsonl")


def read(stream: BinaryIO, name: str, kind: str | None = None, encoding: str = "utf-8") -> Source:
    """The rows of `stream`; `kind` is one of jsonl, json, csv, tsv, or None for what the name says.

    Raises `InvalidRequest` for an encoding that is not known, and for a file that cannot be read at all.
    """
    kind = kind or kind_of(name)
    lines = _lines(stream, name, _codec(encoding))
    if kind in ("csv", "tsv"):
        return _table(lines, name, kind)
    return _documents(lines, name, kind)


# --- lines -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    number: int
    text: str
    fault: str = ""


def _codec(encoding: str) -> str:
    try:
        return codecs.lookup(encoding).name
    except LookupError:
        raise InvalidRequest(f"There is no encoding {encoding!r}.", "For instance: utf-8, latin-1, utf-16.") from None


def _lines(stream: BinaryIO, name: str, encoding: str) -> Iterator[_Line]:
    """The lines, with their ends; what is no text in one is that line's fault."""
    start = stream.read(4)
    mark = next((kind for bom, kind in _MARKS.items() if start.startswith(bom)), None)
    if mark and encoding == "utf-8":
        raise InvalidRequest(f"{name} is {mark.upper()}, not UTF-8.", f"Say so: --encoding {mark}")
    rest = _Again(start, stream)
    wide = encoding.startswith(("utf-16", "utf-32"))
    raw: Iterator[Any] = _decoded(rest, name, encoding) if wide else rest.lines()
    for number, line in enumerate(raw, 1):
        if isinstance(line, str):
            yield _Line(number, line)
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8) if encoding == "utf-8" else line
        fault = ""
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError as error:
            fault = f"not {encoding.upper()}: byte 0x{line[error.start]:02x} at {error.start}" + (
                ": save the file as UTF-8, or say --encoding latin-1" if encoding == "utf-8" else ""
            )
            text = line.decode(encoding, errors="replace")
        if not fault and "\0" in text:
            fault = "holds a NUL byte: is this a text file, or UTF-16 (--encoding utf-16)?"
        yield _Line(number, text, fault)


class _Again:
    """A stream of which the first bytes have been read already."""

    def __init__(self, start: bytes, rest: BinaryIO) -> None:
        self.start, self.rest = start, rest

    def lines(self) -> Iterator[bytes]:
        *whole, last = self.start.split(b"\n")
        for line in whole:
            yield line + b"\n"
        following = iter(self.rest)
        if joined := last + next(following, b""):
            yield joined
        yield from following


def _decoded(again: _Again, name: str, encoding: str) -> Iterator[str]:
    """In an encoding whose line ends are no single bytes."""
    decoder = codecs.getincrementaldecoder(encoding)()
    text = ""
    try:
        for chunk in itertools.chain([again.start], iter(lambda: again.rest.read(1 << 16), b"")):
            *lines, text = (text + decoder.decode(chunk)).split("\n")
            yield from (line + "\n" for line in lines)
        text += decoder.decode(b"", final=True)
    except UnicodeError as error:
        raise InvalidRequest(f"{name} is not {encoding.upper()}: {error}.", "Name its --encoding.") from None
    if text:
        yield text


# --- JSON ------------------------------------------------------------------------------------------------


def _documents(lines: Iterator[_Line], name: str, kind: str) -> Source:
    """One JSON value a line, or one over all lines: a list, one example, or an object with a list inside."""
    first = next((line for line in lines if line.text.strip() or line.fault), None)
    if first is None:
        return Source(name, kind, iter(()))
    start = first.text.lstrip()[:1]
    alone = _parsed(first.text)
    if isinstance(alone, dict) and not _envelope(alone):
        return Source(name, "jsonl", _by_line(itertools.chain([first], lines)))
    if start not in ("[", "{"):
        return Source(name, "jsonl", _by_line(itertools.chain([first], lines)))
    kept = [first, *lines]
    value = _parsed("".join(line.text for line in kept)) if not any(line.fault for line in kept) else None
    if isinstance(value, list | dict):
        return _whole(value, name)
    if kind == "json" or start == "[":
        return Source(name, "json", iter([_why_no_json(kept)]))
    return Source(name, "jsonl", _by_line(kept))


def _by_line(lines: Iterable[_Line]) -> Iterator[Row]:
    for line in lines:
        place = f"line {line.number}"
        if line.fault:
            yield Row(place, fault=line.fault)
        elif line.text.strip():
            try:
                yield Row(place, loads(line.text))
            except (ValueError, RecursionError) as error:
                yield Row(place, fault=not_json(error))


def _whole(value: Any, name: str) -> Source:
    if isinstance(value, list):
        return Source(name, "json", _numbered(value, "example"))
    key = _envelope(value)
    if not key:
        return Source(name, "json", iter([Row("example 1", value)]))
    source = Source(name, "json", _numbered(value[key], "example"))
    if key == "examples":
        source.tags = _tags(value.get("tags"))
    source.left_out = [k for k in value if k not in (key, *(["tags"] if key == "examples" else []))]
    if source.left_out:
        source.remarks.append(f"the rows are those of {key!r}; left out: {', '.join(source.left_out)}")
    return source


def _tags(value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        raise InvalidRequest("tags must be a list of texts.")
    return list(value)


def _envelope(value: dict[str, Any]) -> str:
    """The key of the one list in an object that is no example itself, else ""."""
    if any(key in FORMS for key in value):
        return ""
    lists = [key for key, inner in value.items() if isinstance(inner, list)]
    if "examples" in value:
        if "examples" not in lists:
            raise InvalidRequest("examples must be a list.")
        return "examples"
    return lists[0] if len(lists) == 1 else ""


def _numbered(values: Iterable[Any], word: str) -> Iterator[Row]:
    return (Row(f"{word} {i}", value) for i, value in enumerate(values, 1))


def _parsed(text: str) -> Any:
    try:
        return loads(text)
    except (ValueError, RecursionError):
        return None


def _why_no_json(lines: list[_Line]) -> Row:
    if bad := next((line for line in lines if line.fault), None):
        return Row(f"line {bad.number}", fault=bad.fault)
    try:
        loads("".join(line.text for line in lines))
    except json.JSONDecodeError as error:
        return Row(f"line {error.lineno}", fault=not_json(error))
    except (ValueError, RecursionError) as error:
        return Row("line 1", fault=not_json(error))
    return Row("line 1", fault="not JSON: neither a list nor an object")


# --- tables ----------------------------------------------------------------------------------------------


def _table(lines: Iterator[_Line], name: str, kind: str) -> Source:
    """A header, then a row for each record; a quoted field may hold line ends."""
    first = next((line for line in lines if line.text.strip() or line.fault), None)
    if first is None:
        return Source(name, kind, iter(()))
    if first.fault:
        raise InvalidRequest(f"{name}, line {first.number}: {first.fault}.", "That line is the table's header.")
    delimiter = "\t" if kind == "tsv" else ","
    if kind == "csv" and "," not in first.text:
        delimiter = next((mark for mark in (";", "\t") if mark in first.text), ",")
    csv.field_size_limit(FIELD_LIMIT)
    records = _Records(itertools.chain([first], lines), delimiter)
    try:
        header = [column.strip() for column in next(records.reader)]
    except (csv.Error, StopIteration) as error:
        raise InvalidRequest(f"{name}, line {first.number}: no header of a table: {error}.") from None
    twice = sorted({column for column in header if column and header.count(column) > 1})
    if twice or not any(header):
        what = f"has more than one column {', '.join(twice)}" if twice else "has a header without names"
        raise InvalidRequest(f"{name} {what}.", "The first line must name each column once.")
    source = Source(name, kind, records.rows(header), columns=header)
    if kind == "csv" and delimiter != ",":
        source.remarks.append(f"columns are separated by {'semicolons' if delimiter == ';' else 'tabs'}")
    return source


class _Records:
    """A table's records, each with the line on which it begins."""

    def __init__(self, lines: Iterable[_Line], delimiter: str) -> None:
        self._lines, self._faults = lines, dict[int, str]()
        self._number = 0
        self.reader = csv.reader(self._texts(), delimiter=delimiter, strict=True)

    def _texts(self) -> Iterator[str]:
        for line in self._lines:
            self._number = line.number
            if line.fault:
                self._faults[line.number] = line.fault
            yield line.text

    def rows(self, header: list[str]) -> Iterator[Row]:
        while True:
            begin = self._number + 1
            try:
                fields = next(self.reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(f"line {begin}", fault=f"no row of a table: {error}")
                continue
            bad = [n for n in range(begin, self._number + 1) if n in self._faults]
            if bad:
                yield Row(f"line {bad[0]}", fault=self._faults[bad[0]])
            elif fields and len(fields) != len(header):
                count = f"{len(fields)} field{'s' * (len(fields) != 1)}"
                yield Row(f"line {begin}", fault=f"{count}, the header has {len(header)}")
            elif fields:
                yield Row(f"line {begin}", dict(zip(header, fields, strict=True)))
