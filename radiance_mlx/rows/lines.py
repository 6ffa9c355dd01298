"""JSONL as bytes: one line, or a whole file that is in memory already, as examples."""

import json
from typing import Any

from ..errors import InvalidRequest
from ..messages import Example
from .forms import SHAPES, Understood, understand
from .limits import MAX_BODY_MB, MOST_EXAMPLES, Room, too_many
from .turns import loads

#: so many bad lines are told; a file of another format has nothing but bad ones
TOLD = 20


def understand_line(line: bytes, *, every_answer: bool | None = None) -> Understood:
    """One line, as it stands in the file. Raises `InvalidRequest` as `understand` does."""
    try:
        value = loads(line.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"not UTF-8: byte 0x{line[error.start]:02x} at {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(not_json(error)) from None
    return understand(value, every_answer=every_answer)


def examples_of_jsonl(
    content: bytes, *, every_answer: bool | None = None, max_body_mb: float = MAX_BODY_MB
) -> list[Example]:
    """The examples of a file, in its order; blank lines and a byte order mark do not matter.

    Raises `InvalidRequest`, with `line` and `problem` of the first bad lines in `details`; `PayloadTooLarge` as soon as
    there are too many examples, or too large ones (`limits`).
    """
    examples: list[Example] = []
    faults: list[dict[str, Any]] = []
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if sum(1 for line in lines if line.strip()) > MOST_EXAMPLES:
        raise too_many()
    room = Room(max_body_mb)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = understand_line(line, every_answer=every_answer).examples
        except InvalidRequest as error:
            faults.append({"line": number, "problem": error.message})
        else:
            room.take(found)
            examples += found
    form = f"One JSON object a line: {SHAPES}."
    if faults:
        named = "; ".join(f"line {fault['line']}: {fault['problem']}" for fault in faults[:5])
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise InvalidRequest(f"{named}{more}.", form, faults[:TOLD])
    if not examples:
        raise InvalidRequest("There is no line in it.", form)
    return examples


def not_json(error: Exception) -> str:
    """Why `json` could not read a text."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    return f"not JSON: {error}"
