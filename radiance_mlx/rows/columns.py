"""Which columns of a table, or keys of a row, hold what: as somebody maps them, or by their usual names. Pure."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import InvalidRequest
from .forms import FORMS, keys_of

#: names that columns of a question and its answer have, in lower case, likeliest first
PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
    ("input", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("query", "response"),
)
#: what an instruction is about
ABOUT = ("input", "context")
#: what may be mapped, and of it what may be left empty, and what is JSON where it is a text
TARGETS = (
    "input",
    "output",
    "prompt",
    "completion",
    "instruction",
    "system",
    "text",
    "messages",
    "conversations",
    "tools",
)
MAY_BE_EMPTY = {("instruction", "input"), ("instruction", "system"), ("conversations", "system")}
JSON = ("messages", "conversations", "tools")
HINT = "Like this: --map input=question,output=answer. On the left stands one of: " + ", ".join(TARGETS) + "."

_BETWEEN = re.compile(rf",(?=\s*(?:{'|'.join(TARGETS)})\s*=)")


class ColumnMap:
    """From a row as it was found to a row in one of the known forms; `columns` are those that are read.

    A column `a.b.0` is, where there is none of that name, the first of the list `b` in `a`. Raises `InvalidRequest`
    if the targets are not those of one form.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._columns = dict(columns)
        self._key = _deciding(self._columns)

    def __str__(self) -> str:
        return ",".join(f"{target}={column}" for target, column in self._columns.items())

    @property
    def columns(self) -> list[str]:
        return list(self._columns.values())

    def row(self, found: Any) -> dict[str, Any]:
        """The mapped row. Raises `InvalidRequest` if a column is not there, or is no JSON where it must be."""
        if not isinstance(found, Mapping):
            raise InvalidRequest("an example must be an object")
        row: dict[str, Any] = {}
        for target, column in self._columns.items():
            value = _value(found, column, target)
            if value in (None, "") and (self._key, target) in MAY_BE_EMPTY:
                continue
            row[target] = value
        return row


def parse_map(texts: Iterable[str]) -> ColumnMap | None:
    """`["input=question,output=answer"]`; None if nothing is said. Raises `InvalidRequest`."""
    columns: dict[str, str] = {}
    for text in texts:
        for part in _BETWEEN.split(text):
            target, equals, column = (piece.strip() for piece in part.partition("="))
            if target not in TARGETS or not equals or not column:
                raise InvalidRequest(f"--map: {part.strip() or 'an empty text'!r} maps nothing known.", HINT)
            if target in columns:
                raise InvalidRequest(f"--map: {target} is mapped twice.", HINT)
            columns[target] = column
    return ColumnMap(columns) if columns else None


def find_map(names: Sequence[str]) -> ColumnMap:
    """Columns by their usual names, in any case. Raises `InvalidRequest` if none, or more than one way, is found."""
    found = _candidates({name.strip().lower(): name for name in reversed(names)})
    there = ", ".join(name or "(without a name)" for name in names) or "none"
    if not found:
        raise InvalidRequest(
            f"No column is known by its name; there are: {there}.",
            f"Say what they hold. {HINT}",
            {"columns": list(names)},
        )
    if len(found) > 1:
        ways = " or ".join(f"--map {','.join(f'{k}={v}' for k, v in way.items())}" for way in found)
        raise InvalidRequest(
            f"The columns can be read in {len(found)} ways; there are: {there}.",
            f"Say which: {ways}",
            {"columns": list(names)},
        )
    return ColumnMap(found[0])


def _candidates(there: Mapping[str, str]) -> list[dict[str, str]]:
    def beside(*names: str) -> dict[str, str]:
        return {name: there[name] for name in names if name in there}

    found = []
    if "messages" in there:
        found.append({"messages": there["messages"], **beside("tools")})
    if "conversations" in there:
        found.append({"conversations": there["conversations"], **beside("system", "tools")})
    pairs = [(asked, answer) for asked, answer in PAIRS if asked in there and answer in there]
    instructed = [pair for pair in pairs if pair[0] == "instruction"]
    for asked, answer in pairs:
        if asked == "instruction":
            about = next((there[name] for name in ABOUT if name in there), None)
            way = {"instruction": there[asked], **({"input": about} if about else {}), "output": there[answer]}
            found.append({**way, **beside("system")})
        elif not (instructed and asked == "input"):  # which is what the instruction is about
            found.append({"input": there[asked], "output": there[answer]})
    if "text" in there:
        found.append({"text": there["text"]})
    return found


def _deciding(columns: Mapping[str, str]) -> str:
    """The key that tells the form of these targets."""
    key = next((key for key in FORMS if key in columns), None)
    if key is None:
        raise InvalidRequest(f"--map: {', '.join(columns)} alone is no example.", HINT)
    _, form = FORMS[key]
    fields = keys_of(form)
    if missing := [name for name, field in fields.items() if field.is_required() and name not in columns]:
        raise InvalidRequest(f"--map: {' and '.join(columns)} needs {' and '.join(missing)} too.", HINT)
    if strange := [name for name in columns if name not in fields]:
        raise InvalidRequest(f"--map: {', '.join(strange)} does not go with {key}.", HINT)
    return key


def _value(row: Mapping[str, Any], column: str, target: str) -> Any:
    value = _at(row, column)
    if target in JSON:
        try:
            return json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{column}: is no JSON: {error}") from None
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


def _at(row: Mapping[str, Any], column: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            there = ", ".join(map(str, row)) or "none"
            raise InvalidRequest(f"there is no {column}; it has: {there}")
    return value
