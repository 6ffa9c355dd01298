"""Examples from a file: JSONL or JSON, every row with its place, every bad row named at once."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .output import BadInput

SHAPES = "{input, output}, {prompt, completion}, {messages} or {text}"
SHOWN_FAULTS = 20


@dataclass(frozen=True)
class Row:
    """One example and where it stands, for messages."""

    place: str
    example: dict[str, Any]


def read_rows(file: str) -> tuple[list[Row], list[str]]:
    """The examples of `file` (`-` is stdin) and the tags it brings.

    Raises `BadInput` naming each bad line.
    """
    return parse_rows(_read(file), "stdin" if file == "-" else file)


def parse_rows(text: str, name: str) -> tuple[list[Row], list[str]]:
    """As `read_rows`, for text. A list, a single example or `{examples, tags}` as JSON; else one per line."""
    tags: list[str] = []
    faults: list[str] = []
    whole = _as_whole(text)
    if whole is None:
        found = _lines(text, faults)
    elif isinstance(whole, dict) and "examples" in whole:
        found = _numbered(whole["examples"])
        tags = [str(tag) for tag in whole.get("tags") or []]
    else:
        found = _numbered(whole if isinstance(whole, list) else [whole])
    faults += [f"{place}: {problem}" for place, value in found if (problem := problem_of(value))]
    if faults:
        raise _bad_lines(name, faults)
    if not found:
        raise BadInput(f"{name} holds no examples.", f"One JSON object a line: {SHAPES}.")
    return [Row(place, value) for place, value in found], tags


def problem_of(example: Any) -> str | None:
    """Why `example` has none of the shapes, or None. The service checks the rest."""
    if not isinstance(example, dict):
        return f"an example must be an object, not {_kind(example)}"
    for keys in (("input", "output"), ("prompt", "completion"), ("text",)):
        if any(key in example for key in keys):
            bad = [key for key in keys if not isinstance(example.get(key), str) or not example[key]]
            return f"{' and '.join(bad)} must be text that is not empty" if bad else None
    if "messages" in example:
        sound = isinstance(example["messages"], list) and example["messages"]
        return None if sound else "messages must be a list of {role, content}"
    return f"no known shape: it has the keys {', '.join(example) or '(none)'}"


def _read(file: str) -> str:
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8: {error.reason} at byte {error.start}.") from error
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}.") from error


def _as_whole(text: str) -> Any:
    """The text as one JSON array or object, or None when it is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (list, dict)) else None


def _numbered(values: Any) -> list[tuple[str, Any]]:
    if not isinstance(values, list):
        raise BadInput("examples must be a list.", f"Of objects: {SHAPES}.")
    return [(f"example {i}", value) for i, value in enumerate(values, 1)]


def _lines(text: str, faults: list[str]) -> list[tuple[str, Any]]:
    """The value of each line that is not blank; lines that are no JSON become faults."""
    found: list[tuple[str, Any]] = []
    for i, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append((f"line {i}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            faults.append(f"line {i}: not JSON: {reason}{column}")
    return found


def _bad_lines(name: str, faults: list[str]) -> BadInput:
    shown = sorted(faults, key=_place_number)[:SHOWN_FAULTS]
    more = len(faults) - len(shown)
    shown += [f"and {more} more"] if more else []
    count = "1 bad example" if len(faults) == 1 else f"{len(faults)} bad examples"
    return BadInput(f"{name} has {count}; nothing was sent.", f"An example is {SHAPES}.", shown)


def _place_number(fault: str) -> int:
    return int(fault.partition(":")[0].split()[-1])


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
